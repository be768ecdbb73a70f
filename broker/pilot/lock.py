"""The lock of a pilot's directory: one supervisor at a time, on any host that sees the directory.

It is a file made with O_EXCL, because flock is not reliable on NFS and Lustre. Its content names the holder; its
modification time is the last heartbeat. Heartbeats are compared with the time that the file system gives to a new
file: clocks of hosts differ, that of the file server does not.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from pilotq.broker.errors import PilotExists, Superseded
from pilotq.broker.process_identity import machine_id, start_time

HEARTBEAT_S = 5.0
POLL_S = 0.2
STALE_S = 60.0  # a holder on another machine is dead when its last heartbeat is so old


class Holder(msgspec.Struct):
    """Who holds a lock. ``machine`` is where ``pid`` is valid: see `machine_id`."""

    host: str
    machine: str
    pid: int
    start: int | None
    token: str

    @classmethod
    def here(cls) -> Holder:
        pid = os.getpid()
        return cls(socket.gethostname(), machine_id(), pid, start_time(pid), os.urandom(8).hex())


class Lock:
    """A held lock: `heartbeat` keeps it, `release` removes it.

    lock = Lock.take(pilot.path("lock"))
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        # As long as the file is open its inode number cannot be given to another lock.
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: str) -> Lock:
        """Take the lock, over a dead holder if need be; raises PilotExists when a live one has it."""
        content = msgspec.json.encode(Holder.here())
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                _remove_dead(path)
                continue
            os.write(descriptor, content)
            return cls(path, descriptor)

    def heartbeat(self) -> None:
        """Show that this process lives; raises Superseded when another has taken the lock over."""
        # A file system that is full or away must not end the pilot: whether the lock is ours is checked below.
        with suppress(OSError):
            os.utime(self._descriptor)
        if not self._is_ours():
            raise Superseded(
                f"{self.path} was taken over by another pilot, because this one was silent for over {STALE_S:.0f} s: "
                "this one ends"
            )

    def release(self) -> None:
        if self._is_ours():
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Close the file without removing it: it belongs to another pilot."""
        os.close(self._descriptor)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the file system does not answer: the next heartbeat checks again


def holder(path: str) -> Holder | None:
    """The live holder of the lock; None when nobody holds it, or a dead one."""
    seen = _read(path)
    return None if seen is None else _living(path, *seen)


def await_holder_state(path: str, say: Callable[[str], None]) -> None:
    """Wait until it is known whether a holder on another machine lives: it sends a heartbeat, or none for STALE_S.

    An allocation that was killed leaves such a lock to the next one. ``say`` is called with a sentence about the wait.
    """
    who, seen = holder(path), _read(path)
    if who is None or seen is None or who.machine == Holder.here().machine:
        return
    say(
        f"{path} is held from {who.host}: waiting until the pilot there shows that it lives, or has been silent for "
        f"{STALE_S:.0f} s"
    )
    while holder(path) is not None and _read(path) == seen:
        time.sleep(POLL_S)


def _living(path: str, content: bytes, heartbeat: float) -> Holder | None:
    try:
        who = msgspec.json.decode(content, type=Holder)
    except ValueError:
        # The file was made a moment ago and is not yet written; or its writer died in between, and then it grows old.
        who = Holder("an unknown host", "", 0, None, "")
    if who.machine == Holder.here().machine:
        return who if who.start is not None and start_time(who.pid) == who.start else None
    return who if _file_system_now(path) - heartbeat < STALE_S else None


def _remove_dead(path: str) -> None:
    """Remove a lock whose holder is dead; raises PilotExists when the holder lives."""
    seen = _read(path)
    if seen is None:
        return
    who = _living(path, *seen)
    if who is not None:
        directory = os.path.dirname(path)
        raise PilotExists(
            f"{directory}: a pilot lives here already (process {who.pid} on {who.host}): use it, or end it with "
            f"`pilotq stop --dir {directory}`"
        )
    renamed = f"{path}.{os.urandom(4).hex()}"
    try:
        os.rename(path, renamed)
    except FileNotFoundError:
        return
    # Between reading and renaming another process may have removed the dead lock and taken it: then this is a live one.
    if _read(renamed) != seen:
        with suppress(FileExistsError):
            os.link(renamed, path)
    os.unlink(renamed)


def _read(path: str) -> tuple[bytes, float] | None:
    """Content of the lock and time of its last heartbeat; None when there is no lock."""
    try:
        with open(path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def _file_system_now(path: str) -> float:
    """The time by the clock that stamps heartbeats."""
    probe = f"{path}.{os.urandom(4).hex()}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        os.unlink(probe)
