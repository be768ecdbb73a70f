"""A file system that does not answer, as a mount of a dead server: whatever touches it hangs until it is killed."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MNT_FORCE, MNT_DETACH = 1, 2
INIT = struct.Struct("<IIIIHHII32x")  # fuse_init_out of Linux's fuse.h
HEAD = struct.Struct("<IiQ")  # fuse_out_header
_libc = ctypes.CDLL(None, use_errno=True)


class DeadMount:
    """`unmount` ends it, and all that hangs there with it: system calls return with errors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fuse},rootmode=40755,user_id={os.getuid()},group_id={os.getgid()}"
        if _libc.mount(b"dead", bytes(path), b"fuse", 0, options.encode()):
            os.close(self._fuse)
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        # The one request that is answered.
        request = os.read(self._fuse, 1 << 17)
        (number,) = struct.unpack_from("<Q", request, 8)
        answer = INIT.pack(7, 31, 0, 0, 12, 9, 1 << 17, 1)
        os.write(self._fuse, HEAD.pack(HEAD.size + len(answer), 0, number) + answer)

    def unmount(self) -> None:
        if self._fuse >= 0:
            os.close(self._fuse)
            self._fuse = -1
            _libc.umount2(bytes(self.path), MNT_FORCE | MNT_DETACH)


@contextmanager
def dead_mount(path: Path) -> Iterator[DeadMount]:
    """The mount, below a folder of the test; the test is skipped where none can be made."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("only root can mount a file system that does not answer")
    path.mkdir()
    try:
        mount = DeadMount(path)
    except OSError:
        pytest.skip("a file system that does not answer cannot be mounted here")
    try:
        yield mount
    finally:
        mount.unmount()


@contextmanager
def unreadable_environment(pid: int, folder: Path) -> Iterator[None]:
    """The environment of a process cannot be read, as of one that hangs in the kernel: something that nobody writes
    stands in its place. What reads it then gets nothing; the test is skipped where that cannot be mounted."""
    place, fifo = f"/proc/{pid}/environ", folder / "nobody writes"
    os.mkfifo(fifo)
    if subprocess.run(["mount", "--bind", str(fifo), place], check=False, capture_output=True).returncode:
        pytest.skip("a file system that does not answer cannot be mounted here")
    try:
        yield
    finally:
        os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))  # what waits for its other side goes on
        subprocess.run(["umount", place], check=False, capture_output=True)  # it goes with the process
