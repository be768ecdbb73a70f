"""What grows with the number of tasks that wait: rate, memory, the latency of an urgent task; and very many of them."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time

from benchmarks.figures import Figure
from benchmarks.pilots import keep_records
from benchmarks.pretended.pilot import pretended_pilot
from benchmarks.server_use import ServerUse
from benchmarks.simulation.measured import CORES, Sizes, play, until_ended
from benchmarks.simulation.tables import Column, Table
from pilotq.broker import ArrayRange, Broker, Task

NODES = 2
FIRST = 1_000
SINGLE_MAX = 1_000_000
LOOK_S = 15.0  # how long a queue is watched at most; what is left then goes with its pilot
URGENT, URGENT_MAX = 10, 20  # priority; how many at most
MANY_NODES, MANY_CORES, MANY = 50, 50, 10_000


def measure_queue(sizes: Sizes) -> list[Table]:
    """Elements of an array and single tasks, from 1,000 on, each ten times as many as before."""
    numbers = [FIRST * 10**n for n in range(5) if FIRST * 10**n <= sizes.queued]
    rows = [
        (_queued(number, single=False), _queued(number, single=True) if number <= SINGLE_MAX else [math.nan] * 5)
        for number in numbers
    ]
    units = ("tasks/s", "s", "bytes a task", "ms until its end", "MB")
    names = ("rate", "submit", "memory", "urgent task", "memory of the server")
    columns = [
        Column(f"{name}, {shape}", unit, [row[side][place] for row in rows], "power" if place in (0, 3) else "")
        for place, (name, unit) in enumerate(zip(names, units, strict=True))
        for side, shape in enumerate(("array", "single"))
        if (name, shape) != ("memory", "array")  # it is one record
    ]
    return [Table("queue", "Null tasks that wait, two nodes", "tasks", [float(n) for n in numbers], columns)]


def _queued(number: int, *, single: bool) -> list[float]:
    """Rate, seconds of the submit, bytes a task, milliseconds of an urgent one, MB of the server."""
    with pretended_pilot(NODES, CORES) as pilot, contextlib.closing(ServerUse(pilot.directory)) as server:
        broker = pilot.broker
        play(pilot, 0.0, FIRST)
        broker.pause(True)
        before, began = server.now().memory, time.perf_counter()
        if single:
            keep_records(broker)
            broker.enqueue_many([Task(command=["true"]) for _ in range(number)])
        else:
            broker.enqueue(Task(command=["true"], array=ArrayRange(1, number)))
        submit, memory = time.perf_counter() - began, server.now().memory
        broker.pause(False)
        first, began = broker.counts().finished, time.perf_counter()
        urgent: list[float] = []
        while broker.counts().left and time.perf_counter() < began + LOOK_S:
            if len(urgent) < URGENT_MAX:
                urgent.append(_urgent(broker))
            time.sleep(0.005)
        rate = (broker.counts().finished - first) / (time.perf_counter() - began)
    found = [rate, submit, (memory - before) / number, statistics.median(urgent) * 1e3, memory / 1e6]
    print(f"  {number:,} {'single' if single else 'array'}: {found}", file=sys.stderr, flush=True)
    return found


def _urgent(broker: Broker) -> float:
    """Seconds from the submit of a task that goes before all others until its end is known."""
    began = time.perf_counter()
    broker.wait([broker.enqueue(Task(command=["true"], priority=URGENT))])
    return time.perf_counter() - began


def measure_many(sizes: Sizes) -> list[Figure]:
    """As in Ray's published runs: a million tasks that wait for one node, and 10,000 tasks on 2,500 cores."""
    queued = min(sizes.queued, SINGLE_MAX)
    nodes = min(max(sizes.nodes), MANY_NODES)
    tasks = MANY * nodes // MANY_NODES
    whole = _submit_and_run(1, 64, queued)
    wide = _submit_and_run(nodes, MANY_CORES, tasks)
    cores = nodes * MANY_CORES
    return [
        Figure(f"{queued:,} null tasks on 64 cores, with their submit", whole, "s", detail="Ray: 184 s for 1,000,000"),
        Figure(f"{tasks:,} null tasks on {cores:,} cores, with their submit", tasks / wide, "/s", detail="Ray: 569/s"),
    ]


def _submit_and_run(nodes: int, cores: int, number: int) -> float:
    """Seconds from the first submit to the last end."""
    with pretended_pilot(nodes, cores) as pilot:
        play(pilot, 0.0, nodes * cores)
        before, began = pilot.broker.counts().finished, time.perf_counter()
        pilot.broker.enqueue_many([Task(command=["true"]) for _ in range(number)])
        return until_ended(pilot.broker, before + number) - began
