"""Captured output of tasks: from the journal, from the files it refers to, or from the file a running task writes."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.errors import PilotFailed, UnknownTask
from pilotq.broker.os_strings import from_utf8
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.tasks.states import ENDED

PIECE = 1 << 16
POLL_BYTES = 1 << 20  # of a running task, read at one poll
# Redis says that a task has ended before the journal holds its output: usually some 0.1 s.
JOURNAL_WAIT_S = 5.0
UNCERTAIN_WAIT_S = 2.0  # where there may be no entry to come
POLL_S = 0.02


def captured(journal: Journal, pilot: Pilot, task_id: str, stream: str) -> Iterator[bytes]:
    """The output of the last execution in the journal, in pieces."""
    yield from _of_last(pilot, journal.find(task_id), stream)


def output_of_entry(pilot: Pilot, entry: JournalEntry, stream: str, skip: int = 0) -> Iterator[bytes]:
    """The output that an entry of the journal holds or refers to, without the first ``skip`` bytes. A file that the
    task has named, and that is gone, gives nothing.

    Raises PilotFailed at the end, when captured output is shorter than the journal says.
    """
    inline, place = (entry.stdout, entry.stdout_at) if stream == "stdout" else (entry.stderr, entry.stderr_at)
    data = inline.encode() if isinstance(inline, str) else inline
    if rest := data[skip:]:
        yield rest
    if not place:
        return
    path = pilot.path(from_utf8(str(place[0])))  # an absolute path (a file the task named) stays as it is
    if len(place) == 1:
        yield from _read(path, skip, -1)
        return
    length = int(place[2])
    left = max(length - max(skip, len(data)), 0)
    for piece in _read(path, int(place[1]) + skip, left) if place[0] else ():
        left -= len(piece)
        yield piece
    if left:
        why = "the disk could not keep it"
        if place[0]:
            why = f"{path} " + ("is too short" if os.path.exists(path) else "is gone")
        raise PilotFailed(
            f"{left:,} of the {length:,} bytes that task {entry.id} has written to {stream} are lost: {why}"
        )


def _of_last(pilot: Pilot, entries: Sequence[JournalEntry], stream: str) -> Iterator[bytes]:
    for entry in _last_of(entries):
        yield from output_of_entry(pilot, entry, stream)


def _last_of(entries: Sequence[JournalEntry]) -> list[JournalEntry]:
    # Of a task that was canceled while it waited to be tried again the newest entry is of no execution.
    return sorted(entries, key=lambda entry: entry.execution)[-1:]


def end_of_output(pilot: Pilot, entry: JournalEntry, stream: str, size: int) -> bytes:
    """The last ``size`` bytes of what `output_of_entry` gives; no more of a file is read. Raises as that does."""
    inline, place = (entry.stdout, entry.stdout_at) if stream == "stdout" else (entry.stderr, entry.stderr_at)
    if not place:
        total = len(inline.encode() if isinstance(inline, str) else inline)
    elif len(place) > 1:
        total = int(place[2])
    else:
        total = 0
        with suppress(FileNotFoundError):
            total = os.stat(pilot.path(from_utf8(str(place[0])))).st_size
    return b"".join(output_of_entry(pilot, entry, stream, max(total - size, 0)))[-size:]


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _read(path: str, offset: int, left: int) -> Iterator[bytes]:
    """``left`` bytes from ``offset`` on; all there is if negative."""
    with suppress(FileNotFoundError), open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return  # what a task wrote to a FIFO, a terminal or a device is gone, and a FIFO would be waited for
        file.seek(offset)
        while left and (data := file.read(PIECE if left < 0 else min(PIECE, left))):
            left -= len(data) if left > 0 else 0
            yield data


class Output:
    """Reads the captured output of the tasks of a running pilot."""

    def __init__(self, queries: TaskQueries, pilot: Pilot, journal: Journal) -> None:
        self._queries = queries
        self._pilot = pilot
        self._journal = journal

    def last(self, task_id: str, stream: str) -> Iterator[bytes]:
        """The output of the last execution that has ended, in pieces.

        Waits for the journal when Redis says that the task has ended. Raises PilotFailed when that takes longer than
        JOURNAL_WAIT_S.
        """
        status, execution, _ = self._state(task_id, stream)
        entries = self._entries(task_id, status, execution) if status in ENDED else self._journal.find(task_id)
        yield from _of_last(self._pilot, entries, stream)

    def follow(self, task_id: str, stream: str) -> Iterator[bytes]:
        """What the task writes, from the beginning of its last execution on; an empty piece whenever there is nothing
        new. Ends when the task has ended. Raises UnknownTask when somebody deletes it, PilotFailed as `last`."""
        for _, piece in self.follow_executions(task_id, stream):
            yield piece

    def follow_executions(self, task_id: str, stream: str) -> Iterator[tuple[int, bytes]]:
        """The pieces of `follow`, each with the number of the execution that has written it; 0 with an empty one."""
        seen = offset = 0  # the execution that is followed, and the bytes of it that were given
        while True:
            state = status, execution, path = self._state(task_id, stream)
            if status in ENDED:
                entries = self._entries(task_id, status, execution)
                if seen:
                    yield from self._rest(entries, seen, offset, stream)
                else:
                    yield from self._rest(_last_of(entries), 0, 0, stream)
                return
            if status == "started" and path and seen in (0, execution):
                data = b"".join(_read(path, offset, POLL_BYTES))
                # A running task's file is used again by the next one.
                if self._state(task_id, stream) == state:
                    seen, offset = execution, offset + len(data)
                    yield execution, data
                continue
            if seen and execution > seen:
                entries = self._journal.find(task_id)
                if any(entry.execution >= seen for entry in entries):
                    yield from self._rest(entries, seen, offset, stream)
                    seen, offset = execution, 0
            yield 0, b""

    def _rest(
        self, entries: Sequence[JournalEntry], seen: int, offset: int, stream: str
    ) -> Iterator[tuple[int, bytes]]:
        """What was written behind ``offset`` of the execution ``seen``, and by those after it."""
        for entry in sorted(entries, key=lambda entry: entry.execution):
            if entry.execution >= seen:
                for piece in output_of_entry(self._pilot, entry, stream, offset if entry.execution == seen else 0):
                    yield entry.execution, piece

    def _state(self, task_id: str, stream: str) -> tuple[str, int, str]:
        """Status, number of the last execution, and the file that a running one writes."""
        field = "pq_out" if stream == "stdout" else "pq_err"
        status, execution, path, process_ended, joining = self._queries.link.call(
            "HMGET", keys.job(task_id), "status", "pq_exec", field, "pq_process_ended", "pq_joining"
        )
        if joining is not None and process_ended:  # its process has written all that it will
            status = b"finished"
        if status is not None:
            return status.decode(), int(execution or 0), os.fsdecode(path or b"")
        view = self._queries.task(task_id)
        if view is None:
            raise UnknownTask(f"there is no task {task_id!r} in this pilot any more")
        return view.status, view.execution, ""

    def _entries(self, task_id: str, status: str, execution: int) -> list[JournalEntry]:
        """The entries of a task that has ended with this execution; waits for the last one."""
        # Of what was canceled it is not known whether it ran.
        certain = status != "canceled"
        deadline = time.monotonic() + (JOURNAL_WAIT_S if certain else UNCERTAIN_WAIT_S)
        while True:
            entries = self._journal.find(task_id)
            if any((entry.final or entry.joining is not None) and entry.execution >= execution for entry in entries):
                return entries
            if status == "canceled" and entries and entries[0].execution == 0:
                return entries  # it waited
            if time.monotonic() > deadline:
                if not certain:
                    return entries
                self._journal.examine()
                raise PilotFailed(
                    f"the end of task {task_id} has not reached the journal yet, and its output neither: try again; "
                    f"{self._pilot.log('supervisor')} says if the journal cannot be written"
                )
            time.sleep(POLL_S)
