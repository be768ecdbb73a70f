"""What tasks asked for and what they have used, by their names, and what to ask for next time. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.resources import parse_allocation
from pilotq.broker.tasks.model import Task

MEMORY_MARGIN, TIME_MARGIN = 1.2, 1.5  # of what was used most
LEAST_MEMORY = 16 << 20
LEARN_FROM = 3  # finished executions of a name
LONG_S = 1.0  # of shorter executions the share of their cores says little: most of it is their start


class Usage(msgspec.Struct, kw_only=True):
    """The executions of the tasks with one name; of tasks without a name, of one program.

    ``cores``, ``memory`` (bytes on a node) and ``limit`` (seconds) are the most that any of them had or asked for, 0
    where none did. ``busy`` is the most cores that one kept busy, ``peak`` the most bytes, ``longest`` the longest run,
    in seconds. ``next_cores``, ``next_memory`` and ``next_limit`` are to be asked for next time, with a margin; 0 while
    nothing is known.
    """

    name: str
    program: str = ""
    executions: int = 0
    finished: int = 0
    cores: int = 0
    busy: float = 0.0
    memory: int = 0
    peak: int = 0
    limit: float = 0.0
    longest: float = 0.0
    short_of_memory: int = 0  # executions that ended so
    short_of_time: int = 0
    next_cores: int = 0
    next_memory: int = 0
    next_limit: float = 0.0


def usage(entries: Iterable[JournalEntry], called: Callable[[str], str] = str) -> list[Usage]:
    """The usage by name, those that ran longest in all first; ``called`` gives the name that an entry counts for."""
    tally = UsageTally(called)
    for entry in entries:
        tally.add(entry)
    return tally.take()


class UsageTally:
    """Adds up the usage by name, an entry at a time; see `usage`."""

    def __init__(self, called: Callable[[str], str] = str) -> None:
        self._called = called
        self._found: dict[tuple[str, str], Usage] = {}
        self._seconds: dict[tuple[str, str], float] = {}

    def add(self, entry: JournalEntry) -> None:
        if entry.elements or not entry.execution or entry.started is None or entry.ended is None:
            return
        program = "" if entry.name else entry.command.partition(" ")[0]
        key = (self._called(entry.name), program)
        if key not in self._found:
            self._found[key] = Usage(name=key[0], program=program)
        ran = max(entry.ended - entry.started, 0.0)
        self._seconds[key] = self._seconds.get(key, 0.0) + ran
        _count(self._found[key], entry, ran)

    def take(self) -> list[Usage]:
        """The usage of what was added; nothing is kept."""
        found, seconds, self._found, self._seconds = self._found, self._seconds, {}, {}
        for one in found.values():
            _advise(one)
        return [found[key] for key in sorted(found, key=lambda key: -seconds[key])]


def _count(one: Usage, entry: JournalEntry, ran: float) -> None:
    one.executions += 1
    one.finished += entry.status == "finished"
    one.short_of_memory += entry.reason == "memory"
    one.short_of_time += entry.reason == "time limit"
    one.cores = max(one.cores, sum(len(part.cores) for part in parse_allocation(entry.cpus)) if entry.cpus else 0)
    one.memory = max(one.memory, entry.memory)
    one.limit = max(one.limit, entry.limit or 0.0)
    one.peak = max(one.peak, entry.max_rss or 0)
    one.longest = max(one.longest, ran)
    if ran >= LONG_S:
        one.busy = max(one.busy, (entry.cpu or 0.0) / ran)


def _advise(one: Usage) -> None:
    if one.peak:
        # What was ended for it would have used more.
        used = (
            max(one.peak, one.memory) * 2
            if one.short_of_memory and one.peak >= one.memory
            else one.peak * MEMORY_MARGIN
        )
        one.next_memory = _round_up(max(int(used), LEAST_MEMORY))
    if one.longest:
        over = one.short_of_time and one.longest >= one.limit
        one.next_limit = float(math.ceil(one.longest * (2.0 if over else TIME_MARGIN)))
    if one.longest >= LONG_S:
        one.next_cores = min(max(math.ceil(one.busy - 0.1), 1), max(one.cores, 1))


def learned(tasks: Iterable[Task], usages: Iterable[Usage]) -> list[Task]:
    """These tasks; those with a name ask for what earlier ones with that name have used, with a margin.

    What a task asks for itself is a bound: it gets no more cores and no more memory than that. The time is what it may
    take (``time_request``), and no limit; a task that says a time of its own keeps it. Of a name of which fewer than
    LEARN_FROM executions have finished nothing is known.
    """
    known = {one.name: one for one in usages if one.name and one.finished >= LEARN_FROM}
    return [_filled_in(task, known[task.name]) if task.name in known else task for task in tasks]


def _filled_in(task: Task, one: Usage) -> Task:
    request = task.request
    memory = min(request.memory or one.next_memory, one.next_memory or request.memory)
    low, high = request.cores
    if one.next_cores and request.nodes is None and not request.spread:
        # One core is what a task gets that says nothing.
        most = one.next_cores if request.cores == (1, 1) else min(high, one.next_cores)
        low, high = min(low, most) if request.cores != (1, 1) else most, most
    changes: dict[str, Any] = {"request": msgspec.structs.replace(request, memory=memory, cores=(low, high))}
    if one.next_limit and task.time_limit is None and task.time_request is None:
        changes["time_request"] = one.next_limit
    return msgspec.structs.replace(task, **changes)


def _round_up(size: int) -> int:
    """The next number of bytes with two digits in MiB or GiB."""
    unit = 1 << 30 if size > 10 << 30 else 1 << 20
    number = size / unit
    step: int = 10 ** max(int(math.log10(max(number, 1.0))) - 1, 0)
    return math.ceil(number / step) * step * unit
