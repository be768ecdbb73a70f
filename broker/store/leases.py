"""Reads leases: which nodes have elements of arrays without a record, and tasks whose records say that they wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import open_positions


class LeaseRecord(NamedTuple):
    """Elements of an array, at consecutive positions, that a node has for one execution. See lib_leases.lua."""

    array: str
    first: int
    number: int  # of elements
    execution: int
    slots: int  # so many of the first were handed with a slot
    started: str  # RQ's ISO form: when it was handed out
    address: str  # name:incarnation of the worker

    @classmethod
    def read(cls, array: str, member: bytes) -> LeaseRecord:
        """The lease that a member of the sorted set says."""
        first, number, execution, slots, started, address = member.decode().split(" ", 5)
        return cls(array, int(first), int(number), int(execution), int(slots), started, address)


class LeasedElement(NamedTuple):
    """An element that a lease holds: it has neither ended nor got a record.

    ``is_known`` is False where the array's record was deleted or is damaged: then the number in the id is the position.
    """

    id: str
    position: int
    lease: LeaseRecord
    is_known: bool


def read_leases(link: Connection) -> list[LeaseRecord]:
    """All leases, by array and position."""
    arrays = sorted({field.rpartition(b":")[0].decode() for field in link.call("HKEYS", keys.LEASES)})
    found = []
    for array, members in zip(arrays, link.pipeline([("ZRANGE", keys.leases(a), 0, -1) for a in arrays]), strict=True):
        found += [LeaseRecord.read(array, member) for member in members]
    return found


def number_leased(link: Connection) -> Counter[str]:
    """How many elements leases hold, by array."""
    flat = link.call("HGETALL", keys.LEASES)
    found: Counter[str] = Counter()
    for field, number in zip(flat[::2], flat[1::2], strict=True):
        found[field.rpartition(b":")[0].decode()] += int(number)
    return found


def leased_elements(link: Connection, leases: Iterable[LeaseRecord]) -> Iterator[LeasedElement]:
    """The elements that leases hold. Of those that end or begin meanwhile some may be among them, or not."""
    known: dict[str, Indices | None] = {}
    for lease in leases:
        array = lease.array
        if array not in known:
            known[array] = _indices(link, array)
        indices = known[array]
        for position in _held(link, lease):
            is_known = indices is not None and position < len(indices)
            index = indices[position] if indices is not None and is_known else position
            yield LeasedElement(f"{array}_{index}", position, lease, is_known)


def _indices(link: Connection, array: str) -> Indices | None:
    """None where the array's record was deleted, or is damaged."""
    [[text]] = link.read_hashes([keys.job(array)], "pq_array")
    try:
        return Indices.read(text) if text is not None else None
    except (ValueError, OverflowError):
        return None


def _held(link: Connection, lease: LeaseRecord) -> list[int]:
    """The positions that have neither ended nor got a record."""
    last = lease.first + lease.number - 1
    bits, recorded = link.pipeline([
        ("GETRANGE", keys.outcomes(lease.array), lease.first // 4, last // 4),
        ("GETRANGE", keys.recorded(lease.array), lease.first // 8, last // 8),
    ])  # fmt: skip
    before = lease.first % 4  # elements in front of the first, in its byte
    places = [place - before for place in open_positions(bits, before + lease.number) if place >= before]
    return [lease.first + place for place in places if not _bit(recorded, lease.first % 8 + place)]


def _bit(bits: bytes, place: int) -> bool:
    return place // 8 < len(bits) and bool(bits[place // 8] >> (7 - place % 8) & 1)


class TaskLease(NamedTuple):
    """A task by itself is with a node, though its record says that it waits. See lib_leases.lua."""

    execution: int
    address: str  # name:incarnation of the worker; empty where nobody knows it
    has_slot: bool


def read_holders(link: Connection) -> dict[int, str]:
    """Number of a node in the scores of leases -> name:incarnation."""
    flat = link.call("HGETALL", keys.HOLDERS)
    return {int(n): address.decode() for n, address in zip(flat[::2], flat[1::2], strict=True) if b":" in address}


def holder_of(score: bytes | None) -> int | None:
    """The number of the node that a score in wip says; None where it is that of no lease."""
    value = float(score or 0)
    return int(-value // 2) if value < 0 else None


def task_leases(link: Connection, executions: Sequence[tuple[str, str]]) -> list[TaskLease | None]:
    """Leases of these executions: ``<id>:<execution>``, queue."""
    members: dict[str, list[str]] = {}
    for member, queue in executions:
        members.setdefault(queue, []).append(member)
    commands = [("ZMSCORE", keys.registry("wip", queue), *mine) for queue, mine in members.items()]
    scores = dict(zip(members, map(iter, link.pipeline(commands)), strict=True)) if commands else {}
    found = [(int(member.rpartition(":")[2]), next(scores[queue])) for member, queue in executions]
    holders = read_holders(link) if any(holder_of(score) is not None for _, score in found) else {}
    return [
        None if (number := holder_of(score)) is None
        else TaskLease(execution, holders.get(number, ""), float(score) % 2 == 1)
        for execution, score in found
    ]  # fmt: skip


def with_leases(
    link: Connection, ids: Sequence[str], fields: Sequence[str], rows: Sequence[Sequence[bytes | None]]
) -> list[Sequence[bytes | None]]:
    """Rows of records with these fields, status, pq_class and pq_exec among them, as they are by leases of tasks."""
    found = list(rows)
    status, class_name, last = (fields.index(name) for name in ("status", "pq_class", "pq_exec"))
    queued = [number for number, row in enumerate(rows) if row[status] == b"queued" and row[class_name]]
    asked = [
        (f"{ids[n]}:{_next(rows[n][last])}", keys.queue_of((rows[n][class_name] or b"").decode("utf-8", "replace")))
        for n in queued
    ]
    for number, lease, (_, queue) in zip(queued, task_leases(link, asked), asked, strict=True):
        if lease is not None:
            by_lease = {
                "status": b"started", "pq_exec": b"%d" % lease.execution, "pq_node": lease.address.encode(),
                "origin": queue.encode(), "started_at": None,
            }  # fmt: skip
            found[number] = [by_lease.get(name, value) for name, value in zip(fields, rows[number], strict=True)]
    return found


def _next(execution: bytes | None) -> int:
    return int(execution) + 1 if execution is not None and execution.isdigit() else 1
