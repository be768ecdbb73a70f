"""Repairs a damaged append-only file of the server: cuts it after the last good command, and keeps what was cut off.

The server writes what it does into ``appendonlydir``: a base, and after it a log of commands that grows. The format is
that of Redis's protocol; commands that belong together are between MULTI and EXEC. A log whose end is torn is repaired
by the server itself. It refuses a log that is damaged in the middle, as nobody can tell how the commands after the gap
depend on those that are missing.
"""

from __future__ import annotations

import mmap
import os
import re
import time

from pilotq.broker.errors import InvalidInput, PilotExists
from pilotq.broker.pilot.directory import Pilot, write_private
from pilotq.broker.pilot.lock import holder
from pilotq.broker.store import keys
from pilotq.broker.store.journal_repair import move_damaged_lines

FOLDER = ("server", "appendonlydir")
MARK = "repaired"  # file in server/: the next start may move away lines of the journal that the server does not know
HEAD = re.compile(rb"[*$](\d{1,10})\r\n")
TASK = re.compile(keys.job("([0-9a-v]{1,13}(?:_[0-9]+)?)\r").encode())
NAMED = 10  # tasks named in a message


def repair(pilot: Pilot) -> list[str]:
    """Cut the server's log after the last good command; returns what was done, one sentence each.

    Raises PilotExists unless the pilot has ended, and InvalidInput when there is no log. A damaged base cannot be
    repaired: it is left as it is.
    """
    refuse_running(pilot)
    folder = pilot.path(*FOLDER)
    done = []
    logs = _logs(folder)
    for number, name in enumerate(logs):
        path = os.path.join(folder, name)
        good = good_length(path)
        if good < os.path.getsize(path):
            done.append(_cut(path, good))
            # What was written later depends on what is lost.
            done += [_cut(os.path.join(folder, later), 0) for later in logs[number + 1 :]]
            break
    write_private(pilot.path("server", MARK), b"")
    if not done:
        done.append(f"the logs of the server in {folder} are whole: nothing was changed")
    done.append(
        "at the next start executions that the journal knows and the server does not are moved out of the journal, and "
        f"their tasks run again: `pilotq start --resume {pilot.directory}`"
    )
    return done


def repair_journal(pilot: Pilot) -> list[str]:
    """Move the lines of the journal that cannot be read to a file of their own; returns what was done, empty when they
    all can be. Raises PilotExists unless the pilot has ended."""
    refuse_running(pilot)
    try:
        count, aside = move_damaged_lines(pilot.journal)
    except FileNotFoundError:
        return []
    lines = "1 line" if count == 1 else f"{count:,} lines"
    return [f"{lines} of {pilot.journal} that cannot be read: moved to {aside}"] if count else []


def refuse_running(pilot: Pilot) -> None:
    if holder(pilot.path("lock")) is not None:
        raise PilotExists(
            f"the pilot in {pilot.directory} runs: end it first, with `pilotq stop --dir {pilot.directory}`"
        )


def _logs(folder: str) -> list[str]:
    """Names of the logs that grow, oldest first, as the manifest says."""
    try:
        manifest = next(name for name in os.listdir(folder) if name.endswith(".manifest"))
        with open(os.path.join(folder, manifest)) as file:
            rows = [line.split() for line in file]
    except (FileNotFoundError, StopIteration):
        raise InvalidInput(f"{folder} holds no log of a server: name the directory of a pilot that has one") from None
    return [row[1] for row in rows if row[-1:] == ["i"] and os.path.exists(os.path.join(folder, row[1]))]


def good_length(path: str) -> int:
    """Length of the log in bytes up to the last command that is whole, and not inside a MULTI without its EXEC."""
    size = os.path.getsize(path)
    if not size:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        good = position = 0
        inside = False
        while position < size:
            if view[position] == ord("#"):  # a comment: the time
                end, first = view.find(b"\n", position) + 1, b""
            else:
                end, first = _command(view, position, size)
            if end <= position:
                break
            position = end
            word = first.upper()
            inside = word == b"MULTI" or (inside and word != b"EXEC")
            if not inside:
                good = position
        return good


def _command(view: mmap.mmap, position: int, size: int) -> tuple[int, bytes]:
    """The end of the command at a position, and its first word; -1 when there is none, or only a part of one."""
    head = HEAD.match(view, position)
    if head is None or view[position] != ord("*"):
        return -1, b""
    position, first = head.end(), b""
    for number in range(int(head[1])):
        head = HEAD.match(view, position)
        if head is None or view[position] != ord("$"):
            return -1, b""
        start, end = head.end(), head.end() + int(head[1])
        if end + 2 > size or view[end : end + 2] != b"\r\n":
            return -1, b""
        if not number:
            first = view[start:end]
        position = end + 2
    return position, first


def _cut(path: str, good: int) -> str:
    """Cut a log, keep what was cut off in a file beside it, and describe that."""
    with open(path, "r+b") as file:
        file.seek(good)
        lost = file.read()
        kept_in = f"{path}.cut-{time.strftime('%Y%m%d-%H%M%S')}"
        with open(os.open(kept_in, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as kept:
            kept.write(lost)
        file.truncate(good)
        os.fsync(file.fileno())
    tasks = list(dict.fromkeys(m[1].decode() for m in TASK.finditer(lost)))
    named = ", ".join(tasks[:NAMED]) + (f" and {len(tasks) - NAMED} more" if len(tasks) > NAMED else "")
    return (
        f"{path}: cut after {good:,} bytes; {len(lost):,} bytes are lost, with some {lost.count(b'*'):,} commands "
        f"about {f'the tasks {named}' if tasks else 'no task'}; they are kept in {os.path.basename(kept_in)}"
    )
