"""Drives a launcher process as a worker process does: over its three pipes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pilotq.broker.launcher_kind import launcher_kind
from pilotq.workers.protocol import (
    Begun,
    Element,
    Exited,
    FrameDecoder,
    FromLauncher,
    GroupSwept,
    Launch,
    LaunchBase,
    LaunchRun,
    LaunchSlot,
    Ran,
    Refused,
    Retracted,
    Signal,
    Started,
    encode_frame,
)
from tests.support.worker_host import as_bytes

WAIT_S = 20.0
CPUS = sorted(os.sched_getaffinity(0))
R = TypeVar("R", Begun, Started, Retracted, Refused, Exited, Ran, GroupSwept)


class Driver:
    """Starts a launcher on ``folder``/output; ``close`` ends it by closing the pipe, and it must end well."""

    def __init__(self, folder: Path, *, program: tuple[str, ...] = ("-m", "pilotq.workers.launcher.launcher")) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.output.mkdir(exist_ok=True)
        down, self.down = os.pipe()
        self.up, up = os.pipe()
        self.wake, wake = os.pipe()
        stray, other = os.pipe()  # descriptors that the launcher inherits and its tasks must not
        os.set_inheritable(stray, True)
        arguments = ("--dir", str(self.output), "--node", "n1", "--calls", "1000", "--kind", launcher_kind())
        pipes = ("--down", str(down), "--up", str(up), "--wake", str(wake))
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments, *pipes],
            pass_fds=(down, up, wake, stray),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (down, up, wake, stray, other):
            os.close(fd)
        os.set_blocking(self.down, False)
        self._decoder: FrameDecoder[FromLauncher] = FrameDecoder(FromLauncher)  # type: ignore[arg-type]
        self._keys = count(1)
        self.seen: list[FromLauncher] = []
        self.base()

    def base(self, name: str = "base", *, umask: int = 0o022, limits: dict[int, int] | None = None, **env: str) -> str:
        variables = {"PATH": os.environ["PATH"], "PILOTQ_DIR": str(self.folder), **env}
        encoded = {key.encode(): value.encode() for key, value in variables.items()}
        self.send(LaunchBase(name, encoded, umask, limits or {}))
        return name

    def send(self, *messages: Any) -> None:
        data = encode_frame(list(messages))
        while data:
            _, ready, _ = select.select([], [self.down], [], WAIT_S)
            assert ready, "the launcher does not read"
            data = data[os.write(self.down, data) :]

    def launch(self, *argv: str | bytes, **fields: Any) -> int:
        """Ask for a launch; returns its key. Field names are those of the message."""
        message = self.prepare(*argv, **fields)
        self.send(message)
        return message.key

    def prepare(self, *argv: str | bytes, cpus: Sequence[int] = CPUS[:1], **fields: Any) -> Launch:
        """The message of a launch, to be sent; the slot it names was sent."""
        key = next(self._keys)
        words = [word.encode() if isinstance(word, str) else word for word in argv]
        slot = str(cpus)
        self.send(LaunchSlot(slot, {}, {}, list(cpus)))
        settings = {"id": f"t{key}", "attempt": 1, "base": "base", "env": {}, "cwd": self.folder, **fields}
        return Launch(key=key, slot=slot, argv=words, **as_bytes(settings))

    def keep_keys(self, number: int) -> None:
        """So many of the next keys are used by somebody else."""
        for _ in range(number):
            next(self._keys)

    def get(self, kind: type[R], key: int) -> R:
        """Wait for that message."""
        while (found := self.find(kind, key)) is None:
            self.read(f"{kind.__name__} for {key}")
        return found

    def end_of(self, key: int) -> Exited | Ran:
        """Wait for the end of an element."""
        while True:
            for message in self.seen:
                if isinstance(message, (Exited, Ran)) and message.key == key:
                    return message
            self.read(f"end of {key}")

    def read(self, what: str = "message") -> None:
        """Wait for the next messages."""
        ready, _, _ = select.select([self.up], [], [], WAIT_S)
        assert ready, f"no {what}; seen: {self.seen}"
        data = os.read(self.up, 1 << 16)
        assert data, "the launcher ended"
        self.seen += self._decoder.feed(data)

    def drain(self) -> None:
        """Read the messages that a dead launcher has left in the pipe."""
        while data := os.read(self.up, 1 << 16):
            self.seen += self._decoder.feed(data)

    def find(self, kind: type[R], key: int) -> R | None:
        return next((m for m in self.seen if isinstance(m, kind) and m.key == key), None)

    def run(self, *argv: str | bytes, **fields: Any) -> Exited:
        """Launch and wait for the end; no process of it may remain."""
        exited = self.get(Exited, self.launch(*argv, **fields))
        assert exited.remaining == 0
        return exited

    def signal(self, key: int, number: int) -> None:
        self.send(Signal(key, number))

    def refused(self, *argv: str | bytes, **fields: Any) -> Refused:
        return self.get(Refused, self.launch(*argv, **fields))

    def close(self) -> None:
        if self.down >= 0:
            os.close(self.down)
            self.down = -1
        try:
            assert self.process.wait(WAIT_S) == 0
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.up)
            os.close(self.wake)


def run_of(
    driver: Driver,
    number: int,
    *argv: str | bytes,
    origin: float = 0.0,
    own: Sequence[Sequence[str]] = (),
    **fields: Any,
) -> LaunchRun:
    """The message of a run of so many elements of the array ``7``, with the indices 3, 5, 7...; to be sent."""
    marked = {"PILOTQ_INDEX": "\0i", "QCG_PM_STEP_ID": "\0n"}
    element = {"id": "7_\0i", "env": marked, "element": Element(3, 1, origin)}
    template = driver.prepare(*argv, **{**element, **fields})
    driver.keep_keys(number - 1)
    return LaunchRun(number, 2, template, [packed_strings(*strings) for strings in own])


def packed_strings(*strings: str) -> msgspec.Raw:
    """An item of `LaunchRun.own`."""
    return msgspec.Raw(msgspec.msgpack.encode([text.encode() for text in strings]))


@contextmanager
def hanging_program(path: Path) -> Iterator[Path]:
    """A program whose start hangs as if its file system did: to open it waits until its lease is returned."""
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel sends it to ask for the lease
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield path
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)
