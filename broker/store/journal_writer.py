"""The journal: one line of JSON for each ended execution, written by one process, readable by all and for ever.

The scripts put what has ended into a stream. `JournalWriter` moves it from there into ``journal.jsonl``: append, fsync,
and only then trim the stream. Every line carries the stream id and its number within the entry (``at``), so that a
restart continues exactly behind the last line. It sends nothing itself: its owner sends `commands` to the server and
gives the replies to `feed`, so that a server that hangs cannot hang the supervisor.
"""

from __future__ import annotations

import mmap
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Link
from pilotq.broker.store.messages import Line, Nudge

READ_COUNT = 200  # stream entries read at once
PENDING_BYTES = 8 << 20  # nothing more is read while so much is not fsynced
PAUSE_BYTES = 64 << 20  # size of the stream from which nothing is handed out while the journal cannot be written
OUTPUTS = ("stdout", "stderr")
_to_json = msgspec.json.Encoder().encode


class _Packed(Line, omit_defaults=True):
    """A line as it travels: output that is not UTF-8 is bytes."""

    stdout: Any = ""
    stderr: Any = ""


class _Verdict(msgspec.Struct):
    """What the script that ended the execution decided; it stands above what the line says.

    ``bits`` (two for each element of an array, by position) become the line's ``elements``.
    """

    status: str | msgspec.UnsetType = msgspec.UNSET
    reason: str | msgspec.UnsetType = msgspec.UNSET
    final: bool | msgspec.UnsetType = msgspec.UNSET
    ended: float | msgspec.UnsetType = msgspec.UNSET
    queued: float | msgspec.UnsetType = msgspec.UNSET
    bits: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    start: int = 0  # the array's range: position p is index start + p * step
    step: int = 1


_items = msgspec.msgpack.Decoder(list[tuple[_Packed, _Verdict]])


class JournalWriter:
    """The one writer of a journal file. Single-threaded; see the module's text for how it is driven.

    ``trouble`` is a sentence while the file cannot be written; then everything is kept and tried again, and from
    ``pause_bytes`` of stream on the wish ``journal`` holds that sentence, on which the dispatcher pauses.
    """

    def __init__(self, path: str, *, fsync_s: float, pilot: str = "", pause_bytes: int = PAUSE_BYTES) -> None:
        self.path = path
        self.trouble = ""
        self._fsync_s = fsync_s
        self._pause_bytes = pause_bytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Bytes behind the last fsync. They are kept until then, because after a failed fsync nobody knows what of
        # them is on disk: they are written again, to the same place.
        self._tail = bytearray()
        self._written = 0
        self._synced, self._last = _cut_torn(self._file)
        self._read_from = _before(self._last[0])
        self._trim: str | None = None
        self._due = 0.0
        self._paused = False
        self._size: int | None = None
        self._kinds: list[str] = []
        if self._synced:
            # The last writer may have died between write and fsync: what it left is not trimmed before it is on disk.
            os.fsync(self._file)
            self._trim = "{}-{}".format(*self._last[0])
        else:
            self._tail += _to_json({"pilotq_journal": 1, "pilot": pilot}) + b"\n"

    @property
    def last(self) -> tuple[int, int]:
        """The stream id of the last line."""
        return self._last[0]

    def commands(self, now: float) -> list[tuple[Argument, ...]]:
        """Write and fsync what is due (``now`` is monotonic), and return the commands for the server, maybe none."""
        due = now >= self._due
        self._store(sync=due)
        found: dict[str, tuple[Argument, ...]] = {}
        if not self.trouble and len(self._tail) < PENDING_BYTES:
            found["read"] = ("XREAD", "COUNT", READ_COUNT, "STREAMS", keys.JOURNAL, self._read_from)
        if self._trim is not None:
            found["trim"] = ("XTRIM", keys.JOURNAL, "MINID", self._trim)
        if due:
            self._due = now + self._fsync_s
            if self.trouble or self._paused:
                found["size"] = ("MEMORY", "USAGE", keys.JOURNAL)
        found.update(self._wish())
        self._kinds = list(found)
        return list(found.values())

    def feed(self, replies: list[Any]) -> bool:
        """Take the replies to the last `commands`; True when there may be more to read at once.

        An error among them raises nothing: its command is sent again with the next ones.
        """
        more = False
        for kind, reply in zip(self._kinds, replies, strict=True):
            if isinstance(reply, Exception):
                continue
            if kind == "read" and reply:
                entries = reply[0][1]
                self._take(entries)
                failpoints.at("journal read")
                more = len(entries) == READ_COUNT
            elif kind == "trim":
                failpoints.at("journal trimmed")
                self._trim = None
            elif kind == "size":
                self._size = int(reply or 0)
            elif kind == "pause":
                self._paused, self._size = True, None
            elif kind == "resume":
                self._paused, self._size = False, None
        return more

    def drain(self, link: Link, now: float) -> bool:
        """Move all that the stream holds; whether that was possible. The ``link`` must have no replies outstanding."""
        while not self.trouble:
            self._due = now  # every round ends on disk
            if not self.feed(link.pipeline(self.commands(now))) and not self._tail and self._trim is None:
                return True
        return False

    def close(self) -> None:
        os.close(self._file)

    def _take(self, entries: list[Any]) -> None:
        for raw_id, fields in entries:
            entry = raw_id.decode()
            place = _place(entry)
            try:
                items = _items.decode(fields[1])
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                # The boundary to what scripts pack: one entry that cannot be read must not stop all others.
                _log(f"journal: entry {entry} cannot be read and is left out: {error}")
                items = []
            for number, (line, verdict) in enumerate(items):
                if (place, number) > self._last:
                    self._tail += _render(line, verdict, f"{entry}:{number}")
                    self._last = (place, number)
            self._read_from = entry

    def _store(self, *, sync: bool) -> None:
        """Write the tail; fsync it too when ``sync``. On any failure all of it is written again the next time."""
        if not self._tail:
            return
        try:
            while self._written < len(self._tail):
                with memoryview(self._tail) as view:
                    self._written += os.pwrite(self._file, view[self._written :], self._synced + self._written)
            failpoints.at("journal written")
            if sync:
                os.fsync(self._file)
                failpoints.at("journal synced")
        except OSError as error:
            self._written = 0
            if not self.trouble:
                _log(f"journal: {self.path} cannot be written ({error.strerror}); trying again, nothing is lost")
            self.trouble = (
                f"the journal {self.path} cannot be written ({error.strerror}): "
                "nothing is handed out until it can; make room, or mend the file system"
            )
            return
        if self.trouble:
            _log(f"journal: {self.path} can be written again")
            self.trouble = ""
        if sync:
            self._synced += len(self._tail)
            self._tail.clear()
            self._written = 0
            (milliseconds, sequence), _ = self._last
            self._trim = f"{milliseconds}-{sequence + 1}"

    def _wish(self) -> dict[str, tuple[Argument, ...]]:
        """The commands that make the dispatcher pause or go on, by the size of the stream that was seen last."""
        if self._size is None:
            return {}
        nudge = ("RPUSH", keys.MAIL, msgspec.msgpack.encode(Nudge()))
        if self._size > self._pause_bytes and self.trouble:
            return {"pause": ("HSET", keys.WISH, "journal", self.trouble), "nudge": nudge}
        if self._size <= self._pause_bytes and self._paused:
            return {"resume": ("HDEL", keys.WISH, "journal"), "nudge": nudge}
        return {}


def _log(text: str) -> None:
    from pilotq.broker.processes import log  # for the writer only: a reader need not load it

    log(text)


def _place(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)


def _before(place: tuple[int, int]) -> str:
    """The stream id just below: an entry may have been written in part, so it is read once more."""
    milliseconds, sequence = place
    if sequence:
        return f"{milliseconds}-{sequence - 1}"
    return f"{milliseconds - 1}-{2**64 - 1}" if milliseconds else "0-0"


def _cut_torn(file: int) -> tuple[int, tuple[tuple[int, int], int]]:
    """Remove a torn end, and return the size and the place of the last line.

    Torn is what does not end in a newline, and, after a power loss, what is no JSON.
    """
    size = os.fstat(file).st_size
    end = size
    place = ((0, 0), -1)
    if size:
        with mmap.mmap(file, size, access=mmap.ACCESS_READ) as view:
            end = view.rfind(b"\n") + 1
            while end:
                start = view.rfind(b"\n", 0, end - 1) + 1
                try:
                    record = msgspec.json.decode(view[start:end])
                    if "pilotq_journal" not in record:
                        entry, _, number = record["at"].rpartition(":")
                        place = (_place(entry), int(number))
                    break
                except (msgspec.DecodeError, KeyError, TypeError, ValueError):
                    end = start
    if end < size:
        os.ftruncate(file, end)
    return end, place


def _render(line: _Packed, verdict: _Verdict, at: str) -> bytes:
    line.at = at
    for name in ("status", "reason", "final", "ended", "queued"):
        value = getattr(verdict, name)
        if value is not msgspec.UNSET:
            setattr(line, name, value)
    if verdict.bits is not msgspec.UNSET:
        line.elements = _elements(_bytes_of(verdict.bits), verdict.start, verdict.step)
    encoded = {}
    for name in OUTPUTS:
        data = getattr(line, name)
        if isinstance(data, bytes):
            try:
                setattr(line, name, data.decode())
            except UnicodeDecodeError:
                setattr(line, name, "")
                encoded[f"{name}_b64"] = b64encode(data).decode()
    if encoded:
        return _to_json({**msgspec.to_builtins(line), **encoded}) + b"\n"
    return _to_json(line) + b"\n"


def _bytes_of(raw: msgspec.Raw) -> bytes:
    """The content of a packed string: Lua packs bytes as text, which need not be UTF-8."""
    packed = bytes(raw)
    head = packed[0]
    if head & 0xE0 == 0xA0:
        return packed[1:]
    return packed[{0xD9: 2, 0xDA: 3, 0xDB: 5, 0xC4: 2, 0xC5: 3, 0xC6: 5}[head] :]


def _elements(bits: bytes, start: int, step: int) -> dict[str, str]:
    """Two bits an element, by position -> status -> ranges of indices: ``0-3,7``."""
    words = ("", "finished", "failed", "canceled")
    ranges: dict[str, list[str]] = {}
    run_word, run_first, last = "", 0, 0

    def close_run() -> None:
        if run_word:
            first, final = start + run_first * step, start + last * step
            piece = str(first) if first == final else f"{first}-{final}" + (f":{step}" if step > 1 else "")
            ranges.setdefault(run_word, []).append(piece)

    for number, byte in enumerate(bits):
        # A byte holds four elements, the first in its highest bits; most arrays are long runs of one outcome.
        if byte == 0x55 and run_word == "finished":
            last = number * 4 + 3
            continue
        for place in range(4):
            word = words[byte >> (6 - 2 * place) & 3]
            if word != run_word:
                close_run()
                run_word, run_first = word, number * 4 + place
            last = number * 4 + place
    close_run()
    return {word: ",".join(pieces) for word, pieces in ranges.items()}


class Journal:
    """Reads a journal, also while it is written and after the pilot has ended. A missing file is an empty journal."""

    def __init__(self, path: str) -> None:
        self.path = path

    def find(self, task_id: str) -> list[Line]:
        """All executions of a task, newest first; empty if the journal does not know it."""
        return list(self._matches(b'\n{"id":' + _to_json(task_id) + b",", lambda line: line.id == task_id))

    def tasks_by_name(self, name: str) -> list[Line]:
        """All executions of the tasks with this name, newest first."""
        return list(self._matches(b'"name":' + _to_json(name), lambda line: line.name == name))

    def lines(self) -> Iterator[Line]:
        """All lines, oldest first. Lines written meanwhile may or may not be among them."""
        try:
            with open(self.path, "rb") as file:
                for raw in file:
                    # Only the writer's last line can be without its end.
                    if raw.endswith(b"\n") and not raw.startswith(b'{"pilotq_journal"'):
                        yield _line_of(raw)
        except FileNotFoundError:
            return

    def last(self, count: int) -> list[Line]:
        """The last lines, newest first."""
        found: list[Line] = []
        with self._view() as view:
            end = view.rfind(b"\n") + 1
            while end and len(found) < count:
                start = view.rfind(b"\n", 0, end - 1) + 1
                if start:  # the first line is the header
                    found.append(_line_of(view[start:end]))
                end = start
        return found

    def _matches(self, pattern: bytes, wanted: Callable[[Line], bool]) -> Iterator[Line]:
        """Lines that contain the pattern and are wanted, newest first."""
        with self._view() as view:
            end = view.rfind(b"\n") + 1
            while (found := view.rfind(pattern, 0, end)) >= 0:
                start = found + 1 if pattern.startswith(b"\n") else view.rfind(b"\n", 0, found) + 1
                line = _line_of(view[start : view.find(b"\n", found + 1) + 1])
                if wanted(line):
                    yield line
                end = start

    def _view(self) -> mmap.mmap:
        """The file as a map: only the pages that a search touches are read."""
        try:
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # mmap's word for an empty file
            return mmap.mmap(-1, 1)


def _line_of(raw: bytes) -> Line:
    line = msgspec.json.decode(raw, type=_Packed)
    if b'_b64":' in raw:
        fields = msgspec.json.decode(raw)
        for name in OUTPUTS:
            if f"{name}_b64" in fields:
                setattr(line, name, b64decode(fields[f"{name}_b64"]))
    return line
