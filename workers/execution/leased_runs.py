"""Runs of elements that came in one lease, without an object for each of them.

A node keeps the elements of a lease packed as long as they are all alike: waiting, chained, running for a moment, ended
plainly. Of what is more than that an `Execution` is made (`SlotTable.unpack`), and all else knows only that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.store.messages import ExecutionEnd, Lease, Run
from pilotq.broker.tasks.spec import FLAG_FUNCTION, Spec, read_spec
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.templating import Variables, render
from pilotq.workers.protocol import Call, Launch, LaunchBase, LaunchSlot, Ran, Returned

VALUES_MAX = 64  # results that are told in one piece: each has up to 4 KiB
_encode = msgspec.msgpack.Encoder().encode


class Template(NamedTuple):
    """What the launches of all elements of a lease in one slot are made from."""

    base: LaunchBase
    slot: LaunchSlot
    launch: Launch | Call


class Own(NamedTuple):
    """What an element of a lease has for itself, beside its index."""

    strings: msgspec.Raw  # for its launch: an item of `LaunchRun.own`
    fields: dict[str, Any]  # of its entry in the journal, where they are not those of the lease
    value: str | None = None
    spec: bytes = b""  # packed, of a task of a bundle
    payload: bytes = b""  # of a function


class HeldLease:
    """A lease whose elements are alike, on the node that has them: they differ by their index, and by ``own`` if they
    have that, which then has an item for each.

    ``spec`` is that of each, or of the first of a bundle; ``marked`` is it with marks for what differs. ``command`` is
    that of the journal, with `INDEX_PLACE` for the index; empty where each has one of its own.
    """

    def __init__(
        self, lease: Lease, spec: Spec, marked: Spec, command: str, *, varies: bool, own: Sequence[Own] = ()
    ) -> None:
        self.lease = lease
        self.spec = spec
        self.marked = marked
        self.varies = varies  # there are variables in it
        self.command = command
        self.own = own
        self.places: dict[str, int] = {}  # of allocations, in the rows of its ends
        self.templates: dict[str, Template] = {}  # by allocation

    def place_of(self, allocation: str) -> int:
        return self.places.setdefault(allocation, len(self.places))

    def strings(self, number: int, count: int) -> list[msgspec.Raw]:
        """`LaunchRun.own` of so many elements, from this one on."""
        if not self.own or not bytes(self.own[0].strings):
            return []
        return [own.strings for own in self.own[number : number + count]]

    @property
    def is_function(self) -> bool:
        return bool(self.spec.flags & FLAG_FUNCTION)

    def fields(self, number: int, count: int) -> dict[int, dict[str, Any]]:
        """`RunLines.more` of so many elements, from this one on."""
        return {n: own.fields for n, own in enumerate(self.own[number : number + count]) if own.fields}

    def describe(self, e: Execution) -> None:
        """Set what an execution that is an element of it would have if its launch had been built."""
        run = e.run
        own = self.own[run.position - self.lease.first] if self.own else None
        e.spec, e.limit, e.function = self.spec, self.spec.time_limit, self.is_function
        if own is not None and own.spec:
            e.spec, run.name = read_spec(own.spec), own.fields.get("name", run.name)
        elif self.varies:
            value = own.value if own is not None else None
            variables = Variables(run.id, run.execution, run.name, run.index, position=run.position, value=value)
            e.spec = render(self.spec, variables)
        if own is not None:
            e.stdout, e.stderr = (own.fields.get(field, [b""])[0] for field in ("stdout_at", "stderr_at"))


class LeasedRun:
    """So many elements of a lease, at consecutive positions. Their keys are consecutive, too, from ``key`` on.

    With a ``slot`` its launcher has them, and the first one is the next that begins there, or has begun; else they are
    prefetched.
    """

    __slots__ = ("held", "key", "number", "count", "slot", "allocation", "launcher", "given", "since", "ends")

    def __init__(self, held: HeldLease, key: int, number: int, count: int) -> None:
        self.held = held
        self.key = key
        self.number = number  # of the first one in the lease, counted from 0
        self.count = count
        self.slot = 0
        self.allocation = ""
        self.launcher = 0
        self.given = 0  # those with keys up to this one its launcher has begun to start, or given to an interpreter
        self.since = 0.0  # monotonic: since when the first one is to start
        self.ends: PlainEnds | None = None  # those that were collected last

    @property
    def last_key(self) -> int:
        return self.key + self.count - 1

    @property
    def class_name(self) -> str:
        return self.held.lease.class_name

    def split(self, count: int) -> LeasedRun:
        """Take out the first ``count``."""
        taken = LeasedRun(self.held, self.key, self.number, count)
        self.pass_first(count)
        return taken

    def pass_first(self, count: int = 1) -> None:
        self.key += count
        self.number += count
        self.count -= count

    def pass_plain(self, record: Ran | Returned) -> None:
        """The first one has ended plainly; its row and its result go to ``ends``."""
        ends = self.ends
        assert ends is not None
        if isinstance(record, Ran):
            ends.rows.append(record.row)
        else:
            ends.rows.append(self._row_of(record))
            ends.values.append(record.value)
        ends.seconds += record.seconds
        ends.ended = record.ended
        self.key += 1
        self.number += 1
        self.count -= 1

    def _row_of(self, record: Returned) -> bytes:
        lease = self.held.lease
        after, lasted = record.started - lease.handed, record.ended - record.started
        times = round(after * 1e6), max(round(lasted * 1e6), 0)
        used = record.pid, record.max_rss, round(record.cpu * 1e6)
        return _encode((lease.index + lease.step * self.number, self.held.place_of(self.allocation), *times, *used))

    def run(self, number: int) -> Run:
        """The message of one of them, counted from its first, as if it had come by itself."""
        return self.held.lease.run(self.number + number)

    def holds(self, task_id: str, execution: int) -> bool:
        """Whether the task is one of them, or their array; execution 0 means any."""
        lease = self.held.lease
        if execution not in (0, lease.execution):
            return False
        if task_id == lease.array:
            return True
        array, _, index = task_id.rpartition("_")
        if array != lease.array or not index.isdecimal():
            return False
        number, rest = divmod(int(index) - lease.index, lease.step or 1)
        return not rest and self.number <= number < self.number + self.count


class PlainEnds:
    """Ends of elements of a lease in one slot, at consecutive positions, that are still to be reported."""

    __slots__ = ("held", "slot", "number", "rows", "values", "seconds", "counted", "ended", "kept", "closed")

    def __init__(self, run: LeasedRun) -> None:
        self.held = run.held
        self.slot = run.slot
        self.number = run.number
        self.rows: list[bytes] = []
        self.values: list[bytes] = []  # pickled results of functions
        self.seconds = self.counted = 0.0  # that they ran, in all; of these, those that the caller has counted
        self.ended = 0.0  # unix seconds: when the last one did
        self.kept = True  # its slot has gone on
        self.closed = False  # nothing is added any more

    @property
    def is_full(self) -> bool:
        return len(self.values) >= VALUES_MAX

    def slot_ends(self) -> Iterator[ExecutionEnd]:
        """What the dispatcher must know of them: the slot went on after each, or after each but the last."""
        number, mean = len(self.rows), self.seconds / len(self.rows)
        name = self.held.lease.class_name
        if number > 1 or self.kept:
            yield ExecutionEnd(self.slot, name, mean, True, number=number if self.kept else number - 1)
        if not self.kept:
            yield ExecutionEnd(self.slot, name, mean, False)
