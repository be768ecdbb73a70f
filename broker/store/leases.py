"""Reads the leases of runs of elements: which nodes have elements of arrays that have no record of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import open_positions

BATCH = 500


class LeaseRecord(NamedTuple):
    """Elements of an array, at consecutive positions, that a node has for one execution. See lib_leases.lua."""

    array: str
    first: int
    number: int  # of elements
    execution: int
    slots: int  # so many of the first were handed with a slot
    started: str  # RQ's ISO form: when it was handed out
    address: str  # name:incarnation of the worker


class LeasedElement(NamedTuple):
    """An element that a lease holds: it has neither ended nor got a record."""

    id: str
    position: int
    lease: LeaseRecord


def read_leases(link: Connection) -> list[LeaseRecord]:
    """All leases, by array and position."""
    arrays = sorted({field.rpartition(b":")[0].decode() for field in link.call("HKEYS", keys.LEASES)})
    found = []
    for array, members in zip(arrays, link.pipeline([("ZRANGE", keys.leases(a), 0, -1) for a in arrays]), strict=True):
        for member in members:
            first, count, execution, slots, started, address = member.decode().split(" ", 5)
            found.append(LeaseRecord(array, int(first), int(count), int(execution), int(slots), started, address))
    return found


def number_leased(link: Connection) -> Counter[str]:
    """How many elements leases hold, by array."""
    flat = link.call("HGETALL", keys.LEASES)
    found: Counter[str] = Counter()
    for field, number in zip(flat[::2], flat[1::2], strict=True):
        found[field.rpartition(b":")[0].decode()] += int(number)
    return found


def leased_elements(link: Connection, leases: list[LeaseRecord]) -> Iterator[LeasedElement]:
    """The elements that leases hold. Of those that end or begin meanwhile some may be among them, or not."""
    for lease in leases:
        commands = [("HGET", keys.job(lease.array), "pq_array"), ("HGET", keys.job(lease.array), "pq_class")]
        span, name = link.pipeline(commands)
        if span is None or name is None:
            continue
        indices = Indices.read(span)
        last = lease.first + lease.number - 1
        bits = link.call("GETRANGE", keys.outcomes(lease.array), lease.first // 4, last // 4)
        before = lease.first % 4  # elements in front of the first, in its byte
        places = [place - before for place in open_positions(bits, before + lease.number) if place >= before]
        positions = [lease.first + place for place in places]
        ids = [f"{lease.array}_{indices[position]}" for position in positions]
        there = link.pipeline([("EXISTS", keys.job(i)) for i in ids]) if ids else []
        wip = keys.registry("wip", keys.queue_of(name.decode()))
        seen = link.call("ZMSCORE", wip, *(f"{i}:{lease.execution}" for i in ids)) if ids else []
        for element, position, record, shown in zip(ids, positions, there, seen, strict=True):
            if not record and shown is None:
                yield LeasedElement(element, position, lease)
