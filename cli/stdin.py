"""The standard input of `pilotq run`: one command reads it as if it were run without pilotq, and nothing else does."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import termios


def source(*, local: bool) -> str:
    """A path at which a process of this machine opens this one's standard input; empty for what cannot be passed on.

    A pipe is opened, not copied: what the command does not read stays for others, as in `while read ...; do`. A
    terminal stays the user's, a file that somebody has begun to read would be read from its start, and a socket cannot
    be opened. With ``local`` false the task may run on another machine.
    """
    path = f"/proc/{os.getpid()}/fd/0"
    status = os.fstat(0)
    if not local or os.isatty(0) or stat.S_ISSOCK(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return ""
    if stat.S_ISREG(status.st_mode) and os.lseek(0, 0, os.SEEK_CUR):
        return ""
    return path if os.access(path, os.R_OK) else ""


def unread(*, passed: bool) -> str:
    """A sentence where input waits in a pipe or socket, or stands in a file, that no task could read; else empty."""
    status = os.fstat(0)
    if passed:
        return ""
    if stat.S_ISREG(status.st_mode):
        waiting = status.st_size > 0 and not os.lseek(0, 0, os.SEEK_CUR)  # else it is a loop's
    elif stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
        waiting = struct.unpack("i", fcntl.ioctl(0, termios.FIONREAD, b"\0" * 4))[0] > 0
    else:
        return ""
    return "standard input was not read: tasks get it from a file that --stdin or `stdin` names" if waiting else ""
