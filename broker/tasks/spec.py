"""What a worker needs to know of one task: `Spec`, the form in which a `Task` is stored with its record. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import msgspec

from pilotq.broker.os_strings import UNREADABLE, encode, printable
from pilotq.broker.tasks.functions import Packed, decode_payload_name, pack_call
from pilotq.broker.tasks.model import Task, one_line

# Spec.flags
FLAG_ARRAY = 1  # {index} and {value} are filled in
FLAG_QCG = 2  # ${it} and its like are filled in, QCG-PilotJob's rules
FLAG_LOGIN = 4  # scripts run in `bash -l`
FLAG_VALUES = 8  # elements have values, to be fetched by array and position
FLAG_FUNCTION = 32  # a Python function: argv holds functions.pack_call
FLAG_RQ_JOB = 64  # a job of RQ's own producers: its record says what to run
FLAG_ID = 128  # {id} is filled in, in paths
FLAG_ATTEMPT = 256  # {attempt} is filled in
FLAG_BUNDLE = 512  # of a bundle: each of its tasks has a specification of its own, a `Member`, fetched like a value


ATTEMPT = "{attempt}"


class Grow(msgspec.Struct, array_like=True):
    """By which factors a task asks for more when it is tried again, and how far; 0: it does not."""

    memory: float = 0.0
    memory_max: int = 0  # bytes
    time: float = 0.0
    time_max: float = 0.0  # seconds


class Spec(msgspec.Struct, array_like=True):
    """What a worker needs to know of one task besides its `SubmitContext`: ``pq_spec``, packed with msgpack.

    Strings of the system are bytes, as the kernel takes them. ``script`` wins over ``argv`` when not empty. Paths are
    absolute unless they contain variables that are filled in at launch; then they are joined with ``cwd`` at launch.
    """

    argv: list[bytes]
    script: bytes = b""
    cwd: bytes = b""  # empty: that of the context
    stdin: bytes = b""
    stdout: bytes = b""  # empty: captured
    stderr: bytes = b""
    env: dict[bytes, bytes] = {}
    time_limit: float = 0.0  # seconds from launch, 0 = none
    model: str = "default"
    model_opts: dict[str, bytes] = {}
    flags: int = 0  # FLAG_* above
    cores: int = 1
    launch_at: int = 0
    retries: int = 0  # these three as in Task
    backoff: float = 0.0
    retry_on: str = ""
    grow: Grow | None = None


class Member(msgspec.Struct, array_like=True):
    """One task of a bundle: a record, stored as that of an array, of tasks that are alike."""

    spec: Spec
    name: str = ""


_pack = msgspec.msgpack.Encoder().encode
read_spec = msgspec.msgpack.Decoder(Spec).decode
read_member = msgspec.msgpack.Decoder(Member).decode
BUNDLE_SPEC = _pack(Spec(argv=[], flags=FLAG_BUNDLE))  # of the record of a bundle
_DEFAULTS = msgspec.structs.astuple(Spec([]))


def pack_spec(spec: Spec) -> bytes:
    """The specification, packed, without what is as usual at its end."""
    values = msgspec.structs.astuple(spec)
    size = len(values)
    while size > 1 and values[size - 1] == _DEFAULTS[size - 1]:
        size -= 1
    return _pack(values[:size])


@lru_cache(maxsize=256)
def is_bundle(packed: bytes) -> bool:
    """Whether this packed `Spec` is that of a bundle."""
    try:
        return len(packed) <= 2 * len(BUNDLE_SPEC) and bool(read_spec(packed).flags & FLAG_BUNDLE)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


class MemberPacker:
    """Packs the tasks of a bundle. Of tasks that differ only in command and name the rest is packed once.

    >>> packer = MemberPacker()
    >>> one, other = Task(command=["./sim", "1"]), Task(command=["./sim", "2"], name="b")
    >>> [read_member(packer.pack(task, like=one)).spec.argv for task in (one, other)]
    [[b'./sim', b'1'], [b'./sim', b'2']]
    """

    def __init__(self) -> None:
        self._like: Task | None = None
        self._head = self._tail = b""

    def pack(self, task: Task, like: Task, payload: bytes | None = None) -> bytes:
        """The packed `Member`; ``like`` is the task itself, or one that `validation.is_like` has compared it to.

        ``payload`` is the packed call of its function."""
        name = _pack(printable(task.name) if task.name is not None else "")
        if task is like or not task.command:
            return b"\x92" + _pack(spec_of(task, payload)) + name
        if like is not self._like:
            self._begin(like, [encode(argument) for argument in like.command or ()])
        return b"".join((self._head, _pack([argument.encode() for argument in task.command]), self._tail, name))

    def pack_calls(self, base: Task, payloads: Sequence[bytes]) -> list[bytes]:
        """The packed `Member` of each call of a function: a task like ``base``, whose packed call is the payload."""
        base = msgspec.structs.replace(base, function=Packed(b""))
        self._begin(base, [b""])
        head, tail = self._head, self._tail + _pack(printable(base.name) if base.name is not None else "")
        return [b"".join((head, _pack((payload,)), tail)) for payload in payloads]

    def _begin(self, like: Task, argv: list[bytes]) -> None:
        """Pack what all that is like this task has around its arguments, once."""
        packed, own = _pack(spec_of(like)), _pack(argv)
        at = packed.index(own, 1, len(own) + 4)  # behind the head of the list of fields
        self._like, self._head, self._tail = like, b"\x92" + packed[:at], packed[at + len(own) :]


def command_text(spec: Spec) -> str:
    """One line for the journal, as `description` has it of the whole task; of a call only the function's name.

    Empty for a call whose payload is damaged: its end says that.
    """
    if not spec.flags & FLAG_FUNCTION:
        return one_line(b" ".join(spec.argv) if spec.argv else spec.script.strip())
    try:
        payload = decode_payload_name(spec.argv[0])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, IndexError):
        return ""
    return _call_text(payload.name) if payload.name else ""


def packed_command(packed: bytes) -> str:
    """The command of a packed `Spec`, as `command_text` shows it; empty where it has none of its own or is damaged."""
    try:
        spec = read_spec(packed)
        return "" if spec.flags & FLAG_BUNDLE else command_text(spec)
    except UNREADABLE:
        return ""


@lru_cache(maxsize=256)
def _call_text(name: str) -> str:
    return one_line(f"{name}(...)")


def spec_of(task: Task, payload: bytes | None = None) -> Spec:
    """The specification of a task that was checked; ``payload`` is the packed call of its function, if made already."""
    argv = [encode(a) for a in task.command or []]
    flags = (FLAG_ARRAY if task.is_array else 0) | (FLAG_QCG if task.qcg else 0)
    flags |= FLAG_VALUES if task.values is not None else 0
    if (task.stdout or task.stderr or task.stdin or task.cwd) and not task.qcg:
        flags |= FLAG_ID if "{id}" in f"{task.cwd}{task.stdin}{task.stdout}{task.stderr}" else 0
    if not task.qcg and any(ATTEMPT in text for text in _texts_of(task)):
        flags |= FLAG_ATTEMPT
    if task.function is not None:
        argv = [payload if payload is not None else pack_call(task.function, task.args, task.kwargs)]
        flags |= FLAG_FUNCTION
    return Spec(
        argv=argv,
        script=encode(task.script) if task.script else b"",
        cwd=encode(task.cwd) if task.cwd else b"",
        stdin=encode(task.stdin) if task.stdin else b"",
        stdout=encode(task.stdout) if task.stdout else b"",
        stderr=encode(task.stderr) if task.stderr else b"",
        env={encode(name): encode(value) for name, value in task.env.items()} if task.env else {},
        time_limit=task.time_limit or 0.0,
        model=task.model,
        model_opts={name: encode(value) for name, value in task.model_opts.items()} if task.model_opts else {},
        flags=flags | (FLAG_LOGIN if task.login_shell else 0),
        cores=task.request.cores[0],
        launch_at=task.launch_at,
        retries=task.retries,
        backoff=task.backoff,
        retry_on=task.retry_on,
        grow=_grow_of(task) if task.memory_grow or task.time_grow else None,
    )


def _texts_of(task: Task) -> Iterator[str]:
    """Texts in which variables are filled in."""
    yield from task.command or ()
    yield from (text for text in (task.script, task.cwd, task.stdin, task.stdout, task.stderr) if text)
    yield from task.env.values()


def _grow_of(task: Task) -> Grow:
    return Grow(task.memory_grow, task.memory_max, task.time_grow, task.time_max)
