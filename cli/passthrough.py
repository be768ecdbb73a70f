"""Passes the captured output of the one command of `pilotq run` on while it is written, as a shell would show it."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.output import output_of_entry
from pilotq.broker.errors import PilotFailed, PilotqError
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.journal import Journal

PIECES_MAX = 64  # of a stream at one poll, so that the other one is shown, too


class Passthrough:
    """Copies what one task writes to our own standard output and error; ``broken``: nobody reads it any more."""

    def __init__(self, task_id: str, streams: list[str]) -> None:
        self.broken = False
        self.lost = ""  # why some of it cannot be shown
        self._task_id = task_id
        self._streams = [_Stream(name) for name in streams]

    def poll(self, broker: Broker) -> None:
        """Pass on what is new. Whatever fails is tried again when the pilot has ended."""
        for stream in self._streams:
            with suppress(PilotqError):
                self._write(stream, stream.news(broker, self._task_id))

    def finish(self, pilot: Pilot) -> None:
        """Pass on the rest, once the pilot has ended."""
        for stream in self._streams:
            try:
                self._write(stream, stream.rest(pilot, self._task_id))
            except PilotFailed as error:
                self.lost = str(error)

    def _write(self, stream: _Stream, pieces: Iterator[bytes]) -> None:
        try:
            for piece in pieces:
                if self.broken:
                    return
                _write_all(stream.file, piece)
                stream.passed += len(piece)
        except BrokenPipeError:
            self.broken = True
            # What is left in the buffers must not fail at the end of the process.
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream.file.fileno())


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write and flush, as long as that takes, also where whoever has the other end has made it non-blocking."""
    left, flushed = memoryview(data), False
    while left or not flushed:
        try:
            left = left[file.write(left) :]
            file.flush()
            flushed = True
        except BlockingIOError as error:
            left = left[error.characters_written :] if left else left
            poll = select.poll()
            poll.register(file.fileno(), select.POLLOUT)
            poll.poll()


class _Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.file: BinaryIO = getattr(sys, name).buffer
        self.passed = 0  # bytes
        self._first = 0  # the execution with which that began
        self._followed: Iterator[tuple[int, bytes]] | None = None

    def news(self, broker: Broker, task_id: str) -> Iterator[bytes]:
        """What is new of a running task."""
        if self._followed is None:
            self._followed = broker.follow_executions(task_id, self.name)
        for _, (execution, piece) in zip(range(PIECES_MAX), self._followed, strict=False):
            if not piece:
                return
            self._first = self._first or execution
            yield piece

    def rest(self, pilot: Pilot, task_id: str) -> Iterator[bytes]:
        """What the journal has beyond what was passed on; of a task that was tried again, of all executions since."""
        entries = sorted(Journal(pilot.journal).find(task_id), key=lambda entry: entry.execution)
        skip = self.passed
        for entry in [e for e in entries if e.execution >= self._first] if skip else entries[-1:]:
            for piece in output_of_entry(pilot, entry, self.name):
                yield piece[skip:]
                skip -= min(skip, len(piece))
