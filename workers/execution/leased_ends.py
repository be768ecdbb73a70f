"""Collects the ends of elements that finished and that a lease holds: they are reported together, as columns.

Those that ended plainly in a run come packed, and stay so (`plain_runs`); the others one by one (`runs_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.store.journal_runs import Row, RunLines, pack_run
from pilotq.broker.store.messages import EndReport, Lease, Run, RunEnd
from pilotq.broker.store.resources import class_info
from pilotq.broker.tasks.spec import is_bundle
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.leased_runs import HeldLease, PlainEnds
from pilotq.workers.protocol import NO_OUTPUT, Exited, Returned
from pilotq.workers.session import Apart, iso

_pack = msgspec.msgpack.Encoder().encode
read_row = msgspec.msgpack.Decoder(Row).decode


def memory_of(run: Run | Lease) -> int:
    """The bytes that its task asks for."""
    info = class_info(run.class_name)
    return info.request.memory if info is not None else 0


class LeasedEnd(NamedTuple):
    """The end of an element that finished, of which nothing is to be kept but a line of the journal."""

    e: Execution
    ended: float  # unix seconds
    command: str
    outputs: dict[str, Any]  # fields of its entry in the journal: what it has written
    value: bytes  # pickled, of a function
    report: Callable[[Execution, float], EndReport]  # makes its own report, for the case that it is needed


def runs_of(ends: list[LeasedEnd], node: str) -> Iterator[tuple[RunEnd, Apart]]:
    """The runs that these elements make on this node, each with what makes the reports of its elements."""
    ends = sorted(ends, key=lambda end: (end.e.run.array, end.e.run.execution, end.e.run.position))
    first = 0
    for number in range(1, len(ends) + 1):
        if number == len(ends) or not _follows(ends[number - 1], ends[number]):
            yield _run_of(ends[first:number], node)
            first = number


def _follows(end: LeasedEnd, next_end: LeasedEnd) -> bool:
    """Whether the next one is the next element of the same lease, and also has a value, or has none."""
    run, other = end.e.run, next_end.e.run
    if bool(end.value) != bool(next_end.value):
        return False
    same = run.array == other.array and run.execution == other.execution and run.lease == other.lease
    return same and other.position == run.position + 1


def _run_of(ends: list[LeasedEnd], node: str) -> tuple[RunEnd, Apart]:
    run, base, command = ends[0].e.run, ends[0].e.started, ends[0].command
    usual = {"name": run.name, "command": command, "limit": ends[0].e.limit or None}
    places: dict[str, int] = {}  # of allocations
    rows, more = [], {}
    for number, end in enumerate(ends):
        e, exited = end.e, end.e.exited
        assert exited is not None
        place = places.setdefault(e.allocation, len(places))
        after, lasted = round((e.started - base) * 1e6), max(round((end.ended - e.started) * 1e6), 0)
        rows.append((e.run.index, place, after, lasted, e.pid, exited.max_rss, round(exited.cpu * 1e6)))
        own = {"name": e.run.name, "command": end.command, "limit": e.limit or None}
        if end.outputs or own != usual:
            more[number] = end.outputs | {name: value for name, value in own.items() if value != usual[name]}
    lines = RunLines(
        run.array, run.name, run.submission, node, run.execution, run.queued, run.handed, command, memory_of(run),
        ends[0].e.limit, list(places), base, rows, more, is_bundle(run.spec),
    )  # fmt: skip
    last = iso(max(end.ended for end in ends))
    values = _pack([end.value for end in ends]) if ends[0].value else b""
    packed = RunEnd(run.array, run.execution, run.submission, last, run.position, len(ends), _pack(lines), values)
    return packed, lambda: [end.report(end.e, end.ended) for end in ends]


def plain_runs(
    ends: Sequence[PlainEnds], node: str, report: Callable[[Execution, float], EndReport]
) -> Iterator[tuple[RunEnd, Apart]]:
    """The same for elements that ended plainly; ``report`` makes an element's own report, where that is needed."""
    ordered = sorted(ends, key=lambda end: (id(end.held), end.number))
    first = 0
    for number in range(1, len(ordered) + 1):
        before = ordered[number - 1]
        follows = number < len(ordered) and (before.held, before.number + len(before.rows)) == (
            ordered[number].held,
            ordered[number].number,
        )
        if not follows or before.values:  # results are told in pieces, for which there is more often room
            yield _plain_run_of(ordered[first:number], node, report)
            first = number


def _plain_run_of(
    ends: Sequence[PlainEnds], node: str, report: Callable[[Execution, float], EndReport]
) -> tuple[RunEnd, Apart]:
    held, number, ended = ends[0].held, ends[0].number, max(end.ended for end in ends)
    lease, allocations = held.lease, list(held.places)
    rows = [row for end in ends for row in end.rows]
    lines = RunLines(
        lease.array, lease.name, lease.submission, node, lease.execution, lease.queued, lease.handed, held.command,
        memory_of(lease), held.spec.time_limit, allocations, lease.handed, [], held.fields(number, len(rows)),
        is_bundle(lease.spec),
    )  # fmt: skip
    packed = pack_run(lines, rows)

    values = [value for end in ends for value in end.values]

    def apart() -> list[EndReport]:
        return [
            report(*_element_of(held, number + n, read_row(row), allocations, value))
            for n, (row, value) in enumerate(zip_longest(rows, values, fillvalue=b""))
        ]

    last, first = iso(ended), lease.first + number
    results = _pack(values) if values else b""
    end = RunEnd(lease.array, lease.execution, lease.submission, last, first, len(rows), packed, results)
    return end, apart


def _element_of(
    held: HeldLease, number: int, row: Row, allocations: Sequence[str], value: bytes
) -> tuple[Execution, float]:
    """The execution that a row is of, and when it ended."""
    e = Execution(0, held.lease.run(number))
    held.describe(e)
    exited: Exited | Returned = exited_of(e.key, row, held.lease.handed)
    if held.is_function:
        exited = Returned(
            e.key, exited.pid, "finished", "", "", "", exited.started, exited.ended, exited.seconds, exited.cpu,
            exited.max_rss, 0, NO_OUTPUT, NO_OUTPUT, value,
        )  # fmt: skip
    e.allocation, e.exited, e.pid, e.started = allocations[row[1]], exited, exited.pid, exited.started
    return e, exited.ended


def exited_of(key: int, row: Row, origin: float) -> Exited:
    """The end of a launch that `Ran` tells with this row."""
    _, _, after, lasted, pid, max_rss, cpu = row
    started = origin + after / 1e6
    ended = started + lasted / 1e6
    return Exited(key, pid, 0, started, ended, lasted / 1e6, cpu / 1e6, max_rss, 0, NO_OUTPUT, NO_OUTPUT)
