"""Measures placement: full passes over a large cluster, and the pass after one end on a small one.

    python -m benchmarks placement

The large cluster has 1,000 nodes of 128 cores; 100,000 tasks wait in 50 shapes, of which 10 can never be placed. 40
shapes ask for 1 to 40 cores, their order numbers are interleaved one by one (the worst case for handling many tasks
of a class at once). Figures are medians of CPU time, in the unit that the key names: placement neither waits nor
shares, and other work on the machine stays out of the figure that way (but for caches that it empties).
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable

from benchmarks.figures import Figure
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.scheduling.placement import BackfillState, Waiting, plan
from pilotq.broker.store.resources import NodeInfo, NodeShare
from pilotq.broker.tasks.model import Request

NODES, CORES, TASKS, SHAPES = 1000, 128, 100_000, 50
ALL = 1 << 30
FIGURE = "empty cluster, 1-40 cores, 500 a pass, ms"  # 500 is what the dispatcher claims at once


def make_cluster(nodes: int, cores: int) -> Cluster:
    cluster = Cluster()
    for number in range(nodes):
        halves = [list(range(cores // 2)), list(range(cores // 2, cores))] if cores > 8 else []
        cluster.add_node(NodeInfo(f"n{number:04}", 1, "host", 1, list(range(cores)), numa=halves))
    return cluster


def make_waiting(most_cores: int, memory: int = 0) -> list[Waiting]:
    """TASKS tasks, a fifth of the shapes too large for any node (half of them) or wanting GPUs that no node has."""
    found = []
    for shape in range(SHAPES):
        if shape % 10 == 0:
            request = Request(cores=(CORES + 1 + shape, CORES + 1 + shape))
        elif shape % 10 == 5:
            request = Request(cores=(1, 1), gpus=2, limit=10 * (shape + 1))
        else:
            cores = 1 + shape * most_cores // SHAPES
            request = Request(cores=(cores, cores), memory=memory, limit=shape + 1)
        orders = range(shape + 1, shape + 1 + 32 * SHAPES, SHAPES)
        found.append(Waiting(f"default.p0.s{shape}", 0, request, orders, TASKS // SHAPES))
    return found


def fill(cluster: Cluster, left: int) -> list[tuple[NodeShare, ...]]:
    """Take all but 0 to ``left`` single cores of every node; the same ones each time."""
    luck = random.Random(1)
    taken = []
    for name in cluster.names:
        cores = luck.sample(range(CORES), CORES - luck.randint(0, left))
        taken += [(NodeShare(name, (core,)),) for core in sorted(cores)]
    for parts in taken:
        cluster.take(parts)
    return taken


def full_pass(waiting: list[Waiting], *, rounds: int, limit: int, left: int = -1) -> tuple[float, int]:
    """(milliseconds, placed) of one pass over an empty cluster, or over one with at most ``left`` free cores a node."""
    cluster = make_cluster(NODES, CORES)
    if left >= 0:
        fill(cluster, left)
    times, placed = [], 0
    for _ in range(rounds):
        state = BackfillState()
        gc.collect()
        begin = time.process_time()
        found = plan(cluster, waiting, (), state, 0.0, 1.0, limit)
        times.append(time.process_time() - begin)
        placed = len(found)
        for _name, parts in found:
            cluster.release(parts)
    return statistics.median(times) * 1e3, placed


def hold_pass(rounds: int) -> float:
    """Milliseconds of the pass in which a hold begins while 127,000 one-core tasks run, a third without limit."""
    cluster = make_cluster(NODES, CORES)
    running = [(parts, 50.0 + n % 100 if n % 3 else math.inf) for n, parts in enumerate(fill(cluster, 2))]
    waiting = [Waiting("large", 0, Request(cores=(CORES, CORES)), [1], 1), *make_waiting(40)]
    times = []
    for _ in range(rounds):
        state = BackfillState()
        gc.collect()
        begin = time.process_time()
        found = plan(cluster, waiting, running, state, 0.0, 0.0, ALL)
        times.append(time.process_time() - begin)
        assert state.hold is not None
        for _name, parts in found:
            cluster.release(parts)
        cluster.unhold()
    return statistics.median(times) * 1e3


def small_pass(nodes: int, cores: int, classes: int, passes: int) -> float:
    """Microseconds of one pass with its release, when one core has become free on a full small cluster."""
    cluster = make_cluster(nodes, cores)
    waiting = [Waiting(f"c{n}", 0, Request(limit=n or None), [n], 10_000) for n in range(classes)]
    state = BackfillState()
    running = [parts for _, parts in plan(cluster, waiting, (), state, 0.0)]
    begin = time.process_time()
    for turn in range(passes):
        cluster.release(running[turn % len(running)])
        ((_, running[turn % len(running)]),) = plan(cluster, waiting, (), state, 0.0)
    return (time.process_time() - begin) / passes * 1e6


def measure_all(rounds: int) -> dict[str, float]:
    """All figures; ``rounds`` is how often each large pass is repeated."""
    wide, narrow = make_waiting(40), make_waiting(8)
    figures: dict[str, float] = {}

    def note(name: str, measure: Callable[[], tuple[float, int]]) -> None:
        figures[f"{name}, ms"], figures[f"{name}, placed"] = measure()

    note("empty cluster, 1-40 cores, all that fit", lambda: full_pass(wide, rounds=rounds, limit=ALL))
    note("empty cluster, 1-40 cores, 500 a pass", lambda: full_pass(wide, rounds=rounds, limit=500))
    note("empty cluster, 1-8 cores, all that fit", lambda: full_pass(narrow, rounds=rounds, limit=ALL))
    note("empty cluster, 1-8 cores, 500 a pass", lambda: full_pass(narrow, rounds=rounds, limit=500))
    note("0-4 cores of a node free, 1-8 cores", lambda: full_pass(narrow, rounds=rounds, limit=ALL, left=4))
    note("full cluster", lambda: full_pass(wide, rounds=rounds, limit=ALL, left=0))
    with_memory = make_waiting(40, memory=1 << 20)
    note("empty cluster, 1-40 cores and memory, 500 a pass", lambda: full_pass(with_memory, rounds=rounds, limit=500))
    figures["a hold begins, 127,000 running, ms"] = hold_pass(rounds)
    figures["1 node of 2 cores, 1 class, one end and one pass, us"] = small_pass(1, 2, 1, 20_000)
    figures["2 nodes of 64 cores, 1 class, one end and one pass, us"] = small_pass(2, 64, 1, 20_000)
    figures["2 nodes of 64 cores, 50 classes, one end and one pass, us"] = small_pass(2, 64, 50, 2_000)
    return figures


def run(rounds: int = 7) -> list[Figure]:
    found = []
    for name, value in measure_all(rounds).items():
        what, _, unit = name.rpartition(", ")
        reach = 10.0 if name == FIGURE else 0.0
        if unit in ("ms", "us"):
            found.append(Figure(f"placement, {what}", value, unit, reach, False))
    return found
