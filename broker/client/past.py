"""`PastTasks`: what became of tasks that have no record in Redis (any more): their array knows, or the journal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pilotq.broker.client.record_views import array_of, indices_in
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection, ReplyError
from pilotq.broker.store.journal import Journal, JournalReader
from pilotq.broker.tasks.array_outcomes import indices_of, outcome_at


class PastTasks:
    """Statuses of many tasks without records. The journal is read once, and then what is added to it.

    ``ids``: all that may be asked for. ``link`` is None when the pilot has ended, ``journal`` when it cannot be read.
    """

    def __init__(self, link: Connection | None, journal: Journal | None, ids: Iterable[str]) -> None:
        self._link = link
        wanted = set(ids)
        wanted |= {array for array in map(array_of, wanted) if array is not None}
        self._reader = JournalReader(journal, wanted) if journal is not None else None
        self._statuses: dict[str, str] = {}  # of what the journal has as ended
        self._ranges: dict[str, dict[str, str]] = {}  # of ended arrays: status -> ranges of indices
        self._elements: dict[str, dict[int, str]] = {}  # the same by index, of those that were asked for

    def statuses(self, ids: Sequence[str]) -> dict[str, str]:
        """id -> its status, for those that are known; of an element that has not ended ``queued`` or ``started``."""
        found = self._by_arrays(ids) if self._link is not None else {}
        rest = [task_id for task_id in ids if task_id not in found]
        if rest and self._reader is not None:
            self._read(self._reader)
            found.update((task_id, status) for task_id in rest if (status := self._in_journal(task_id)))
        return found

    def _by_arrays(self, ids: Sequence[str]) -> dict[str, str]:
        """Elements of arrays that have a record."""
        assert self._link is not None
        found: dict[str, str] = {}
        wanted: dict[str, list[str]] = {}
        for task_id in ids:
            if (array := array_of(task_id)) is not None:
                wanted.setdefault(array, []).append(task_id)
        for array, elements in wanted.items():
            commands = [("HMGET", keys.job(array), "pq_array", "pq_next"), ("GET", keys.outcomes(array))]
            try:
                row, outcomes = self._link.pipeline(commands)
                following = int(row[1] or 0)
            except (ReplyError, ValueError):  # others can write there
                continue
            if (indices := indices_in(row[0].decode("utf-8", "replace") if row[0] else "")) is None:
                continue
            for task_id in elements:
                if (position := indices.position(int(task_id.rpartition("_")[2]))) is not None:
                    outcome = outcome_at(outcomes or b"", position, following)
                    found[task_id] = "queued" if outcome == "waiting" else outcome
        return found

    def _read(self, reader: JournalReader) -> None:
        for entry in reader.read():
            self._ranges.pop(entry.id, None)
            self._elements.pop(entry.id, None)
            if not entry.final:  # it is tried again
                self._statuses.pop(entry.id, None)
                continue
            self._statuses[entry.id] = entry.status
            if entry.elements:
                self._ranges[entry.id] = entry.elements

    def _in_journal(self, task_id: str) -> str | None:
        array = array_of(task_id)
        if array is None or task_id in self._statuses or array not in self._ranges:
            return self._statuses.get(task_id)
        if array not in self._elements:
            ranges = self._ranges[array]
            self._elements[array] = {index: status for status, text in ranges.items() for index in indices_of(text)}
        return self._elements[array].get(int(task_id.rpartition("_")[2]))
