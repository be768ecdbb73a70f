"""The messages between dispatcher and workers, and what a worker reports of an ended execution. All are msgpack.

Dispatcher to worker: a stream for each incarnation of a node (the inbox), each entry a list of ``Run``, ``Batch`` and
``Lease`` (added by the claim script itself), ``Stop``, ``RetractTasks``, ``Reopen``, ``StateRequest``, ``Leave``.
Worker to dispatcher: the list of events, each element one of ``NodeReport``, ``TasksReturned``, ``StateReport``,
``NodeLost``, ``Draining``, ``PartlyReleased``, ``Swept``; clients add ``ControlChanged``. Worker to worker, into the
inbox too, about a multinode task: ``StartRemote``, ``StopRemote``, ``Sweep`` from its *primary node* to the others,
``RemoteEnded`` and ``Swept`` back.

A *slot* is one reservation as dispatcher and worker both know it: a number and an allocation text. A task is handed out
with a slot, or with slot 0: then it is *prefetched*, and takes over the slot of the next task of its class that ends on
this node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.os_strings import UNREADABLE


class Run(msgspec.Struct, array_like=True, tag="run"):
    """Run this execution. The order of the fields is fixed by claim.lua."""

    id: str
    execution: int
    slot: int  # 0: prefetched
    allocation: str  # of the slot; empty when prefetched
    class_name: str
    name: str
    queued: float  # unix seconds
    handed: float
    shared: str  # content key of the SubmitContext record
    array: str  # id of the array, or empty
    index: int  # the element's index as the user counts; -1 when no element
    position: int  # 0, 1, ... within the array
    retries: int  # left
    submission: str
    spec: bytes  # msgpack Spec; decoded by itself, so that a damaged one costs nothing else
    crashes: int = 0  # executions whose launcher or worker died under them
    last_suspect_node: str = ""  # the suspect node on which it failed at once: see quarantine.py
    lease: int = -1  # first position of the `Lease` that it came in, then it has no record on the server; -1: of none


class Lease(msgspec.Struct, array_like=True, tag="lease"):
    """Run these elements of an array. The order of the fields is fixed by claim.lua.

    The first ones have the ``slots`` (number, allocation), the others are prefetched. The other fields are as in Run.
    """

    array: str
    execution: int
    class_name: str
    name: str
    queued: float
    handed: float
    shared: str
    first: int  # position of the first element
    number: int  # of elements
    index: int  # of the first element
    step: int  # from one index to the next
    retries: int
    submission: str
    spec: bytes
    slots: list[tuple[int, str]]

    def run(self, number: int) -> Run:
        """The `Run` of one of the elements, counted from 0."""
        slot, allocation = self.slots[number] if number < len(self.slots) else (0, "")
        index = self.index + self.step * number
        return Run(
            f"{self.array}_{index}", self.execution, slot, allocation, self.class_name, self.name, self.queued,
            self.handed, self.shared, self.array, index, self.first + number, self.retries, self.submission, self.spec,
            lease=self.first,
        )  # fmt: skip


class Batch(msgspec.Struct, array_like=True, tag="batch"):
    """Run these tasks of one submission and class. The order of the fields is fixed by claim.lua.

    Of each task (id, execution, slot, allocation, spec). The other fields are as in Run.
    """

    class_name: str
    queued: float
    handed: float
    shared: str
    retries: int
    submission: str
    tasks: list[tuple[str, int, int, str, bytes]]

    def runs(self) -> Iterator[Run]:
        """A `Run` for each task, in order."""
        for task_id, execution, slot, allocation, spec in self.tasks:
            yield Run(
                task_id, execution, slot, allocation, self.class_name, "", self.queued, self.handed, self.shared, "",
                -1, 0, self.retries, self.submission, spec,
            )  # fmt: skip


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """End this task if that execution is still here; ``reason`` is one of states.REASONS.

    Of an array all its elements here are ended. With ``unstarted`` only what has not begun is.
    """

    id: str  # empty: all that run
    execution: int  # 0: whichever is here
    reason: str
    unstarted: bool = False


class RetractTasks(msgspec.Struct, array_like=True, tag="retract"):
    """Return up to ``count`` prefetched tasks of a class that have not started. Answered by TasksReturned."""

    class_name: str
    count: int


class Vacate(msgspec.Struct, array_like=True, tag="vacate"):
    """End the tasks in these slots, which are nice: they are requeued (from the dispatcher)."""

    slots: list[int]


class Reopen(msgspec.Struct, array_like=True, tag="reopen"):
    """Slots that were released while tasks of their class were on their way to the node: they go on with these.

    Answered by a NodeReport: one for which no task is left is released again.
    """

    class_name: str
    slots: list[tuple[int, str]]  # number, allocation


class StateRequest(msgspec.Struct, array_like=True, tag="state_request"):
    """A new dispatcher asks for all that the worker holds. Answered by StateReport."""

    term: int


class Leave(msgspec.Struct, array_like=True, tag="leave"):
    """End. ``grace`` seconds until SIGKILL; running and handed tasks are requeued, for this reason.

    Tasks get SIGTERM at once; with ``notice`` they get that signal at once, and SIGTERM when only the usual grace is
    left."""

    grace: float
    reason: str = "pilot ended"
    notice: int = 0


class StartRemote(msgspec.Struct, array_like=True, tag="start_remote"):
    """Start a process here that is a part of an execution whose primary node is another one."""

    id: str
    execution: int
    host: str  # name:incarnation of its primary node's worker, which gets RemoteEnded
    number: int  # of this process, among those of that worker
    allocation: str
    shared: str  # content key of the SubmitContext record
    argv: list[bytes]
    env: dict[bytes, bytes]
    cwd: bytes
    memory: int = 0  # bytes that all processes of the execution on this node may use together, 0 = any


class StopRemote(msgspec.Struct, array_like=True, tag="stop_remote"):
    """End a process that was started by ``StartRemote``: nothing waits for it any more."""

    host: str
    number: int


class RemoteEnded(msgspec.Struct, array_like=True, tag="remote_ended"):
    """A process that was started by ``StartRemote`` has ended, or could not be started."""

    number: int
    status: int  # exit code as a shell has it: 128 + signal; 255 when nothing was started
    stdout: bytes = b""  # the end of what it wrote
    stderr: bytes = b""
    lost: bool = False  # through no fault of its own
    peak: int = 0  # bytes that all processes of the execution there have used at most, so far
    too_much: str = ""  # a sentence, when they were ended because they used more memory than they may


class Sweep(msgspec.Struct, array_like=True, tag="sweep"):
    """End all processes of an execution on this node, and answer with ``Swept`` when none is left.

    With ``id`` empty: of all executions of a primary node that is dead; then the dispatcher asks, and gets the answer.
    """

    host: str  # name:incarnation of the primary node's worker
    id: str = ""
    execution: int = 0
    round: int = 0  # repeated in the answer
    grace: float = 0.0  # seconds between SIGTERM and SIGKILL


class Swept(msgspec.Struct, array_like=True, tag="swept"):
    """Answers Sweep: no process of the execution lives on this node."""

    node: str
    incarnation: int
    host: str
    round: int


class Gone(msgspec.Struct, array_like=True, tag="gone"):
    """A node that executions of the receiver use is lost or has left (from the dispatcher)."""

    address: str  # name:incarnation
    clean: bool = False  # it has left (deregistered), which counts against no task


class ClearSuspicion(msgspec.Struct, array_like=True, tag="clear_suspicion"):
    """What failed at once on the node was not its fault: the worker is slower to suspect it (from the dispatcher).

    ``healthy``: it can run tasks, so that a new failure streak begins.
    """

    healthy: bool = False


ToWorker = (
    Run | Batch | Lease | Stop | Vacate | RetractTasks | Reopen | StateRequest | Leave | StartRemote | StopRemote
    | RemoteEnded | Sweep | Swept | Gone | ClearSuspicion
)  # fmt: skip


_decode = msgspec.msgpack.Decoder(list[ToWorker]).decode
_decode_one = msgspec.msgpack.Decoder(ToWorker).decode
_decode_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_RUN_FIELDS = [(f.name, msgspec.msgpack.Decoder(f.type)) for f in msgspec.structs.fields(Run)]
_NEEDED = frozenset({"id", "execution", "slot", "allocation", "class_name"})  # for a Run to be answered


def decode_inbox(packed: bytes) -> tuple[list[ToWorker], list[str]]:
    """The messages of one entry of an inbox, and a sentence for each that is damaged.

    For a `Batch` a `Run` for each of its tasks.
    A `Run` of which a field cannot be read comes with an empty ``spec``: so that task ends, and no other.
    """
    try:
        return _with_runs(_decode(packed)), []
    except UNREADABLE:
        pass
    messages: list[ToWorker] = []
    damaged: list[str] = []
    try:
        parts = _decode_raw(packed)
    except UNREADABLE as error:
        return [], [f"an entry of the inbox cannot be read: {error}"]
    for part in parts:
        try:
            messages.append(_decode_one(part))
        except UNREADABLE as error:
            run = _read_run(part)
            damaged.append(f"a message cannot be read: {error}" if run is None else f"task {run.id}: {error}")
            messages += [run] if run is not None else []
    return _with_runs(messages), damaged


def _with_runs(messages: list[ToWorker]) -> list[ToWorker]:
    if not any(isinstance(message, Batch) for message in messages):
        return messages
    found: list[ToWorker] = []
    for message in messages:
        found += message.runs() if isinstance(message, Batch) else (message,)
    return found


def _read_run(packed: msgspec.Raw) -> Run | None:
    """A Run of which at least one field cannot be read; None if it is none, or cannot even be answered."""
    try:
        tag, *parts = _decode_raw(packed)
        if msgspec.msgpack.decode(tag) != "run":
            return None
    except UNREADABLE:
        return None
    fields: dict[str, Any] = {
        "name": "", "queued": 0.0, "handed": 0.0, "shared": "", "array": "", "index": -1, "position": 0, "retries": 0,
        "submission": "", "spec": b"",
    }  # fmt: skip
    whole = True
    for (name, decoder), part in zip(_RUN_FIELDS, parts, strict=False):
        try:
            fields[name] = decoder.decode(part)
        except UNREADABLE:
            if name in _NEEDED:
                return None
            if name == "spec":
                fields[name] = bytes(part)  # whoever decodes it decides
            else:
                whole = False
    if not fields.keys() >= _NEEDED:
        return None
    return Run(**{**fields, "spec": fields["spec"] if whole else b""})


# What an end says of the health of its node: it can run tasks; nothing; a task has failed at once; the last of a streak
# of such failures.
HEALTHY, UNKNOWN, FAILED, SUSPECT = range(4)


class ExecutionEnd(NamedTuple):
    """What the dispatcher must know of an ended execution, or of several that ended alike."""

    slot: int
    class_name: str
    seconds: float  # launch to end, < 0 if it was never launched
    kept: bool  # True: the slot went on to a prefetched task
    health: int = HEALTHY  # of its node: HEALTHY, UNKNOWN, FAILED or SUSPECT
    last_suspect_node: str = ""  # as it was handed
    why: str = ""  # of one that is SUSPECT: what happened, a sentence for people
    number: int = 1  # of executions that have ended so, one after the other in that slot; ``seconds`` is their mean


class NodeReport(msgspec.Struct, array_like=True, tag="node_report"):
    node: str
    incarnation: int
    ends: list[ExecutionEnd]


class TasksReturned(msgspec.Struct, array_like=True, tag="returned"):
    """Prefetched tasks that went back to their class lists: how many, by class."""

    node: str
    incarnation: int
    counts: dict[str, int]


class StateReport(msgspec.Struct, array_like=True, tag="state_report"):
    """All that a worker holds: sent when it registers, and as the answer to StateRequest."""

    node: str
    incarnation: int
    term: int  # of the StateRequest answered; 0 when it registers
    slots: list[tuple[int, str, str]]  # number, allocation, class name
    prefetched: dict[str, int]
    remote: list[tuple[str, str]] = []  # processes for executions of other nodes: primary node, allocation


class NodeLost(msgspec.Struct, array_like=True, tag="lost"):
    """Proof that an incarnation of a node is dead (its process was seen to end). ``clean``: it has left by
    itself, when nothing ran there any more; what was handed to it since never began."""

    node: str
    incarnation: int
    why: str
    clean: bool = False


class Draining(msgspec.Struct, array_like=True, tag="draining"):
    """A worker accepts nothing more: it ends its tasks and leaves then."""

    node: str
    incarnation: int


class ControlChanged(msgspec.Struct, array_like=True, tag="control_changed"):
    """``keys.CONTROL`` or what else the dispatcher obeys has changed: it reads it again."""


class PartlyReleased(msgspec.Struct, array_like=True, tag="partly_released"):
    """The execution of a slot has ended, but some of its nodes have not confirmed that nothing of it lives there.

    Only their shares stay reserved; when all have confirmed, the slot ends as any other.
    """

    node: str
    incarnation: int
    slot: int
    allocation: str  # what stays reserved


ToDispatcher = NodeReport | TasksReturned | StateReport | NodeLost | Draining | ControlChanged | PartlyReleased | Swept


class EndReport(msgspec.Struct):
    """One ended execution, as a worker reports it to complete.lua.

    ``outcome`` is finished, failed, stopped (by the user, RQ's stop-job), canceled, lost (counts against the crash
    limit), requeue (walltime: requeued without counting) or suspect (failed at once, like many before it on this node:
    requeued without counting if another node can try it). ``entry`` is the packed `JournalEntry`; ``text`` is what RQ
    shows of a failure (its exc_string, already encoded).
    """

    id: str
    execution: int
    outcome: str
    reason: str
    ended: str  # RQ's ISO form
    exit: str  # exit code as text, or ''
    started: str  # ISO, or '' if it never began
    allocation: str
    entry: bytes  # packed JournalEntry
    text: str = ""
    array: str = ""  # of an element
    position: int = 0
    class_name: str = ""  # these three as in Run
    submission: str = ""
    retries: int = 0
    delay: float = 0.0  # seconds until it is tried again
    next_class: str = ""  # these two of a retry that asks for more: its class, and its Spec if that is another
    next_spec: bytes = b""


class RunEnd(NamedTuple):
    """Elements of an array that a lease holds, at consecutive positions, and that have finished, for complete.lua.

    Nothing is kept of them but lines of the journal; ``values``, if there are any, go to their executor, or are kept in
    one piece with their bundle.
    """

    array: str
    execution: int
    submission: str
    ended: str  # RQ's ISO form, of the last
    first: int
    number: int  # of elements
    lines: bytes  # packed RunLines
    values: bytes = b""  # packed list: the pickled result of each
