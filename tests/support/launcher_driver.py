"""A launcher process as a worker's control process has it: three pipes, records down, records up, the bell."""

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

from pilotq.workers.protocol import (
    Base,
    Begun,
    Exited,
    Frames,
    Launch,
    Place,
    Refused,
    Signal,
    Started,
    Swept,
    Up,
    Withdrawn,
    frame,
)

WAIT_S = 20.0
HERE = sorted(os.sched_getaffinity(0))
R = TypeVar("R", Begun, Started, Withdrawn, Refused, Exited, Swept)


class Driver:
    """Starts a launcher on ``folder``/output; ``close`` ends it by closing the pipe, and it must end well."""

    def __init__(self, folder: Path, *, program: tuple[str, ...] = ("-m", "pilotq.workers.launcher.launcher")) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.output.mkdir(exist_ok=True)
        down, self.down = os.pipe()
        self.up, up = os.pipe()
        self.bell, bell = os.pipe()
        stray, other = os.pipe()  # something that the launcher inherits and its tasks must not
        os.set_inheritable(stray, True)
        arguments = ("--dir", str(self.output), "--node", "n1", "--calls", "1000")
        pipes = ("--down", str(down), "--up", str(up), "--bell", str(bell))
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments, *pipes],
            pass_fds=(down, up, bell, stray),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (down, up, bell, stray, other):
            os.close(fd)
        os.set_blocking(self.down, False)
        self._frames: Frames[Up] = Frames(Up)  # type: ignore[arg-type]
        self._keys = count(1)
        self.seen: list[Up] = []
        self.base()

    def base(self, name: str = "base", *, umask: int = 0o022, limits: dict[int, int] | None = None, **env: str) -> str:
        surroundings = {"PATH": os.environ["PATH"], "PILOTQ_DIR": str(self.folder), **env}
        self.send(Base(name, surroundings, umask, limits or {}))
        return name

    def send(self, *records: Any) -> None:
        data = frame(list(records))
        while data:
            _, ready, _ = select.select([], [self.down], [], WAIT_S)
            assert ready, "the launcher does not read"
            data = data[os.write(self.down, data) :]

    def launch(self, *argv: str | bytes, **fields: Any) -> int:
        """Ask for a launch; returns its key. Field names are those of the record."""
        record = self.prepare(*argv, **fields)
        self.send(record)
        return record.key

    def prepare(self, *argv: str | bytes, cpus: Sequence[int] = HERE[:1], **fields: Any) -> Launch:
        """The record of a launch, to be sent; the place it names has been sent."""
        key = next(self._keys)
        words = [word.encode() if isinstance(word, str) else word for word in argv]
        place = str(cpus)
        self.send(Place(place, {}, {}, list(cpus)))
        settings = {"id": f"t{key}", "execution": 1, "base": "base", "env": {}, "cwd": str(self.folder), **fields}
        return Launch(key=key, place=place, argv=words, **settings)

    def get(self, kind: type[R], key: int) -> R:
        """Wait for that record."""
        while (found := self.find(kind, key)) is None:
            ready, _, _ = select.select([self.up], [], [], WAIT_S)
            assert ready, f"no {kind.__name__} for {key}; seen: {self.seen}"
            data = os.read(self.up, 1 << 16)
            assert data, "the launcher ended"
            self.seen += self._frames.feed(data)
        return found

    def drain(self) -> None:
        """Take in what a dead launcher has left."""
        while data := os.read(self.up, 1 << 16):
            self.seen += self._frames.feed(data)

    def find(self, kind: type[R], key: int) -> R | None:
        return next((r for r in self.seen if isinstance(r, kind) and r.key == key), None)

    def run(self, *argv: str | bytes, **fields: Any) -> Exited:
        """Launch and wait for the end; nothing may be left of it."""
        exited = self.get(Exited, self.launch(*argv, **fields))
        assert exited.left == 0
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
            os.close(self.bell)


@contextmanager
def hold(path: Path) -> Iterator[Path]:
    """A program whose start hangs as if its file system did: whoever opens it waits for its lease to be given back."""
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel asks for it
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield path
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)
