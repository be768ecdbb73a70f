"""A command on a terminal of its own: what it shows is read, keys are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Terminal:
    """``shown`` is all that was written so far, with its escape sequences."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self.shown = b""
        self._fd = fd

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def read_until(self, text: str, seconds: float = 60.0) -> str:
        """Read until this was written, from now on; returns what was."""
        return self._read(text.encode(), time.monotonic() + seconds).decode("utf-8", "replace")

    def read_to_end(self, seconds: float = 60.0) -> int:
        """Read until the command has ended; returns its exit code."""
        self._read(b"", time.monotonic() + seconds)
        return self.process.wait(10)

    def _read(self, wanted: bytes, deadline: float) -> bytes:
        found = b""
        while not wanted or wanted not in found:
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted!r} was not shown, but {found[-2000:]!r}"
            if not select.select([self._fd], [], [], min(left, 1.0))[0]:
                continue
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # so ends a terminal that nobody has open any more
                data = b""
            if not data:
                assert not wanted, f"it ended, and {wanted!r} was not shown, but {found[-2000:]!r}"
                break
            found += data
            self.shown += data
        return found


@contextmanager
def terminal(
    argv: Sequence[str], folder: Path, env: dict[str, str], *, lines: int = 24, columns: int = 80
) -> Iterator[Terminal]:
    """Run a command in the folder on a new terminal; it is killed at the end if it has not ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    with os.fdopen(ours, "rb", closefd=True):
        process = subprocess.Popen(
            argv, cwd=folder, env={**env, "TERM": "xterm-256color"}, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            process.wait()
