"""`Unrecorded`: views of tasks without a record of their own: of elements of arrays, and of tasks of bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from pilotq.broker.client.record_views import (
    age_of,
    array_of,
    element_view,
    indices_in,
    leased_view,
    text_of,
    whole_of,
    why_never_run,
)
from pilotq.broker.client.views import TaskView
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.leases import leased_elements, read_leases
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import CANCELED, indices_of, outcome_at, positions_with
from pilotq.broker.tasks.spec import command_text
from pilotq.broker.tasks.states import ENDED

Views = Callable[[Sequence[str]], list[TaskView | None]]


class Unrecorded:
    """Reads what arrays and bundles know of their tasks; ``views`` gives the views of records."""

    def __init__(self, link: Connection, journal: Journal | None, bundles: Bundles, views: Views) -> None:
        self._link = link
        self._journal = journal
        self._bundles = bundles
        self._views = views

    def describe(self, view: TaskView) -> TaskView:
        """A task of a bundle gets a name and a command of its own, and no index."""
        if view.index is not None and (member := self._bundles.member(view.array, view.index)) is not None:
            view.name, view.command, view.index = member.name, command_text(member.spec), None
        return view

    def outcomes(self, array: str) -> tuple[str, int, bytes]:
        """Of an array: its indices as its record has them, the first position that was not handed out, the outcomes."""
        row, bits = self._link.pipeline(
            [("HMGET", keys.job(array), "pq_array", "pq_next"), ("GET", keys.outcomes(array))]
        )
        return text_of(row[0]), whole_of(row[1]), bits or b""

    def task(self, task_id: str) -> TaskView | None:
        """An element without a record: not assigned yet, or never, or its entry is not in the journal yet."""
        array = array_of(task_id)
        if array is None:
            return None
        view = self._views([array])[0]
        if view is None or not view.array_size:
            entries = self._journal.find(array) if self._journal is not None else []
            return element_view(entries[0], task_id) if entries else None
        span, following, bits = self.outcomes(array)
        indices = indices_in(span)
        position = indices.position(int(task_id.rpartition("_")[2])) if indices is not None else None
        if indices is None or position is None:
            return None
        outcome = outcome_at(bits, position, following)
        if outcome == "started":
            leases = [lease for lease in read_leases(self._link) if lease.array == array]
            for element in leased_elements(self._link, leases):
                if element.id == task_id:
                    return self.describe(leased_view(element, view))
        why = self._why_canceled(view) if outcome == "canceled" else ""
        return self._of_outcome(view, indices, position, outcome, why)

    def _why_canceled(self, array: TaskView) -> str:
        [[stopped, each]] = self._link.read_hashes([keys.job(array.id)], "pq_stopped", "pq_parents")
        return why_never_run(text_of(stopped) or array.reason, "dependency" if each else "canceled")

    def _of_outcome(self, array: TaskView, indices: Indices, position: int, outcome: str, reason: str) -> TaskView:
        status = {"waiting": array.status if array.status == "deferred" else "queued"}.get(outcome, outcome)
        index = indices[position]
        return self.describe(TaskView(
            id=f"{array.id}_{index}", name=array.name, status=status, reason=reason, queue=array.queue,
            command=array.command, array=array.id, index=index, times={"queued": array.times["queued"]},
            retries=0 if status in ENDED else array.retries, ended=status in ENDED,
        ))  # fmt: skip

    # -- many -------------------------------------------------------------------------------------------------------

    def leased(self) -> Iterator[TaskView]:
        """Elements that a node has got and that have no record: short ones, or such that have not begun."""
        leases = sorted(read_leases(self._link), key=lambda lease: age_of(lease.array), reverse=True)
        for array, mine in groupby(leases, key=lambda lease: lease.array):
            if (view := self._views([array])[0]) is not None:
                held = leased_elements(self._link, list(mine))
                yield from (self.describe(leased_view(element, view)) for element in held if element.is_known)

    def waiting(self, bundle: TaskView) -> Iterator[TaskView]:
        """The tasks of a bundle that were not handed out, newest first; those that came back have records."""
        text, following, bits = self.outcomes(bundle.id)
        if (indices := indices_in(text)) is None:
            return
        for position in range(len(indices) - 1, following - 1, -1):
            if outcome_at(bits, position, following) == "waiting":
                yield self._of_outcome(bundle, indices, position, "waiting", "")

    def canceled(self, bundle: str, seen: set[str]) -> Iterator[TaskView]:
        """The tasks of a bundle that were canceled and are not ``seen``: they have neither a record nor an entry."""
        view = self._views([bundle])[0]
        text, _, bits = self.outcomes(bundle)
        if view is None or (indices := indices_in(text)) is None:
            return
        why = self._why_canceled(view)
        for position in positions_with(bits, (CANCELED,), len(indices)):
            if f"{bundle}_{position}" not in seen:
                yield self._of_outcome(view, indices, position, "canceled", why)


def canceled_members(bundles: Iterable[JournalEntry], seen: set[str]) -> Iterator[TaskView]:
    """The same from the entries of bundles that have ended: nothing else knows more of them."""
    for entry in bundles:
        for index in indices_of(entry.elements.get("canceled", "")):
            task_id = f"{entry.id}_{index}"
            if task_id not in seen and (view := element_view(entry, task_id)) is not None:
                yield view
