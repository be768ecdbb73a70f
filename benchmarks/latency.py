"""Measures the start of one task on an idle pilot: from `enqueue` in another process to the task's first instruction.

The task is a small C program that reads the clock first of all; client and task read the same monotonic clock. The
next one is submitted when the last has ended and a moment of irregular length is over: nothing can fall in step.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time

from benchmarks.compiled import compiled
from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import Broker, Task

IDLE_S = 0.05  # on average, between two tasks
WARM = 20


def delays(number: int) -> list[float]:
    """Milliseconds of each start."""
    luck = random.Random(1)
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder, pilot() as directory:
        program = compiled("first_instruction", folder)
        with Broker.connect(directory) as broker:
            for _ in range(WARM + number):
                time.sleep(luck.uniform(0.5, 1.5) * IDLE_S)
                began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                task = broker.enqueue(Task(command=[program]))
                broker.wait([task])
                first = int(b"".join(broker.output(task)))
                found.append((first - began) / 1e6)
    return found[WARM:]


def run() -> list[Figure]:
    number = int(os.environ.get("PILOTQ_STARTS", "500"))
    found = sorted(delays(number))
    at = statistics.quantiles(found, n=100)
    detail = f"{number} starts, {found[0]:.1f} to {found[-1]:.1f} ms"
    return [
        Figure("enqueue to first instruction, idle pilot, median", at[49], "ms", 2.0, False, detail),
        Figure("enqueue to first instruction, idle pilot, of 99 %", at[98], "ms", 10.0, False, detail),
    ]
