"""Whether the server is older than the journal: then it has forgotten what had ended, and would run it again.

Every line of the journal names the entry of the server's stream that it came from. A server whose stream never came so
far is not the one that wrote it: a power loss has cost its last seconds, or somebody has put older files there.
"""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec

from pilotq.broker.errors import StateLost
from pilotq.broker.pilot.aof_repair import MARK
from pilotq.broker.pilot.directory import Pilot, write_private
from pilotq.broker.processes import log
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link, ReplyError
from pilotq.broker.store.journal_writer import JournalWriter

QUESTION = ("XINFO", "STREAM", keys.JOURNAL)
Place = tuple[int, int]  # a stream id


def open_journal(pilot: Pilot, address: Address, settings: Settings) -> JournalWriter:
    """Open the pilot's journal for writing. Raises StateLost when the server is older than it, unless `doctor --repair`
    was used since: then the lines that the server does not know are put aside."""
    link = Link(address)
    try:
        reply = link.call(*QUESTION)
    except ReplyError as error:
        reply = error
    finally:
        link.close()
    mark = pilot.path("server", MARK)
    last = last_of(reply)
    if os.path.exists(mark):
        if last is not None:
            _put_aside(pilot.journal, last)
        os.unlink(mark)
    journal = JournalWriter(pilot.journal, fsync_s=settings.journal_fsync_s, pilot=pilot.id)
    if is_older(reply, journal):
        journal.close()
        raise StateLost(
            f"the server is older than {pilot.journal}: executions that had ended are not known to it, because of a "
            f"power loss or of files of an earlier time; `pilotq doctor --repair --dir {pilot.directory}` lets their "
            "tasks run again, and puts these lines aside"
        )
    return journal


def is_older(reply: Any, journal: JournalWriter) -> bool:
    """Whether the server that gave this reply to QUESTION is older than the journal; False when it does not tell."""
    last = last_of(reply)
    return last is not None and last < journal.last


def last_of(reply: Any) -> Place | None:
    """The last id the stream has given out; None when the reply does not tell."""
    if isinstance(reply, Exception):
        return (0, 0) if "no such key" in str(reply) else None
    fields = dict(zip(reply[::2], reply[1::2], strict=False))
    return _place(fields[b"last-generated-id"].decode())


def _place(text: str) -> Place:
    milliseconds, _, sequence = text.partition("-")
    return int(milliseconds), int(sequence)


def _put_aside(path: str, last: Place) -> None:
    """Move the lines that came after a stream id to a file beside the journal."""
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    first = next((number for number, line in enumerate(lines) if _is_later(line, last)), len(lines))
    if first < len(lines):
        aside = f"{path.removesuffix('.jsonl')}.lost-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        write_private(aside, b"".join(lines[first:]))
        os.truncate(path, sum(map(len, lines[:first])))
        log(f"{len(lines) - first} lines of the journal that the server does not know are put aside, in {aside}")


def _is_later(line: bytes, last: Place) -> bool:
    try:
        return _place(msgspec.json.decode(line)["at"].rpartition(":")[0]) > last
    except (msgspec.DecodeError, KeyError, ValueError):
        return False  # the header, or a torn end
