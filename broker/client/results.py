"""Results of functions: from RQ's results streams, where RQ's own tools find them, too; of an executor from what it is
told; large ones from the files that the interpreters have written.
"""

from __future__ import annotations

import base64
import os
import pickle
import threading
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.errors import (
    FunctionCanceled,
    FunctionFailed,
    InvalidInput,
    MemoryExceeded,
    NoPilot,
    UnknownTask,
)
from pilotq.broker.os_strings import UNREADABLE
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.connection import Argument, Connection
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import outcome_at
from pilotq.broker.tasks.functions import RESULT_SUFFIX, Stored, read_text
from pilotq.broker.tasks.spec import FLAG_FUNCTION, is_bundle, read_spec
from pilotq.broker.tasks.states import ENDED, REASONS

DIGITS_MAX = 10  # of a position
SPARSE = 4  # of results in a bundle that lie closer together all between are read
_decode_piece = msgspec.msgpack.Decoder(tuple[int, list[bytes]]).decode
MESSAGE_CHARS = 500  # of what a worker says of a function that did not come to its end


class Outcome(NamedTuple):
    """What became of a function that has ended: its value (a `StoredValue` if it is large), or what is to be raised."""

    value: Any = None
    error: BaseException | None = None


class Ended(NamedTuple):
    """How a task of an executor has ended, as complete.lua and others tell it."""

    id: str
    status: str
    reason: str
    text: str  # of EndReport
    value: bytes = b""  # pickled; then there is no text


class OutputFiles:
    """The files with output and large results of a pilot, which is None where its directory is not known."""

    def __init__(self, pilot: Pilot | None) -> None:
        self._directory = None if pilot is None else os.path.join(pilot.directory, "output")

    def read(self, stored: Stored) -> bytes:
        """Raises FunctionFailed when the file is gone or damaged, NoPilot when its directory is not known."""
        if self._directory is None:
            raise NoPilot("a large result is read from the pilot's directory: connect with --dir, not by a URL")
        path = os.path.join(self._directory, stored.name)
        try:
            with open(path, "rb") as file:
                file.seek(stored.offset)
                data = file.read(stored.length)
        except OSError as error:
            raise FunctionFailed(f"the result of the function cannot be read: {error.strerror}: {path}") from None
        if len(data) < stored.length:
            raise FunctionFailed(
                f"the result of the function is damaged: {path} has {len(data):,} of its {stored.length:,} bytes"
            )
        return data

    def remove(self, stored: Stored, owner: int) -> None:
        """Remove a file that holds this one value; other processes than its owner's do nothing."""
        if self._directory is not None and os.getpid() == owner:
            with suppress(OSError):
                os.unlink(os.path.join(self._directory, stored.name))


class StoredValue:
    """A large value, in a file: it is read each time it is asked for, so that many of them need no memory.

    With ``owned`` nobody else can read it: a file that holds it alone is removed together with this object.
    """

    __slots__ = ("__weakref__", "_files", "_stored")

    def __init__(self, files: OutputFiles, stored: Stored, *, owned: bool) -> None:
        self._files = files
        self._stored = stored
        if owned and stored.name.endswith(RESULT_SUFFIX):
            weakref.finalize(self, files.remove, stored, os.getpid())

    def load(self) -> Any:
        """Raises FunctionFailed when it cannot be read."""
        return load(self._files.read(self._stored))


def fetch(link: Connection, ids: Sequence[str], files: OutputFiles) -> list[Outcome | None]:
    """The outcomes of functions; None for those that have not ended."""
    kept = values_in_bundles(link, ids)
    alone = iter(_fetch_alone(link, [task_id for task_id in ids if task_id not in kept], files))
    return [_loaded(kept[task_id]) if task_id in kept else next(alone) for task_id in ids]


def values_in_bundles(link: Connection, ids: Sequence[str]) -> dict[str, bytes]:
    """The pickled results, by id, of those functions that share a record with others, and have finished by a lease."""
    positions: dict[str, set[int]] = {}
    for task_id in ids:
        bundle, _, position = task_id.partition("_")
        if position.isdecimal() and position.isascii() and len(position) <= DIGITS_MAX:
            positions.setdefault(bundle, set()).add(int(position))
    asked: list[str] = []
    commands: list[tuple[Argument, ...]] = []
    for bundle, some in positions.items():
        key, low, high = keys.returned(bundle), min(some), max(some)
        is_sparse = high - low > SPARSE * len(some)
        each = some if is_sparse else [low]
        reads: list[tuple[Argument, ...]] = [("ZREVRANGEBYSCORE", key, n, "-inf", "LIMIT", 0, 1) for n in each]
        if not is_sparse and high > low:
            reads.append(("ZRANGEBYSCORE", key, f"({low}", high))
        commands += reads
        asked += [bundle] * len(reads)
    found: dict[str, bytes] = {}
    for bundle, pieces in zip(asked, link.pipeline(commands) if commands else [], strict=True):
        for piece in pieces:
            first, values = _decode_piece(piece)
            found.update((f"{bundle}_{number}", value) for number, value in enumerate(values, first))
    return {task_id: found[task_id] for task_id in ids if task_id in found}


def _fetch_alone(link: Connection, ids: Sequence[str], files: OutputFiles) -> list[Outcome | None]:
    """The outcomes of those of which no bundle has a result."""
    if not ids:
        return []
    streams = link.pipeline([("XREVRANGE", keys.results(task_id), "+", "-", "COUNT", 1) for task_id in ids])
    found: list[Outcome | None] = [None] * len(ids)
    unclear = []
    for number, entries in enumerate(streams):
        # Only a function that has finished has a value: nothing else need be known of it.
        if (value := _value_of(_fields(entries))) is not None:
            found[number] = _value(value, files)
        else:
            unclear.append(number)
    commands: list[tuple[Argument, ...]] = []
    for number in unclear:
        # Its status first: what has ended by then has its result, too.
        commands.append(("HMGET", keys.job(ids[number]), "status", "pq_array", "pq_reason", "pq_sub", "pq_bundle"))
        commands.append(("XREVRANGE", keys.results(ids[number]), "+", "-", "COUNT", 1))
    replies = link.pipeline(commands) if commands else []
    for place, number in enumerate(unclear):
        found[number] = _outcome(ids[number], replies[2 * place], _fields(replies[2 * place + 1]), files)
    without_record = [ids[number] for place, number in enumerate(unclear) if replies[2 * place][0] is None]
    known = _outcomes_of_elements(link, without_record)
    return [known.get(task_id, outcome) for task_id, outcome in zip(ids, found, strict=True)]


def _outcomes_of_elements(link: Connection, ids: Sequence[str]) -> dict[str, Outcome]:
    """What arrays and bundles know of those of their functions that have no record."""
    by_array: dict[str, list[str]] = {}
    for task_id in ids:
        by_array.setdefault(task_id.rpartition("_")[0], []).append(task_id)
    fields = "pq_array", "pq_next", "pq_sub", "pq_spec"
    commands = [(("HMGET", keys.job(array), *fields), ("GET", keys.outcomes(array))) for array in by_array]
    replies = link.pipeline([command for pair in commands for command in pair]) if commands else []
    bundles = Bundles(link)
    found: dict[str, Outcome] = {}
    for (array, elements), record, bits in zip(by_array.items(), replies[::2], replies[1::2], strict=True):
        span, following, submission, spec = (text or b"" for text in record)
        try:
            indices, first_waiting = Indices.read(span), int(following)
            is_told = keys.executor_of(submission.decode())
            places = {task_id: indices.position(int(task_id.rpartition("_")[2])) for task_id in elements}
        except (ValueError, OverflowError):
            continue  # these are none of an array, or it is damaged
        for task_id, position in places.items():
            outcome = "" if position is None else outcome_at(bits or b"", position, first_waiting)
            if outcome == "canceled":
                found[task_id] = Outcome(error=FunctionCanceled(f"task {task_id} was canceled"))
            elif outcome == "finished" and is_told:
                found[task_id] = Outcome(error=_went_to_executor(task_id))
            elif outcome == "finished" and position is not None and not _is_function(bundles, array, position, spec):
                found[task_id] = Outcome(error=_no_function(task_id))
    return found


def _is_function(bundles: Bundles, array: str, position: int, spec: bytes) -> bool:
    """Whether an element is a function, as far as that can be read."""
    try:
        member = bundles.member(array, position) if is_bundle(spec) else None
        return bool((member.spec if member is not None else read_spec(spec)).flags & FLAG_FUNCTION)
    except UNREADABLE:
        return True


def _no_function(task_id: str) -> InvalidInput:
    return InvalidInput(f"task {task_id} is no function: it has an exit code, but no result")


def _went_to_executor(task_id: str) -> UnknownTask:
    return UnknownTask(f"the result of task {task_id} went to its executor: only that one has it")


def _loaded(value: bytes) -> Outcome:
    try:
        return Outcome(load(value))
    except FunctionFailed as error:
        return Outcome(error=error)


def outcome_of(ended: Ended, files: OutputFiles) -> Outcome:
    """The outcome of a function that its executor was told of."""
    if ended.value:
        return _loaded(ended.value)
    if ended.status == "finished":
        return _value(ended.text, files, owned=True)
    trace, _, exception = ended.text.partition("\n")
    return Outcome(error=_failure(ended.id, ended.status, ended.reason, trace, exception, files))


def discard(ended: Ended, files: OutputFiles) -> None:
    """Remove the file that holds the value of a function alone, which nobody will read."""
    with suppress(ValueError):
        stored = read_text(ended.text) if ended.text.startswith("file:") else None
        if isinstance(stored, Stored) and stored.name.endswith(RESULT_SUFFIX):
            files.remove(stored, os.getpid())


def _fields(entries: list[Any]) -> dict[bytes, bytes]:
    flat = entries[0][1] if entries else []
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _value_of(fields: dict[bytes, bytes]) -> str | None:
    value = fields.get(b"return_value") or fields.get(b"pq_file")
    return None if value is None else value.decode("ascii", "replace")


def _value(text: str, files: OutputFiles, *, owned: bool = False) -> Outcome:
    try:
        data = read_text(text)
        return Outcome(StoredValue(files, data, owned=owned) if isinstance(data, Stored) else load(data))
    except FunctionFailed as error:
        return Outcome(error=error)
    except ValueError as error:
        return Outcome(error=FunctionFailed(f"the result of the function cannot be read: {error}"))


def _outcome(
    task_id: str, record: list[bytes | None], fields: dict[bytes, bytes], files: OutputFiles
) -> Outcome | None:
    """Of any task; None when it has not ended."""
    raw_status, array, reason, submission, bundle = record
    if raw_status is None:
        return Outcome(error=UnknownTask(f"the result of task {task_id} is gone: records are kept for a time only"))
    if bundle is not None:
        return Outcome(error=InvalidInput(f"{task_id} is a bundle: its tasks have exit codes, but no results"))
    if array is not None:
        return Outcome(error=InvalidInput(f"task {task_id} is an array: ask for its elements, {task_id}_INDEX"))
    status = raw_status.decode()
    if status not in ENDED:
        return None
    if status == "finished" and (value := _value_of(fields)) is not None:
        return _value(value, files)
    if status == "finished" and keys.executor_of((submission or b"").decode()):
        return Outcome(error=_went_to_executor(task_id))
    if status == "finished":
        return Outcome(error=_no_function(task_id))
    trace, exception = (fields.get(name, b"").decode("ascii", "replace") for name in (b"exc_string", b"pq_exception"))
    return Outcome(error=_failure(task_id, status, (reason or b"").decode(), trace, exception, files))


def _failure(task_id: str, status: str, reason: str, trace: str, exception: str, files: OutputFiles) -> BaseException:
    """The exception of a function that did not finish, as it is to be raised here: its own where that can be read."""
    text = _decoded_trace(trace)
    error = _exception(exception, files) if exception and status == "failed" else None
    if error is None:
        error = _told(task_id, status, reason, text)
    if text:
        try:
            error.__cause__ = RemoteTraceback(text)
        except Exception:  # noqa: BLE001  # a class of the user that lets nothing be set
            pass
    return error


def _told(task_id: str, status: str, reason: str, text: str) -> FunctionFailed:
    """The exception that says in words why a function has no value."""
    from pilotq.broker.client.explain import PREDICATES  # brings placement along, which a result does not need

    what, why = f"task {task_id}", REASONS.get(reason) or "it did not come to its end"
    why = f"it {why}" if why.startswith(PREDICATES) else why
    lines = text.strip().splitlines()
    if status != "failed":
        # `canceled`: by its user, or because of another task.
        return FunctionCanceled(f"{what} was {status}" + (f": {why}" if reason == "dependency" else ""))
    if reason == "exception" and lines:
        return FunctionFailed(f"{what}: {lines[-1][:MESSAGE_CHARS]}")
    # The worker's first line says the reason, too; the others where it ran, and what is known.
    more = "; ".join(line.strip() for line in lines[1:])[:MESSAGE_CHARS]
    kind = MemoryExceeded if reason == "memory" else FunctionFailed
    return kind(f"{what} failed: {why}" + (f" ({more})" if more else ""))


def _decoded_trace(trace: str) -> str:
    try:
        return zlib.decompress(base64.b64decode(trace)).decode("utf-8", "replace") if trace else ""
    except (ValueError, zlib.error):
        return ""  # somebody else has written it


def _exception(text: str, files: OutputFiles) -> BaseException | None:
    """The exception itself; None when it cannot be read here: the traceback says what it was."""
    try:
        data = read_text(text)
        found = load(files.read(data) if isinstance(data, Stored) else data)
    except (FunctionFailed, NoPilot, ValueError):
        return None
    return found if isinstance(found, BaseException) else None


def load(data: bytes) -> Any:
    """The value of a pickle; raises FunctionFailed when it cannot be read here."""
    try:
        return pickle.loads(data)
    except BaseException as error:
        # This runs the user's code, which may raise anything: a module that parses arguments exits at its import.
        # Ctrl-C is no fault of it, and only the main thread gets that.
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise FunctionFailed(f"the result of the function cannot be read here: {what}") from error


class RemoteTraceback(Exception):
    """The traceback in the interpreter that ran the function, as text: the cause of the exception raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'
