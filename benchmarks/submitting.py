"""Measures submission: bulk submits, one enqueue, one whole run."""

from __future__ import annotations

import statistics
import tempfile
import time

from benchmarks.figures import Figure
from benchmarks.pilots import command, pilot
from pilotq.broker import ArrayRange, Broker, Task


def bulk(number: int) -> float:
    """Tasks per second that `enqueue_many` submits; the pilot is paused, so that only this is measured."""
    with pilot() as directory, Broker.connect(directory) as broker:
        broker.pause(True)
        tasks = [Task(command=["/bin/true", str(n)]) for n in range(number)]
        began = time.perf_counter()
        ids = broker.enqueue_many(tasks)
        took = time.perf_counter() - began
        broker.cancel(ids)
    return number / took


def array(number: int) -> float:
    """Seconds to submit an array."""
    with pilot() as directory, Broker.connect(directory) as broker:
        broker.pause(True)
        began = time.perf_counter()
        task_id = broker.enqueue(Task(command=["/bin/true"], array=ArrayRange(1, number)))
        took = time.perf_counter() - began
        broker.cancel([task_id])
    return took


def one_enqueue(rounds: int) -> float:
    """Seconds of `pilotq enqueue -- /bin/true` on a running pilot, median."""
    with pilot() as directory:
        return statistics.median(timed("enqueue", "--dir", directory, "--", "/bin/true") for _ in range(rounds))


def one_run(rounds: int) -> float:
    """Seconds of `pilotq run -- /bin/true`, from nothing to nothing, median."""
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder:
        return statistics.median(timed("run", "--", "/bin/true", cwd=folder) for _ in range(rounds))


def timed(*arguments: str, cwd: str | None = None) -> float:
    began = time.perf_counter()
    command(*arguments, cwd=cwd)
    return time.perf_counter() - began


def run(number: int = 100_000, rounds: int = 7) -> list[Figure]:
    return [
        Figure(f"enqueue_many of {number:,}", bulk(number), "/s", 30_000),
        Figure("array of 1,000,000 accepted", array(1_000_000), "s", 0.5, False),
        Figure("pilotq enqueue -- /bin/true", one_enqueue(rounds), "s", 0.2, False),
        Figure("pilotq run -- /bin/true", one_run(rounds), "s", 1.0, False),
    ]
