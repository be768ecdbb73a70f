"""Measures no-op functions, each with an argument of its own, and compares every result.

By ``Executor.map``, by ``enqueue_many`` with ``Broker.results``, and, beside them in each round, by the process
pools of the standard library on as many cores: these keep nothing, see no end of a process, and capture no output.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median

from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import Broker, Executor, Task


def nothing(number: int) -> int:
    return number + 1


def timed(action: Callable[[int], list[int]], number: int) -> float:
    """Calls a second."""
    began = time.monotonic()
    found = action(number)
    took = time.monotonic() - began
    assert found == list(range(1, number + 1))
    return number / took


def run(number: int = 20_000, rounds: int = 3) -> list[Figure]:
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {}
    with pilot() as directory, Broker.connect(directory) as broker, Executor(directory) as executor:

        def by_map(count: int) -> list[int]:
            return list(executor.map(nothing, range(count)))

        def by_enqueue(count: int) -> list[int]:
            ids = broker.enqueue_many([Task(function=nothing, args=(n,)) for n in range(count)])
            return list(broker.results(ids))

        def by_pool(count: int) -> list[int]:
            with multiprocessing.Pool(cores) as pool:
                return pool.map(nothing, range(count), chunksize=1)

        def by_process_pool(count: int) -> list[int]:
            with ProcessPoolExecutor(cores) as pool:
                return list(pool.map(nothing, range(count)))

        ways = {"map": by_map, "enqueue_many": by_enqueue, "Pool": by_pool, "ProcessPoolExecutor": by_process_pool}
        by_map(500)
        for _ in range(rounds):
            for name, way in ways.items():
                rates.setdefault(name, []).append(timed(way, number))
    figures = []
    for name, reach in (("map", 8000.0), ("enqueue_many", 8000.0)):
        beside = [a / b for a, b in zip(rates[name], rates["ProcessPoolExecutor"], strict=True)]
        detail = f"{median(beside):.2f} of ProcessPoolExecutor; rounds {', '.join(f'{r:,.0f}' for r in rates[name])}"
        figures.append(Figure(f"functions by {name}, results compared", median(rates[name]), "/s", reach, True, detail))
    others = ("Pool", "ProcessPoolExecutor")
    return figures + [Figure(f"the same by {name} (chunks of one)", median(rates[name]), "/s") for name in others]
