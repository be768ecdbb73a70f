"""Statistics over the executions in a journal: utilization of the cores, waits, run times, failures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.resources import parse_allocation


class Spread(msgspec.Struct, frozen=True):
    """The distribution of some durations, in seconds."""

    number: int
    median: float
    p90: float
    longest: float


class Statistics(msgspec.Struct, kw_only=True):
    """What a pilot has done.

    ``seconds`` is from the first start to the last end; ``cores`` are all that any execution held; ``use`` is the share
    of cores x seconds that executions held. ``waits``: from submit to start of first executions. ``tasks`` counts tasks
    by how they ended last, ``failures`` executions by reason, ``nodes`` executions by node.
    """

    executions: int = 0
    seconds: float = 0.0
    cores: int = 0
    core_seconds: float = 0.0
    cpu_seconds: float = 0.0
    use: float | None = None
    waits: Spread | None = None
    runs: Spread | None = None
    tasks: dict[str, int] = {}
    failures: dict[str, int] = {}
    nodes: dict[str, int] = {}
    longest: list[JournalEntry] = []


def statistics(entries: Iterable[JournalEntry], longest: int = 5) -> Statistics:
    """Sum up the entries of a journal. Arrays count by their elements; ``longest`` executions are kept."""
    found = Statistics()
    held: set[tuple[str, int]] = set()
    waits: list[float] = []
    runs: list[float] = []
    tasks: dict[str, str] = {}
    failures: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    slowest: list[tuple[float, JournalEntry]] = []
    first, last = float("inf"), float("-inf")
    for entry in entries:
        if entry.elements:
            continue
        tasks[entry.id] = entry.status if entry.final else "queued"
        if not entry.execution:
            continue
        found.executions += 1
        nodes[entry.node] += 1
        if entry.status != "finished":
            failures[entry.reason or entry.status] += 1
        found.cpu_seconds += entry.cpu or 0.0
        if entry.started is None or entry.ended is None:
            continue
        first, last = min(first, entry.started), max(last, entry.ended)
        ran = max(entry.ended - entry.started, 0.0)
        runs.append(ran)
        if entry.execution == 1 and entry.queued is not None:
            waits.append(max(entry.started - entry.queued, 0.0))
        parts = parse_allocation(entry.cpus) if entry.cpus else ()
        found.core_seconds += ran * sum(len(part.cores) for part in parts)
        held.update((part.node, core) for part in parts for core in part.cores)
        if len(slowest) < longest or ran > slowest[-1][0]:
            entry.stdout = entry.stderr = ""
            slowest = sorted([*slowest, (ran, entry)], key=lambda item: -item[0])[:longest]
    found.tasks, found.failures, found.nodes = dict(Counter(tasks.values())), dict(failures), dict(nodes)
    found.longest = [entry for _, entry in slowest]
    found.cores, found.waits, found.runs = len(held), _spread(waits), _spread(runs)
    if runs:
        found.seconds = last - first
        possible = found.cores * found.seconds
        found.use = found.core_seconds / possible if possible > 0 else None
    return found


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    ordered = sorted(values)
    return Spread(len(ordered), ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10], ordered[-1])
