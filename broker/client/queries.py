"""`TaskQueries`: views of tasks and nodes, read from Redis while it has their records, from the journal afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain, islice

from pilotq.broker.client.joins import child_of
from pilotq.broker.client.node_views import read_node_views
from pilotq.broker.client.record_views import (
    VIEW_FIELDS,
    add_journal_facts,
    age_of,
    array_of,
    indices_in,
    size_of,
    text_of,
    view_of_entry,
    view_of_record,
    whole_of,
)
from pilotq.broker.client.unrecorded import Unrecorded, canceled_members
from pilotq.broker.client.views import Counts, NodeView, TaskView
from pilotq.broker.os_strings import printable
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.connection import Connection, ReplyError
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.leases import number_leased, with_leases
from pilotq.broker.store.registry import user_queues
from pilotq.broker.tasks.array_outcomes import element_ranges
from pilotq.broker.tasks.states import ENDED, WAITING

SLICE = 500
RUNNING_READ_MAX = 1000  # tasks with a worker that are read to see which of them run
WAITING_KINDS = ("deferred", "scheduled", "ready")
ENDED_KINDS = {"finished": "finished", "failed": "failed", "stopped": "failed", "canceled": "canceled"}
Pages = Callable[[int, int], Iterable[bytes]]


class TaskQueries:
    """Queries of the tasks and nodes of one pilot; ``journal`` is None where the pilot's directory is not known."""

    def __init__(self, link: Connection, journal: Journal | None) -> None:
        self.link = link
        self.journal = journal
        self._bundles = Bundles(link)
        self._unrecorded = Unrecorded(link, journal, self._bundles, self.views)

    def views(self, ids: Sequence[str]) -> list[TaskView | None]:
        """Views of these tasks from Redis, in one round trip for each 500; None for tasks without a record."""
        found: list[TaskView | None] = []
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            rows = with_leases(self.link, part, VIEW_FIELDS, self._read(part))
            found += [view_of_record(i, row) if row[0] is not None else None for i, row in zip(part, rows, strict=True)]
        elements = [view for view in found if view is not None and view.array]
        self._bundles.learn(view.array for view in elements)
        for view in elements:
            self._unrecorded.describe(view)
        return found

    def statuses(self, ids: Sequence[str]) -> dict[str, str]:
        """id -> status, of those that have a record."""
        found: dict[str, str] = {}
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            fields = ("status", "pq_class", "pq_exec")
            rows = with_leases(self.link, part, fields, self._read(part, fields))
            found.update((i, text_of(row[0])) for i, row in zip(part, rows, strict=True) if row[0])
        return found

    def counts(self, ids: Sequence[str]) -> Counts:
        """What has become of these tasks so far; elements of arrays count one each, also while their array runs.

        What is in no record any more has ended, in a way that is not known here: it counts as finished.
        """
        from pilotq.broker.client.past import PastTasks

        found = Counts()
        gone: list[str] = []  # without a record
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            rows = self._read(part, ("status", "pq_array", "pq_left", "pq_unfinished", "pq_failures"))
            for task_id, (status, span, left, unfinished, failures) in zip(part, rows, strict=True):
                if size := size_of(text_of(span)):
                    ended = size if text_of(status) in ENDED else size - whole_of(left)
                    found.total += size
                    found.finished += ended - whole_of(unfinished)
                    found.failed += whole_of(failures)
                    found.canceled += whole_of(unfinished) - whole_of(failures)
                    continue
                found.total += 1
                if status is None:
                    gone.append(task_id)
                elif (word := text_of(status)) in ENDED:
                    found.add(word)
        known = PastTasks(self.link, None, ()).statuses(gone) if gone else {}
        for word in (known.get(task_id, "finished") for task_id in gone):
            if word in ENDED:
                found.add(word)
        return found

    def _read(self, ids: Sequence[str], fields: Sequence[str] = VIEW_FIELDS) -> list[Sequence[bytes | None]]:
        commands = [("HMGET", keys.job(i), *fields) for i in ids]
        try:
            return self.link.pipeline(commands)
        except ReplyError:  # under the name of one of them is something else: it has no record
            return [self._read([i], fields)[0] for i in ids] if len(ids) > 1 else [[None] * len(fields)]

    def task(self, task_id: str) -> TaskView | None:
        """All that is known of one task."""
        view = self.views([task_id])[0]
        entries = self.journal.find(task_id) if self.journal is not None else []
        if view is None:
            if not entries or not entries[0].final:  # of a task that was to run again its array may know more
                found = self._unrecorded.task(task_id)
                if found is not None or not entries:
                    return found
            return view_of_entry(entries[0])
        (submission,) = self._read([task_id], ("pq_sub",))[0]
        view.child_of = child_of(self.link, text_of(submission)).partition("#")[0]
        if view.array_size:
            array, following, bits = self._unrecorded.outcomes(task_id)
            view.elements = element_ranges(bits, array, following) if indices_in(array) else {}
        if view.ended and entries:
            add_journal_facts(view, entries[0])
        return view

    # -- many -------------------------------------------------------------------------------------------------------

    def tasks(self, status: str | None, limit: int) -> Iterator[TaskView]:
        """At most ``limit`` tasks, newest first.

        First those with a record in Redis (running, waiting, ended), then those that only the journal has, and last
        tasks of bundles that were canceled before a node had them. Waiting elements of an array are shown by the array.
        """
        seen: set[str] = set()

        def known() -> Iterator[TaskView]:
            for view in self._of_redis(status, min(SLICE, limit)):
                if view.id not in seen:
                    seen.add(view.id)
                    yield view
            if status is None or status in ENDED:
                bundles: list[JournalEntry] = []
                yield from self._of_journal(seen, bundles)
                if status in (None, "canceled"):
                    yield from self._canceled_members(seen, bundles)

        return islice((view for view in known() if status in (None, view.status)), limit)

    def _of_redis(self, status: str | None, page: int) -> Iterator[TaskView]:
        """Tasks with a record in Redis that may have this status. ``page``: how much of each list is read at once."""
        if status in (None, "started"):
            yield from self._started(page)
        if status is None or status in WAITING:
            for view in self._views(self._waiting(page), page):
                yield from self._unrecorded.waiting(view) if view.is_bundle else (view,)
        if status is None:
            yield from self._started(page)  # what has left the waiting ones before these were read
        kinds = sorted(set(ENDED_KINDS.values())) if status is None else [ENDED_KINDS.get(status, "")]
        ended = [
            self._views(_pages(self._of_registry(kind, queue), page), page)
            for kind in kinds if kind
            for queue in self._queues()
        ]  # fmt: skip
        both = merge(*ended, key=lambda view: view.times.get("ended") or 0.0, reverse=True)
        yield from (view for view in both if not view.is_bundle)

    def _started(self, page: int) -> Iterator[TaskView]:
        yield from (view for view in self._views(self._running(), page) if not view.is_bundle)
        yield from self._unrecorded.leased()

    def _canceled_members(self, seen: set[str], ended: list[JournalEntry]) -> Iterator[TaskView]:
        """Tasks of bundles that were canceled and are not ``seen``; ``ended``: bundles as the journal has them."""
        known = set()
        for bundle in self._bundle_ids():
            known.add(bundle)
            yield from self._unrecorded.canceled(bundle, seen)
        yield from canceled_members((entry for entry in ended if entry.id not in known), seen)

    def _bundle_ids(self) -> Iterator[str]:
        ids = self._recorded()
        while batch := list(islice(ids, SLICE)):
            marks = self.link.read_hashes([keys.job(task_id) for task_id in batch], "pq_bundle")
            yield from (task_id for task_id, [mark] in zip(batch, marks, strict=True) if mark is not None)

    def _recorded(self) -> Iterator[str]:
        """Ids of all that has a record, as far as a list or registry has it."""
        return chain(self._running(), self._waiting(SLICE), *(
            _pages(self._of_registry(kind, queue), SLICE)
            for kind in sorted(set(ENDED_KINDS.values())) for queue in self._queues()
        ))  # fmt: skip

    def bundles(self, ids: Sequence[str]) -> dict[str, int]:
        """Those of these ids that are of bundles, with the number of their tasks."""
        found: dict[str, int] = {}
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            rows = self.link.read_hashes([keys.job(i) for i in part], "pq_bundle", "pq_array")
            found.update((i, size_of(text_of(row[1]))) for i, row in zip(part, rows, strict=True) if row[0] is not None)
        return found

    def _views(self, ids: Iterator[str], page: int) -> Iterator[TaskView]:
        while batch := list(islice(ids, page)):
            yield from (view for view in self.views(batch) if view is not None)

    def _queues(self) -> list[str]:
        return user_queues(self.link)

    def executions(self) -> Iterator[str]:
        """Members of the wip registries, ``<id>:<execution>``; an array with nothing left to assign is ``<id>:0``."""
        queues = self._queues()
        for members in self.link.pipeline([("ZRANGE", keys.registry("wip", queue), 0, -1) for queue in queues]):
            yield from (member.decode() for member in members)

    def running(self) -> int:
        """How many executions have a slot. Which of the very short ones run is told to nobody: of those at most as many
        as there are slots."""
        members = [member for member in self.executions() if not member.endswith(":0")]
        read = [("HGET", keys.job(member.rpartition(":")[0]), "pq_slot") for member in members[:RUNNING_READ_MAX]]
        slots, *own = self.link.pipeline([("HGET", keys.STATUS, "slots"), *read])
        handed = len(members) + sum(number_leased(self.link).values())
        return max(sum(slot is not None for slot in own), min(handed, int(slots or 0)))

    def _running(self) -> Iterator[str]:
        yield from sorted((member.rpartition(":")[0] for member in self.executions()), key=age_of, reverse=True)

    def _waiting(self, page: int) -> Iterator[str]:
        queues = self._queues()
        # A job of RQ's producers is in its user's queue until it is routed to a class list.
        names = [*(name.decode() for name in self.link.call("HKEYS", keys.CLASSES)), *queues]
        lengths = self.link.pipeline([("LLEN", keys.queue(name)) for name in names])
        filled = [name for name, length in zip(names, lengths, strict=True) if length]
        lists = [_pages(self._of_list(name), page) for name in filled]
        registries = [_pages(self._of_registry(kind, queue), page) for kind in WAITING_KINDS for queue in queues]
        registries += [_pages(self._of_set(keys.rate_limited(limit)), page) for limit in self._limits()]
        yield from merge(*lists, *registries, key=age_of, reverse=True)

    def open_ids(self) -> list[str]:
        """Ids of what has not ended; an array stands for its elements."""
        found = dict.fromkeys(chain(self._running(), self._waiting(SLICE)))
        return [task_id for task_id in found if array_of(task_id) not in found]

    def retriable(self) -> list[str]:
        """Ids of what ended and did not finish, oldest first; an array stands for its elements."""
        pages = [self._of_registry(kind, queue) for kind in ("failed", "canceled") for queue in self._queues()]
        found = dict.fromkeys(chain(*(_pages(page, SLICE) for page in pages)))
        return sorted((i for i in found if array_of(i) not in found), key=age_of)

    def _of_list(self, name: str) -> Pages:
        key = keys.queue(name)
        return lambda first, count: reversed(self.link.call("LRANGE", key, -first - count, -first - 1))

    def _limits(self) -> list[str]:
        return sorted(name.decode() for name in self.link.call("SMEMBERS", keys.RATE_LIMITS))

    def uncounted(self) -> int:
        """Number of jobs of RQ's producers that are not counted yet; exact where all counted tasks have ended."""
        deferred = [("ZCARD", keys.registry("deferred", queue)) for queue in self._queues()]
        return self.to_be_queued() + (sum(map(int, self.link.pipeline(deferred))) if deferred else 0)

    def to_be_queued(self) -> int:
        """Number of tasks that get into a class list though no other task ends: routed, or when their time comes."""
        commands: list[tuple[str, ...]] = []
        for queue in self._queues():
            commands += [("LLEN", keys.queue(queue))]
            commands += [("ZCARD", keys.registry("scheduled", queue)), ("ZCARD", keys.registry("ready", queue))]
        commands += [("ZCARD", keys.rate_limited(limit)) for limit in self._limits()]
        return sum(map(int, self.link.pipeline(commands))) if commands else 0

    def _of_registry(self, kind: str, queue: str) -> Pages:
        return self._of_set(keys.registry(kind, queue))

    def _of_set(self, key: str) -> Pages:
        return lambda first, count: self.link.call("ZREVRANGE", key, first, first + count - 1)

    def _of_journal(self, seen: set[str], bundles: list[JournalEntry]) -> Iterator[TaskView]:
        for entry in self.journal.newest() if self.journal is not None else ():
            if entry.final and entry.id not in seen:
                seen.add(entry.id)
                if entry.bundle:
                    bundles.append(entry)
                else:
                    yield view_of_entry(entry)

    def find(self, name: str) -> list[str]:
        """Ids of the tasks with this name, without elements of arrays."""
        found: dict[str, None] = {}
        wanted = printable(name)
        ids = self._recorded()
        while batch := list(islice(ids, SLICE)):
            rows = self.link.pipeline([("HMGET", keys.job(i), "pq_name", "pq_array_of", "pq_bundle") for i in batch])
            for task_id, (own, array, is_bundle) in zip(batch, rows, strict=True):
                if is_bundle:
                    found.update((member, None) for member, other in self._bundles.names(task_id) if other == wanted)
                elif own == wanted.encode() and not array:
                    found[task_id] = None
        entries = self.journal.tasks_by_name(wanted) if self.journal is not None else []
        found.update((entry.submitted_as, None) for entry in entries)
        return list(found)

    def nodes(self) -> list[NodeView]:
        """The nodes that have joined, by name."""
        return read_node_views(self.link)


def _pages(read: Pages, page: int) -> Iterator[str]:
    """All that ``read(first, count)`` gives, ``page`` at a time."""
    first = 0
    while batch := list(read(first, page)):
        yield from (member.decode() for member in batch)
        if len(batch) < page:
            return
        first += page
