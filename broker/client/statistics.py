"""Statistics over the executions in a journal: utilization of the cores, waits, run times, failures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.resources import parse_allocation
from pilotq.broker.tasks.array_outcomes import count_indices


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
    by how they ended last, also those that never ran, ``failures`` executions by reason, ``nodes`` executions by node.
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
    ends = _Ends()
    failures: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    slowest: list[tuple[float, JournalEntry]] = []
    first, last = float("inf"), float("-inf")
    for entry in entries:
        ends.add(entry)
        never_ran = not entry.execution or (entry.status == "canceled" and entry.started is None)
        if entry.elements or never_ran:
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
    found.tasks, found.failures, found.nodes = ends.counts(), dict(failures), dict(nodes)
    found.longest = [entry for _, entry in slowest]
    found.cores, found.waits, found.runs = len(held), _spread(waits), _spread(runs)
    if runs:
        found.seconds = last - first
        possible = found.cores * found.seconds
        found.use = found.core_seconds / possible if possible > 0 else None
    return found


class _Ends:
    """How tasks ended last, by array; elements that never ran have no entry, only a place in that of their array."""

    def __init__(self) -> None:
        self._tasks: dict[str, dict[str, str]] = {}  # array, or "" -> id -> status
        self._arrays: dict[str, tuple[int, int, str]] = {}  # size, canceled elements, what those without an entry are

    def add(self, entry: JournalEntry) -> None:
        if entry.elements:
            size = sum(map(count_indices, entry.elements.values()))
            self._arrays[entry.id] = size, count_indices(entry.elements.get("canceled", "")), "canceled"
        elif entry.id in self._arrays:  # it was requeued: what did not finish waits again
            self._arrays[entry.id] = *self._arrays[entry.id][:2], "queued"
            mine = self._tasks.get(entry.id, {})
            mine.update((task_id, "queued") for task_id, status in mine.items() if status != "finished")
        else:
            self._tasks.setdefault(entry.array, {})[entry.id] = entry.status if entry.final else "queued"

    def counts(self) -> dict[str, int]:
        found = Counter(status for tasks in self._tasks.values() for status in tasks.values())
        for array, (size, canceled, word) in self._arrays.items():
            found[word] += min(size - len(self._tasks.get(array, {})), canceled)
        return dict(+found)


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    ordered = sorted(values)
    return Spread(len(ordered), ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10], ordered[-1])
