"""Measures what a task costs beside itself: CPU time of each part, and what the server does, for /bin/true.

    python -m benchmarks costs      # PILOTQ_COSTS=N: with N tasks of each shape instead of 20,000

Four shapes: elements of an array, different tasks of one `enqueue_many`, single tasks that come 500 at a time, and
tasks that are submitted one by one. CPU is what each process has used itself, from before the submit until the last end
is in the journal; the children's own is what the launchers have reaped, and the unit of the ratios.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.figures import Figure
from benchmarks.parts import TICK_S, cpu, listed, parts
from benchmarks.pilots import pilot
from benchmarks.server_use import ServerUse, Use
from pilotq.broker import ArrayRange, Broker, Task
from pilotq.broker.pilot.directory import Pilot

TRUE = "/bin/true"
MORE = "-"  # a second argument: with a single one `true` of GNU reads its locale first, which takes it 200 us
WARM = 1_000
SOME = 500
WAIT_S = 1800.0
LOOK_LEAST_S, LOOK_MOST_S = 0.005, 0.25
JOURNAL_S = 0.3  # the supervisor writes what has come more often than that
Submit = Callable[[Broker, int], None]


def submit_array(broker: Broker, number: int) -> None:
    broker.enqueue(Task(command=[TRUE], array=ArrayRange(1, number)))


def submit_many(broker: Broker, number: int) -> None:
    broker.enqueue_many([Task(command=[TRUE, str(n), MORE]) for n in range(number)])


def submit_some(broker: Broker, number: int) -> None:
    for first in range(0, number, SOME):
        broker.enqueue_many([Task(command=[TRUE, str(n), MORE]) for n in range(first, min(first + SOME, number))])


def submit_single(broker: Broker, number: int) -> None:
    for _ in range(number):
        broker.enqueue(Task(command=[TRUE]))


class Run(NamedTuple):
    """What ``number`` tasks of one shape have used: CPU seconds by part, the server's work, bytes of the journal.

    ``idle`` is the share of all cores that nobody has used meanwhile.
    """

    number: int
    seconds: float
    used: Counter[str]
    server: Use
    journal: int
    idle: float

    @property
    def tasks(self) -> float:
        """CPU seconds of the children themselves."""
        return self.used["tasks"]

    @property
    def own(self) -> float:
        """CPU seconds of all parts of the pilot."""
        return sum(self.used.values()) - self.tasks

    @property
    def share(self) -> float:
        """The share of all cores that parts and tasks have used."""
        return sum(self.used.values()) / self.seconds / len(os.sched_getaffinity(0))


def watched(submit: Submit, number: int) -> Run:
    """Run so many tasks of this shape on a pilot of all cores, which has run others before."""
    with pilot() as directory, Broker.connect(directory) as broker, contextlib.closing(ServerUse(directory)) as server:
        submit(broker, WARM)
        await_ends(broker, directory)
        pids = parts(directory)
        used, use, journal, idle = cpu(pids), server.now(), journal_bytes(directory), _idle()
        began = time.perf_counter()
        submit(broker, number)
        seconds = await_ends(broker, directory) - began
        idle = (_idle() - idle) / seconds / (os.cpu_count() or 1)
        now = cpu(pids)
        difference = Counter({part: now[part] - used[part] for part in now})
        found = Run(number, seconds, difference, server.now() - use, journal_bytes(directory) - journal, idle)
        counts = broker.counts()
    if counts.finished != WARM + number:
        raise SystemExit(f"{counts.finished} of {WARM + number} tasks finished")
    return found


def await_ends(broker: Broker, directory: str) -> float:
    """Wait until all tasks have ended; returns when (perf_counter). Their ends are in the journal then.

    Looks seldom while much is left: 50 looks a second were a fifth of what the server did for an array.
    """
    began = time.perf_counter()
    first = broker.counts().left
    while left := broker.counts().left:
        passed = time.perf_counter() - began
        if passed > WAIT_S:
            raise SystemExit(f"{left} tasks had not ended after {WAIT_S:g} s")
        rest = passed * left / (first - left) if left < first else passed
        time.sleep(min(max(rest / 2, LOOK_LEAST_S), LOOK_MOST_S))
    ended = time.perf_counter()
    before = -1
    while (size := journal_bytes(directory)) > before:
        before = size
        time.sleep(JOURNAL_S)
    return ended


def journal_bytes(directory: str) -> int:
    return os.path.getsize(Pilot(directory).journal)


def _idle() -> float:
    """CPU seconds that nobody has used since the machine started."""
    with open("/proc/stat", encoding="ascii") as file:
        return int(file.readline().split()[4]) * TICK_S


def _figures(what: str, found: Run, own: float = 0.0, server: float = 0.0, log: float = 0.0) -> list[Figure]:
    each = {part: seconds / found.number * 1e6 for part, seconds in found.used.items() if part != "tasks"}
    child = found.tasks / found.number * 1e6
    us = f"us: {listed(each)}; child {child:.0f}"
    does = f"{found.server.each(found.number)}; journal {found.journal / found.number:.0f} bytes"
    print(f"  {what}: {us}; {does}", file=sys.stderr, flush=True)
    return [
        Figure(f"{what}, own CPU of all parts, of the child's", found.own / found.tasks, "", own, False, us),
        Figure(f"{what}, CPU of the server, of the child's", found.used["server"] / found.tasks, "", server, False),
        Figure(f"{what}, log", found.server.log_bytes / found.number, "bytes", log, False, does),
    ]


def run() -> list[Figure]:
    number = int(os.environ.get("PILOTQ_COSTS", "20000"))
    return [
        *_figures("element of an array", watched(submit_array, number), 0.30, 0.015, 200),
        *_figures("task of one enqueue_many", watched(submit_many, number), 0.30, 0.015, 200),
        *_figures(f"single task, {SOME} at a time", watched(submit_some, number), 0.50, 0.11, 800),
        *_figures("task of an enqueue of its own", watched(submit_single, number // 4)),
    ]
