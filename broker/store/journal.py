"""The journal of ended executions, for readers: its entries, and how they are found in the file.

>>> Journal("/pilot/journal.jsonl").find("1f")[0].status
'finished'
"""

from __future__ import annotations

import mmap
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from pilotq.broker.os_strings import from_json, printable

OUTPUTS = ("stdout", "stderr")
FIRST_KEY = b'{"id":'  # a line begins with it, and with the id as JSON
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
    array: str = ""
    index: int | None = None
    message: str = ""  # more than the reason, for people
    stdout: str | bytes = ""
    stderr: str | bytes = ""
    stdout_at: list[Any] = []
    stderr_at: list[Any] = []
    submission: str = ""
    elements: dict[str, str] = {}  # of an array: status -> compact ranges of indices
    at: str = ""  # stream id, and number within that entry: the writer goes on behind it after a restart


class PackedEntry(JournalEntry, omit_defaults=True):
    """An entry as it travels: output that is not UTF-8 is bytes."""

    stdout: Any = ""
    stderr: Any = ""


class Journal:
    """Reads a journal, also while it is written and after the pilot has ended. A missing file is an empty journal."""

    def __init__(self, path: str) -> None:
        self.path = path

    def find(self, task_id: str) -> list[JournalEntry]:
        """All executions of a task, newest first; empty if the journal does not know it."""
        return list(self._matches(b'\n{"id":' + _to_json(printable(task_id)) + b",", lambda entry: entry.id == task_id))

    def tasks_by_name(self, name: str) -> list[JournalEntry]:
        """All executions of the tasks with this name, newest first."""
        return list(self._matches(b'"name":' + _to_json(name), lambda entry: entry.name == name))

    def entries(self) -> Iterator[JournalEntry]:
        """All entries, oldest first. Entries written meanwhile may or may not be among them."""
        try:
            with open(self.path, "rb") as file:
                for raw in file:
                    # Only the writer's last line can be without its end.
                    if raw.endswith(b"\n") and not raw.startswith(b'{"pilotq_journal"'):
                        yield _decode(raw)
        except FileNotFoundError:
            return

    def last(self, count: int) -> list[JournalEntry]:
        """The last entries, newest first."""
        found: list[JournalEntry] = []
        with self._view() as view:
            end = view.rfind(b"\n") + 1
            while end and len(found) < count:
                start = view.rfind(b"\n", 0, end - 1) + 1
                if start:  # the first line is the header
                    found.append(_decode(view[start:end]))
                end = start
        return found

    def _matches(self, pattern: bytes, wanted: Callable[[JournalEntry], bool]) -> Iterator[JournalEntry]:
        """Entries that contain the pattern and are wanted, newest first."""
        with self._view() as view:
            end = view.rfind(b"\n") + 1
            while (found := view.rfind(pattern, 0, end)) >= 0:
                start = found + 1 if pattern.startswith(b"\n") else view.rfind(b"\n", 0, found) + 1
                entry = _decode(view[start : view.find(b"\n", found + 1) + 1])
                if wanted(entry):
                    yield entry
                end = start

    def _view(self) -> mmap.mmap:
        """The file as a map: only the pages that a search touches are read."""
        try:
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # mmap's word for an empty file
            return mmap.mmap(-1, 1)


class JournalReader:
    """The entries of some tasks, in passes that go on where the one before ended."""

    def __init__(self, journal: Journal, ids: Iterable[str]) -> None:
        self._path = journal.path
        self._wanted = {_to_json(printable(task_id)) for task_id in ids}
        self._offset = 0

    def read(self) -> Iterator[JournalEntry]:
        """What was written since the last pass, oldest first."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        return  # the writer is at it
                    self._offset += len(raw)
                    task_id = raw[len(FIRST_KEY) : raw.find(b'",', len(FIRST_KEY)) + 1]
                    # With an escaped quote in it the id may go on.
                    if raw.startswith(FIRST_KEY) and (task_id in self._wanted or b"\\" in task_id):
                        entry = _decode(raw)
                        if _to_json(entry.id) in self._wanted:
                            yield entry
        except FileNotFoundError:
            return


def _decode(raw: bytes) -> JournalEntry:
    entry = from_json(raw, PackedEntry)
    if b'_b64":' in raw:
        fields = from_json(raw, dict[str, Any])
        for name in OUTPUTS:
            if f"{name}_b64" in fields:
                setattr(entry, name, b64decode(fields[f"{name}_b64"]))
    return entry
