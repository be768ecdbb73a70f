"""`Tally`: what the journal says of ended tasks, by name and array, by reason, and over time; read bit by bit."""

from __future__ import annotations

import os
import re
import time
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

from pilotq.broker.client.overview import FailureGroup
from pilotq.broker.store.journal import Journal, JournalEntry, JournalReader
from pilotq.broker.tasks.array_outcomes import count_indices

GROUPS_MAX = 2000  # names and arrays that are counted
FAILURES_MAX = 500  # groups of failures that are counted
UNDONE_MAX = 100_000  # tasks that did not finish, and whose group is remembered in case they run again
IDS_MAX = 500  # of a group of failures
SAMPLE_S = 5
SAMPLES = 60
RATE_SAMPLES = 12
LOOK_EVERY = 256  # entries between two looks at the clock
_NUMBER = re.compile("[0-9]+")

Group = tuple[str, str]  # the array, or empty and the pattern of the name


def pattern_of(name: str) -> str:
    """What tasks are called whose names differ in their numbers only: ``fold-*`` of ``fold-17``."""
    return _NUMBER.sub("*", name)


def group_of(array: str, name: str) -> Group:
    """What the progress of a task counts for."""
    return (array, "") if array else ("", pattern_of(name))


class GroupTally:
    """Ended tasks of one group, and how many of them ended in the last minute."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outcomes: Counter[str] = Counter()
        self.recent: deque[list[int]] = deque(maxlen=RATE_SAMPLES)  # [number of the sample, ended in it]

    def add(self, outcome: str, number: int, sample: int) -> None:
        self.outcomes[outcome] += number
        if number > 0 and sample:
            if not self.recent or sample > self.recent[-1][0]:
                self.recent.append([sample, 0])
            self.recent[-1][1] += number

    def rate(self, now: float) -> float:
        """Ended per second over the last minute, or since the first end in it."""
        current = int(now // SAMPLE_S)
        recent = [one for one in self.recent if one[0] > current - RATE_SAMPLES]
        if not recent:
            return 0.0
        return sum(one[1] for one in recent) / max(now - recent[0][0] * SAMPLE_S, 1.0)


class _Undone(NamedTuple):
    group: Group
    outcome: str
    failure: tuple[str, int | None, str, str] | None


class Tally:
    """Reads a journal from its beginning on, as far as there is time at each update.

    ``ended`` has, since the last `take_ended`, the ids that ended (and False) or are to run again (and True).
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._reader = JournalReader(journal, None) if journal is not None else None
        self.groups: dict[Group, GroupTally] = {}
        self.failures: dict[tuple[str, int | None, str, str], FailureGroup] = {}
        self.more_failures = 0
        self.samples: dict[int, int] = {}
        self._undone: OrderedDict[str, _Undone] = OrderedDict()
        self._elements: dict[str, set[str]] = {}  # the ids of those by their array
        self._changes: list[tuple[str, bool]] = []

    @property
    def behind(self) -> int:
        """Bytes of the journal that were not read."""
        if self._reader is None or self._journal is None:
            return 0
        try:
            return max(os.stat(self._journal.path).st_size - self._reader.offset, 0)
        except FileNotFoundError:
            return 0

    def update(self, seconds: float) -> None:
        """Read what was written since the last update, for so long at most."""
        if self._reader is None:
            return
        deadline = time.monotonic() + seconds
        for number, entry in enumerate(self._reader.read(), start=1):
            self._add(entry)
            if not number % LOOK_EVERY and time.monotonic() > deadline:
                break
        oldest = int(time.time() // SAMPLE_S) - SAMPLES
        for sample in [sample for sample in self.samples if sample <= oldest]:
            del self.samples[sample]

    def take_ended(self) -> list[tuple[str, bool]]:
        """The ids that ended since the last call, and True where one is to run again instead."""
        changes, self._changes = self._changes, []
        return changes

    def _add(self, entry: JournalEntry) -> None:
        if not entry.final:
            if not entry.execution:
                self._changes.append((entry.id, True))
                for task_id in [entry.id, *self._elements.get(entry.id, ())]:
                    self._again(task_id)
            return
        self._changes.append((entry.id, False))
        sample = int((entry.ended or 0.0) // SAMPLE_S)
        if entry.elements:
            # Elements have entries of their own, but for those that never ran.
            group, size = self._group((entry.id, ""), entry.name), sum(map(count_indices, entry.elements.values()))
            group.add("canceled", max(size - sum(group.outcomes.values()), 0), 0)
            return
        key = group_of(entry.array, entry.name)
        outcome = "failed" if entry.status == "stopped" else entry.status
        self._again(entry.id)  # somebody may have repaired the journal: an end counts once
        # The tasks of a bundle have names of their own, and it has none.
        self._group(key, "" if entry.array and entry.index is None else entry.name).add(outcome, 1, sample)
        if sample:
            self.samples[sample] = self.samples.get(sample, 0) + 1
        if outcome != "finished":
            failure = self._fail(entry) if outcome == "failed" else None
            self._undone[entry.id] = _Undone(key, outcome, failure)
            if entry.array:
                self._elements.setdefault(entry.array, set()).add(entry.id)
            if len(self._undone) > UNDONE_MAX:
                self._forget(next(iter(self._undone)))

    def _forget(self, task_id: str) -> _Undone | None:
        undone = self._undone.pop(task_id, None)
        array = undone.group[0] if undone is not None else ""
        if array:
            self._elements[array].discard(task_id)
            if not self._elements[array]:
                del self._elements[array]
        return undone

    def _again(self, task_id: str) -> None:
        """A task that did not finish runs again."""
        undone = self._forget(task_id)
        if undone is None:
            return
        self._group(undone.group, "").outcomes[undone.outcome] -= 1
        group = self.failures.get(undone.failure) if undone.failure is not None else None
        if group is None or undone.failure is None:
            return
        group.number -= 1
        if task_id in group.ids:
            group.ids.remove(task_id)
        if group.number <= 0:
            del self.failures[undone.failure]
        elif group.ids and group.example == task_id:
            group.example = group.ids[-1]

    def _group(self, key: Group, name: str) -> GroupTally:
        group = self.groups.get(key)
        if group is None:
            if len(self.groups) >= GROUPS_MAX:
                key = ("", "\0")  # no name has it: all others
                if key in self.groups:
                    return self.groups[key]
            group = self.groups[key] = GroupTally(name if key[0] else key[1])
        return group

    def _fail(self, entry: JournalEntry) -> tuple[str, int | None, str, str] | None:
        exit_code = entry.exit_code if entry.reason == "exit" else None
        key = (entry.reason or entry.status, exit_code, pattern_of(entry.name), entry.node)
        group = self.failures.get(key)
        if group is None:
            if len(self.failures) >= FAILURES_MAX:
                self.more_failures += 1
                return None
            group = FailureGroup(reason=key[0], exit_code=exit_code, name=key[2], node=entry.node)
            self.failures[key] = group
        group.number += 1
        group.example, group.message, group.at = entry.id, entry.message, entry.ended
        group.ids.append(entry.id)
        del group.ids[:-IDS_MAX]
        return key
