"""`Executions`: the executions of a journal as columns, for reports on many of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from pilotq.broker.store.resources import parse_allocation

if TYPE_CHECKING:
    from pilotq.broker.store.journal import JournalEntry


def given_to(entries: Iterable[JournalEntry], *takers: Callable[[JournalEntry], object]) -> Iterator[JournalEntry]:
    """The entries; each is given to ``takers`` first: so several make something of one reading."""
    for entry in entries:
        for take in takers:
            take(entry)
        yield entry


class Words:
    """Words by number: each is kept once."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, word: str) -> int:
        found = self._numbers.get(word)
        if found is None:
            found = self._numbers[word] = len(self.words)
            self.words.append(word)
        return found


class Executions:
    """The executions that began and ended, in the order of their ends; entry number i of each column is execution i.

    Times are unix seconds. ``queued`` is when the execution could have begun as far as the queue goes: of a task that
    is tried again, the end of the execution before; of one that came after others, the end of the last of these (of an
    array that did, once its own end has been added). ``cores`` is how many it held. ``name``, ``status``, ``reason``,
    ``node`` and ``place`` (the text of the allocation) are numbers of words in ``names``, ``statuses`` and so on.
    """

    def __init__(self, entries: Iterable[JournalEntry] = ()) -> None:
        self.ids: list[str] = []
        self.queued, self.started, self.ended = array("d"), array("d"), array("d")
        self.cores, self.name, self.place = array("L"), array("L"), array("L")
        self.status, self.reason, self.node = array("L"), array("L"), array("L")
        self.names, self.places = Words(), Words()
        self.statuses, self.reasons, self.nodes = Words(), Words(), Words()
        self._cores_of: list[int] = []  # place -> how many cores it has
        self._retried: dict[str, float] = {}  # task -> end of its last execution
        self._of_arrays: dict[str, array[int]] = {}  # array -> its executions, until it has ended
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entry: JournalEntry) -> None:
        """Add an entry; one that is no execution, or none that began, is left out."""
        if entry.elements:
            for number in self._of_arrays.pop(entry.id, ()):
                self.queued[number] = min(max(self.queued[number], entry.released or 0.0), self.started[number])
        if entry.elements or not entry.execution or entry.started is None or entry.ended is None:
            return
        if entry.index is not None:
            self._of_arrays.setdefault(entry.array, array("L")).append(len(self.ids))
        queued = entry.started if entry.queued is None else entry.queued
        queued = max(queued, entry.released or queued, self._retried.pop(entry.id, queued))
        if not entry.final:
            self._retried[entry.id] = entry.ended
        self.ids.append(entry.id)
        self.queued.append(min(queued, entry.started))
        self.started.append(entry.started)
        self.ended.append(max(entry.ended, entry.started))
        self.name.append(self.names.number(entry.name))
        place = self.places.number(entry.cpus)
        if place == len(self._cores_of):
            self._cores_of.append(sum(len(part.cores) for part in parse_allocation(entry.cpus)) if entry.cpus else 0)
        self.place.append(place)
        self.cores.append(self._cores_of[place])
        self.status.append(self.statuses.number(entry.status))
        self.reason.append(self.reasons.number(entry.reason))
        self.node.append(self.nodes.number(entry.node))

    def held(self) -> list[tuple[str, int]]:
        """The cores that any of them held, as (node, core), in order."""
        parts = (part for place in self.places.words if place for part in parse_allocation(place))
        return sorted({(part.node, core) for part in parts for core in part.cores})
