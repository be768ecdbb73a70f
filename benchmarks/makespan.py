"""Measures uneven tasks: 1,000 of one class on 2 virtual nodes of 2 cores, 1 % of them 10 s, the rest 5 ms.

Prefetched tasks of a node must not wait behind a long task while another node is idle. The figure is the makespan
over that of an offline list schedule: the same durations, in the same order, each to the core that is free first.
"""

from __future__ import annotations

import heapq
import time

from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import Broker, Task

SHORT_S, LONG_S, CORES = 0.005, 10.0, 4


def durations(number: int) -> list[float]:
    """The long ones are spread evenly over the second half: by then the dispatcher prefetches."""
    every = number // 20
    return [LONG_S if n >= number // 2 and n % every == 0 else SHORT_S for n in range(number)]


def list_schedule(seconds: list[float]) -> float:
    free = [0.0] * CORES
    for duration in seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def run(number: int = 1_000) -> list[Figure]:
    seconds = durations(number)
    with pilot("--nodes", "n1:2,n2:2") as directory, Broker.connect(directory) as broker:
        began = time.monotonic()
        broker.wait(broker.enqueue_many([Task(command=["sleep", str(s)]) for s in seconds]))
        took = time.monotonic() - began
    ideal = list_schedule(seconds)
    detail = f"{took:.1f} s, list schedule {ideal:.1f} s"
    return [Figure("makespan, 1 % long tasks, over a list schedule", took / ideal, "", 1.3, False, detail)]
