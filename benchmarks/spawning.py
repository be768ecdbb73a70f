"""Measures real processes: `/bin/true` through a pilot against a bare loop that only spawns and reaps.

The bare loop is the ceiling of this machine and language: one process that keeps as many children running as there are
cores, each pinned to its core by the spawner's own affinity, in its own session, reaped with its resource usage. Both
sides count from the first start to the last end, in turn (A B A B), and the median of the ratios is the figure.
"""

from __future__ import annotations

import os
import statistics
import time

from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import Broker, Task
from pilotq.broker.store.journal import Journal

TRUE = "/bin/true"


def bare_loop(number: int) -> float:
    """Tasks per second of the bare loop."""
    cores = sorted(os.sched_getaffinity(0))
    free, running = list(cores), {}
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    began, started = time.perf_counter(), 0
    while started < number or running:
        while free and started < number:
            core = free.pop()
            os.sched_setaffinity(0, {core})
            running[os.posix_spawn(TRUE, [TRUE], {}, setsid=True, file_actions=actions)] = core
            started += 1
        pid, _, _ = os.wait4(-1, 0)
        free.append(running.pop(pid))
    took = time.perf_counter() - began
    os.sched_setaffinity(0, cores)
    os.close(null)
    return number / took


def through_pilot(number: int) -> float:
    """Tasks per second through a pilot, from the first start to the last end by its journal."""
    with pilot() as directory:
        with Broker.connect(directory) as broker:
            broker.wait(broker.enqueue_many([Task(command=[TRUE, str(n)]) for n in range(number)]))
        journal = Journal(os.path.join(directory, "journal.jsonl"))
        while len(lines := [line for line in journal.entries() if line.execution]) < number:
            time.sleep(0.1)
    if len(lines) != number or any(line.exit_code != 0 for line in lines):
        raise SystemExit(f"{len(lines)} of {number} tasks ended well")
    first = min(line.started for line in lines if line.started is not None)
    return number / (max(line.ended for line in lines if line.ended is not None) - first)


def run(number: int = 20_000, rounds: int = 5) -> list[Figure]:
    bare, through = [], []
    for _ in range(rounds):
        bare.append(bare_loop(number))
        through.append(through_pilot(number))
    ratio = statistics.median(p / b for p, b in zip(through, bare, strict=True))
    detail = f"{statistics.median(through):,.0f}/s, bare loop {statistics.median(bare):,.0f}/s"
    return [Figure(f"{number:,} x {TRUE}, of the bare loop", ratio, "", 0.60, True, detail)]
