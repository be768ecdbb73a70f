"""Three budgets: failures (retries, with pauses, of chosen kinds), unexplained losses (the crash limit), and what is
free. And a poisonous task, which kills its worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.errors import InvalidInput
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.tasks.retry_policy import is_retried, retry_delay
from pilotq.broker.tasks.validation import validate
from tests.support.fault_rig import Rig, Work, rig
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("budgets"), "n1:2") as live:
        yield live


def executions(pilot: LivePilot, task_id: str) -> list[tuple[int, str, bool]]:
    pilot.ended(task_id)
    return [(line.execution, line.reason, line.final) for line in reversed(pilot.lines(task_id))]


@pytest.mark.parametrize(
    ("retry_on", "reason", "code", "again"),
    [
        ("", "exit", 1, True), ("", "not found", None, True), ("75", "exit", 75, True), ("75", "exit", 76, False),
        ("7,100-110", "exit", 110, True), ("7,100-110", "exit", 111, False), ("75", "signal", None, False),
        ("signal", "signal", None, True), ("signal, limit", "time limit", 15, True), ("1-255", "launch", None, False),
    ],
)  # fmt: skip
def test_which_failures_are_tried_again(retry_on: str, reason: str, code: int | None, again: bool) -> None:
    assert is_retried(retry_on, reason, code) is again


def test_pauses_double_up_to_an_hour() -> None:
    assert [retry_delay(30.0, n) for n in (1, 2, 3, 8, 900)] == [30.0, 60.0, 120.0, 3600.0, 3600.0]
    assert [retry_delay(7200.0, n) for n in (1, 2)] == [7200.0, 7200.0]
    assert retry_delay(0.0, 5) == 0.0


@pytest.mark.parametrize("wrong", ["0", "256", "5-3", "x", "1,,2", "-1", "9-", "Signal"])
def test_what_is_no_list_of_failures_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidInput, match="task 1: retry_on: "):
        validate(Task(command=["x"], retries=1, retry_on=wrong), "task 1")


def test_pauses_and_kinds_without_retries_are_refused(pilot: LivePilot) -> None:
    for options in (["--backoff", "1s"], ["--retry-on", "75"]):
        done = pilot.cli("enqueue", *options, "--", "true")
        assert done.returncode == 2
        assert b"give retries, too" in done.stderr


def test_only_chosen_failures_are_tried_again(pilot: LivePilot) -> None:
    chosen_one = pilot.cli("enqueue", "--retries", "2", "--retry-on", "75,100-110,signal", "--", "sh", "-c", "exit 105")
    other = pilot.enqueue("sh", "-c", "exit 3", retries=2, retry_on="75,signal")
    killed = pilot.enqueue("sh", "-c", "kill -9 $$", retries=1, retry_on="75,signal")
    assert len(executions(pilot, chosen_one.stdout.decode().strip())) == 3
    assert executions(pilot, other) == [(1, "exit", True)]
    assert executions(pilot, killed) == [(1, "signal", False), (2, "signal", True)]


def test_a_retry_waits_for_its_pause(pilot: LivePilot) -> None:
    """Meanwhile it is scheduled and holds no core; the pauses are seen from inside."""
    task = pilot.enqueue("sh", "-c", "exit 9", retries=2, backoff=1.0)
    wait_until(lambda: pilot.broker.task(task).status == "scheduled", what="scheduled")
    assert pilot.ended(pilot.enqueue("true", request=Task(command=["x"]).request)).status == "finished"
    assert len(executions(pilot, task)) == 3
    first, second, third = reversed(pilot.lines(task))
    assert None not in (first.ended, second.started, second.ended, third.started)
    assert second.started - first.ended >= 0.9  # type: ignore[operator]
    assert third.started - second.ended >= 1.9  # type: ignore[operator]


def test_elements_wait_for_their_pauses_too(pilot: LivePilot) -> None:
    array = pilot.broker.enqueue(
        Task(command=["sh", "-c", "test $PILOTQ_EXECUTION = 2"], array=ArrayRange(0, 3), retries=1, backoff=0.5)
    )
    assert pilot.ended(array).elements == {"finished": "0-3"}


def test_what_waits_for_its_pause_can_be_canceled(pilot: LivePilot) -> None:
    one = pilot.enqueue("false", retries=5, backoff=1000.0)
    array = pilot.broker.enqueue(Task(command=["false"], array=ArrayRange(0, 3), retries=5, backoff=1000.0))
    wait_until(lambda: pilot.broker.task(one).status == "scheduled")
    wait_until(lambda: all(pilot.broker.task(f"{array}_{n}").status == "scheduled" for n in range(4)))
    pilot.broker.cancel([one, array])
    assert pilot.ended(one).status == pilot.ended(array).status == "canceled"
    with closing(Connection(pilot.broker.store.link.address)) as link:
        assert link.call("ZCARD", keys.registry("scheduled", "default")) == 0


def test_a_poisonous_task_ends_by_the_crash_limit_and_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    """It kills its worker, each time; a long neighbour is with it each time, and short ones come and go."""
    poison = "sleep 0.3; launcher=$PPID; worker=$(cut -d' ' -f4 /proc/$launcher/stat); kill -9 $worker"
    with rig(tmp_path, nodes="n1:2") as r:
        work = r.submit([Task(script=poison), r.probe(1.5), *(r.probe() for _ in range(100))])
        settled(r, work.key)
        lines = wait_until(lambda: full(r, work))
        assert [x.reason for x in lines[work.ids[0]]] == ["worker lost", "worker lost", "crash limit"]
        others = [lines[i][-1] for i in work.ids[1:]]
        assert {(x.status, x.final) for x in others} == {("finished", True)}
        assert not r.of_tasks()


def test_a_quick_poison_costs_the_short_tasks_before_it_nothing(tmp_path: Path) -> None:
    """It is chained after them, so that it kills the worker before that has reported their ends, and its own start.
    Only a poisonous task may reach the crash limit."""
    poison, short = Task(script="kill -9 $(cut -d' ' -f4 /proc/$PPID/stat); sleep 5"), Task(command=["true"])
    with rig(tmp_path, nodes="n1:1", report_batch_s=0.3) as r:
        settled(r, r.submit([short] * 10).key)  # they are known to be short
        work = r.submit([short, short, poison, short, poison, short])
        settled(r, work.key)
        lines = wait_until(lambda: full(r, work))
        ends = [(lines[i][-1].status, lines[i][-1].reason) for i in work.ids]
        fine, bad = ("finished", ""), ("failed", "crash limit")
        assert ends == [fine, fine, bad, fine, bad, fine]


def settled(r: Rig, key: str) -> None:
    def over() -> bool:
        with r.broker() as broker:
            return broker.counts(key).left == 0

    wait_until(over, seconds=90, what="all have ended")


def full(r: Rig, work: Work) -> dict[str, list[JournalEntry]]:
    lines = r.lines(work)
    return lines if all(any(x.final for x in lines.get(i, ())) for i in work.ids) else {}


# -- more for the next try -------------------------------------------------------------------------------------------

# Needs so many MB, for a moment.
NEED = "import sys, time; kept = bytearray(int(sys.argv[1]) << 20); kept[::4096] = kept[1::4096]; time.sleep(1)"
MB = 1 << 20


def needing(pilot: LivePilot, size: int, memory: int, **fields: Any) -> str:
    command = [sys.executable, "-I", "-S", "-c", NEED, str(size)]
    return pilot.enqueue(*command, request=Request(memory=memory * MB), **fields)


def test_what_used_too_much_memory_is_tried_again_with_more(pilot: LivePilot) -> None:
    """Twice as much each time, up to the most; `retries` are for other failures."""
    task = needing(pilot, 200, 60, memory_grow=2, memory_max=300 * MB)
    assert executions(pilot, task) == [(1, "memory", False), (2, "memory", False), (3, "", True)]
    assert "of 120 MiB on n1" in pilot.lines(task)[1].message
    hopeless = needing(pilot, 200, 60, memory_grow=4, memory_max=100 * MB, retries=1, retry_on="75")
    assert executions(pilot, hopeless) == [(1, "memory", False), (2, "memory", True)]
    assert "of 100 MiB on n1" in pilot.lines(hopeless)[0].message


def test_memory_can_be_a_failure_to_retry(pilot: LivePilot) -> None:
    task = needing(pilot, 200, 60, retries=1, retry_on="memory")
    assert executions(pilot, task) == [(1, "memory", False), (2, "memory", True)]


def test_what_reached_its_time_limit_is_tried_again_with_more_time(pilot: LivePilot) -> None:
    """Each element for itself; the command is told which attempt it is."""
    script = "echo {attempt} $PILOTQ_EXECUTION; test {index} = 0 || sleep 1.2"
    array = pilot.broker.enqueue(
        Task(script=script, array=ArrayRange(0, 1), time_limit=0.4, time_grow=2, time_max=10.0)
    )
    assert executions(pilot, f"{array}_1") == [(1, "time limit", False), (2, "time limit", False), (3, "", True)]
    assert executions(pilot, f"{array}_0") == [(1, "", True)]
    assert (pilot.output(f"{array}_0"), pilot.output(f"{array}_1")) == (b"1 1\n", b"3 3\n")


def test_the_attempt_is_filled_in_for_any_task(pilot: LivePilot) -> None:
    task = pilot.enqueue(
        "sh", "-c", "echo {attempt} $X '{id}' >&2; test {attempt} = 2", env={"X": "{attempt}"}, retries=1
    )
    assert executions(pilot, task) == [(1, "exit", False), (2, "", True)]
    assert pilot.output(task, "stderr") == b"2 2 {id}\n"


def test_what_is_no_way_to_grow_is_refused(pilot: LivePilot) -> None:
    for options, why in (
        (["--memory-grow", "2"], b"memory_grow and memory_max go together"),
        (["--memory-grow", "2", "--memory-max", "1G"], b"give memory, too"),
        (["--memory", "1G", "--memory-grow", "1", "--memory-max", "2G"], b"memory_grow must be a number from 1.1"),
        (["--memory", "1G", "--memory-grow", "2", "--memory-max", "1G"], b"memory_max above memory"),
        (["--time-grow", "2", "--time-max", "1h"], b"give time_limit, too"),
        (["--array", "0-9%2", "--memory", "1M", "--memory-grow", "2", "--memory-max", "2M"], b"only some"),
        (["--memory", "1G", "--memory-grow", "2", "--memory-max", "900T"], b"memory_max 900 TiB can never be had here"),
    ):  # fmt: skip
        done = pilot.cli("enqueue", *options, "--", "true")
        assert done.returncode == 2
        assert why in done.stderr, done.stderr
