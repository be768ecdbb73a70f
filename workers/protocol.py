"""Defines the messages between a worker process and its launchers, and between a launcher and its interpreters.

A launcher has three pipes. ``down`` carries messages to it (``ToLauncher``), ``up`` carries messages from it
(``FromLauncher``). Both carry frames: four bytes of length (little endian), then one msgpack list of messages, so that
many messages travel in one frame. Each launch or call has a ``key``, a number that is never used twice. Paths and
environment variables are bytes, as the system has them.

Launches can be *chained*: one that names another one as ``after`` is started by the launcher itself as soon as no
process of that one is left, so that no core waits for an answer of the worker process.

A message from the launcher is written before the launcher does anything else that could end or stop it, so that the
pipe tells how far it came. But the worker process need not read each message when it arrives: a byte on the third
pipe, ``wake``, means that one has arrived which is worth waking up for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

HEADER = struct.Struct("<I")
INLINE_BYTES = 4096  # captured output up to this size travels in the message
END_BYTES = 4096  # of larger output, in the message
# In the strings of a `LaunchRun`: no string that the system takes has a NUL.
INDEX_MARK, NUMBER_MARK = b"\0i", b"\0n"
OWN_MARKS = b"\0A", b"\0B", b"\0C", b"\0D"


class LaunchBase(msgspec.Struct, array_like=True, tag="base"):
    """What all launches of a submission share: sent once to each launcher, before the first launch that names it."""

    name: str
    env: dict[bytes, bytes]
    umask: int
    limits: dict[int, int]  # soft limits by RLIMIT number; capped at the hard limit
    path: bytes = b""  # directories that Python functions are imported from first, with colons between


class LaunchSlot(msgspec.Struct, array_like=True, tag="slot"):
    """What all launches in one slot share: sent once to each launcher, before the first launch that names it."""

    name: str
    env: dict[bytes, bytes]  # laid over the base's
    defaults: dict[bytes, bytes]  # for variables that the base lacks
    cpus: list[int]  # CPU numbers of this machine
    files: dict[bytes, bytes] = {}  # path -> content: written before the first start in it


class Forget(msgspec.Struct, array_like=True, tag="forget"):
    """No later launch names a base or slot that was sent before this message."""


class Element(msgspec.Struct, array_like=True, frozen=True):
    """The element of an array that a launch is: when it ends plainly `Ran` says so, with a row that has these."""

    index: int
    place: int  # of the allocation, among those that its rows name
    origin: float  # unix seconds, from which its start is counted


class Launch(msgspec.Struct, array_like=True, tag="launch"):
    """Start one process: mask, cwd, umask, limits, own session, signals at their defaults, only 0, 1 and 2 open.

    With ``after`` it is started when no process of that launch is left, however that one ended, also if it was refused;
    at once if that is so already. All launches of a chain are in one slot.

    ``env`` is laid over the base's and the slot's. Files are absolute paths; empty stdin is /dev/null, empty stdout
    or stderr is captured; the same path twice is one open file. With ``suffix`` output is written to the path with the
    suffix (and published by rename by the worker process). A ``script`` is written to a file, whose path becomes the
    last argument; the file goes when no process of the launch is left.
    """

    key: int
    id: str
    attempt: int
    base: str
    slot: str
    argv: list[bytes]
    env: dict[bytes, bytes]
    cwd: bytes
    stdin: bytes = b""
    stdout: bytes = b""
    stderr: bytes = b""
    suffix: str = ""
    after: int = 0
    script: bytes = b""
    make_cwd: bool = False  # the working directory is made, parents too, as QCG-PilotJob does
    files: dict[bytes, bytes] = {}  # path -> content: written before it starts
    element: Element | None = None


class LaunchRun(msgspec.Struct, array_like=True, tag="launch_run"):
    """Start elements of an array one after the other: as many launches as ``number``, each chained behind the last.

    ``launch`` is that of the first one, with its ``element``. The keys of the others are the numbers behind its key,
    their indices follow in steps. Its strings have `INDEX_MARK` where each element has its index, and `NUMBER_MARK`
    where it has eight hexadecimal digits that no other one of this worker process has.

    Where elements differ in more than that ``own`` has a packed list of strings for each. The first of them it has
    where the first of `OWN_MARKS` is, and so on; those behind four are its arguments, if ``launch`` has none.
    """

    number: int
    step: int  # from one index to the next
    launch: Launch
    own: list[msgspec.Raw] = []

    def launch_of(self, number: int) -> Launch:
        """The launch of one of them, counted from 0."""
        template, first = self.launch, self.launch.element
        assert first is not None
        element = msgspec.structs.replace(first, index=first.index + self.step * number)
        own = _read_strings(self.own[number]) if self.own else []
        marks = {INDEX_MARK: b"%d" % element.index, NUMBER_MARK: b"%08x" % (template.key + number & 0xFFFFFFFF)}
        marks |= zip(OWN_MARKS, own, strict=False)

        def filled(text: bytes) -> bytes:
            return fill_marks(text, marks) if b"\0" in text else text

        return msgspec.structs.replace(
            template,
            key=template.key + number,
            id=filled(template.id.encode()).decode(),
            argv=[filled(argument) for argument in template.argv] or own[len(OWN_MARKS) :],
            env={name: filled(value) for name, value in template.env.items()},
            cwd=filled(template.cwd),
            stdin=filled(template.stdin),
            stdout=filled(template.stdout),
            stderr=filled(template.stderr),
            after=template.key + number - 1 if number else template.after,
            element=element,
        )


def fill_marks(text: bytes, marks: Mapping[bytes, bytes]) -> bytes:
    """A string with what stands for each mark in its place; none of that may have a NUL.

    >>> fill_marks(b"run-\\0i/\\0A", {INDEX_MARK: b"7", OWN_MARKS[0]: b"a b"})
    b'run-7/a b'
    """
    for mark, own in marks.items():
        text = text.replace(mark, own)
    return text


class ConfinedLaunch(Launch, array_like=True, tag="confined"):
    """A launch in a cgroup of its own, which is made for it and may use ``memory`` bytes."""

    cgroup: str = ""  # its path
    memory: int = 0


class Call(msgspec.Struct, array_like=True, tag="call"):
    """Run one Python function in an interpreter, a persistent process, of this base and slot.

    Calls are chained like launches, and with them; an interpreter runs one call at a time. ``env`` holds while the call
    runs. Files are as of a launch.
    """

    key: int
    id: str
    attempt: int
    base: str
    slot: str
    env: dict[bytes, bytes]
    cwd: bytes
    stdin: bytes = b""
    stdout: bytes = b""
    stderr: bytes = b""
    suffix: str = ""
    after: int = 0
    payload: bytes = b""  # made by functions.pack_call
    element: bytes | int | None = None  # value (UTF-8) or index of an array's element: the first argument
    rq_fields: dict[bytes, bytes] = {}  # the record of an RQ job
    callback_only: bool = False  # the interpreter of a job that was stopped had to be killed: run its callback alone
    submission: str = ""


class CallRun(msgspec.Struct, array_like=True, tag="call_run"):
    """Run functions one after the other: as many calls as there are ``payloads``, each chained behind the last.

    ``call`` is the first one, but for its payload, with `INDEX_MARK` in its id. The keys and indices of the others are
    the numbers behind its key and behind ``index``.
    """

    index: int
    call: Call
    payloads: list[bytes]

    def calls(self) -> Iterator[Call]:
        first, mark = self.call, INDEX_MARK.decode()
        for number, payload in enumerate(self.payloads):
            yield msgspec.structs.replace(
                first,
                key=first.key + number,
                id=first.id.replace(mark, str(self.index + number)),
                after=first.key + number - 1 if number else first.after,
                payload=payload,
            )


class Interrupt(msgspec.Struct, array_like=True, tag="interrupt"):
    """Launcher to interpreter, followed by a signal: raise in the function of this call, if that still runs."""

    key: int
    reason: str  # of states.REASONS


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """Interpreter to launcher: it has loaded, and reads calls."""


class Retract(msgspec.Struct, array_like=True, tag="retract"):
    """Do not start a chained launch; those behind it move up. Without effect on one that was started already."""

    key: int


class Signal(msgspec.Struct, array_like=True, tag="signal"):
    """Send a signal to every process of the launch: its session, process group, and strays by mark.

    SIGKILL for a call ends the interpreter and all processes that it has started; any other signal is raised in the
    function, as an exception that suits the ``reason`` (of states.REASONS).
    """

    key: int
    signal: int
    reason: str = ""


class Quit(msgspec.Struct, array_like=True, tag="quit"):
    """Kill all processes that are left, remove own files, exit."""


class Begun(msgspec.Struct, array_like=True, tag="begun"):
    """The launch is being started: those before it in its chain have ended. Before this no process of it exists.

    Of a call: an interpreter is given it, and the ``others`` behind it.
    """

    key: int
    others: list[int] = []


class Started(msgspec.Struct, array_like=True, tag="started"):
    """The process runs. Not sent for one that has ended within a moment and left nothing."""

    key: int
    pid: int
    at: float  # unix seconds
    seconds: float  # how long ago that was
    stdout_path: bytes  # where captured output can be read while the task runs; empty if it goes to a named file
    stderr_path: bytes


class Retracted(msgspec.Struct, array_like=True, tag="retracted"):
    """The launch was not started and never will be."""

    key: int


class Refused(msgspec.Struct, array_like=True, tag="refused"):
    """Nothing was started. ``reason`` is of states.REASONS: 'not found', 'launch' or 'output'.

    With ``passing`` it was a shortage: it may be tried again, and what was chained behind it is retracted.
    """

    key: int
    reason: str
    message: str
    passing: bool = False


class Captured(msgspec.Struct, array_like=True):
    """Captured output: up to INLINE_BYTES as ``data``; more lies in ``path`` (absolute) at ``offset``.

    ``end`` is the end of what lies there: the worker process reads no file. ``length`` counts all that was written,
    also what could be kept nowhere.
    """

    data: bytes = b""
    path: bytes = b""
    offset: int = 0
    length: int = 0
    end: bytes = b""


NO_OUTPUT = Captured()


def tail(captured: Captured, size: int) -> bytes:
    """The last ``size`` bytes of captured output, at most END_BYTES; it only helps people."""
    return (captured.end or captured.data)[-size:]


class Exited(msgspec.Struct, array_like=True, tag="exited"):
    """The main process ended. ``remaining`` of its processes still live: ``GroupSwept`` follows when none does.

    ``status`` is as of waitpid, ``started`` as in Started. ``cpu`` seconds and ``max_rss`` bytes are of the main
    process and the children it waited for (of one smaller than the launcher, ``max_rss`` is an upper bound).
    ``seconds`` is by the monotonic clock. With ``remaining`` == 0 the outputs are final, else they only have the
    ``end`` of what was written so far.
    """

    key: int
    pid: int
    status: int
    started: float
    ended: float
    seconds: float
    cpu: float
    max_rss: int
    remaining: int
    stdout: Captured
    stderr: Captured
    killed_at: int = 0  # bytes that its cgroup held when the kernel killed it for that


class Ran(msgspec.Struct, array_like=True, tag="ran"):
    """A launch that is an `Element` ended plainly: within a moment, with exit code 0, and it has left nothing and
    written nothing that was captured.

    ``row`` is its line of the journal: a packed Row of broker/store/journal_runs.py. ``seconds`` is how long it ran,
    by the monotonic clock, ``ended`` (unix seconds) when it ended.
    """

    key: int
    seconds: float
    ended: float
    row: bytes


class Returned(msgspec.Struct, array_like=True, tag="returned"):
    """A function came to its end. ``remaining`` as in Exited: so many processes that it started still live.

    ``outcome`` is finished, failed or retried; ``text`` is EndReport.text, ``reason`` and ``message`` those of a
    failure. A short result of a function of ours is its pickle, ``value``, and there is no text. Times are as in
    Exited, ``cpu`` seconds the call's, ``max_rss`` bytes the interpreter's peak.
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
    remaining: int
    stdout: Captured
    stderr: Captured
    value: bytes = b""

    @property
    def status(self) -> int:
        """0 when it went well, as of waitpid."""
        return int(self.outcome == "failed")


class GroupSwept(msgspec.Struct, array_like=True, tag="swept"):
    """No process of the launch lives any more; the outputs are final."""

    key: int
    ended: float
    stdout: Captured
    stderr: Captured


ToLauncher = (
    LaunchBase | LaunchSlot | Forget | Launch | LaunchRun | ConfinedLaunch | Call | CallRun | Retract | Signal | Quit
)
FromLauncher = Begun | Started | Retracted | Refused | Exited | Ran | Returned | GroupSwept
T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_read_strings = msgspec.msgpack.Decoder(list[bytes]).decode


def encode_frame(messages: Sequence[ToLauncher | FromLauncher | msgspec.Raw]) -> bytes:
    """The bytes of one frame, for a pipe.

    >>> FrameDecoder(ToLauncher).feed(encode_frame([Retract(7), Quit()]))
    [Retract(key=7), Quit()]
    """
    body = _encoder.encode(messages)
    return HEADER.pack(len(body)) + body


class FrameDecoder(Generic[T]):
    """Cuts the byte stream of one pipe into messages of one direction (ToLauncher or FromLauncher)."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The messages that are complete by now."""
        buffer = self._buffer
        buffer += data
        messages: list[T] = []
        begin = HEADER.size
        while begin <= len(buffer):
            end = begin + HEADER.unpack_from(buffer, begin - HEADER.size)[0]
            if end > len(buffer):
                break
            messages += self._decoder.decode(bytes(buffer[begin:end]))
            begin = end + HEADER.size
        del buffer[: begin - HEADER.size]
        return messages
