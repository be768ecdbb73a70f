"""Captures the output of tasks that do not name a file for it, and keeps large results of functions.

Each stream of a running task is a plain file of a pool, opened once and used by one task after the other, so a task
that prints nothing costs two system calls. When the task has ended its output is taken from the file: up to
INLINE_BYTES travel in the message, more is copied to the pack file of this launcher, and output that is too large to
copy keeps the file, under a name of its own, and the pool gets a new one.
"""

from __future__ import annotations

import os

from pilotq.workers.protocol import END_BYTES, INLINE_BYTES, NO_OUTPUT, Captured
from pilotq.workers.whole_writes import write_whole

PACK_BYTES = 1 << 20  # copying so much takes about 0.5 ms, in which no other task is launched; larger files are renamed


class PoolFile:
    """A file that one stream of one task is written to. ``path`` is absolute."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: bytes) -> None:
        self.fd = fd
        self.path = path


class Capture:
    """Keeps the pool and pack file of a launcher in ``directory`` (absolute); files are named by ``node`` and pid."""

    def __init__(self, directory: str, node: str) -> None:
        self._directory = os.fsencode(directory)
        self._name = os.path.join(self._directory, f"{node}.{os.getpid()}".encode())
        self._free: list[PoolFile] = []
        self._taken: set[PoolFile] = set()
        self._made = 0
        self._pack = -1
        self._packed = 0  # bytes of the pack that messages point to

    def take(self) -> PoolFile:
        """An empty file for one stream. Raises OSError when no new one can be made."""
        file = self._free.pop() if self._free else self._make()
        self._taken.add(file)
        return file

    def release(self, file: PoolFile) -> None:
        """Return a file that no process was started with."""
        self._taken.discard(file)
        self._free.append(file)

    def collect(self, file: PoolFile, name: str) -> Captured:
        """The output of a task of which no process lives any more; the file returns to the pool.

        ``name`` is the name of the file in the output directory if it is kept. ``length`` counts all that was written:
        when the disk refuses to keep it, ``path`` is empty and ``data`` is the beginning.
        """
        captured, size = NO_OUTPUT, 0
        try:
            size = os.lseek(file.fd, 0, os.SEEK_END)
            if size:
                captured = self._keep(file, size, name)
                if captured.path and captured.path != self._pack_path:
                    return captured  # it is no file of the pool any more
                os.ftruncate(file.fd, 0)
                # Appending ignores the position, but the next task could see it.
                os.lseek(file.fd, 0, os.SEEK_SET)
            self.release(file)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            # Its file system fails: this file is never used again; at worst this output is lost, but no other.
            self._drop(file)
            if captured is NO_OUTPUT:
                captured = Captured(length=size)
        return captured

    def keep(self, data: bytes, name: str) -> Captured:
        """Write a large result to a file: the pack, or one of its own with this name. Raises OSError."""
        if len(data) <= PACK_BYTES:
            return self._append(data)
        path = os.path.join(self._directory, os.fsencode(name))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)  # the umask is a task's
            write_whole(fd, data)
        except OSError:
            os.unlink(path)  # a half is of no use, and its disk may be full
            raise
        finally:
            os.close(fd)
        return Captured(path=path, length=len(data))

    def peek(self, file: PoolFile) -> Captured:
        """The end of what a task has written so far of which processes live; it only helps people."""
        try:
            size = os.lseek(file.fd, 0, os.SEEK_END)
            return Captured(end=os.pread(file.fd, END_BYTES, max(size - END_BYTES, 0)))
        except OSError:
            return NO_OUTPUT

    def close(self) -> None:
        """Remove the files of the pool, those in use too; files that messages point to stay."""
        for file in [*self._free, *self._taken]:
            self._drop(file)
        self._free.clear()
        if self._pack >= 0:
            os.close(self._pack)
            self._pack = -1

    @property
    def _pack_path(self) -> bytes:
        return self._name + b".pack"

    def _make(self) -> PoolFile:
        self._made += 1
        path = b"%s.%d.pool" % (self._name, self._made)
        # A file of this name is of a dead launcher that had our pid. For reading, too: it is read through the same
        # descriptor when the task has ended.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)  # the umask is a task's
        return PoolFile(fd, path)

    def _keep(self, file: PoolFile, size: int, name: str) -> Captured:
        if size <= INLINE_BYTES:
            return Captured(os.pread(file.fd, size, 0), length=size)
        try:
            if size <= PACK_BYTES:
                return self._copy(file, size)
        except OSError:
            pass  # no space for a copy; a new name needs none
        try:
            return self._rename(file, size, name)
        except OSError:
            return Captured(os.pread(file.fd, INLINE_BYTES, 0), length=size)

    def _copy(self, file: PoolFile, size: int) -> Captured:
        return self._append(os.pread(file.fd, size, 0))

    def _append(self, content: bytes) -> Captured:
        if self._pack < 0:
            self._pack = os.open(self._pack_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(self._pack, 0o600)
            # One of this name is of a dead process that had our pid, as in a container that was started again: what it
            # has kept is somebody's output.
            self._packed = os.lseek(self._pack, 0, os.SEEK_END)
        data = memoryview(content)
        done = 0
        while done < len(data):
            done += os.pwrite(self._pack, data[done:], self._packed + done)
        captured = Captured(path=self._pack_path, offset=self._packed, length=done, end=content[-END_BYTES:])
        self._packed += done
        return captured

    def _rename(self, file: PoolFile, size: int, name: str) -> Captured:
        path = os.path.join(self._directory, name.encode())
        end = os.pread(file.fd, END_BYTES, max(size - END_BYTES, 0))
        os.rename(file.path, path)
        self._taken.discard(file)
        os.close(file.fd)
        return Captured(path=path, length=size, end=end)

    def _drop(self, file: PoolFile) -> None:
        self._taken.discard(file)
        try:
            os.close(file.fd)
            os.unlink(file.path)
        except OSError:
            pass  # the directory was removed or fails: nothing can be removed there


def open_current(file: PoolFile) -> int:
    """A descriptor of the file that has this name by now; an empty one is made if there is none."""
    return os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def reopen(file: PoolFile) -> None:
    """Open the file anew by its name: an interpreter may have replaced it, after it kept the old one as an output."""
    try:
        fd = open_current(file)
    except OSError:
        return  # the directory fails: reading the output will fail, too
    os.dup2(fd, file.fd, inheritable=False)
    os.close(fd)
