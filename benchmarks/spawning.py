"""Real processes: `/bin/true` through a pilot against the bare loop that does nothing but spawn and reap.

The bare loop is the ceiling of this machine and language: one process that keeps as many children running as there are
cores, each pinned to its core by the spawner's own affinity, in its own session, reaped with its resource usage. Both
sides count from the first start to the last end, in turn (A B A B), and the median of the ratios is the figure.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

from pilotq.broker import Broker, Task
from pilotq.broker.journal import Journal
from pilotq.broker.task import ArrayRange

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


def through_pilot(number: int, *, array: bool) -> float:
    """Tasks per second through a pilot, from the first start to the last end by its journal."""
    with tempfile.TemporaryDirectory(prefix="pilotq-bench-") as folder:
        directory = os.path.join(folder, "pilot")
        subprocess.run([sys.executable, "-m", "pilotq", "start", "--dir", directory], check=True, capture_output=True)
        try:
            with Broker.connect(directory) as broker:
                if array:
                    ids = [broker.enqueue(Task(command=[TRUE], array=ArrayRange(1, number)))]
                else:
                    ids = broker.enqueue_many([Task(command=[TRUE, str(n)]) for n in range(number)])
                broker.wait(ids)
        finally:
            subprocess.run([sys.executable, "-m", "pilotq", "stop", "--dir", directory], check=True, capture_output=True)
        lines = [line for line in Journal(os.path.join(directory, "journal.jsonl")).lines() if line.execution]
        if len(lines) != number or any(line.exit_code != 0 for line in lines):
            raise SystemExit(f"{len(lines)} of {number} tasks ended well")
        starts = [line.started for line in lines if line.started is not None]
        ends = [line.ended for line in lines if line.ended is not None]
        return number / (max(ends) - min(starts))


def run(number: int = 20_000, rounds: int = 5) -> dict[str, object]:
    bare, pilot = [], []
    for _ in range(rounds):
        bare.append(bare_loop(number))
        pilot.append(through_pilot(number, array=False))
    ratios = [p / b for p, b in zip(pilot, bare, strict=True)]
    return {
        "what": f"{number:,} x {TRUE}, {len(os.sched_getaffinity(0))} cores, tasks per second",
        "bare": statistics.median(bare),
        "pilotq": statistics.median(pilot),
        "ratio": statistics.median(ratios),
        "aim": 0.60,
    }


if __name__ == "__main__":
    arguments = [int(a) for a in sys.argv[1:]]
    print(run(*arguments))
