"""The journal of ended executions, for readers: its entries, and how they are found in the file.

>>> Journal("/pilot/journal.jsonl").find("1f")[0].status
'finished'
"""

from __future__ import annotations

import mmap
import warnings
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import msgspec

from pilotq.broker.errors import JournalDamaged
from pilotq.broker.os_strings import from_json, printable
from pilotq.broker.store.resources import parse_allocation
from pilotq.broker.tasks.array_outcomes import count_indices

OUTPUTS = ("stdout", "stderr")
FIRST_KEY = b'{"id":'  # a line begins with it, and with the id as JSON
HEADER = b'{"pilotq_journal"'  # with it the first line begins
Moment = Annotated[float, msgspec.Meta(ge=0, le=1e11)] | None  # unix seconds
Place = list[str | int]
PLACES = ([str], [str, int, int])  # types of a place
WARNINGS_MAX = 5  # lines of one file that are named
_told: dict[str, set[int]] = {}  # lines of each file that were warned of
_to_json = msgspec.json.Encoder().encode


class JournalEntry(msgspec.Struct, omit_defaults=True):
    """One line of journal.jsonl: one ended execution, or one task that ended without any.

    Times are unix seconds, ``cpu`` seconds, ``max_rss`` bytes. ``final`` is False for an execution that is tried
    again. ``stdout``/``stderr`` hold captured output up to 4 KB, else ``stdout_at``/``stderr_at`` say where it is:
    [file below the pilot directory, offset, length], or [file named by the task]; bytes of its path that are not UTF-8
    are surrogates.
    The first key must be ``id``: cli and broker find entries by ``\\n{"id":"..."``.
    """

    id: str
    name: str = ""
    status: str = ""  # RQ's word
    reason: str = ""
    execution: int = 0
    final: bool = True
    node: str = ""
    cpus: str = ""  # allocation text, n1[0:1],n2[0]
    queued: float | None = None
    handed: float | None = None
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    pid: int | None = None  # of the main process, on its node
    max_rss: int | None = None
    cpu: float | None = None
    memory: int = 0  # bytes that it asked for, on each node
    limit: float | None = None  # seconds
    array: str = ""
    index: int | None = None
    command: str = ""  # one line, shortened
    message: str = ""  # more than the reason, for people
    stdout: str | bytes = ""
    stderr: str | bytes = ""
    stdout_at: list[Any] = []
    stderr_at: list[Any] = []
    submission: str = ""
    elements: dict[str, str] = {}  # of an array or bundle: status -> compact ranges of indices
    bundle: bool = False  # it stands for the tasks of a bundle
    released: float | None = None  # of what has waited for other tasks: when the last of them had ended
    # Of a task that joins: when its process had ended. It has a line for that, not final, and one for its own end.
    joining: float | None = None
    at: str = ""  # stream id, and number within that entry: the writer goes on behind it after a restart

    @property
    def submitted_as(self) -> str:
        """The id that its submit has returned: that of its array, or its own, also in a bundle (without an index)."""
        return self.id if self.index is None or not self.array else self.array


class PackedEntry(JournalEntry, omit_defaults=True):
    """An entry as it travels: output that is not UTF-8 is bytes."""

    stdout: Any = ""
    stderr: Any = ""


class _Line(JournalEntry):
    """An entry as it stands in the file, with what can be checked of it."""

    queued: Moment = None
    released: Moment = None
    handed: Moment = None
    started: Moment = None
    ended: Moment = None
    joining: Moment = None
    stdout: str = ""
    stderr: str = ""
    stdout_at: Place = []
    stderr_at: Place = []


_decode = msgspec.json.Decoder(_Line).decode

NEWEST_FIRST = 500  # entries that `Journal.newest` reads at first


class Journal:
    """Reads a journal, also while it is written and after the pilot has ended. A missing file is an empty journal.

    A line that cannot be read is left out, with a warning (`JournalDamaged`) that names it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._examined = False

    def find(self, task_id: str) -> list[JournalEntry]:
        """All executions of a task, newest first; empty if the journal does not know it.

        That of a task that has joined its children is one entry, which ended with the last child.
        """
        sought = b'\n{"id":' + _to_json(printable(task_id)) + b","
        found = list(self._matches(sought, lambda entry: entry.id == task_id))
        if len(found) > 1 and found[0].final and found[0].joining is not None and found[1].joining is not None:
            end, process = found[:2]
            process.final, process.status, process.reason, process.ended = True, end.status, end.reason, end.ended
            process.message = end.message or process.message
            del found[0]
        return found

    def tasks_by_name(self, name: str) -> list[JournalEntry]:
        """All executions of the tasks with this name, newest first."""
        return list(self._matches(b'"name":' + _to_json(name), lambda entry: entry.name == name))

    def entries(self) -> Iterator[JournalEntry]:
        """All entries, oldest first. Entries written meanwhile may or may not be among them."""
        try:
            with open(self.path, "rb") as file:
                for number, raw in enumerate(file, start=1):
                    # Only the writer's last line can be without its end.
                    if raw.endswith(b"\n") and not raw.startswith(HEADER):
                        try:
                            yield decode_entry(raw)
                        except ValueError as error:
                            warn_of_line(self.path, number, error)
        except FileNotFoundError:
            return

    def examine(self) -> None:
        """Warn of every line that cannot be read: what somebody looks for, and does not find, may stand there."""
        if not self._examined:
            self._examined = True
            for _ in self.entries():
                pass

    def last(self, count: int) -> list[JournalEntry]:
        """The last entries, newest first."""
        found: list[JournalEntry] = []
        with self._view() as view:
            end = view.rfind(b"\n") + 1
            while end and len(found) < count:
                start = view.rfind(b"\n", 0, end - 1) + 1
                if (entry := self._entry(view, start, end)) is not None:
                    found.append(entry)
                end = start
        return found

    def newest(self) -> Iterator[JournalEntry]:
        """The entries, newest first; not many more are read than are taken."""
        given, count = 0, NEWEST_FIRST
        while True:
            entries = self.last(count)
            yield from entries[given:]
            if len(entries) < count:
                return
            given, count = len(entries), 4 * count

    def _matches(self, pattern: bytes, wanted: Callable[[JournalEntry], bool]) -> Iterator[JournalEntry]:
        """Entries that contain the pattern and are wanted, newest first."""
        with self._view() as view:
            end = view.rfind(b"\n") + 1
            while (found := view.rfind(pattern, 0, end)) >= 0:
                start = found + 1 if pattern.startswith(b"\n") else view.rfind(b"\n", 0, found) + 1
                entry = self._entry(view, start, view.find(b"\n", found + 1) + 1)
                if entry is not None and wanted(entry):
                    yield entry
                end = start

    def _entry(self, view: mmap.mmap, start: int, end: int) -> JournalEntry | None:
        """The entry that stands there; None for the header, and for what cannot be read."""
        raw = view[start:end]
        if raw.startswith(HEADER):
            return None
        try:
            return decode_entry(raw)
        except ValueError as error:
            warn_of_line(self.path, 1 + _count_lines(view, start), error)
            return None

    def _view(self) -> mmap.mmap:
        """The file as a map: only the pages that a search touches are read."""
        try:
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # mmap's word for an empty file
            return mmap.mmap(-1, 1)


class JournalReader:
    """The entries of some tasks, or of all (``ids`` None), in passes that go on where the one before ended or was left.

    ``offset`` is how many bytes were read.
    """

    def __init__(self, journal: Journal, ids: Iterable[str] | None) -> None:
        self._path = journal.path
        self._wanted = None if ids is None else {_to_json(printable(task_id)) for task_id in ids}
        self.offset = 0
        self._lines = 0  # that were read

    def read(self) -> Iterator[JournalEntry]:
        """What was written since the last pass, oldest first."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self.offset)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        return  # the writer is at it
                    self.offset += len(raw)
                    self._lines += 1
                    if self._may_be_wanted(raw):
                        try:
                            entry = decode_entry(raw)
                        except ValueError as error:
                            warn_of_line(self._path, self._lines, error)
                            continue
                        if self._wanted is None or _to_json(entry.id) in self._wanted:
                            yield entry
        except FileNotFoundError:
            return

    def _may_be_wanted(self, raw: bytes) -> bool:
        if self._wanted is None:
            return not raw.startswith(HEADER)
        task_id = raw[len(FIRST_KEY) : raw.find(b'",', len(FIRST_KEY)) + 1]
        # With an escaped quote in it the id may go on.
        return raw.startswith(FIRST_KEY) and (task_id in self._wanted or b"\\" in task_id)


def decode_entry(raw: bytes) -> JournalEntry:
    """The entry in a line; raises ValueError where it is none that could be used."""
    try:
        entry = _decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raw.decode()  # from its version 0.23 on msgspec does not tell what is not UTF-8 from what is no JSON
        entry = from_json(raw, _Line)  # it may have escapes that only this knows
    if b'_b64":' in raw:
        fields = from_json(raw, dict[str, Any])
        for name in OUTPUTS:
            if f"{name}_b64" in fields:
                setattr(entry, name, b64decode(fields[f"{name}_b64"], validate=True))
    parse_allocation(entry.cpus)
    if entry.elements:
        for ranges in entry.elements.values():
            count_indices(ranges)
    if entry.stdout_at or entry.stderr_at:
        for place in (entry.stdout_at, entry.stderr_at):
            if place and [type(part) for part in place] not in PLACES:
                raise msgspec.ValidationError("an output at no place")
    return entry


def problem_of(error: Exception) -> str:
    """Why a line cannot be read, by what `decode_entry` has raised."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
        return "it is no JSON"
    return "it is no entry of a journal"


def warn_of_line(path: str, number: int, error: ValueError) -> None:
    """Warn of a line, counted from 1, that cannot be read; of the first few of a file by name, and of each once."""
    told = _told.setdefault(path, set())
    if number in told or len(told) > WARNINGS_MAX:
        return
    told.add(number)
    where = printable(path)
    text = f"{where}: line {number} cannot be read ({problem_of(error)})"
    if len(told) > WARNINGS_MAX:
        text = f"{where}: more lines cannot be read"
    warnings.warn(f"{text}: what it says is left out; `pilotq doctor` tells what to do", JournalDamaged, stacklevel=2)


def _count_lines(view: mmap.mmap, end: int) -> int:
    piece = 1 << 20
    return sum(view[at : min(at + piece, end)].count(b"\n") for at in range(0, end, piece))
