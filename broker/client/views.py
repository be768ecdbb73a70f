"""Views of tasks, nodes and counts: plain records with RQ's statuses, made from Redis or from the journal."""

from __future__ import annotations

import msgspec


class TaskView(msgspec.Struct, kw_only=True):
    """One task. Times are unix seconds; ``cores`` is the allocation text (``n1[0:1]``) once it was assigned."""

    id: str
    name: str = ""
    status: str
    reason: str = ""
    exit_code: int | None = None
    signal: int | None = None
    execution: int = 0
    node: str = ""
    cores: str = ""
    # queued, handed, started, ended; of one that has joined its children "joining": its process had ended
    times: dict[str, float | None] = {}
    queue: str = ""
    command: str = ""
    message: str = ""
    max_rss: int | None = None
    cpu: float | None = None
    retries: int = 0
    children: int = 0  # tasks and arrays that were submitted within it, of one that joins
    open_children: int = 0  # those that have not ended
    child_of: str = ""  # the task within which it was submitted, if that joins it
    array_size: int = 0  # > 0: an array
    array_limit: int = 0  # of an array that Redis knows: how many of its elements may run at a time; 0: any number
    is_bundle: bool = False  # tasks that are alike share this record, as the elements of an array do
    elements: dict[str, str] = {}  # of an array: status -> compact ranges of indices, "0-3,7"
    array: str = ""  # of an element: its array; of a task of a bundle: the bundle
    index: int | None = None  # of an element
    stdout_tail: str = ""
    stderr_tail: str = ""
    ended: bool = False


class Explanation(msgspec.Struct, kw_only=True):
    """Why a task waits, runs or ended so. ``why`` are sentences, the most telling first.

    ``until`` (unix seconds): what it waits for comes, or it itself ends, by then; None if nobody knows. ``tasks`` are
    the ids of those it waits for, or because of which it was omitted. ``output``: the end of what it wrote to stderr.
    ``commands`` are commands that show or do more.
    """

    id: str
    name: str = ""
    status: str
    why: list[str] = []
    until: float | None = None
    tasks: list[str] = []
    output: str = ""
    commands: list[str] = []


class GpuView(msgspec.Struct, kw_only=True):
    """One GPU of a node; ``memory`` in bytes, 0 where it is not known."""

    name: str
    uuid: str = ""
    model: str = ""
    memory: int = 0


class NodeView(msgspec.Struct, kw_only=True):
    """One node that has joined."""

    name: str
    state: str  # up, lost, drained, retired, quarantined
    host: str
    pid: int
    cores: int
    used: int
    shared_cores: bool = False
    running: int = 0
    gpus: list[GpuView] = []
    last_beat: float | None = None
    why: str = ""  # of a node that is assigned nothing
    memory: int = 0  # bytes, 0 = not counted
    memory_by: str = ""  # who holds tasks to the memory that they ask for; empty: nobody


def seconds_left(left: int, running: int, rate: float) -> float | None:
    """The seconds that so many tasks take of which so many run, at a rate of ends a second; None where that says
    little: when nothing ends, and at the end."""
    return left / rate if rate > 0 and left > running and left >= rate else None


class Counts(msgspec.Struct, kw_only=True):
    """Tasks of a pilot or of one submission; elements of arrays count one each."""

    total: int = 0
    finished: int = 0
    failed: int = 0
    canceled: int = 0

    def add(self, status: str, number: int = 1) -> None:
        """So many more have ended with this status."""
        if status == "finished":
            self.finished += number
        elif status == "canceled":
            self.canceled += number
        else:
            self.failed += number

    @property
    def ended(self) -> int:
        return self.finished + self.failed + self.canceled

    @property
    def left(self) -> int:
        return self.total - self.ended
