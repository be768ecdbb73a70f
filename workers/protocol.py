"""The records between a worker's control process and its launchers, and how they travel.

A pipe carries frames: four bytes of length (little endian), then one msgpack list of records. Many records ride in
one frame. Down are ``Base``, ``Place``, ``Forget``, ``Launch``, ``Call``, ``Withdraw``, ``Signal``, ``Quit``; up are
``Begun``, ``Started``, ``Withdrawn``, ``Refused``, ``Exited``, ``Returned``, ``Swept``. ``key`` names one launch or
call and is never used twice.

Launches can be *lined up*: one that names another as ``after`` is started by the launcher itself as soon as nothing
of that one is left, so that no core waits for an answer.

Records up are written before the launcher does anything else that could end or stop it, so that the pipe tells how
far it came. But the control process need not read each when it comes: a byte on a third pipe, the bell, says that
something is worth waking up for.
"""

from __future__ import annotations

import struct
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
    path: str = ""  # directories that Python functions are imported from first, with colons between


class Place(msgspec.Struct, array_like=True, tag="place"):
    """What launches in one place share; sent once to each launcher, before the first Launch that names it."""

    place: str
    env: dict[str, str]  # laid over the base's
    defaults: dict[str, str]  # what the base's lacks
    cpus: list[int]  # CPU numbers of this machine


class Forget(msgspec.Struct, array_like=True, tag="forget"):
    """No later Launch names a base or place that was sent before this."""


class Launch(msgspec.Struct, array_like=True, tag="launch"):
    """Start one process: mask, cwd, umask, limits, own session, signals at their defaults, only 0, 1 and 2 open.

    With ``after`` it is started when nothing of that launch is left, however that one ended, also if it was refused;
    at once if that is so already. Launches after one another are in one place.

    ``env`` is laid over the base's and the place's. Files are absolute paths; empty stdin is /dev/null, empty stdout
    or stderr is captured; the same path twice is one open file. With ``suffix`` output is written to the path with the
    suffix (and published by rename by the control process). ``pty`` and the like do not exist.
    """

    key: int
    id: str
    execution: int
    base: str
    place: str
    argv: list[bytes]
    env: dict[str, str]
    cwd: str
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    suffix: str = ""
    after: int = 0


class Call(msgspec.Struct, array_like=True, tag="call"):
    """Run one Python function in an interpreter of this base and place, a persistent process.

    Lined up like launches, and with them; an interpreter runs one call at a time, and several one after the other.
    ``env`` holds for the time of the call. Files are as of a launch.
    """

    key: int
    id: str
    execution: int
    base: str
    place: str
    env: dict[str, str]
    cwd: str
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    suffix: str = ""
    after: int = 0
    payload: bytes = b""  # made by functions.pack_call
    element: str | int | None = None  # value or index of an array's element: the first argument
    fields: dict[bytes, bytes] = {}  # of the job's record, of a job of RQ's own producers
    epilogue: bool = False  # the interpreter of a job that was stopped had to be killed: only its callback is run


class Interrupt(msgspec.Struct, array_like=True, tag="interrupt"):
    """Launcher to interpreter, with a signal behind it: raise in the function of this call, if that still runs."""

    key: int
    reason: str  # of states.REASONS


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """Interpreter to launcher: it has loaded, and reads calls."""


class Withdraw(msgspec.Struct, array_like=True, tag="withdraw"):
    """Do not start what is lined up; what comes behind it moves up. Without effect on what was started already."""

    key: int


class Signal(msgspec.Struct, array_like=True, tag="signal"):
    """Send a signal to everything that belongs to the launch: its session, process group, and strays by mark.

    Of a call SIGKILL ends the interpreter and all that it has started; any other is raised in the function, as an
    exception that suits the ``reason`` (of states.REASONS).
    """

    key: int
    signal: int
    reason: str = ""


class Quit(msgspec.Struct, array_like=True, tag="quit"):
    """Kill what is left, remove own files, exit."""


class Begun(msgspec.Struct, array_like=True, tag="begun"):
    """It is being started: what comes before it on its lane has ended. Of what has not begun nothing can be left."""

    key: int


class Started(msgspec.Struct, array_like=True, tag="started"):
    """It lives. Not said of what has ended within a moment and left nothing."""

    key: int
    pid: int
    at: float  # unix seconds
    seconds: float  # how long ago that was
    stdout_path: str  # where captured output can be read while the task runs; empty if it goes to a named file
    stderr_path: str


class Withdrawn(msgspec.Struct, array_like=True, tag="withdrawn"):
    """It was not started and never will be."""

    key: int


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


NOTHING = Captured()


def tail(captured: Captured, size: int) -> bytes:
    """The last ``size`` bytes of what was captured; empty where its file cannot be read: this only helps people."""
    if not captured.path:
        return captured.data[-size:]
    size = min(captured.length, size)
    try:
        with open(captured.path, "rb") as file:
            file.seek(captured.offset + captured.length - size)
            return file.read(size)
    except OSError:
        return b""


class Exited(msgspec.Struct, array_like=True, tag="exited"):
    """The main process ended. ``left`` > 0: so many of its processes still live, ``Swept`` follows when none does.

    ``status`` is as of waitpid, ``started`` as in Started. ``cpu`` seconds and ``max_rss`` bytes are of the main
    process and the children it waited for. ``seconds`` is by the monotonic clock. With ``left`` == 0 the outputs are
    final.
    """

    key: int
    pid: int
    status: int
    started: float
    ended: float
    seconds: float
    cpu: float
    max_rss: int
    left: int
    stdout: Captured
    stderr: Captured


class Returned(msgspec.Struct, array_like=True, tag="returned"):
    """A function came to its end. ``left`` as in Exited: so many processes that it started still live.

    ``outcome`` is finished, failed or retried; ``text`` what EndReport.text says of it, ``reason`` and ``message``
    those of a failure. Times are as in Exited, ``cpu`` seconds the call's, ``max_rss`` bytes the interpreter's peak.
    """

    key: int
    pid: int
    outcome: str
    reason: str
    message: str
    text: str
    started: float
    ended: float
    seconds: float
    cpu: float
    max_rss: int
    left: int
    stdout: Captured
    stderr: Captured

    @property
    def status(self) -> int:
        """0 when it went well, as of waitpid."""
        return int(self.outcome == "failed")


class Swept(msgspec.Struct, array_like=True, tag="swept"):
    """Nothing of the launch lives any more; the outputs are final."""

    key: int
    ended: float
    stdout: Captured
    stderr: Captured


Down = Base | Place | Forget | Launch | Call | Withdraw | Signal | Quit
Up = Begun | Started | Withdrawn | Refused | Exited | Returned | Swept
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

    def feed(self, data: bytes) -> list[T]:
        """The records that are whole by now."""
        buffer = self._buffer
        buffer += data
        records: list[T] = []
        begin = FRAME.size
        while begin <= len(buffer):
            end = begin + FRAME.unpack_from(buffer, begin - FRAME.size)[0]
            if end > len(buffer):
                break
            records += self._decoder.decode(bytes(buffer[begin:end]))
            begin = end + FRAME.size
        del buffer[: begin - FRAME.size]
        return records
