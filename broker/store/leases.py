"""Reads the leases of runs of elements: which nodes have elements of arrays that have no record of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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
