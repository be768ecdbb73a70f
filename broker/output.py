"""Captured output of tasks: from the journal, from the packs it points into, or from the file a running task writes."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pilotq.broker import keys
from pilotq.broker.errors import NoPilot
from pilotq.broker.journal import Journal
from pilotq.broker.link import Link
from pilotq.broker.pilot import Pilot
from pilotq.broker.records import Line

PIECE = 1 << 16


def captured(pilot: Pilot | None, task_id: str, stream: str) -> Iterator[bytes]:
    """The output of the last execution that ended, in pieces."""
    if pilot is None:
        raise NoPilot("captured output is read from the pilot's directory: give it with --dir")
    lines = Journal(pilot.journal).find(task_id)
    if lines:
        yield from of_line(pilot, lines[0], stream)


def of_line(pilot: Pilot, line: Line, stream: str) -> Iterator[bytes]:
    """What a line of the journal holds, or points to. A file that is gone gives nothing."""
    inline, place = (line.stdout, line.stdout_at) if stream == "stdout" else (line.stderr, line.stderr_at)
    if inline:
        yield inline.encode() if isinstance(inline, str) else inline
    if place:
        path = pilot.path(str(place[0]))  # an absolute path (a file the task named) stays as it is
        offset, left = (int(place[1]), int(place[2])) if len(place) > 1 else (0, -1)
        yield from _read(path, offset, left)


def _read(path: str, offset: int, left: int) -> Iterator[bytes]:
    """``left`` bytes from ``offset`` on; all there is if negative."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        while left and (data := file.read(PIECE if left < 0 else min(PIECE, left))):
            left -= len(data) if left > 0 else 0
            yield data


def live(link: Link, pilot: Pilot | None, task_id: str, stream: str, offset: int) -> tuple[bytes, bool]:
    """(bytes after ``offset`` of a task that runs, or all that is left of one that has ended; whether it has ended).

    The file of a running task is used again by the next one, so the execution is compared after reading, too.
    """
    field = "pq_out" if stream == "stdout" else "pq_err"
    before = link.call("HMGET", keys.job(task_id), "status", "pq_exec", field)
    if before[0] == b"started" and before[2]:
        data = b"".join(_read(os.fsdecode(before[2]), offset, 16 * PIECE))
        if link.call("HMGET", keys.job(task_id), "status", "pq_exec", field) == before:
            return data, False
    if before[0] in (b"started", b"queued", b"deferred", b"scheduled"):
        return b"", False
    whole = b"".join(captured(pilot, task_id, stream))
    return whole[offset:], True
