"""The records between a worker's control process and its launchers, and how they travel.

A pipe carries frames: four bytes of length (little endian), then one msgpack list of records. Many records ride in
one frame. Down are ``Base``, ``Launch``, ``Signal``, ``Quit``; up are ``Started``, ``Refused``, ``Exited``, ``Swept``.
``key`` names one launch on this pipe and is never used twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

FRAME = struct.Struct("<I")
INLINE_BYTES = 4096  # captured output up to this size travels in the record


class Base(msgspec.Struct, array_like=True, tag="base"):
    """Surroundings that many launches share; sent once to each launcher, before the first Launch that names it."""

    base: str
    env: dict[str, str]
    umask: int
    limits: dict[int, int]  # soft limits by RLIMIT number; capped at the hard limit


class Launch(msgspec.Struct, array_like=True, tag="launch"):
    """Start one process: mask, cwd, umask, limits, own session, signals at their defaults, only 0, 1 and 2 open.

    ``env`` is laid over the base's. Files are absolute paths; empty stdin is /dev/null, empty stdout or stderr is
    captured; the same path twice is one open file. With ``suffix`` output is written to the path with the suffix
    (and published by rename by the control process). ``pty`` and the like do not exist.
    """

    key: int
    id: str
    execution: int
    base: str
    argv: list[bytes]
    env: dict[str, str]
    cpus: list[int]  # CPU numbers of this machine
    cwd: str
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    suffix: str = ""


class Signal(msgspec.Struct, array_like=True, tag="signal"):
    """Send a signal to everything that belongs to the launch: its session, process group, and strays by mark."""

    key: int
    signal: int


class Quit(msgspec.Struct, array_like=True, tag="quit"):
    """Kill what is left, remove own files, exit."""


class Started(msgspec.Struct, array_like=True, tag="started"):
    key: int
    pid: int
    at: float  # unix seconds
    stdout_path: str  # where captured output can be read while the task runs; empty if it goes to a named file
    stderr_path: str


class Refused(msgspec.Struct, array_like=True, tag="refused"):
    """Nothing was started. ``reason`` is of states.REASONS: 'not found', 'launch' or 'output'."""

    key: int
    reason: str
    message: str


class Captured(msgspec.Struct, array_like=True):
    """Captured output: up to INLINE_BYTES as ``data``; more lies in ``path`` (absolute) at ``offset``."""

    data: bytes = b""
    path: str = ""
    offset: int = 0
    length: int = 0


class Exited(msgspec.Struct, array_like=True, tag="exited"):
    """The main process ended. ``left`` > 0: so many of its processes still live, ``Swept`` follows when none does.

    ``status`` is as of waitpid. ``cpu`` seconds and ``max_rss`` bytes are of the main process and the children it
    waited for. ``seconds`` is by the monotonic clock. With ``left`` == 0 the outputs are final.
    """

    key: int
    status: int
    ended: float
    seconds: float
    cpu: float
    max_rss: int
    left: int
    stdout: Captured
    stderr: Captured


class Swept(msgspec.Struct, array_like=True, tag="swept"):
    """Nothing of the launch lives any more; the outputs are final."""

    key: int
    ended: float
    stdout: Captured
    stderr: Captured


Down = Base | Launch | Signal | Quit
Up = Started | Refused | Exited | Swept
T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def frame(records: list[Down] | list[Up]) -> bytes:
    body = _encoder.encode(records)
    return FRAME.pack(len(body)) + body


class Frames(Generic[T]):
    """Cuts a byte stream into records of one direction."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        self._buffer += data
        while len(self._buffer) >= FRAME.size:
            (size,) = FRAME.unpack_from(self._buffer)
            if len(self._buffer) < FRAME.size + size:
                return
            body = bytes(self._buffer[FRAME.size : FRAME.size + size])
            del self._buffer[: FRAME.size + size]
            yield from self._decoder.decode(body)
