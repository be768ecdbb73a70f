"""The one writer of the journal: a file with one line of JSON for each ended execution, readable by all and for ever.

The scripts put what has ended into a stream. `JournalWriter` moves it from there into ``journal.jsonl``: append, fsync,
and only then trim the stream. Every line carries the stream id and its number within the entry (``at``), so that a
restart continues exactly behind the last line. It sends nothing itself: its owner sends `commands` to the server and
gives the replies to `feed`, so that a server that hangs cannot hang the supervisor.
"""

from __future__ import annotations

import mmap
import os
from base64 import b64encode
from typing import Any

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.log import log
from pilotq.broker.os_strings import from_json, to_json
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Connection
from pilotq.broker.store.journal import HEADER, OUTPUTS, PackedEntry
from pilotq.broker.store.journal_repair import keep_aside
from pilotq.broker.store.journal_runs import Line, RunLines
from pilotq.broker.store.messages import ControlChanged
from pilotq.broker.tasks.array_outcomes import OUTCOMES, element_ranges

READ_COUNT = 200  # stream entries read at once
PENDING_BYTES = 8 << 20  # nothing more is read while so much is not fsynced
PAUSE_BYTES = 64 << 20  # size of the stream from which nothing is handed out while the journal cannot be written


class _Ending(msgspec.Struct):
    """What the script that ended the execution decided; it stands above what the entry says.

    ``outcomes`` (two bits for each element of an array, by position) become the entry's ``elements``.
    """

    status: str | msgspec.UnsetType = msgspec.UNSET
    reason: str | msgspec.UnsetType = msgspec.UNSET
    final: bool | msgspec.UnsetType = msgspec.UNSET
    ended: float | msgspec.UnsetType = msgspec.UNSET
    queued: float | msgspec.UnsetType = msgspec.UNSET
    released: float | msgspec.UnsetType = msgspec.UNSET
    joining: float | msgspec.UnsetType = msgspec.UNSET
    outcomes: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    array: str = ""  # "start:step:count": the indices of the elements


class PlaceOfEntry(msgspec.Struct):
    """The part of an entry of the journal that says where in the stream it was."""

    at: str


# None: it has finished, and nothing else is to be said.
_items = msgspec.msgpack.Decoder(list[tuple[PackedEntry | Line, _Ending | None]])
_FINISHED = _Ending(status="finished", reason="", final=True)
_runs = msgspec.msgpack.Decoder(list[RunLines])
RUNS = b"r"  # the field of an entry of the stream that holds runs of elements


class JournalWriter:
    """The one writer of a journal file. Single-threaded; see the module's text for how it is driven.

    ``trouble`` is a sentence while the file cannot be written; then everything is kept and tried again, and from
    ``pause_bytes`` of stream on the field ``journal`` of ``keys.STATUS`` holds it, and the dispatcher pauses.
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
        self._synced, self._last = _cut_torn(path, self._file)
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
            self._tail += to_json({"pilotq_journal": 1, "pilot": pilot}) + b"\n"

    @property
    def last(self) -> tuple[int, int]:
        """The stream id of the last line."""
        return self._last[0]

    def commands(self, now: float) -> list[tuple[Argument, ...]]:
        """Write and fsync what is due (``now`` is monotonic), and return the commands for the server, maybe none."""
        due = now >= self._due
        self._store(sync=due)
        found: dict[str, tuple[Argument, ...]] = {}
        if self._trim is not None:  # before the read, whose reply may set the next mark
            found["trim"] = ("XTRIM", keys.JOURNAL, "MINID", self._trim)
        if not self.trouble and len(self._tail) < PENDING_BYTES:
            found["read"] = ("XREAD", "COUNT", READ_COUNT, "STREAMS", keys.JOURNAL, self._read_from)
        if due:
            self._due = now + self._fsync_s
            if self.trouble or self._paused:
                found["size"] = ("MEMORY", "USAGE", keys.JOURNAL)
        found.update(self._pause_commands())
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
                failpoints.hit("journal read")
                more = len(entries) == READ_COUNT
            elif kind == "trim":
                failpoints.hit("journal trimmed")
                self._trim = None
            elif kind == "size":
                self._size = int(reply or 0)
            elif kind == "pause":
                self._paused, self._size = True, None
            elif kind == "resume":
                self._paused, self._size = False, None
        return more

    def drain(self, link: Connection, now: float) -> bool:
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
            stream_id = raw_id.decode()
            place = _place(stream_id)
            try:
                items = _items_of(*fields)
            except (ValueError, LookupError) as error:
                # The boundary to what scripts pack: one entry that cannot be read must not stop all others.
                self._leave_out(stream_id, fields[1], error)
                items = []
            for number, (entry, ending) in enumerate(items):
                if (place, number) > self._last:
                    try:
                        self._tail += _render(entry, ending, f"{stream_id}:{number}")
                    except (ValueError, LookupError) as error:  # what is in it cannot be
                        self._leave_out(f"{stream_id}:{number}", fields[1], error)
                    self._last = (place, number)
            self._read_from = stream_id
        if not self._tail:
            # Nothing new: the last entry was read whole, and the writer before has put all of it on disk.
            self._trim = _after(self._last[0])

    def _leave_out(self, at: str, data: bytes, error: Exception) -> None:
        """Keep what cannot be read of the stream in a file beside the journal: its task has ended all the same."""
        try:
            where = keep_aside(self.path, [to_json({"at": at, "entry": data}) + b"\n"])
        except OSError as failure:
            where = f"nowhere ({failure.strerror})"
        log(f"journal: entry {at} cannot be read ({error}): it is left out, and kept in {where}", level="error")

    def _store(self, *, sync: bool) -> None:
        """Write the tail; fsync it too when ``sync``. On any failure all of it is written again the next time."""
        if not self._tail:
            return
        try:
            while self._written < len(self._tail):
                with memoryview(self._tail) as view:
                    self._written += os.pwrite(self._file, view[self._written :], self._synced + self._written)
            failpoints.hit("journal written")
            if sync:
                os.fsync(self._file)
                failpoints.hit("journal synced")
        except OSError as error:
            self._written = 0
            if not self.trouble:
                log(
                    f"journal: {self.path} cannot be written ({error.strerror}); trying again, nothing is lost",
                    level="error",
                )
            self.trouble = (
                f"the journal {self.path} cannot be written ({error.strerror}): "
                "nothing is handed out until it can; make room, or mend the file system"
            )
            return
        if self.trouble:
            log(f"journal: {self.path} can be written again")
            self.trouble = ""
        if sync:
            self._synced += len(self._tail)
            self._tail.clear()
            self._written = 0
            self._trim = _after(self._last[0])

    def _pause_commands(self) -> dict[str, tuple[Argument, ...]]:
        """The commands that make the dispatcher pause or go on, by the size of the stream that was seen last."""
        if self._size is None:
            return {}
        notify = ("RPUSH", keys.EVENTS, msgspec.msgpack.encode(ControlChanged()))
        if self._size > self._pause_bytes and self.trouble:
            return {"pause": ("HSET", keys.STATUS, "journal", self.trouble), "notify": notify}
        if self._size <= self._pause_bytes and self._paused:
            return {"resume": ("HDEL", keys.STATUS, "journal"), "notify": notify}
        return {}


def _items_of(field: bytes, data: bytes) -> list[tuple[PackedEntry | bytes, _Ending]]:
    """What an entry of the stream holds: entries, or lines that lack their end; raises ValueError or LookupError where
    that cannot be read."""
    if field == RUNS:
        return [(item, _FINISHED) for run in _runs.decode(data) for item in run.begun_lines() or run.entries()]
    return [
        (item.entry() if isinstance(item, Line) else item, ending or _FINISHED) for item, ending in _items.decode(data)
    ]


def _place(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)


def _after(place: tuple[int, int]) -> str:
    """The stream id just above: trimming to it removes the entry at ``place`` too."""
    milliseconds, sequence = place
    return f"{milliseconds}-{sequence + 1}"


def _before(place: tuple[int, int]) -> str:
    """The stream id just below: an entry may have been written in part, so it is read once more."""
    milliseconds, sequence = place
    if sequence:
        return f"{milliseconds}-{sequence - 1}"
    return f"{milliseconds - 1}-{2**64 - 1}" if milliseconds else "0-0"


def _cut_torn(path: str, file: int) -> tuple[int, tuple[tuple[int, int], int]]:
    """Remove a torn end, and return the size and the place of the last line.

    Torn is what does not end in a newline, and, after a power loss, what cannot be read; whole lines of that are kept
    in a file beside the journal.
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
                    if view[start : start + len(HEADER)] != HEADER:
                        entry, _, number = from_json(view[start:end], PlaceOfEntry).at.rpartition(":")
                        place = (_place(entry), int(number))
                    break
                except ValueError:
                    end = start
            whole = view[end : view.rfind(b"\n") + 1]
        if whole:
            log(f"journal: its last lines cannot be read, and are moved to {keep_aside(path, [whole])}", level="error")
    if end < size:
        os.ftruncate(file, end)
    return end, place


def _render(entry: PackedEntry | bytes, ending: _Ending, at: str) -> bytes:
    if isinstance(entry, bytes):
        return b'%s,"at":"%s"}\n' % (entry, at.encode())
    entry.at = at
    for name in ("status", "reason", "final", "ended", "queued", "released", "joining"):
        value = getattr(ending, name)
        if value is not msgspec.UNSET:
            setattr(entry, name, value)
    if ending.outcomes is not msgspec.UNSET:
        entry.elements = element_ranges(_bytes_of(ending.outcomes), ending.array)
        entry.elements.pop(OUTCOMES[0], None)  # the journal tells what has ended
    encoded = {}
    for name in OUTPUTS:
        data = getattr(entry, name)
        if isinstance(data, bytes):
            try:
                setattr(entry, name, data.decode())
            except UnicodeDecodeError:
                setattr(entry, name, "")
                encoded[f"{name}_b64"] = b64encode(data).decode()
        for place in getattr(entry, f"{name}_at")[:1]:
            if isinstance(place, bytes):
                getattr(entry, f"{name}_at")[0] = place.decode("utf-8", "surrogateescape")
    if encoded:
        return to_json({**msgspec.to_builtins(entry), **encoded}) + b"\n"
    return to_json(entry) + b"\n"


def _bytes_of(raw: msgspec.Raw) -> bytes:
    """The content of a packed string: Lua packs bytes as text, which need not be UTF-8."""
    packed = bytes(raw)
    head = packed[0]
    if head & 0xE0 == 0xA0:
        return packed[1:]
    return packed[{0xD9: 2, 0xDA: 3, 0xDB: 5, 0xC4: 2, 0xC5: 3, 0xC6: 5}[head] :]
