"""`Archive`: the tasks of a pilot that has ended, read from its journal, with the reading methods of `Broker`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from pilotq.broker.client.output import captured
from pilotq.broker.client.past import PastTasks
from pilotq.broker.client.record_views import array_of, element_view, view_of_entry
from pilotq.broker.client.unrecorded import canceled_members
from pilotq.broker.client.views import Counts, Explanation, TaskView
from pilotq.broker.errors import UnknownTask
from pilotq.broker.os_strings import printable
from pilotq.broker.pilot.directory import TOTAL, Pilot
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.tasks.array_outcomes import count_indices


class Archive:
    """The journal of one pilot that has ended, as a read-only `Broker`.

    A task that had not ended when the pilot did is shown as queued, if it ever ran, and else is unknown here: its
    record is in the server's data, until the pilot is resumed.

        for view in Archive(Pilot("/data/run/.pilotq")).tasks(status="failed"):
            print(view.id, view.reason)
    """

    def __init__(self, pilot: Pilot) -> None:
        self.pilot = pilot
        self._journal = Journal(pilot.journal)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def gap(self) -> str:
        """A sentence where there may be tasks that the journal does not have; else empty."""
        if self.complete:
            return ""
        return (
            "the pilot was killed, and its journal does not know what never ran: "
            f"`pilotq start --resume {self.pilot.directory}` goes on with it"
        )

    def task(self, task_id: str) -> TaskView:
        """One task. Raises UnknownTask."""
        for entry in self._journal.find(task_id):
            return _view(entry)
        array = array_of(task_id)
        for entry in self._journal.find(array) if array else ():
            if view := element_view(entry, task_id):
                return view
        raise UnknownTask(
            f"the pilot in {self.pilot.directory} has ended, and its journal does not know {task_id!r}: `pilotq list` "
            f"shows what ran there; what never ran comes back with `pilotq start --resume {self.pilot.directory}`"
        )

    def explain(self, task_id: str) -> Explanation:
        """Why a task ended as it did. Raises UnknownTask."""
        from pilotq.broker.client.explain import ended  # brings placement along, which a submit does not need

        return ended(self.task(task_id), self.pilot.directory)

    def tasks(self, *, status: str | None = None, limit: int = 1000) -> Iterator[TaskView]:
        """Tasks, those that ended last first; behind them those of bundles that were canceled and never ran."""
        seen: set[str] = set()

        def known() -> Iterator[TaskView]:
            bundles = []
            for entry in self._journal.newest():
                if entry.id not in seen:
                    seen.add(entry.id)
                    if entry.bundle:
                        bundles.append(entry)
                    else:
                        yield _view(entry)
            yield from canceled_members(bundles, seen)

        return islice((view for view in known() if status in (None, view.status)), limit)

    def find(self, name: str) -> list[str]:
        """Ids of the tasks with this name, without elements of arrays."""
        found = list(dict.fromkeys(entry.submitted_as for entry in self._journal.tasks_by_name(printable(name))))
        if not found:
            self._journal.examine()
        return found

    def output(self, task_id: str, stream: str = "stdout") -> Iterator[bytes]:
        """The captured output of the last execution, in pieces; ``stream``: stdout or stderr."""
        return captured(self._journal, self.pilot, task_id, stream)

    follow = output  # nothing more will come

    def counts(self) -> Counts:
        """Numbers of tasks; ``total`` is at least what was submitted before the pilot was asked to end."""
        last: dict[str, JournalEntry] = {}
        unfinished: dict[str, dict[str, JournalEntry]] = {}  # array -> the same of its elements that did not finish
        for entry in map(_without_output, self._journal.entries()):
            elements = unfinished.setdefault(entry.array, {}) if entry.array else last
            last.pop(entry.id, None)
            elements.pop(entry.id, None)
            (last if entry.status == "finished" else elements)[entry.id] = entry
            if not entry.final and not entry.execution:  # a retry: of an array what had not finished does not count
                unfinished.pop(entry.id, None)
        for elements in unfinished.values():
            last.update(elements)
        counts = Counts()
        for entry in last.values():
            if entry.elements:
                for status, ranges in entry.elements.items():
                    counts.add(status, count_indices(ranges))
            elif entry.final and not (entry.array in last and last[entry.array].elements):
                counts.add(entry.status)
        cut_off = sum(not entry.final for entry in last.values())
        counts.total = max(counts.ended + cut_off, self._submitted() or 0)
        return counts

    @property
    def complete(self) -> bool:
        """Whether it is known how many tasks never ran. It is not after the pilot was killed."""
        return self._submitted() is not None

    def _submitted(self) -> int | None:
        try:
            with open(self.pilot.path(TOTAL)) as file:
                return int(file.read())
        except (FileNotFoundError, ValueError):  # a power loss may have emptied it
            return None

    def wait(self, ids: Iterable[str] | None = None) -> Counts:
        """What became of these tasks (default: all); returns at once, for what has not ended never will here."""
        if ids is None:
            return self.counts()
        wanted = list(dict.fromkeys(ids))
        statuses = PastTasks(None, self._journal, wanted).statuses(wanted)
        if len(statuses) < len(wanted):  # these never ran, or were to be tried again, or their lines cannot be read
            self._journal.examine()
        counts = Counts(total=len(wanted))
        for status in statuses.values():
            counts.add(status)
        return counts


def _view(entry: JournalEntry) -> TaskView:
    view = view_of_entry(entry)
    if not entry.final:
        # It was to be retried, and waits for that; or its children had not ended.
        view.status, view.exit_code, view.signal = "queued", None, None
        if entry.joining is not None:
            view.status, view.reason, view.times["ended"] = "deferred", "joining", None
    return view


def _without_output(entry: JournalEntry) -> JournalEntry:
    entry.stdout = entry.stderr = entry.message = ""
    return entry
