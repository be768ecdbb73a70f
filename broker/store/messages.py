"""The messages between dispatcher and workers, and the line of the journal. All are msgpack.

Dispatcher to worker: one stream per incarnation of a node (the inbox), each entry a list of ``Handed`` (added by the
claim script itself), ``Stop``, ``Recall``, ``Hello``, ``Leave``. Worker to dispatcher: the mail, each element one
of ``Ended``, ``GivenBack``, ``NodeState``, ``NodeLost``, ``Leaving``, ``Withheld``, ``Swept``; clients add ``Nudge``.
Worker to worker, into the inbox too, about an execution over several nodes: ``Guest``, ``GuestStop``, ``Sweep`` from
the *host* (the worker of its first node) to the others, ``GuestEnded`` and ``Swept`` back.

A *lane* is one reservation as dispatcher and worker both know it: a number and an allocation text. A task is handed
with a lane, or with lane 0: then it is handed *ahead*, and takes over the lane of the next task of its class that
ends on this node.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import msgspec


class Handed(msgspec.Struct, array_like=True, tag="run"):
    """One execution. Field order is fixed by claim.lua."""

    id: str
    execution: int
    lane: int
    allocation: str  # of the lane; empty when handed ahead
    class_name: str
    name: str
    queued: float  # unix seconds
    handed: float
    shared: str  # content key of the Shared record
    array: str  # id of the array, or empty
    index: int  # the element's index as the user counts; -1 when no element
    position: int  # 0, 1, ... within the array
    retries: int  # left
    submission: str
    spec: msgspec.Raw
    crashes: int = 0  # executions whose launcher or worker died under them
    spared: str = ""  # the doubted node on which it failed at once: see aside.py


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """End this task if that execution is still here; ``reason`` is one of states.REASONS."""

    id: str  # empty: all that run
    execution: int  # 0: whichever is here
    reason: str


class Recall(msgspec.Struct, array_like=True, tag="recall"):
    """Give back up to ``count`` tasks of a class that were handed ahead and have not started."""

    class_name: str
    count: int


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """A new dispatcher asks: tell me what you hold. Answered by NodeState."""

    term: int


class Leave(msgspec.Struct, array_like=True, tag="leave"):
    """End. ``grace`` seconds until SIGKILL; running and handed tasks are given back, for this reason.

    Tasks get SIGTERM at once; with ``notice`` they get that signal at once, and SIGTERM when only the usual grace is
    left."""

    grace: float
    reason: str = "pilot ended"
    notice: int = 0


class Guest(msgspec.Struct, array_like=True, tag="guest"):
    """Start a process here that is a part of an execution whose first node is another one."""

    id: str
    execution: int
    host: str  # name:incarnation of its first node's worker, which is told of the end
    number: int  # of this process, among those of that worker
    allocation: str
    shared: str  # content key of the Shared record
    argv: list[bytes]
    env: dict[str, str]
    cwd: str


class GuestStop(msgspec.Struct, array_like=True, tag="guest_stop"):
    """Nobody waits for that process any more: end it."""

    host: str
    number: int


class GuestEnded(msgspec.Struct, array_like=True, tag="guest_ended"):
    """A process that was started by ``Guest`` has ended, or could not be started."""

    number: int
    status: int  # exit code as a shell has it: 128 + signal; 255 when nothing was started
    stdout: bytes = b""  # the end of what it wrote
    stderr: bytes = b""
    lost: bool = False  # through no fault of its own


class Sweep(msgspec.Struct, array_like=True, tag="sweep"):
    """End all processes of an execution on this node, and answer with ``Swept`` when none is left.

    With ``id`` empty: of all executions of a host that is dead; then the dispatcher asks, and gets the answer.
    """

    host: str  # name:incarnation of the first node's worker
    id: str = ""
    execution: int = 0
    round: int = 0  # repeated in the answer
    grace: float = 0.0  # seconds between SIGTERM and SIGKILL


class Swept(msgspec.Struct, array_like=True, tag="swept"):
    """Nothing of it lives on this node."""

    node: str
    incarnation: int
    host: str
    round: int


class Gone(msgspec.Struct, array_like=True, tag="gone"):
    """A node that executions of yours use is lost, or has left (said by the dispatcher)."""

    address: str  # name:incarnation
    clean: bool = False  # it has left, which is nobody's fault


class Pardon(msgspec.Struct, array_like=True, tag="pardon"):
    """What failed at once on your node was not the node's fault: be slower to doubt it (said by the dispatcher).

    ``fine``: it can run tasks, so that a new row of failures begins."""

    fine: bool = False


ToWorker = Handed | Stop | Recall | Hello | Leave | Guest | GuestStop | GuestEnded | Sweep | Swept | Gone | Pardon


# What an end says of its node: it can run tasks; nothing; a task has failed at once; it is one of many in a row.
FINE, MUTE, FAILED, DOUBTED = range(4)


class End(NamedTuple):
    """What the dispatcher must know of one ended execution."""

    lane: int
    class_name: str
    seconds: float  # launch to end, < 0 if it was never launched
    kept: bool  # True: the lane went on to a task that had been handed ahead
    said: int = FINE  # of its node
    spared: str = ""  # as it was handed
    why: str = ""  # of the first one that is DOUBTED: what happened, in words


class Ended(msgspec.Struct, array_like=True, tag="ended"):
    node: str
    incarnation: int
    ends: list[End]


class GivenBack(msgspec.Struct, array_like=True, tag="back"):
    """Tasks handed ahead that went back to their class lists, by class."""

    node: str
    incarnation: int
    counts: dict[str, int]


class NodeState(msgspec.Struct, array_like=True, tag="state"):
    """All that a worker holds: sent at birth, and as the answer to Hello."""

    node: str
    incarnation: int
    term: int  # of the Hello answered; 0 at birth
    lanes: list[tuple[int, str, str]]  # lane, allocation, class name
    ahead: dict[str, int]
    guests: list[tuple[str, str]] = []  # of executions of other nodes: host, allocation


class NodeLost(msgspec.Struct, array_like=True, tag="lost"):
    """Proof that an incarnation of a node is dead (its process was seen to end). ``clean``: it has signed off itself,
    when nothing ran there any more; what was handed to it since never began."""

    node: str
    incarnation: int
    why: str
    clean: bool = False


class Leaving(msgspec.Struct, array_like=True, tag="leaving"):
    """A worker ends its tasks and signs off then: it takes nothing more."""

    node: str
    incarnation: int


class Nudge(msgspec.Struct, array_like=True, tag="nudge"):
    """Standing wishes have changed: read them again."""


class Withheld(msgspec.Struct, array_like=True, tag="withheld"):
    """The execution of a lane has ended, but some of its nodes have not confirmed that nothing of it lives there.

    Only their parts stay taken; when all have confirmed the lane ends as any other.
    """

    node: str
    incarnation: int
    lane: int
    allocation: str  # what stays taken


ToDispatcher = Ended | GivenBack | NodeState | NodeLost | Leaving | Nudge | Withheld | Swept


class NodeInfo(msgspec.Struct):
    """A node as its worker registers it. ``cores`` are core numbers as allocations name them."""

    name: str
    incarnation: int
    host: str
    pid: int
    cores: list[int]
    shared_cores: bool = False  # several virtual cores stand for one real one
    cpus: list[int] = []  # the CPU number of each of ``cores``, where they differ
    numa: list[list[int]] = []  # groups of ``cores``; empty: one group
    gpus: list[str] = []
    memory: int = 0  # bytes, 0 = not counted
    counters: dict[str, int] = {}
    job: str = ""  # the Slurm job whose allocation it is part of

    @property
    def address(self) -> str:
        """Names this incarnation of the node among all."""
        return f"{self.name}:{self.incarnation}"


class Line(msgspec.Struct, omit_defaults=True):
    """One line of journal.jsonl: one ended execution, or one task that ended without any.

    Times are unix seconds, ``cpu`` seconds, ``max_rss`` bytes. ``final`` is False for an execution that is tried
    again. ``stdout``/``stderr`` hold captured output up to 4 KB, else ``stdout_at``/``stderr_at`` say where it is:
    [file below the pilot directory, offset, length], or [file named by the task].
    The first key must be ``id``: cli and broker find lines by ``\\n{"id":"..."``.
    """

    id: str
    name: str = ""
    status: str = ""  # RQ's word
    reason: str = ""
    execution: int = 0
    final: bool = True
    node: str = ""
    cpus: str = ""  # allocation text, n1[0:1],n2[0]
    queued: float | None = None
    handed: float | None = None
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    pid: int | None = None  # of the main process, on its node
    max_rss: int | None = None
    cpu: float | None = None
    array: str = ""
    index: int | None = None
    message: str = ""  # more than the reason, for people
    stdout: str | bytes = ""
    stderr: str | bytes = ""
    stdout_at: list[str | int] = []
    stderr_at: list[str | int] = []
    submission: str = ""
    elements: dict[str, str] = {}  # of an array: status -> compact ranges of indices
    at: str = ""  # stream id and number: what was written is known by it


class Part(NamedTuple):
    """What one node gives to a reservation."""

    node: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()
    memory: int = 0  # bytes
    use: tuple[tuple[str, int], ...] = ()  # named counters; like memory not part of the allocation text


@lru_cache(maxsize=4096)
def parse_allocation(text: str) -> tuple[Part, ...]:
    """``n1[0:1],n2[0]`` -> parts; the same text QCG-PilotJob reports. GPUs follow a semicolon: ``n1[0:1;g0:g1]``."""
    parts = []
    for piece in text.split("],"):
        node, _, rest = piece.rstrip("]").partition("[")
        cores, _, gpus = rest.partition(";")
        numbers = tuple(int(c) for c in cores.split(":") if c)
        parts.append(Part(node, numbers, tuple(g for g in gpus.split(":") if g)))
    return tuple(parts)


def format_allocation(parts: tuple[Part, ...]) -> str:
    return ",".join(f"{p.node}[{':'.join(map(str, p.cores))}{';' + ':'.join(p.gpus) if p.gpus else ''}]" for p in parts)


class EndReport(msgspec.Struct):
    """One ended execution, as a worker reports it to end.lua.

    ``wish`` is finished, failed, stopped (by the user, RQ's stop-job), canceled, lost (counts against the crash
    limit), free (walltime: requeued without counting) or doubted (failed at once, like many before it on this node:
    requeued without counting if another node can try it). ``line`` is the packed ``Line``; ``text`` is what RQ shows of
    a failure (its exc_string, already encoded).
    """

    id: str
    execution: int
    wish: str
    reason: str
    ended: str  # RQ's ISO form
    exit: str  # exit code as text, or ''
    started: str  # ISO, or '' if it never began
    allocation: str
    line: bytes
    text: str = ""
    array: str = ""  # of an element
    position: int = 0
    class_name: str = ""  # these three as they were handed
    submission: str = ""
    retries: int = 0
    delay: float = 0.0  # seconds until it is tried again
