"""What is read from Slurm, and what is made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput, PilotFailed
from pilotq.broker.slurm.allocation import (
    address_for,
    choose_nodes,
    end_from_env,
    end_from_job,
    expand_counts,
    expand_nodes,
    job_record,
    read_allocation,
    show_job,
    unused_components,
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


# As Slurm prints them: all elements of an array, all components of a heterogeneous job. The user names
# job and command.
RECORD = """\
JobId={job} {more}JobName={name}
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   StartTime=2026-11-22T20:00:00 EndTime={end} Deadline=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList={nodes}
   Command=/data/u/run EndTime=2030-01-01T00:00:00
"""


@pytest.mark.parametrize("more", ["ArrayJobId=7 ArrayTaskId=2 ", "HetJobId=7 HetJobOffset=1 "])
def test_the_record_of_our_own_job_counts(more: str) -> None:
    ends = {job: f"2026-11-22T20:0{job}:00" for job in ("7", "8", "9")}
    text = "\n".join(RECORD.format(job=j, more=more, name="a EndTime=x", end=ends[j], nodes=f"n{j}") for j in ends)
    for job, end in ends.items():
        record = job_record(text, job)
        assert (record["EndTime"], record["NodeList"]) == (end, f"n{job}")
    assert job_record(text, "77") == {}


def test_scontrol_is_asked_for_times_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\necho "JobId=$3\n   StartTime=x EndTime=${SLURM_TIME_FORMAT:-unset}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert show_job("7")["EndTime"] == "standard"


def test_components_that_are_not_used_are_named() -> None:
    assert unused_components(STEP) == ""
    said = unused_components({**STEP, "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[1-2]"})
    assert "heterogeneous job of 2 components: only the nodes of the first one are used, and not gpu[1-2]" in said


def test_loopback_is_no_address_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    with pytest.raises(PilotFailed, match="--bind"):
        address_for(["localhost", "127.0.0.1", "no.such.host.invalid"], {})
