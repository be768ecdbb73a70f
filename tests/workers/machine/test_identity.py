"""The name, cores and memory of a node: by what its worker may really use, and by what was granted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.resources import NodeInfo
from pilotq.cli.pilot_options import signal_number
from pilotq.workers.machine.identity import NodeIdentity
from pilotq.workers.machine.topology import siblings, usable_cpus, without_siblings

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "64,1", "SLURMD_NODENAME": "n1",
    "HOSTNAME": "elsewhere",
}  # fmt: skip


def info(cores: int = 2, memory: int = 0) -> NodeInfo:
    return NodeInfo("n1", 0, "n1", 1, list(range(cores)), memory=memory)


def test_the_name_is_that_of_the_step_and_tells_allocations_apart() -> None:
    assert NodeIdentity(STEP, "7").name == "n1"
    assert NodeIdentity(STEP, "8").name == "n1-7"
    assert NodeIdentity(STEP, "").name == "n1-7"
    assert NodeIdentity({}, "").name == os.uname().nodename.partition(".")[0]


def test_no_more_cores_than_were_granted_and_none_that_are_not_ours() -> None:
    assert NodeIdentity(STEP, "7").cores() == usable_cpus()
    assert NodeIdentity({**STEP, "SLURMD_NODENAME": "n2"}, "7").cores() == usable_cpus()[:1]
    assert NodeIdentity({**STEP, "SLURMD_NODENAME": "n3"}, "7").cores() == usable_cpus()  # not in the list of nodes
    identity = NodeIdentity({}, "")
    assert identity.cores(grant=1) == identity.cpus == usable_cpus()[:1]


@pytest.mark.parametrize(
    ("variables", "own", "memory"),
    [
        ({"SLURM_MEM_PER_NODE": "1000"}, 0, 1000 << 20),
        ({"SLURM_MEM_PER_NODE": "1000"}, 500 << 20, 500 << 20),
        ({"SLURM_MEM_PER_CPU": "100"}, 0, 6400 << 20),
        ({"SLURM_MEM_PER_NODE": "0"}, 123, 123),
        ({}, 123, 123),
    ],
)
def test_memory_is_what_was_granted(variables: dict[str, str], own: int, memory: int) -> None:
    completed = NodeIdentity({**STEP, **variables}, "7").complete(info(memory=own))
    assert (completed.job, completed.memory) == ("7", memory)


def test_one_hardware_thread_of_each_core(tmp_path: Path) -> None:
    for cpu, threads in enumerate(("0,2", "1,3", "0,2", "1,3", "4")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(threads + "\n")
    root = str(tmp_path)
    assert without_siblings([0, 1, 2, 3, 4], root) == [0, 1, 4]
    assert without_siblings([2, 3], root) == [2, 3]
    assert without_siblings([5, 6], root) == [5, 6]  # the kernel does not say
    assert siblings(0, [0, 1, 2], root) == [2] and siblings(1, [0, 1, 2], root) == [], "3 was not granted"


@pytest.mark.parametrize(("text", "number"), [("USR1", 10), ("sigterm", 15), ("12", 12), ("NONE", 0), ("99", 0)])
def test_signals_have_names(text: str, number: int) -> None:
    if number:
        assert signal_number(text) == number
        return
    with pytest.raises(InvalidInput, match="there is no signal"):
        signal_number(text)
