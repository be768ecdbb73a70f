"""Measures real processes: `/bin/true` through a pilot against two bare loops that only spawn and reap.

The ceiling of this machine is the pinned C loop (pinned_loop.c): vfork, one child on each core at a time, pinned, in a
session of its own. The bare loop does the same in Python, with posix_spawn. All count from the first start to the last
end, in turn, and medians of the ratios in each round are the figures.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

from benchmarks.compiled import compiled
from benchmarks.costs import Submit, submit_array, submit_many
from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import Broker
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


def through_pilot(submit: Submit, number: int) -> float:
    """Tasks per second through a pilot, from the first start to the last end by its journal."""
    with pilot() as directory:
        with Broker.connect(directory) as broker:
            submit(broker, number)
            broker.wait()
        journal = Journal(os.path.join(directory, "journal.jsonl"))
        while len(lines := [line for line in journal.entries() if line.execution]) < number:
            time.sleep(0.1)
    if len(lines) != number or any(line.exit_code != 0 for line in lines):
        raise SystemExit(f"{len(lines)} of {number} tasks ended well")
    first = min(line.started for line in lines if line.started is not None)
    return number / (max(line.ended for line in lines if line.ended is not None) - first)


def run(rounds: int = 5) -> list[Figure]:
    number = int(os.environ.get("PILOTQ_COSTS", "20000"))
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder:
        pinned = compiled("pinned_loop", folder)
        sides: dict[str, Callable[[], float]] = {
            "pinned C loop": lambda: float(subprocess.check_output([pinned, str(number)])),
            "an array": lambda: through_pilot(submit_array, number),
            "bare loop in Python": lambda: bare_loop(number),
            "different tasks of one enqueue_many": lambda: through_pilot(submit_many, number),
        }
        found = [{what: measure() for what, measure in sides.items()} for _ in range(rounds)]
    return [
        figure(found, "an array", "pinned C loop", number, 0.80),
        figure(found, "different tasks of one enqueue_many", "pinned C loop", number, 0.70),
        figure(found, "an array", "bare loop in Python", number, 0.0),
    ]


def figure(found: list[dict[str, float]], what: str, of: str, number: int, reach: float) -> Figure:
    ratios = [one[what] / one[of] for one in found]
    ours, theirs = (statistics.median(one[side] for one in found) for side in (what, of))
    detail = f"{ours:,.0f}/s, {of} {theirs:,.0f}/s, rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    return Figure(f"{number:,} x {TRUE}, {what}, of the {of}", statistics.median(ratios), "", reach, True, detail)
