"""Measures how long RQ's pages of `pilotq dashboard` take, with many waiting tasks and many that have ended.

`live_page.py` measures pilotq's own page.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.figures import Figure
from benchmarks.pilots import keep_records, pilot
from benchmarks.served import served
from pilotq.broker import Broker, Task

WAITING = "default.p0.1c"


def pages(task: str) -> dict[str, list[str]]:
    """What a browser asks for to show a page: the frame, and the data in it."""

    def jobs(queue: str, registry: str, order: str, page: int = 1) -> list[str]:
        place = f"jobs/{queue}/{registry}/8/{order}/{page}"
        return [f"rq/0/view/{place}", f"rq/0/data/{place}.json"]

    return {
        "overview": ["rq/", "rq/0/data/queues.json"],
        "waiting tasks": jobs(WAITING, "queued", "asc"),
        "waiting tasks, last page": jobs(WAITING, "queued", "dsc"),
        "waiting tasks, in the middle": jobs(WAITING, "queued", "asc", 6_000),
        "ended tasks": jobs("default", "canceled", "asc"),
        "ended tasks, last page": jobs("default", "canceled", "dsc"),
        "one task": [f"rq/0/view/job/{task}", f"rq/0/data/job/{task}.json"],
        "workers": ["rq/0/view/workers", "rq/0/data/workers.json"],
    }


def measure(directory: str, task: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Page -> median and worst of its seconds."""
    with served("dashboard", directory) as server:

        def show(paths: list[str]) -> float:
            began = time.perf_counter()
            for path in paths:
                server.read(path)
            return time.perf_counter() - began

        times = {name: [show(paths) for _ in range(rounds + 1)][1:] for name, paths in pages(task).items()}
    return {name: (statistics.median(seconds), max(seconds)) for name, seconds in times.items()}


def run(number: int = 100_000, rounds: int = 15) -> list[Figure]:
    with pilot() as directory, Broker.connect(directory) as broker:
        keep_records(broker)
        broker.pause(True)
        ended = broker.enqueue_many([Task(command=["/bin/true", "ended", str(n)]) for n in range(number)])
        broker.cancel(ended)
        waiting = broker.enqueue_many([Task(command=["/bin/true", "waits", str(n)]) for n in range(number)])
        found = measure(directory, waiting[number // 2], rounds)
        broker.cancel(waiting)
    return [
        Figure(
            f"dashboard, {number:,} waiting, {number:,} ended: {name}", median, "s", 0.2, False, f"worst {worst:.3f} s"
        )
        for name, (median, worst) in found.items()
    ]
