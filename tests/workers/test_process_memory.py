"""Which process counts for which task, and for how much."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pilotq.workers.memory_watch import EXCESS_BYTES, MemoryWatch, WatchedTask, _Loop
from pilotq.workers.process_memory import STRAY_S, ProcessGroup, ProcessTable
from tests.support.waiting import wait_until

MB = 1 << 20
HOLD = (
    "import sys; x = bytearray(int(sys.argv[1]) << 20); x[::4096] = x[1::4096]; print(1, flush=True); sys.stdin.read()"
)


@pytest.fixture
def table() -> Iterator[ProcessTable]:
    found = ProcessTable()
    yield found
    found.close()


class Held:
    """A process that uses so many MB until it is ended."""

    def __init__(self, size: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOLD, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.pid = self.process.pid

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def test_an_interpreter_goes_from_task_to_task(table: ProcessTable) -> None:
    """The number of its process belongs to the last one; what has ended counts no more."""
    held = Held(50)
    first, second = ProcessGroup({}), ProcessGroup({})
    table.add(first, held.pid)
    assert 50 * MB < table.measure(first) < 90 * MB
    table.add(second, held.pid)
    table.remove(first)
    assert 50 * MB < table.measure(second) < 90 * MB
    assert table.measure(first) == 0
    held.end()
    assert table.measure(second) == 0
    assert second.members == {}


def test_what_was_started_before_it_was_looked_at_counts(table: ProcessTable) -> None:
    # Of what runs in its background a shell makes the stdin /dev/null.
    script = f"exec 3<&0; setsid {sys.executable} -I -S -c '{HOLD}' 40 <&3 & wait"
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        group = ProcessGroup({})
        table.find_new(0.0)
        table.add(group, process.pid)
        wait_until(lambda: table.find_new(0.0) is not None and table.measure(group) > 40 * MB, what="the child counts")
        os.killpg(process.pid, 9)
        for pid in list(group.members):
            if pid != process.pid:
                os.kill(pid, 9)


@pytest.mark.parametrize("late", [False, True])
def test_what_a_daemon_has_started_before_it_is_assigned_counts(table: ProcessTable, late: bool) -> None:
    """The daemon is a child of the launcher with a session of its own, as main processes are: here of this process.

    It counts at once, or after a while when it was seen before its task was (``late``).
    """
    other, main = Held(1), Held(1)
    group = ProcessGroup({b"PILOTQ_TASK_ID": b"9"})
    if late:
        table.add(ProcessGroup({b"PILOTQ_TASK_ID": b"8"}), other.pid)
    else:
        table.add(group, main.pid)
    with subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -I -S -c '{HOLD}' 40; true"], env={**os.environ, "PILOTQ_TASK_ID": "9"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as daemon:  # fmt: skip
        assert daemon.stdin is not None and daemon.stdout is not None
        daemon.stdout.readline()
        found = table.find_new(0.0)
        if late:
            assert found == []
            table.add(group, main.pid)
            found = table.find_new(STRAY_S)
        assert len(found) == 2
        assert len(group.members) == 3 and table.measure(group) > 40 * MB
        daemon.stdin.close()
    main.end()
    other.end()


def test_the_period_follows_from_room_and_growth() -> None:
    """In any case a task is measured before it can be far above its limit; near it, and growing, much sooner."""
    loop = _Loop(1.0)
    task = WatchedTask("x", 100 * MB, {})
    assert loop._period(task, 0.0) == pytest.approx((130 * MB + EXCESS_BYTES) / 1e9 - 0.07)
    task.size = 90 * MB
    assert loop._period(task, 100 * MB) == pytest.approx(0.05)
    assert loop._period(WatchedTask("y", 8000 * MB, {}), 0.0) == loop._period(WatchedTask("z", 0, {}), 0.0) == 1.0
    loop.close()


def test_children_of_a_task_with_a_limit_are_found_at_once() -> None:
    """However much time looking for processes has taken just now; for one without a limit that time is limited."""
    loop = _Loop(1.0)
    script = f"exec 3<&0; read -r go; {sys.executable} -I -S -c '{HOLD}' 80 <&3; true"
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        free, limited = WatchedTask("free", 0, {}), WatchedTask("limited", 60 * MB, {})
        free.starts.append(process.pid)
        loop.add(free)
        loop.measure(0.0)
        loop._look_at = 100.0
        process.stdin.write(b"go\n")
        process.stdin.flush()
        process.stdout.readline()
        assert loop.measure(10.0) == [] and free.peak < 60 * MB
        limited.starts.append(process.pid)
        loop.add(limited)
        assert loop.measure(20.0) == [limited]
        process.stdin.close()
    loop.close()


def test_what_is_above_its_limit_is_told_once() -> None:
    watch, held = MemoryWatch(0.1), Held(80)
    task = WatchedTask("x", 60 * MB, {})
    watch.add(task, held.pid)
    found: list[WatchedTask] = []

    def told() -> bool:
        found.extend(watch.take_over_limit())
        return bool(found)

    wait_until(told, what="it is above its limit")
    assert found == [task]
    assert task.over == task.peak > 80 * MB
    assert watch.take_over_limit() == []
    watch.remove(task)
    held.end()
    watch.close()
