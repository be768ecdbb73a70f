"""Writes whole pieces: `os.write` may write less than it was given."""

from __future__ import annotations

import os


def write_whole(fd: int, data: bytes) -> None:
    """Write all of ``data`` where ``fd`` stands. Raises OSError; then a part of it may stand there."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
