"""Runs tasks on pretended nodes, and tells how long they took and what the parts used."""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

from benchmarks.pretended.pilot import PretendedPilot
from pilotq.broker import ArrayRange, Broker, Task

CORES = 56  # of a node, as in the published runs on Frontier
WAIT_S = 900.0
LOOK_S = 0.005


class Sizes(NamedTuple):
    """``nodes``: the numbers of nodes to measure; ``queued``: the largest number of tasks that wait."""

    nodes: list[int]
    queued: int


class Measured(NamedTuple):
    """``seconds`` from the release of what waited to the last end; CPU seconds by part."""

    number: int
    seconds: float
    used: Counter[str]
    pretence: float

    @property
    def rate(self) -> float:
        return self.number / self.seconds

    def us(self, part: str) -> float:
        return self.used[part] / self.number * 1e6


def play(pilot: PretendedPilot, seconds: float, number: int, *, as_array: bool = False) -> Measured:
    """Run so many tasks of so many seconds that all wait when the first one begins."""
    command = ["sleep", f"{seconds:g}"] if seconds else ["true"]
    broker = pilot.broker
    broker.pause(True)
    before = broker.counts().finished
    if as_array:
        broker.enqueue(Task(command=list(command), array=ArrayRange(1, number)))
    else:
        broker.enqueue_many([Task(command=list(command)) for _ in range(number)])
    used, report = pilot.cpu(), pilot.report()
    began = time.perf_counter()
    broker.pause(False)
    took = until_ended(broker, before + number) - began
    now, after = pilot.cpu(), pilot.report()
    return Measured(
        number, took, Counter({part: now[part] - used[part] for part in now}), after["pretence"] - report["pretence"]
    )


def until_ended(broker: Broker, finished: int) -> float:
    """Wait until so many tasks in all have finished; returns when (perf_counter)."""
    deadline = time.perf_counter() + WAIT_S
    while (counts := broker.counts()).left:
        if time.perf_counter() > deadline:
            raise SystemExit(f"{counts.left} tasks had not ended after {WAIT_S:g} s")
        time.sleep(LOOK_S)
    ended = time.perf_counter()
    if counts.finished != finished:
        raise SystemExit(f"{counts.finished} of {finished} tasks finished")
    return ended
