"""Captured output of tasks: from the journal, from the packs it points into, or from the file a running task writes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pilotq.broker.client.queries import Listing
from pilotq.broker.errors import PilotFailed, UnknownTask
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.broker.store.journal_writer import Journal
from pilotq.broker.store.messages import Line
from pilotq.broker.tasks.states import ENDED

PIECE = 1 << 16
LOOK_BYTES = 1 << 20  # of a running task, read at one look
# Redis says that a task has ended before the journal holds its output: usually some 0.1 s.
JOURNAL_WAIT_S = 5.0
UNCERTAIN_WAIT_S = 2.0  # where there may be no line to come
LOOK_S = 0.02


def captured(journal: Journal, pilot: Pilot, task_id: str, stream: str) -> Iterator[bytes]:
    """The output of the last execution in the journal, in pieces."""
    yield from _of_last(pilot, journal.find(task_id), stream)


def of_line(pilot: Pilot, line: Line, stream: str, skip: int = 0) -> Iterator[bytes]:
    """What a line of the journal holds, or points to, without the first ``skip`` bytes. A file that is gone gives
    nothing."""
    inline, place = (line.stdout, line.stdout_at) if stream == "stdout" else (line.stderr, line.stderr_at)
    if rest := (inline.encode() if isinstance(inline, str) else inline)[skip:]:
        yield rest
    if place:
        path = pilot.path(str(place[0]))  # an absolute path (a file the task named) stays as it is
        offset, left = (int(place[1]), max(int(place[2]) - skip, 0)) if len(place) > 1 else (0, -1)
        yield from _read(path, offset + skip, left)


def _of_last(pilot: Pilot, lines: Sequence[Line], stream: str) -> Iterator[bytes]:
    # Of a task that was canceled while it waited to be tried again the newest line is of no execution.
    if lines:
        yield from of_line(pilot, max(lines, key=lambda line: line.execution), stream)


def _read(path: str, offset: int, left: int) -> Iterator[bytes]:
    """``left`` bytes from ``offset`` on; all there is if negative."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(offset)
        while left and (data := file.read(PIECE if left < 0 else min(PIECE, left))):
            left -= len(data) if left > 0 else 0
            yield data


class Output:
    """The output of the tasks of a running pilot."""

    def __init__(self, listing: Listing, pilot: Pilot, journal: Journal) -> None:
        self._listing = listing
        self._pilot = pilot
        self._journal = journal

    def last(self, task_id: str, stream: str) -> Iterator[bytes]:
        """The output of the last execution that has ended, in pieces.

        Waits for the journal when Redis says that the task has ended. Raises PilotFailed when that takes longer than
        JOURNAL_WAIT_S.
        """
        status, execution, _ = self._state(task_id, stream)
        lines = self._lines(task_id, status, execution) if status in ENDED else self._journal.find(task_id)
        yield from _of_last(self._pilot, lines, stream)

    def follow(self, task_id: str, stream: str) -> Iterator[bytes]:
        """What the task writes, from the beginning of its last execution on; an empty piece whenever there is nothing
        new. Ends when the task has ended. Raises UnknownTask when somebody deletes it, PilotFailed as `last`."""
        seen = offset = 0  # the execution that is followed, and the bytes of it that were given
        while True:
            state = status, execution, path = self._state(task_id, stream)
            if status in ENDED:
                lines = self._lines(task_id, status, execution)
                if seen:
                    yield from self._rest(lines, seen, offset, stream)
                else:
                    yield from _of_last(self._pilot, lines, stream)
                return
            if status == "started" and path and seen in (0, execution):
                data = b"".join(_read(path, offset, LOOK_BYTES))
                # A running task's file is used again by the next one.
                if self._state(task_id, stream) == state:
                    seen, offset = execution, offset + len(data)
                    yield data
                continue
            if seen and execution > seen:
                lines = self._journal.find(task_id)
                if any(line.execution >= seen for line in lines):
                    yield from self._rest(lines, seen, offset, stream)
                    seen, offset = execution, 0
            yield b""

    def _rest(self, lines: Sequence[Line], seen: int, offset: int, stream: str) -> Iterator[bytes]:
        """What was written behind ``offset`` of the execution ``seen``, and by those after it."""
        for line in sorted(lines, key=lambda line: line.execution):
            if line.execution >= seen:
                yield from of_line(self._pilot, line, stream, offset if line.execution == seen else 0)

    def _state(self, task_id: str, stream: str) -> tuple[str, int, str]:
        """Status, number of the last execution, and the file that a running one writes."""
        field = "pq_out" if stream == "stdout" else "pq_err"
        status, execution, path = self._listing.link.call("HMGET", keys.job(task_id), "status", "pq_exec", field)
        if status is not None:
            return status.decode(), int(execution or 0), os.fsdecode(path or b"")
        view = self._listing.task(task_id)
        if view is None:
            raise UnknownTask(f"there is no task {task_id!r} in this pilot any more")
        return view.status, view.execution, ""

    def _lines(self, task_id: str, status: str, execution: int) -> list[Line]:
        """The lines of a task that has ended with this execution; waits for the last one."""
        # Of what was canceled it is not known whether it ran.
        certain = status != "canceled"
        deadline = time.monotonic() + (JOURNAL_WAIT_S if certain else UNCERTAIN_WAIT_S)
        while True:
            lines = self._journal.find(task_id)
            if any(line.final and line.execution >= execution for line in lines):
                return lines
            if status == "canceled" and lines and lines[0].execution == 0:
                return lines  # it waited
            if time.monotonic() > deadline:
                if not certain:
                    return lines
                raise PilotFailed(
                    f"the end of task {task_id} has not reached the journal yet, and its output neither: try again; "
                    f"{self._pilot.log('supervisor')} says if the journal cannot be written"
                )
            time.sleep(LOOK_S)
