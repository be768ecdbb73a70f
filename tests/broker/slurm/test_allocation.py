"""What is read from Slurm, and what is made of it."""

from __future__ import annotations

import pytest

from pilotq.broker.errors import InvalidInput, PilotFailed
from pilotq.broker.slurm.allocation import (
    address_for,
    choose_nodes,
    end_from_env,
    end_from_job,
    expand_counts,
    expand_nodes,
    read_allocation,
)

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_CPUS_PER_NODE": "4(x2),2",
    "SLURM_NODELIST": "n3", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "1",
}  # fmt: skip


def test_the_variables_of_the_job_count_and_not_those_of_a_step() -> None:
    allocation = read_allocation(STEP)
    assert allocation.job == "7"
    assert [(node.name, node.cpus) for node in allocation.nodes] == [("n1", 4), ("n2", 4), ("n3", 2)]
    assert allocation.granted("n3") == 2
    assert allocation.granted("elsewhere") == 0


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", "n1"), ("n[1-3]", "n1 n2 n3"), ("n[08-10,12]", "n08 n09 n10 n12"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("login,n[2-1000001]", None), ("n[1-", None),
    ],
)  # fmt: skip
def test_lists_of_nodes(text: str, names: str | None) -> None:
    if names is None:
        with pytest.raises(InvalidInput, match="is no list of nodes"):
            expand_nodes(text)
    else:
        assert expand_nodes(text) == names.split()


@pytest.mark.parametrize(
    ("text", "counts"),
    [("4(x2),2", [4, 4, 2]), ("1", [1]), ("3,1(x3)", [3, 1, 1, 1]), ("", []), ("4(x", []), ("a", [])],
)
def test_counts_of_cpus(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


def test_without_counts_each_worker_finds_out() -> None:
    allocation = read_allocation({**STEP, "SLURM_JOB_CPUS_PER_NODE": "4(x2)"})
    assert [node.cpus for node in allocation.nodes] == [0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "names"), [("2", "n1 n2"), ("2-3", "n2 n3"), ("3-3", "n3"), ("n[2-3]", "n2 n3"), ("n3,n1", "n1 n3")]
)
def test_nodes_are_chosen(spec: str, names: str) -> None:
    assert choose_nodes(read_allocation(STEP), spec).names == names.split()


@pytest.mark.parametrize(
    ("spec", "why"),
    [("4", "has 3 nodes"), ("0", "has 3 nodes"), ("3-2", "has 3 nodes"), ("n1:2", "chooses"), ("n9", "n9 not")],
)  # fmt: skip
def test_what_is_not_there_is_refused(spec: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        choose_nodes(read_allocation(STEP), spec)


def test_outside_an_allocation_it_says_so() -> None:
    with pytest.raises(InvalidInput, match="no Slurm allocation"):
        read_allocation({})


def test_the_end_of_a_job() -> None:
    assert end_from_job({"EndTime": "Unknown"}) is None
    assert end_from_job({}) is None
    first, second = end_from_job({"EndTime": "2026-11-22T20:35:21"}), end_from_job({"EndTime": "2026-11-22T20:36:21"})
    assert first is not None and second == first + 60
    assert end_from_env({"SLURM_JOB_END_TIME": "1795380292"}) == 1795380292.0
    assert end_from_env({"SLURM_JOB_END_TIME": "0"}) is None


def test_loopback_is_no_address_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    with pytest.raises(PilotFailed, match="--bind"):
        address_for(["localhost", "127.0.0.1", "no.such.host.invalid"], {})
