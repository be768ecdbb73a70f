"""What real tasks of real pilots see of GPUs: their own, and none where they asked for none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pilotq.broker import Executor
from tests.support.command_line import Cli, command, environment, in_background
from tests.support.functions import gpus_seen
from tests.support.machines import A100, a100, intel_max, mi250x, mig, uuid
from tests.support.waiting import wait_until

NAMES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
SEEN = 'for name in "$@"; do eval "echo $name=\\"\\${$name-unset}\\""; done'
NONE = {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


def on(root: str) -> dict[str, str]:
    """Variables of a pilot whose machine is in this folder, granted nothing by variables."""
    return {"PILOTQ_MACHINE_ROOT": root}


def seen(cli: Cli, *options: str, **env: str) -> dict[str, str]:
    """The variables of GPUs that a task finds, without those that are not set."""
    task = cli("enqueue", *options, "--", "sh", "-c", SEEN, "sh", *NAMES, **env).stdout.strip()
    assert cli("wait", task, "--timeout", "60s").returncode == 0
    lines = dict(line.split("=", 1) for line in cli("logs", task).stdout.splitlines())
    return {name: value for name, value in lines.items() if value != "unset"}


@pytest.mark.parametrize(
    ("machine", "two", "none"),
    [
        (a100, NONE | {"CUDA_VISIBLE_DEVICES": f"{uuid(0)},{uuid(1)}"}, NONE),
        (mig, NONE | {"CUDA_VISIBLE_DEVICES": f"MIG-{uuid(0)}/1/0,MIG-{uuid(0)}/2/0"}, NONE),
        (mi250x, {"ROCR_VISIBLE_DEVICES": "GPU-00000000000003e8,GPU-00000000000003e9"}, NONE),
        (intel_max, NONE | {"ZE_AFFINITY_MASK": "0,1"}, NONE | {"ZE_AFFINITY_MASK": "9999"}),
    ],
)
def test_tasks_see_their_own_gpus_of_each_vendor(
    tmp_path: Path, machine: Callable[[Path], str], two: dict[str, str], none: dict[str, str]
) -> None:
    with in_background(tmp_path, "--nodes", "2", **on(machine(tmp_path / "root"))) as cli:
        stale = {"CUDA_VISIBLE_DEVICES": "5", "ROCR_VISIBLE_DEVICES": "5", "HIP_VISIBLE_DEVICES": "5"}
        assert seen(cli, "--gpus", "2", **stale) == two
        assert seen(cli, **stale) == none
        assert seen(cli, "--env", "CUDA_VISIBLE_DEVICES=6")["CUDA_VISIBLE_DEVICES"] == "6", "what a task says itself"


def test_numbers_that_were_granted_are_those_of_tasks(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "a:1,b:1", CUDA_VISIBLE_DEVICES="3,5") as cli:
        assert seen(cli, "--gpus", "2") == NONE | {"CUDA_VISIBLE_DEVICES": "3,5"}
        assert "a has 2 GPUs: 3,5" in cli("nodes").stdout


def test_nodes_and_start_tell_what_was_found(tmp_path: Path) -> None:
    root = a100(tmp_path / "root", closed=(6, 7))
    with in_background(tmp_path, "--nodes", "n1:1", **on(root)) as cli:
        assert f"n1 has 6 GPUs: 0-5 {A100}\n" in cli("nodes").stdout
        (node,) = json.loads(cli("nodes", "--json").stdout)
        assert node["gpus"][2] == {"name": "2", "uuid": uuid(2), "model": A100, "memory": 0}
        other = cli("start", "--nodes", "n2:1", "--dir", "other", SLURM_JOB_GPUS="0,1,2", **on(root))
        assert "GPUs of n2: Slurm has granted 3 GPUs, and 6 can be used: only those of the job are used" in other.stderr
        assert "n2 has 3 GPUs: 0-2" in cli("nodes", "--dir", "other").stdout
        cli("stop", "--now", "--dir", "other")


def test_a_number_of_the_user_counts(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1", "--gpus", "2") as cli:
        by_bus = {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        assert seen(cli, "--gpus", "2") == NONE | by_bus
        refused = cli("enqueue", "--gpus", "3", "--", "true")
        assert refused.returncode == 2 and "3 GPUs" in refused.stderr


def test_shares_are_packed_and_kinds_are_found(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "6", **on(a100(tmp_path / "root", count=2))) as cli:
        holders = [cli("enqueue", "--gpus", "0.25", "--", "sleep", "60").stdout.strip() for _ in range(5)]
        wait_until(lambda: all(task["status"] == "started" for task in shown(cli, *holders)), what="all to run")
        assert [task["cores"] for task in shown(cli, *holders)] == [
            *(f"n0[{core};0@0.25]" for core in range(4)), "n0[4;1@0.25]"
        ]  # fmt: skip
        assert seen(cli, "--gpus", "A100:0.75") == NONE | {"CUDA_VISIBLE_DEVICES": uuid(1)}
        for wanted, why in (("h100:1", "no node has any"), ("0.12345", "steps of 0.0001"), (":2", "no number of GPUs")):
            refused = cli("enqueue", "--gpus", wanted, "--", "true")
            assert refused.returncode == 2 and why in refused.stderr
        cli("cancel", *holders)


def shown(cli: Cli, *tasks: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(cli("show", *tasks, "--json").stdout)
    return found


def test_no_interpreter_is_used_again_with_other_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with Executor(nodes="2") as executor:
        one = executor.options(gpus=1)
        futures = [one.submit(gpus_seen) for _ in range(20)] + [executor.submit(gpus_seen) for _ in range(20)]
        found = [future.result(timeout=60) for future in futures]
    assert len({gpus for _, gpus in found}) > 1 and {gpus for _, gpus in found} <= {"4", "5", ""}
    assert {gpus for _, gpus in found[:20]} <= {"4", "5"} and {gpus for _, gpus in found[20:]} == {""}
    assert len({pid for pid, _ in found}) == len(set(found)), "each process has seen one value"


def test_each_node_of_a_task_has_its_own_gpus(tmp_path: Path) -> None:
    """The nodes of this pilot differ; the second one is started by hand."""
    with in_background(tmp_path, "--nodes", "n1:1", **on(a100(tmp_path / "one", closed=(0, 2)))) as cli:
        join = command("worker", "--dir", ".pilotq/current", "--node", "n2", "--virtual", "1")
        second = subprocess.Popen(
            join, cwd=tmp_path, env=environment(**on(mi250x(tmp_path / "two"))), stderr=subprocess.DEVNULL
        )
        try:
            wait_until(
                lambda: "n2 has 8 GPUs: 0-7 AMD Instinct MI250X, 64 GiB" in cli("nodes").stdout, what="n2 to join"
            )
            show = "echo $PILOTQ_NODE $CUDA_VISIBLE_DEVICES $ROCR_VISIBLE_DEVICES"
            script = f"for node in n1 n2; do $HYDRA_LAUNCHER_EXEC $node '{show}'; done"
            (tmp_path / "script").write_text(script)
            task = cli("enqueue", "--nodes", "2", "--cores", "1", "--gpus", "1", "--script", "script").stdout.strip()
            assert cli("wait", task, "--timeout", "60s").returncode == 0
            assert cli("logs", task).stdout == f"n1 {uuid(1)}\nn2 GPU-00000000000003e8\n"
        finally:
            second.terminate()
            second.wait(timeout=60)
