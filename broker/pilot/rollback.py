"""Detects a server that was rolled back: one whose data are older than the journal.

Such a server has forgotten executions that had ended, and would run them again. Every line of the journal names the
entry of the server's stream that it came from. A server whose stream never reached that entry has lost it: its last
seconds in a power loss, or everything since somebody put older files in its directory.
"""

from __future__ import annotations

import os
import time
from typing import Any

from pilotq.broker.errors import StateLost
from pilotq.broker.log import log
from pilotq.broker.os_strings import from_json
from pilotq.broker.pilot.aof_repair import MARK
from pilotq.broker.pilot.directory import Pilot, write_private
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection, ReplyError
from pilotq.broker.store.journal_writer import JournalWriter, PlaceOfEntry

STREAM_QUERY = ("XINFO", "STREAM", keys.JOURNAL)
StreamId = tuple[int, int]  # a stream id


def open_journal(pilot: Pilot, address: Address, settings: Settings) -> JournalWriter:
    """Open the pilot's journal for writing.

    Raises StateLost when the server was rolled back, unless `doctor --repair` was used since: then the lines that the
    server does not know are moved to a file beside the journal.
    """
    connection = Connection(address)
    try:
        reply = connection.call(*STREAM_QUERY)
    except ReplyError as error:
        reply = error
    finally:
        connection.close()
    mark = pilot.path("server", MARK)
    last = last_id(reply)
    if os.path.exists(mark):
        if last is not None:
            _move_unknown_lines(pilot.journal, last)
        os.unlink(mark)
    journal = JournalWriter(pilot.journal, fsync_s=settings.journal_fsync_s, pilot=pilot.id)
    if is_rolled_back(reply, journal):
        journal.close()
        raise StateLost(
            f"the server is older than {pilot.journal}: executions that had ended are not known to it, because of a "
            f"power loss or of files of an earlier time; `pilotq doctor --repair --dir {pilot.directory}` lets their "
            "tasks run again, and moves these lines to a file of their own"
        )
    return journal


def is_rolled_back(reply: Any, journal: JournalWriter) -> bool:
    """Whether the server that gave this reply to STREAM_QUERY is older than the journal; False if the reply is an error
    that does not tell."""
    last = last_id(reply)
    return last is not None and last < journal.last


def last_id(reply: Any) -> StreamId | None:
    """The last id that the stream has assigned; None when the reply does not tell."""
    if isinstance(reply, Exception):
        return (0, 0) if "no such key" in str(reply) else None
    fields = dict(zip(reply[::2], reply[1::2], strict=False))
    return _parse_id(fields[b"last-generated-id"].decode())


def _parse_id(text: str) -> StreamId:
    milliseconds, _, sequence = text.partition("-")
    return int(milliseconds), int(sequence)


def _move_unknown_lines(path: str, last: StreamId) -> None:
    """Move the lines that came after a stream id to a file beside the journal."""
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    first = next((number for number, line in enumerate(lines) if _is_later(line, last)), len(lines))
    if first < len(lines):
        moved_to = f"{path.removesuffix('.jsonl')}.lost-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        write_private(moved_to, b"".join(lines[first:]))
        os.truncate(path, sum(map(len, lines[:first])))
        log(
            f"{len(lines) - first} lines of the journal that the server does not know are moved to {moved_to}",
            level="warning",
        )


def _is_later(line: bytes, last: StreamId) -> bool:
    try:
        return _parse_id(from_json(line, PlaceOfEntry).at.rpartition(":")[0]) > last
    except ValueError:
        return False  # the header, or a torn end
