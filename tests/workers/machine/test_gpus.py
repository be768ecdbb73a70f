"""The GPUs that a node has, found in trees of /proc, /sys and /dev after real machines."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pilotq.broker.store.resources import NodeInfo
from pilotq.workers.gpu_variables import gpu_variables
from pilotq.workers.machine.gpus import add_gpus, find_gpus
from tests.support.machines import A100, a100, intel_max, mi250x, mig, uuid


def names(*args: object, **options: object) -> list[str]:
    return [device.name for device in find_gpus(*args, **options).devices]  # type: ignore[arg-type]


def test_eight_a100_with_what_procfs_and_sysfs_tell(tmp_path: Path) -> None:
    found = find_gpus({}, a100(tmp_path))
    assert (found.vendor, found.note) == ("nvidia", "")
    assert [(d.name, d.uuid, d.model) for d in found.devices] == [(str(n), uuid(n), A100) for n in range(8)]
    assert [d.near for d in found.devices] == ["0-63"] * 4 + ["64-127"] * 4


def test_a_granted_number_is_one_of_those_that_can_be_opened(tmp_path: Path) -> None:
    root = a100(tmp_path, closed=(0, 1, 4, 5, 6, 7))
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_GPUS": "2,3"}, root)
    assert [(d.name, d.uuid) for d in found.devices] == [("0", uuid(2)), ("1", uuid(3))] and found.note == ""
    assert [d.uuid for d in find_gpus({}, root).devices] == [uuid(2), uuid(3)]


@pytest.mark.parametrize(
    ("env", "vendor", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2, 3,-1,4"}, "nvidia", ["2", "3"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f-2a,MIG-1/2/0", "ROCR_VISIBLE_DEVICES": "1"}, "nvidia",
         ["GPU-8f-2a", "MIG-1/2/0"]),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "nvidia", []),
        ({"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "1,0,1"}, "amd", ["1", "0"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-60d8a2,3"}, "amd", ["GPU-60d8a2", "3"]),
        ({"ZE_AFFINITY_MASK": "0.0,0.1,1"}, "intel", ["0.0", "0.1", "1"]),
    ],
)  # fmt: skip
def test_what_is_granted_by_a_variable(env: dict[str, str], vendor: str, expected: list[str]) -> None:
    found = find_gpus(env, "/nowhere")
    assert ([device.name for device in found.devices], found.vendor) == (expected, vendor)


def test_a_uuid_that_is_granted_is_known(tmp_path: Path) -> None:
    (device,) = find_gpus({"CUDA_VISIBLE_DEVICES": uuid(5)[:13]}, a100(tmp_path)).devices
    assert (device.name, device.model, device.near) == (uuid(5)[:13], A100, "64-127")


def test_a_number_by_speed_is_passed_on_as_it_is(tmp_path: Path) -> None:
    """Where models differ only CUDA knows which GPU is the fastest."""
    root = a100(tmp_path, count=2)
    path = tmp_path / "proc/driver/nvidia/gpus/0000:07:00.0/information"
    path.write_text(path.read_text().replace(A100, "Tesla T4"))
    for order, identifier in ((None, ""), ("PCI_BUS_ID", uuid(1))):
        env = {"CUDA_VISIBLE_DEVICES": "1"} | ({"CUDA_DEVICE_ORDER": order} if order else {})
        info = NodeInfo("n", 1, "h", 1, [0])
        add_gpus(info, find_gpus(env, root), {})
        assert [device.uuid for device in find_gpus(env, root).devices] == [identifier]
        expected = {"CUDA_VISIBLE_DEVICES": identifier or "1", "ROCR_VISIBLE_DEVICES": ""}
        assert gpu_variables(info, ["1"], env) == expected


def test_instances_of_mig_stand_for_their_gpu(tmp_path: Path) -> None:
    found = find_gpus({}, mig(tmp_path)).devices
    assert [(d.name, d.uuid) for d in found] == [
        ("0/1/0", f"MIG-{uuid(0)}/1/0"), ("0/2/0", f"MIG-{uuid(0)}/2/0"), ("1", uuid(1))
    ]  # fmt: skip
    assert found[0].model == f"{A100} MIG"


def test_each_die_of_mi250x_is_a_gpu(tmp_path: Path) -> None:
    found = find_gpus({}, mi250x(tmp_path))
    assert found.vendor == "amd" and len(found.devices) == 8
    assert found.devices[3] == ("3", "GPU-00000000000003eb", "AMD Instinct MI250X", 64 << 30, "0000:c6:00.0", "16-31")
    (tmp_path / "dev/kfd").unlink()
    assert find_gpus({"SLURM_JOB_ID": "7"}, str(tmp_path)) == ("nvidia", [], "")


def test_partitions_that_share_a_uuid_have_numbers(tmp_path: Path) -> None:
    assert [(d.name, d.uuid) for d in find_gpus({}, mi250x(tmp_path, partitions=True)).devices][:2] == [
        ("0", ""), ("1", "")
    ]  # fmt: skip


def test_intel_max_without_other_graphics(tmp_path: Path) -> None:
    found = find_gpus({}, intel_max(tmp_path))
    assert found.vendor == "intel"
    assert [(d.name, d.address, d.memory) for d in found.devices] == [
        ("0", "0000:18:00.0", 128 << 30), ("1", "0000:3a:00.0", 128 << 30)
    ]  # fmt: skip
    assert found.devices[0].model == "Intel Data Center GPU Max 1550"


def test_none_and_those_that_are_hidden(tmp_path: Path) -> None:
    assert find_gpus({}, str(tmp_path)) == ("nvidia", [], "")
    root = a100(tmp_path)
    assert names({"CUDA_VISIBLE_DEVICES": ""}, root) == [], (
        "as CUDA reads it: a pilot within a task has only the task's"
    )
    assert names({"ROCR_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": ""}, root) == [str(n) for n in range(8)]


def test_a_driver_whose_devices_cannot_be_opened(tmp_path: Path) -> None:
    root = a100(tmp_path, closed=tuple(range(8)))
    assert find_gpus({}, root) == ("nvidia", [], "this user may not open the 8 GPUs that are there")
    assert find_gpus({"SLURM_JOB_ID": "7"}, root).note == "", "a job that asked for none"


@pytest.mark.parametrize(
    ("env", "closed", "expected", "note"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, range(1, 8), "0 1 2",
         "CUDA_VISIBLE_DEVICES grants 3 GPUs, and 1 can be opened"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "4-6"}, (), "0",
         "Slurm has granted 3 GPUs, and 1 can be used"),
        ({"SLURM_STEP_GPUS": "2,5", "SLURM_JOB_GPUS": "0-3"}, (), "2 5",
         "Slurm has granted 2 GPUs, and 8 can be used: only those of the job are used"),
        ({"SLURM_JOB_GPUS": "2,5", "SLURM_JOB_ID": "7"}, range(8), "", "Slurm has granted 2 GPUs, and 0 can be used"),
    ],
)  # fmt: skip
def test_where_granted_and_found_differ_is_a_sentence(
    tmp_path: Path, env: dict[str, str], closed: tuple[int, ...], expected: str, note: str
) -> None:
    found = find_gpus(env, a100(tmp_path, closed=tuple(closed)))
    assert (" ".join(device.name for device in found.devices), found.note) == (expected, note)


def test_numbers_of_slurm_are_none_of_parts_of_gpus(tmp_path: Path) -> None:
    root = mig(tmp_path)
    (tmp_path / "dev/nvidia0").unlink()  # the one that has no parts
    found = find_gpus({"SLURM_JOB_GPUS": "1"}, root)
    assert [device.name for device in found.devices] == ["0/1/0", "0/2/0"]
    assert found.note == "Slurm has granted 1 GPU, and 2 can be used"


def test_a_number_of_each_node_is_compared(tmp_path: Path) -> None:
    found = find_gpus({"SLURM_GPUS_PER_NODE": "a100:4"}, a100(tmp_path))
    assert len(found.devices) == 8 and found.note == "Slurm has granted 4 GPUs, and 8 can be used"


def test_a_number_overrides_what_is_found(tmp_path: Path) -> None:
    root = a100(tmp_path)
    assert names({}, root, 3) == ["0", "1", "2"] and names({}, root, 0) == []
    assert names({"CUDA_VISIBLE_DEVICES": "2,1"}, root, 4) == ["2", "1", "0", "3"]
    assert find_gpus({"SLURM_JOB_GPUS": "1"}, root, 8).note == ""


def test_near_cores_have_the_numbers_of_the_node(tmp_path: Path) -> None:
    info = NodeInfo("n", 1, "h", 1, [0, 1, 2, 3])
    add_gpus(info, find_gpus({}, a100(tmp_path)), {62: 0, 63: 1, 64: 2, 65: 3})
    assert info.gpu_facts["0"].cores == [0, 1] and info.gpu_facts["7"].cores == [2, 3]
    add_gpus(info, find_gpus({}, a100(tmp_path)), {0: 0, 1: 1})
    assert info.gpu_facts["0"].cores == [], "all are near: nothing is to be chosen"


def test_it_takes_a_moment(tmp_path: Path) -> None:
    for make in (a100, mi250x, intel_max):
        root = make(tmp_path / make.__name__)  # type: ignore[operator]
        begin = time.process_time()
        find_gpus({}, root)
        assert time.process_time() - begin < 0.05
