"""Carries messages between a launcher and an interpreter over a pair of sequenced-packet sockets.

A message is read by exactly one reader, whole or not at all. So the launcher, which keeps the interpreter's end open
too, can retract what the interpreter has not read: a call that was read has begun, any other has not.

A message that is too large for the socket travels in a file in memory, whose descriptor is sent.
"""

from __future__ import annotations

import array
import os
import socket

from pilotq.workers.whole_writes import write_whole

INLINE_BYTES = 48 << 10  # larger ones would fill the socket's buffer by twos and threes
_READ_BYTES = INLINE_BYTES + 1
_ANCILLARY_BYTES = socket.CMSG_SPACE(4)  # one descriptor


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets.

    >>> ours, theirs = pair()
    >>> send(ours, b"message")
    >>> receive(theirs)
    b'message'
    """
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, data: bytes) -> None:
    """Raises BlockingIOError when the buffer of a socket that does not block is full: nothing was sent."""
    if len(data) <= INLINE_BYTES:
        sock.send(data)
        return
    file = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        write_whole(file, data)
        rights = array.array("i", [file])
        sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    finally:
        os.close(file)


def receive(sock: socket.socket, flags: int = 0) -> bytes:
    """One message; empty when the other side has closed. Raises BlockingIOError when none has arrived."""
    data, ancillary, _, _ = sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, flags)
    if not ancillary:
        return data
    file = array.array("i", ancillary[0][2])[0]
    try:
        return _content(file)
    finally:
        os.close(file)


def _content(file: int) -> bytes:
    size = os.fstat(file).st_size
    parts = []
    done = 0
    while done < size:
        part = os.pread(file, size - done, done)
        parts.append(part)
        done += len(part)
    return b"".join(parts)
