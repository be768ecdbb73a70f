"""Measures jobs of a producer that knows only RQ: no-op functions, from the first enqueue to the last end."""

from __future__ import annotations

import os
import sys
import tempfile
import time

from redis import Redis
from rq import Queue

from benchmarks.figures import Figure
from benchmarks.pilots import command
from pilotq.broker import Broker


def rate(number: int, rounds: int) -> tuple[float, float]:
    """Jobs per second that a pilot runs, and that the producer enqueues alone; the best of some rounds."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder:
        with open(os.path.join(folder, "noop.py"), "w", encoding="utf-8") as file:
            file.write("def noop(n):\n    return None\n")
        directory = os.path.join(folder, "pilot")
        command("start", "--dir", directory, cwd=folder)
        try:
            with Broker.connect(directory) as broker, Redis.from_url(broker.url) as connection:
                queue = Queue("bench", connection=connection)
                found += [_round(broker, queue, number) for _ in range(rounds)]
        finally:
            command("stop", "--dir", directory)
    return max(whole for whole, _ in found), max(alone for _, alone in found)


def _round(broker: Broker, queue: Queue, number: int) -> tuple[float, float]:
    before = broker.counts()
    began = time.perf_counter()
    queue.enqueue_many([Queue.prepare_data("noop.noop", (n,)) for n in range(number)])
    enqueued = time.perf_counter()
    broker.wait(timeout=300)
    ended = time.perf_counter()
    after = broker.counts()
    if after.finished - before.finished != number:
        sys.exit(f"{after.finished - before.finished} of {number} jobs finished")
    return number / (ended - began), number / (enqueued - began)


def run() -> list[Figure]:
    few, _ = rate(64, 10)
    many, alone = rate(5000, 3)
    return [
        Figure("64 no-op jobs of an RQ producer", few, "/s", 1000, detail="from the first enqueue to the last end"),
        Figure("5,000 of them", many, "/s", 1000, detail=f"RQ's enqueue_many alone: {alone:,.0f}/s"),
    ]
