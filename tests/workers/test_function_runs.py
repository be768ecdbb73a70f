"""A worker process with functions of a bundle that came in a lease; the test plays dispatcher and server."""

from __future__ import annotations

import base64
import operator
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.store.messages import RetractTasks
from pilotq.broker.tasks.model import Task
from pilotq.broker.tasks.spec import FLAG_BUNDLE, MemberPacker
from tests.support import functions
from tests.support.paths import ROOT
from tests.support.worker_host import Ending, Host, alive

CLASS = "default.p10.1c"
PROMPT: dict[str, Any] = {"prefetch_after": 1, "chain_s": 3600.0, "chain_max": 8, "kill_grace_s": 0.5}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path, **PROMPT) as running:
        running.shared("base", PYTHONPATH=str(ROOT))
        yield running


def hand(host: Host, tasks: Sequence[Task]) -> None:
    """These tasks as a bundle, in one lease."""
    packer = MemberPacker()
    host.to_session("values", "arr", [packer.pack(task, task) for task in tasks])
    host.lease("arr", len(tasks), class_name=CLASS, flags=FLAG_BUNDLE)


def ends(host: Host, count: int) -> list[Ending]:
    return [host.end_of(f"arr_{number}") for number in range(count)]


def value(end: Ending) -> Any:
    return pickle.loads(base64.b64decode(end.report.text))


def products(count: int) -> list[Task]:
    return [Task(function=functions.product, args=(n, 3)) for n in range(count)]


def test_each_call_returns_its_own(host: Host) -> None:
    tasks = products(60)
    tasks[30] = Task(function=operator.neg, args=(7,), name="other")
    hand(host, tasks)
    found = ends(host, 60)
    assert [value(end) for end in found] == [-7 if n == 30 else 3 * n for n in range(60)]
    for number, end in enumerate(found):
        assert (end.report.outcome, end.report.position, end.entry.index) == ("finished", number, None)
        assert end.entry.pid and end.entry.max_rss and 2.0 < end.entry.started <= end.entry.ended
        usual = ("", "tests.support.functions:product(...)")
        assert (end.entry.name, end.entry.command) == (usual if number != 30 else ("other", "_operator:neg(...)"))
    told = [end for _, batch in host.reported("ends") for end in batch]
    assert sum(end.number for end in told) == 60 and sum(end.number for end in told if end.kept) == 59


def test_what_is_more_than_a_plain_end_is_reported_by_itself(host: Host) -> None:
    tasks = products(40)
    tasks[5] = Task(function=functions.throw, args=(ValueError("no"),))
    tasks[9] = Task(function=functions.shout, args=("out", 1))
    tasks[12] = Task(function=functions.crash)
    tasks[20] = Task(function=functions.give_back, args=(bytes(100_000),))
    hand(host, tasks)
    found = ends(host, 40)
    assert {n: end.report.reason for n, end in enumerate(found) if end.report.outcome != "finished"} == {
        5: "exception", 12: found[12].report.reason,
    }  # fmt: skip
    assert found[12].report.reason in ("signal", "interpreter")
    assert "out" in str(found[9].entry.stdout)
    assert found[20].report.text.startswith("file:")
    others = [n for n in range(40) if n not in (5, 9, 12, 20)]
    assert [value(found[n]) for n in others] == [3 * n for n in others]


def waiting_at(host: Host, place: int, count: int) -> Path:
    """So many calls, of which the one at that place waits for a file."""
    go = host.directory / "go"
    tasks = products(count)
    tasks[place] = Task(function=functions.wait_for, args=(str(go),))
    hand(host, tasks)
    ends(host, place)
    host.until(lambda: host.reported("starts"), "the start of the one that waits")
    return go


def test_those_behind_one_that_takes_longer_are_stopped_or_returned(host: Host) -> None:
    go = waiting_at(host, 3, 40)
    host.stop("arr_6")
    host.send(RetractTasks(CLASS, 30))
    host.until(lambda: sum(len(tasks) for tasks, _ in host.reported("back")) == 30)
    go.touch()
    found = ends(host, 10)
    assert [end.report.outcome for end in found] == ["finished"] * 6 + ["canceled"] + ["finished"] * 3
    assert [value(found[n]) for n in (0, 5, 9)] == [0, 15, 27]
    returned = sorted(int(task.rpartition("_")[2]) for tasks, _ in host.reported("back") for task, _ in tasks)
    assert returned == list(range(10, 40))


def test_one_that_runs_is_stopped_and_the_others_go_on(host: Host) -> None:
    waiting_at(host, 2, 20)
    host.stop("arr_2")
    found = ends(host, 20)
    assert [n for n, end in enumerate(found) if end.report.outcome != "finished"] == [2]
    assert found[2].report.outcome == "canceled" and value(found[19]) == 57


def test_calls_outlive_their_launcher(host: Host) -> None:
    """The one that runs is lost. Those that its interpreter had behind it are not charged."""
    waiting_at(host, 2, 40)
    (launcher,) = host.launchers()
    os.kill(launcher, signal.SIGKILL)
    found = ends(host, 40)
    assert not alive(launcher)
    outcomes = [end.report.outcome for end in found]
    assert outcomes[2] == "lost" and set(outcomes[3:]) <= {"finished", "requeue"}
    assert outcomes.count("requeue") <= PROMPT["chain_max"] and outcomes[39] == "finished"


def test_a_time_limit_holds_for_a_call_of_a_run(host: Host) -> None:
    tasks = [Task(function=functions.product, args=(n, 3), time_limit=0.5) for n in range(12)]
    tasks[4] = Task(function=functions.wait_for, args=("/no/such/file",), time_limit=0.5)
    hand(host, tasks)
    found = ends(host, 12)
    assert [end.report.reason for end in found] == ["time limit" if n == 4 else "" for n in range(12)]
    assert all(end.entry.limit == 0.5 for end in found)
