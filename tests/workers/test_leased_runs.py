"""A worker process with elements of arrays that came in leases; the test plays dispatcher and server."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.store.messages import Leave, RetractTasks, StateRequest
from pilotq.broker.tasks.model import Task
from pilotq.broker.tasks.spec import FLAG_ARRAY, FLAG_BUNDLE, FLAG_VALUES, MemberPacker
from tests.support.worker_host import Host, alive

pytestmark = pytest.mark.usefixtures("each_launcher")

CLASS = "default.p10.1c"
PROMPT: dict[str, Any] = {"prefetch_after": 1, "chain_s": 3600.0, "chain_max": 8}  # runs are chained from the start
WAITS = "echo $0 >>begun; [ $0 != 2 ] || read word <go; echo $0 >>order"


@pytest.fixture(params=["array", "values", "bundle"])
def shape(request: pytest.FixtureRequest) -> str:
    """In what the elements differ."""
    return str(request.param)


def lease(host: Host, number: int, *argv: str, **more: Any) -> None:
    host.lease("arr", number, *argv, class_name=CLASS, **more)


def ends(host: Host, indices: range) -> list[Any]:
    return [host.end_of(f"arr_{index}") for index in indices]


def at_the_third(host: Host, shape: str) -> None:
    """A lease of 40 of which the third waits for the FIFO ``go``."""
    os.mkfifo(host.directory / "go")
    if shape == "bundle":
        tasks = [Task(command=["sh", "-c", WAITS, str(n)], name=f"t{n}") for n in range(40)]
        packer = MemberPacker()
        host.to_session("values", "arr", [packer.pack(task, tasks[0]) for task in tasks])
        lease(host, 40, flags=FLAG_BUNDLE)
    elif shape == "values":
        host.to_session("values", "arr", [str(n).encode() for n in range(40)])
        lease(host, 40, "sh", "-c", WAITS, "{value}", flags=FLAG_ARRAY | FLAG_VALUES)
    else:
        lease(host, 40, "sh", "-c", WAITS, "{index}")
    begun = host.directory / "begun"
    host.until(lambda: begun.exists() and begun.read_text().split() == ["0", "1", "2"])


def test_each_element_runs_once_in_its_order_and_has_a_line(tmp_path: Path) -> None:
    with Host(tmp_path, **PROMPT) as host:
        words = "echo $0 $PILOTQ_INDEX $PILOTQ_VALUE $PILOTQ_TASK_ID $PILOTQ_EXECUTION $PILOTQ_ARRAY_ID >>order"
        lease(host, 50, "sh", "-c", words, "at-{index}", index=7, step=3, first=100, slot=4, allocation="n1[1]")
        indices = range(7, 157, 3)
        found = ends(host, indices)
    lines = (tmp_path / "order").read_text().splitlines()
    assert lines == [f"at-{i} {i} {i} arr_{i} 1 arr" for i in indices]
    for index, end in zip(indices, found, strict=True):
        entry = end.entry
        assert (end.report.outcome, end.report.position) == ("finished", 100 + (index - 7) // 3)
        assert (entry.index, entry.array, entry.cpus, entry.exit_code) == (index, "arr", "n1[1]", 0)
        assert entry.pid and entry.max_rss and entry.queued == 1.0 and 2.0 < entry.started <= entry.ended
        assert f"at-{index}" in entry.command
    told = [end for _, batch in host.reported("ends") for end in batch]
    assert sum(end.number for end in told) == 50 and {end.slot for end in told} == {4}
    assert sum(end.number for end in told if end.kept) == 49


def test_tasks_of_a_bundle_are_told_by_their_commands_and_names(tmp_path: Path, shape: str) -> None:
    with Host(tmp_path, **PROMPT) as host:
        at_the_third(host, shape)
        (tmp_path / "go").write_text("now\n")
        found = ends(host, range(40))
    assert (tmp_path / "order").read_text().split() == [str(n) for n in range(40)]
    for n, end in enumerate(found):
        entry, in_bundle = end.entry, shape == "bundle"
        assert entry.command == f"sh -c {WAITS} {n}"
        assert (entry.name, entry.index) == ((f"t{n}", None) if in_bundle else ("", n))


def test_named_outputs_of_elements(tmp_path: Path) -> None:
    with Host(tmp_path, **PROMPT) as host:
        words = "echo out $PILOTQ_INDEX; echo err >&2; [ $PILOTQ_INDEX != 5 ]"
        lease(host, 12, "sh", "-c", words, stdout="out-{index}", stderr="err-{index}")
        found = ends(host, range(12))
    for n, end in enumerate(found):
        assert (tmp_path / f"out-{n}").read_text() == f"out {n}\n" and (tmp_path / f"err-{n}").read_text() == "err\n"
        assert end.entry.stdout_at == [os.fsencode(tmp_path / f"out-{n}")]
        assert end.entry.stderr_at == [os.fsencode(tmp_path / f"err-{n}")]
        assert end.report.outcome == ("failed" if n == 5 else "finished")


def test_what_is_more_than_a_plain_end_is_reported_by_itself(tmp_path: Path) -> None:
    with Host(tmp_path, **PROMPT) as host:
        words = "3) echo out;; 5) exit 3;; 8) kill -9 $$;; 9) sleep 0.3;; 11) setsid sleep 9 &"
        lease(host, 30, "sh", "-c", f"case $PILOTQ_INDEX in {words} esac")
        found = ends(host, range(30))
    reasons = {n: (end.report.outcome, end.report.reason) for n, end in enumerate(found)}
    failed = {5: ("failed", "exit"), 8: ("failed", "signal")}
    assert reasons == {n: failed.get(n, ("finished", "")) for n in range(30)}
    assert found[3].entry.stdout == "out\n" and found[9].entry.ended - found[9].entry.started >= 0.3


def test_one_element_is_stopped_and_the_others_go_on(tmp_path: Path, shape: str) -> None:
    with Host(tmp_path, **PROMPT) as host:
        at_the_third(host, shape)
        for index in (2, 5, 30):  # it runs, it is chained, it waits
            host.stop(f"arr_{index}")
        found = ends(host, range(40))
    canceled = [n for n, end in enumerate(found) if end.report.outcome == "canceled"]
    assert canceled == [2, 5, 30] and all(found[n].report.outcome == "finished" for n in range(40) if n not in canceled)
    assert (tmp_path / "order").read_text().split() == [str(n) for n in range(40) if n not in canceled]


def test_all_elements_of_an_array_are_stopped(tmp_path: Path, shape: str) -> None:
    with Host(tmp_path, **PROMPT) as host:
        at_the_third(host, shape)
        host.stop("arr")
        found = ends(host, range(40))
    assert [end.report.outcome for end in found] == ["finished"] * 2 + ["canceled"] * 38
    assert (tmp_path / "order").read_text().split() == ["0", "1"]


def test_the_newest_elements_are_returned_also_those_that_are_chained(tmp_path: Path, shape: str) -> None:
    with Host(tmp_path, **PROMPT) as host:
        at_the_third(host, shape)
        host.send(RetractTasks(CLASS, 35))
        host.until(lambda: sum(len(tasks) for tasks, _ in host.reported("back")) == 35)
        host.send(StateRequest(5))
        ((state,),) = host.until(lambda: host.reported("state"))
        assert (state.slots, state.prefetched) == ([(1, "n1[0]", CLASS)], {CLASS: 2})
        (tmp_path / "go").write_text("now\n")
        ends(host, range(5))
    returned = sorted(int(task.rpartition("_")[2]) for tasks, _ in host.reported("back") for task, _ in tasks)
    assert returned == list(range(5, 40))
    assert (tmp_path / "order").read_text().split() == [str(n) for n in range(5)]


def test_elements_that_had_not_begun_outlive_their_launcher(tmp_path: Path, shape: str) -> None:
    with Host(tmp_path, **PROMPT) as host:
        at_the_third(host, shape)
        (launcher,) = host.launchers()
        os.kill(launcher, signal.SIGKILL)
        lost = host.end_of("arr_2")
        found = ends(host, range(3, 40))
        assert not alive(launcher)
    assert (lost.report.outcome, lost.report.reason) == ("lost", "worker lost")
    assert all(end.report.outcome == "finished" for end in found)
    assert (tmp_path / "order").read_text().split() == [str(n) for n in range(40) if n != 2]


def test_a_worker_that_leaves_returns_what_has_not_begun(tmp_path: Path, shape: str) -> None:
    with Host(tmp_path, **PROMPT) as host:
        at_the_third(host, shape)
        host.send(Leave(5.0))
        assert host.end_of("arr_2").report.outcome == "requeue"
        assert host.wait() == 0
    returned = [task for tasks, _ in host.reported("back") for task, _ in tasks]
    assert sorted(int(task.rpartition("_")[2]) for task in returned) == list(range(3, 40))


def test_a_time_limit_holds_for_an_element_of_a_run(tmp_path: Path) -> None:
    with Host(tmp_path, kill_grace_s=0.2, **PROMPT) as host:
        lease(host, 10, "sh", "-c", "[ $PILOTQ_INDEX != 4 ] || exec sleep 100", time_limit=0.5)
        found = ends(host, range(10))
    assert [end.report.reason for end in found] == ["time limit" if n == 4 else "" for n in range(10)]
    assert all(end.entry.limit == 0.5 for end in found)


def test_a_launcher_that_does_not_go_on_within_a_run_is_replaced(tmp_path: Path) -> None:
    """It is stopped by the third element, whose launch counts as hung; those behind it are not charged."""
    with Host(tmp_path, launch_confirm_s=6.0, **PROMPT) as host:
        lease(host, 40, "sh", "-c", "[ $PILOTQ_INDEX != 2 ] || kill -STOP $PPID")
        found = ends(host, range(40))
    reasons = [(end.report.outcome, end.report.reason) for end in found]
    assert reasons[2] == ("failed", "launch hangs")
    others = [reason for n, reason in enumerate(reasons) if n != 2]
    assert set(others) == {("finished", ""), ("requeue", "worker lost")}
    assert others.count(("requeue", "worker lost")) <= PROMPT["chain_max"]


def test_a_program_that_is_not_there_fails_each_element(tmp_path: Path) -> None:
    with Host(tmp_path, **PROMPT) as host:
        lease(host, 12, "/no/such/program")
        found = ends(host, range(12))
    assert {end.report.reason for end in found} == {"not found"}
    assert {end.report.outcome for end in found} <= {"failed", "suspect"}


def test_what_is_chained_behind_an_element_that_cannot_start_runs_once(tmp_path: Path) -> None:
    """A program that is being written for too long fails its element; its launcher has retracted what was behind."""
    shell, indices = shutil.which("dash") or shutil.which("sh") or "", range(300)
    shutil.copy(shell, tmp_path / "written")
    for index in indices:
        (tmp_path / f"p-{index}").symlink_to(shell if index != 2 else tmp_path / "written")
    with Host(tmp_path, shortage_s=1.0, heartbeat_s=0.05, prefetch_after=1) as host, open(tmp_path / "written", "ab"):
        host.run("other", "sleep", "0.1", slot=9, allocation="n1[1]", class_name=CLASS)
        lease(host, 300, str(tmp_path / "p-{index}"), "-c", "echo $PILOTQ_INDEX >>order; sleep 0.01")
        found = ends(host, indices)
        host.until(lambda: host.reported("heartbeat")[-1][0]["state"] == "idle")
    assert [n for n, end in enumerate(found) if end.report.outcome != "finished"] == [2]
    assert found[2].report.reason == "launch"
    assert sorted(map(int, (tmp_path / "order").read_text().split())) == [n for n in indices if n != 2]
    told = [end for _, batch in host.reported("ends") for end in batch]
    assert sum(end.number for end in told) == 301
