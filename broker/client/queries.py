"""`TaskQueries`: views of tasks and nodes, read from Redis while it has their records, from the journal afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain, groupby, islice

from pilotq.broker.client.node_views import read_node_views
from pilotq.broker.client.views import Counts, NodeView, TaskView
from pilotq.broker.os_strings import printable
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.connection import Connection, ReplyError
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.leases import LeasedElement, leased_elements, number_leased, read_leases
from pilotq.broker.store.registry import user_queues
from pilotq.broker.store.resources import class_info
from pilotq.broker.store.store import from_iso
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import count_indices, element_ranges, outcome_at, outcome_of
from pilotq.broker.tasks.spec import command_text
from pilotq.broker.tasks.states import ENDED, WAITING

SLICE = 500
RUNNING_READ_MAX = 1000  # tasks with a worker that are read to see which of them run
VIEW_FIELDS = (
    "status", "description", "origin", "pq_name", "pq_reason", "pq_exit", "pq_exec", "pq_node", "pq_cpus",
    "pq_queued_at", "enqueued_at", "started_at", "ended_at", "pq_retries", "pq_array", "pq_next", "pq_array_of",
    "pq_running", "pq_class", "pq_bundle",
)  # fmt: skip
WAITING_KINDS = ("deferred", "scheduled", "ready")
ENDED_KINDS = {"finished": "finished", "failed": "failed", "stopped": "failed", "canceled": "canceled"}
_HEAD = re.compile(r"[0-9]+:[0-9]+:([0-9]{1,16})(?= |$)")  # of pq_array
_ELEMENT = re.compile(r"(.+)_(0|[1-9][0-9]{0,15})")  # an index has one spelling, and at most 16 digits (INDEX_LIMIT)
Pages = Callable[[int, int], Iterable[bytes]]


def _text(value: bytes | None) -> str:
    return value.decode("utf-8", "replace") if value else ""


# Others can write to records: what is damaged in one is shown as if it were not there, and hides no other task.
def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _whole(text: str | bytes | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        return 0


def _time(text: str) -> float | None:
    try:
        return from_iso(text)
    except ValueError:
        return None


def _size(text: str) -> int:
    """The number of the elements of an array; 0 of what is none."""
    found = _HEAD.match(text)
    return int(found[1]) if found else 0


def indices_in(text: str) -> Indices | None:
    """The indices of an array as its record has them; None where that is damaged."""
    try:
        return Indices.read(text)
    except ValueError:
        return None


def view_of_record(task_id: str, values: Sequence[bytes | None]) -> TaskView:
    """A view of a task from the fields VIEW_FIELDS of its record."""
    f = dict(zip(VIEW_FIELDS, map(_text, values), strict=True))
    status = f["status"]
    exit_text = f["pq_exit"]
    reason = f["pq_reason"]
    if status == "started" and not f["pq_array"]:
        reason = "running" if f["pq_running"] else "handed"
    # Until a launch is reported, started_at is the time at which the task was assigned; the journal has both.
    launched = status in ENDED or f["pq_running"]
    view = TaskView(
        id=task_id,
        name=f["pq_name"],
        status=status,
        reason=reason,
        # That of what has finished with 0 is not written.
        exit_code=_whole(exit_text) if exit_text else 0 if status == "finished" and f["pq_cpus"] else None,
        execution=_whole(f["pq_exec"]),
        node=f["pq_node"].rpartition(":")[0] if status != "queued" else "",
        cores=f["pq_cpus"],
        times={
            "queued": _number(f["pq_queued_at"]) or _time(f["enqueued_at"]),
            "handed": None if launched else _time(f["started_at"]),
            "started": _time(f["started_at"]) if launched else None,
            "ended": _time(f["ended_at"]),
        },
        queue=keys.queue_of(f["origin"]),
        command=f["description"],
        retries=_whole(f["pq_retries"]),
        array=f["pq_array_of"],
        index=_whole(task_id.rpartition("_")[2]) if f["pq_array_of"] else None,
        ended=status in ENDED,
    )
    view.array_size, view.is_bundle = _size(f["pq_array"]), bool(f["pq_bundle"])
    if view.array_size:  # its record has the times of its last element
        view.times.update(handed=None, started=None)
    if view.array_size and (info := class_info(f["pq_class"])) is not None:
        view.array_limit = info.at_most
    return view


def view_of_entry(entry: JournalEntry) -> TaskView:
    """A view of an ended task from its last entry in the journal."""
    return TaskView(
        id=entry.id,
        name=entry.name,
        command=entry.command,
        status=entry.status,
        reason=entry.reason,
        exit_code=entry.exit_code,
        signal=entry.signal,
        execution=entry.execution,
        node=entry.node,
        cores=entry.cpus,
        times={"queued": entry.queued, "handed": entry.handed, "started": entry.started, "ended": entry.ended},
        message=entry.message,
        max_rss=entry.max_rss,
        cpu=entry.cpu,
        array=entry.array,
        index=entry.index,
        array_size=sum(map(count_indices, entry.elements.values())),
        elements=entry.elements,
        stdout_tail=_tail(entry.stdout),
        stderr_tail=_tail(entry.stderr),
        ended=entry.final,
    )


def _tail(data: str | bytes) -> str:
    return printable(data)


def element_view(entry: JournalEntry, task_id: str) -> TaskView | None:
    """A view of an element that never ran, from the entry of its array; None when that had no such element."""
    index = int(task_id.rpartition("_")[2])
    status = outcome_of(entry.elements, index)
    if status is None:
        return None
    times = {"queued": entry.queued, "ended": entry.ended}
    return TaskView(
        id=task_id, name=entry.name, status=status, array=entry.id, index=index, command=entry.command,
        reason=_why_never_run(entry.reason) if status == "canceled" else "", times=times, ended=True,
    )  # fmt: skip


def _why_never_run(reason: str, else_why: str = "canceled") -> str:
    """Why an element was canceled before a node had it, by the reason of its array."""
    return reason if reason in ("canceled", "dependency", "failures") else else_why


def leased_view(element: LeasedElement, array: TaskView) -> TaskView:
    """A view of an element that a lease holds, by that of its array."""
    lease = element.lease
    times = {"queued": array.times["queued"], "handed": _time(lease.started)}
    return TaskView(
        id=element.id, name=array.name, status="started", reason="handed", execution=lease.execution,
        node=lease.address.rpartition(":")[0], queue=array.queue, command=array.command, retries=array.retries,
        array=array.id, index=int(element.id.rpartition("_")[2]), times=times,
    )  # fmt: skip


def array_of(task_id: str) -> str | None:
    """The array of an element: ``7f_3`` -> ``7f``; None when the text has not the form of an element's id."""
    found = _ELEMENT.fullmatch(task_id)
    return found and found[1]


def add_journal_facts(view: TaskView, entry: JournalEntry) -> TaskView:
    """Add to a view of Redis what only the journal has of an ended task."""
    view.signal, view.message = entry.signal, entry.message
    view.max_rss, view.cpu = entry.max_rss, entry.cpu
    view.stdout_tail, view.stderr_tail = _tail(entry.stdout), _tail(entry.stderr)
    view.elements = view.elements or entry.elements
    return view


class TaskQueries:
    """Queries of the tasks and nodes of one pilot; ``journal`` is None where the pilot's directory is not known."""

    def __init__(self, link: Connection, journal: Journal | None) -> None:
        self.link = link
        self.journal = journal
        self._bundles = Bundles(link)

    def views(self, ids: Sequence[str]) -> list[TaskView | None]:
        """Views of these tasks from Redis, in one round trip for each 500; None for tasks without a record."""
        found: list[TaskView | None] = []
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            rows = self._read(part)
            found += [view_of_record(i, row) if row[0] is not None else None for i, row in zip(part, rows, strict=True)]
        elements = [view for view in found if view is not None and view.array]
        self._bundles.learn(view.array for view in elements)
        for view in elements:
            self._describe(view)
        return found

    def _describe(self, view: TaskView) -> TaskView:
        """A task of a bundle has a name and a command of its own, and no index."""
        if view.index is not None and (member := self._bundles.member(view.array, view.index)) is not None:
            view.name, view.command, view.index = member.name, command_text(member.spec), None
        return view

    def statuses(self, ids: Sequence[str]) -> dict[str, str]:
        """id -> status, of those that have a record."""
        found: dict[str, str] = {}
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            rows = self._read(part, ("status",))
            found.update((i, _text(row[0])) for i, row in zip(part, rows, strict=True) if row[0])
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
                if size := _size(_text(span)):
                    ended = size if _text(status) in ENDED else size - _whole(left)
                    found.total += size
                    found.finished += ended - _whole(unfinished)
                    found.failed += _whole(failures)
                    found.canceled += _whole(unfinished) - _whole(failures)
                    continue
                found.total += 1
                if status is None:
                    gone.append(task_id)
                elif (word := _text(status)) in ENDED:
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
                found = self._element_without_record(task_id)
                if found is not None or not entries:
                    return found
            return view_of_entry(entries[0])
        if view.array_size:
            array, following, bits = self._array(task_id)
            view.elements = element_ranges(bits, array, following) if indices_in(array) else {}
        if view.ended and entries:
            add_journal_facts(view, entries[0])
        return view

    def _array(self, task_id: str) -> tuple[str, int, bytes]:
        row, bits = self.link.pipeline(
            [("HMGET", keys.job(task_id), "pq_array", "pq_next"), ("GET", keys.outcomes(task_id))]
        )
        return _text(row[0]), _whole(row[1]), bits or b""

    def _element_without_record(self, task_id: str) -> TaskView | None:
        """An element without a record: not assigned yet, or never, or its entry is not in the journal yet."""
        array = array_of(task_id)
        if array is None:
            return None
        view = self.views([array])[0]
        if view is None or not view.array_size:
            entries = self.journal.find(array) if self.journal is not None else []
            return element_view(entries[0], task_id) if entries else None
        index = int(task_id.rpartition("_")[2])
        span, following, bits = self._array(array)
        indices = indices_in(span)
        position = indices.position(index) if indices is not None else None
        if position is None:
            return None
        outcome = outcome_at(bits, position, following)
        if outcome == "started":
            leases = [lease for lease in read_leases(self.link) if lease.array == array]
            for element in leased_elements(self.link, leases):
                if element.id == task_id:
                    return self._describe(leased_view(element, view))
        status = {"waiting": view.status if view.status == "deferred" else "queued"}.get(outcome, outcome)
        reason = ""
        if status == "canceled":
            stopped, each = self._read([array], ("pq_stopped", "pq_parents"))[0]
            reason = _why_never_run(_text(stopped) or view.reason, "dependency" if each else "canceled")
        return self._describe(TaskView(
            id=task_id, name=view.name, status=status, reason=reason, queue=view.queue, command=view.command,
            array=array, index=index, times={"queued": view.times["queued"]}, ended=status in ENDED,
        ))  # fmt: skip

    # -- many -------------------------------------------------------------------------------------------------------

    def tasks(self, status: str | None, limit: int) -> Iterator[TaskView]:
        """At most ``limit`` tasks, newest first.

        First those with a record in Redis (running, waiting, ended), then those that only the journal has. Waiting
        elements of an array are shown by the array.
        """
        seen: set[str] = set()

        def known() -> Iterator[TaskView]:
            for view in self._of_redis(status, min(SLICE, limit)):
                if view.id not in seen:
                    seen.add(view.id)
                    yield view
            if status is None or status in ENDED:
                yield from self._of_journal(seen)

        return islice((view for view in known() if status in (None, view.status)), limit)

    def _of_redis(self, status: str | None, page: int) -> Iterator[TaskView]:
        """Tasks with a record in Redis that may have this status. ``page``: how much of each list is read at once."""
        if status in (None, "started"):
            yield from (view for view in self._views(self._running(), page) if not view.is_bundle)
            yield from self._leased()
        if status is None or status in WAITING:
            for view in self._views(self._waiting(page), page):
                yield from self._waiting_members(view) if view.is_bundle else (view,)
        kinds = sorted(set(ENDED_KINDS.values())) if status is None else [ENDED_KINDS.get(status, "")]
        ended = [
            self._views(_pages(self._of_registry(kind, queue), page), page)
            for kind in kinds if kind
            for queue in self._queues()
        ]  # fmt: skip
        yield from merge(*ended, key=lambda view: view.times.get("ended") or 0.0, reverse=True)

    def _leased(self) -> Iterator[TaskView]:
        """Elements that a node has got and that have no record: short ones, or such that have not begun."""
        leases = sorted(read_leases(self.link), key=lambda lease: _age(lease.array), reverse=True)
        for array, mine in groupby(leases, key=lambda lease: lease.array):
            if (view := self.views([array])[0]) is not None:
                held = leased_elements(self.link, list(mine))
                yield from (self._describe(leased_view(element, view)) for element in held if element.is_known)

    def _waiting_members(self, bundle: TaskView) -> Iterator[TaskView]:
        """The tasks of a bundle that were not handed out, newest first; those that came back have records."""
        text, following, bits = self._array(bundle.id)
        for position in range(_size(text) - 1, following - 1, -1):
            if outcome_at(bits, position, following) == "waiting":
                yield self._describe(TaskView(
                    id=f"{bundle.id}_{position}", status="queued", queue=bundle.queue, array=bundle.id, index=position,
                    times={"queued": bundle.times["queued"]}, retries=bundle.retries, command=bundle.command,
                ))  # fmt: skip

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
        yield from sorted((member.rpartition(":")[0] for member in self.executions()), key=_age, reverse=True)

    def _waiting(self, page: int) -> Iterator[str]:
        queues = self._queues()
        # A job of RQ's producers is in its user's queue until it is routed to a class list.
        names = [*(name.decode() for name in self.link.call("HKEYS", keys.CLASSES)), *queues]
        lengths = self.link.pipeline([("LLEN", keys.queue(name)) for name in names])
        filled = [name for name, length in zip(names, lengths, strict=True) if length]
        lists = [_pages(self._of_list(name), page) for name in filled]
        registries = [_pages(self._of_registry(kind, queue), page) for kind in WAITING_KINDS for queue in queues]
        registries += [_pages(self._of_set(keys.rate_limited(limit)), page) for limit in self._limits()]
        yield from merge(*lists, *registries, key=_age, reverse=True)

    def open_ids(self) -> list[str]:
        """Ids of what has not ended; an array stands for its elements."""
        found = dict.fromkeys(chain(self._running(), self._waiting(SLICE)))
        return [task_id for task_id in found if array_of(task_id) not in found]

    def retriable(self) -> list[str]:
        """Ids of what ended and did not finish, oldest first; an array stands for its elements."""
        pages = [self._of_registry(kind, queue) for kind in ("failed", "canceled") for queue in self._queues()]
        found = dict.fromkeys(chain(*(_pages(page, SLICE) for page in pages)))
        return sorted((i for i in found if array_of(i) not in found), key=_age)

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

    def _of_journal(self, seen: set[str]) -> Iterator[TaskView]:
        for entry in self.journal.newest() if self.journal is not None else ():
            if entry.final and entry.id not in seen:
                seen.add(entry.id)
                yield view_of_entry(entry)

    def find(self, name: str) -> list[str]:
        """Ids of the tasks with this name, without elements of arrays."""
        found: dict[str, None] = {}
        wanted = printable(name)
        ids = chain(self._running(), self._waiting(SLICE), *(
            _pages(self._of_registry(kind, queue), SLICE)
            for kind in sorted(set(ENDED_KINDS.values())) for queue in self._queues()
        ))  # fmt: skip
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


def _age(task_id: str) -> tuple[int, int]:
    """The place of an id in the order of submission; ids that are not ours come first of all."""
    number, _, index = task_id.partition("_")
    try:
        return int(number, 32), int(index or 0)
    except ValueError:
        return -1, 0
