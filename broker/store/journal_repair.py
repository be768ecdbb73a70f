"""Finds the lines of a journal that cannot be read, and moves them to a file beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pilotq.broker.store.journal import HEADER, decode_entry, problem_of


class DamagedLine(NamedTuple):
    """A line that cannot be read: its number from 1, the line, and why."""

    number: int
    data: bytes
    why: str


def damaged_lines(path: str) -> Iterator[DamagedLine]:
    """The lines that cannot be read. The last one is none of them while it has no end: it may be being written."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.endswith(b"\n") and not raw.startswith(HEADER):
                try:
                    decode_entry(raw)
                except ValueError as error:
                    yield DamagedLine(number, raw, problem_of(error))


def move_damaged_lines(path: str) -> tuple[int, str]:
    """Move them to a file beside the journal; returns how many there were, and the path of that file.

    The journal is replaced by one without them, atomically. Its writer must have ended.
    """
    damaged = list(damaged_lines(path))
    if not damaged:
        return 0, ""
    aside = keep_aside(path, (line.data for line in damaged))
    left_out = {line.number for line in damaged}
    fresh = f"{path}.{os.urandom(4).hex()}"
    try:
        with open(path, "rb") as old, os.fdopen(_create(fresh), "wb") as new:
            if 1 in left_out:
                new.write(HEADER + b':1,"pilot":""}\n')
            new.writelines(raw for number, raw in enumerate(old, start=1) if number not in left_out)
            new.flush()
            os.fsync(new.fileno())
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise
    _sync_folder(path)
    return len(damaged), aside


def keep_aside(path: str, lines: Iterable[bytes]) -> str:
    """Write lines of the journal at ``path`` to a file beside it, and return the path of that file."""
    aside = f"{path.removesuffix('.jsonl')}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(6).hex()}.jsonl"
    with os.fdopen(_create(aside), "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(aside)
    return aside


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
