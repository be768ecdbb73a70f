"""Results of functions, read from RQ's results streams, where RQ's own tools find them, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pilotq.broker.errors import FunctionCanceled, FunctionFailed, InvalidInput, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Connection
from pilotq.broker.tasks.functions import read_failure, read_result
from pilotq.broker.tasks.states import ENDED

PORTION_BYTES = 64 << 20  # of results that are read at once: 500 large ones would be gigabytes


class Outcome(NamedTuple):
    """What became of one function that has ended: its value, or the exception to raise."""

    value: Any = None
    error: BaseException | None = None


def portions(link: Connection, ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """The ids in their order, cut so that the results of each piece are PORTION_BYTES at most, or one larger result."""
    sizes = link.pipeline([("MEMORY", "USAGE", keys.results(i)) for i in ids]) if ids else []
    first = size = 0
    for place, found in enumerate(sizes):
        size += found or 0
        if size > PORTION_BYTES and place > first:
            yield ids[first:place]
            first, size = place, found or 0
    if ids:
        yield ids[first:]


def fetch(link: Connection, ids: Sequence[str]) -> list[Outcome | None]:
    """The outcomes of functions; None for those that have not ended."""
    if not ids:
        return []
    streams = link.pipeline([("XREVRANGE", keys.results(task_id), "+", "-", "COUNT", 1) for task_id in ids])
    found: list[Outcome | None] = [None] * len(ids)
    unclear = []
    for number, entries in enumerate(streams):
        # Only a function that has finished has a value: nothing else need be known of it.
        if (value := _fields(entries).get(b"return_value")) is not None:
            found[number] = _value(value)
        else:
            unclear.append(number)
    commands: list[tuple[Argument, ...]] = []
    for number in unclear:
        # Its status first: what has ended by then has its result, too.
        commands.append(("HMGET", keys.job(ids[number]), "status", "pq_array"))
        commands.append(("XREVRANGE", keys.results(ids[number]), "+", "-", "COUNT", 1))
    replies = link.pipeline(commands) if commands else []
    for place, number in enumerate(unclear):
        found[number] = _outcome(ids[number], replies[2 * place], _fields(replies[2 * place + 1]))
    return found


def _fields(entries: list[Any]) -> dict[bytes, bytes]:
    flat = entries[0][1] if entries else []
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _value(text: bytes) -> Outcome:
    try:
        return Outcome(read_result(text))
    except FunctionFailed as error:
        return Outcome(error=error)


def _outcome(task_id: str, record: list[bytes | None], fields: dict[bytes, bytes]) -> Outcome | None:
    """Of any task; None when it has not ended."""
    raw_status, array = record
    if raw_status is None:
        return Outcome(error=UnknownTask(f"the result of task {task_id} is gone: records are kept for a time only"))
    if array is not None:
        return Outcome(error=InvalidInput(f"task {task_id} is an array: ask for its elements, {task_id}_INDEX"))
    status = raw_status.decode()
    if status not in ENDED:
        return None
    if status == "finished" and b"return_value" in fields:
        return _value(fields[b"return_value"])
    if status == "finished":
        return Outcome(error=InvalidInput(f"task {task_id} is no function: it has an exit code, but no result"))
    if status == "failed":
        trace, exception = fields.get(b"exc_string", b""), fields.get(b"pq_exception", b"")
        return Outcome(error=read_failure(f"task {task_id}", trace, exception))
    return Outcome(error=FunctionCanceled(f"task {task_id} was {status}"))
