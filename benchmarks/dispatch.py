"""Measures dispatch without processes: how many tasks a second go through a pilot whose launchers only pretend.

    python -m benchmarks dispatch      # PILOTQ_DISPATCH=N: up to N elements, and up to N tasks, but a million at most

Everything but the processes is real: supervisor, server, dispatcher, journal, and the worker process of each of two
nodes of 56 cores (both in one process here). The tasks take no time. The rate is from the release of what waits until
the last end is counted, so that the submit is not in it. Array and single tasks are measured from 1,000 on, each ten
times as many as before: the figure is the last rate, and the detail has all and the CPU time of each part a task.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from benchmarks.figures import Figure
from benchmarks.pilots import keep_records
from benchmarks.pretended.pilot import PretendedPilot, pretended_pilot
from pilotq.broker import ArrayRange, Broker, Task

FIRST = 1_000
WAIT_S = 1800.0
LOOK_S = 0.005
SINGLE_MAX = 1_000_000
Submit = Callable[[Broker, int], None]


def submit_array(broker: Broker, number: int) -> None:
    broker.enqueue(Task(command=["/bin/true"], array=ArrayRange(1, number)))


def submit_single(broker: Broker, number: int) -> None:
    keep_records(broker)
    broker.enqueue_many([Task(command=["/bin/true", str(n)]) for n in range(number)])


def rate(pilot: PretendedPilot, submit: Submit, number: int) -> tuple[float, dict[str, float]]:
    """Tasks a second, and CPU microseconds of each part a task."""
    broker = pilot.broker
    broker.pause(True)
    before = broker.counts().finished
    submit(broker, number)
    used = pilot.cpu()
    began = time.perf_counter()
    broker.pause(False)
    while (counts := broker.counts()).left and time.perf_counter() < began + WAIT_S:
        time.sleep(LOOK_S)
    took = time.perf_counter() - began
    now = pilot.cpu()
    if counts.finished - before != number:
        raise SystemExit(f"{counts.finished - before} of {number} tasks finished in {took:.0f} s")
    return number / took, {part: (now[part] - used[part]) / number * 1e6 for part in now}


def measure(what: str, submit: Submit, most: int, reach: float) -> Figure:
    rates: dict[int, float] = {}
    used: dict[str, float] = {}
    number = FIRST
    while number <= most:
        with pretended_pilot(2, 56) as pilot:
            rate(pilot, submit, FIRST)
            before = pilot.report()
            rates[number], used = rate(pilot, submit, number)
            report = pilot.report() - before
            share = report["pretence"] / report["cpu"]
        print(f"  {what} {number:,}: {rates[number]:,.0f}/s", _listed(used), file=sys.stderr, flush=True)
        number *= 10
    last = max(rates)
    detail = ", ".join(f"{n:,}: {r:,.0f}/s" for n, r in rates.items())
    detail += f"; CPU us a task: {_listed(used)}, of the worker processes' {share:.0%} pretend"
    return Figure(f"dispatch without processes, {what}, {last:,}", rates[last], "/s", reach, detail=detail)


def _listed(used: dict[str, float]) -> str:
    return ", ".join(f"{part} {value:.0f}" for part, value in sorted(used.items()))


def run() -> list[Figure]:
    most = int(os.environ.get("PILOTQ_DISPATCH", "100000"))
    return [
        measure("array", submit_array, most, 50_000),
        measure("single tasks", submit_single, min(most, SINGLE_MAX), 12_000),
    ]
