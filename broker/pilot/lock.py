"""The lock of a pilot directory: one supervisor at a time, on any host that sees the directory.

A file made with O_EXCL, because flock is not to be trusted on NFS and Lustre. Its content says who holds it; its
modification time is the beat. Beats are compared with the time the file system itself gives to a new file: clocks of
hosts differ, that of the file server does not.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from pilotq.broker.errors import PilotExists, Superseded

BEAT_S = 5.0
LOOK_S = 0.2
STALE_S = 60.0  # a holder that we cannot look at is dead when it was silent for so long


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is dead or a zombie.

    With the pid it names a process for good: pids are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


class Holder(msgspec.Struct):
    """Who holds a lock. ``machine`` is where ``pid`` means something: one boot of a machine, one pid namespace."""

    host: str
    machine: str
    pid: int
    start: int | None
    token: str

    @classmethod
    def here(cls) -> Holder:
        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
        pid = os.getpid()
        return cls(socket.gethostname(), machine, pid, start_time(pid), os.urandom(8).hex())


class Lock:
    """A held lock; `beat` keeps it, `release` gives it back."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        # Kept open: as long as it is, the file's inode number cannot be given to another lock.
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: str) -> Lock:
        """Take the lock, over a dead holder if need be; raises PilotExists when a live one has it."""
        content = msgspec.json.encode(Holder.here())
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                _put_aside_dead(path)
                continue
            os.write(descriptor, content)
            return cls(path, descriptor)

    def beat(self) -> None:
        """Show that we live; raises Superseded when the lock is not ours any more."""
        # A file system that is full or away must not end the pilot: whether the lock is ours is asked below.
        with suppress(OSError):
            os.utime(self._descriptor)
        if not self._ours():
            raise Superseded(
                f"{self.path} was taken over by another pilot, because this one was silent for over {STALE_S:.0f} s: "
                "this one ends"
            )

    def release(self) -> None:
        if self._ours():
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Let go of the file without removing it (it is another's)."""
        os.close(self._descriptor)

    def _ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the file system does not answer: the next beat asks again


def holder(path: str) -> Holder | None:
    """The live holder of the lock; None when nobody holds it, or a dead one."""
    seen = _read(path)
    return None if seen is None else _living(path, *seen)


def await_verdict(path: str, say: Callable[[str], None]) -> None:
    """Wait until it is known whether a holder on another machine lives: it beats, or has been silent for STALE_S.

    An allocation that was killed leaves such a lock to the next one. ``say`` is told of the wait.
    """
    who, seen = holder(path), _read(path)
    if who is None or seen is None or who.machine == Holder.here().machine:
        return
    say(
        f"{path} is held from {who.host}: waiting until the pilot there shows that it lives, or has been silent for "
        f"{STALE_S:.0f} s"
    )
    while holder(path) is not None and _read(path) == seen:
        time.sleep(LOOK_S)


def _living(path: str, content: bytes, beat: float) -> Holder | None:
    try:
        who = msgspec.json.decode(content, type=Holder)
    except msgspec.DecodeError:
        # Made a moment ago and not yet written; or its writer died in between, and then it grows old.
        who = Holder("an unknown host", "", 0, None, "")
    if who.machine == Holder.here().machine:
        return who if who.start is not None and start_time(who.pid) == who.start else None
    return who if _file_system_now(path) - beat < STALE_S else None


def _put_aside_dead(path: str) -> None:
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
    aside = f"{path}.{os.urandom(4).hex()}"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    # Between our look and our rename another may have removed the dead lock and taken it: then we hold a live one.
    if _read(aside) != seen:
        with suppress(FileExistsError):
            os.link(aside, path)
    os.unlink(aside)


def _read(path: str) -> tuple[bytes, float] | None:
    """Content and time of the last beat; None when there is no lock."""
    try:
        with open(path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def _file_system_now(path: str) -> float:
    """The time by the clock that stamps beats."""
    probe = f"{path}.{os.urandom(4).hex()}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        os.unlink(probe)
