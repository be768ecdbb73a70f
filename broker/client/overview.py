"""`Overview`: one moment of a running pilot, for pages and terminals that show it again and again.

Its records are bounded, whatever the pilot holds; `overview_reader.py` makes them.
"""

from __future__ import annotations

import msgspec

from pilotq.broker.client.views import Counts, GpuView


class ExecutionView(msgspec.Struct, kw_only=True):
    """One execution that a node has. ``cores`` is the allocation text (``n1[0:1]``), empty until its launch was
    reported; ``started`` in unix seconds, of the launch; ``memory`` is what it may use on each node, in bytes."""

    id: str
    execution: int
    name: str = ""
    array: str = ""
    node: str = ""
    cores: str = ""
    started: float | None = None
    memory: int = 0


class NodeOverview(msgspec.Struct, kw_only=True):
    """One node. ``cores`` are the numbers that allocations name; ``threads`` further hardware threads of some.

    ``used`` cores are reserved, of them some for executions that the overview does not name: too many, or so short that
    no record is kept of them; ``elements`` has the number of those handed to the node, by array. ``memory`` (bytes, 0:
    not counted), and ``memory_used`` of it by executions that are named.
    """

    name: str
    state: str  # up, lost, drained, retired, quarantined
    why: str = ""
    host: str = ""
    cores: list[int] = []
    threads: dict[int, list[int]] = {}
    shared_cores: bool = False
    used: int = 0
    running: int = 0
    gpus: list[GpuView] = []
    memory: int = 0
    memory_used: int = 0
    elements: dict[str, int] = {}


class Progress(msgspec.Struct, kw_only=True):
    """How far the tasks of one name have come, or the elements of one array. ``handed`` were given to nodes: they run,
    or are the next there. Tasks whose names differ in their numbers only count together, under ``fold-*``.

    ``rate`` is ended tasks per second over the last minute, ``left_s`` the seconds that the others take at that rate;
    None while nobody knows. The record with the name None is of all tasks whose names were not read.
    """

    name: str | None
    array: str = ""
    total: int = 0
    finished: int = 0
    failed: int = 0
    canceled: int = 0
    handed: int = 0
    waiting: int = 0
    rate: float = 0.0
    left_s: float | None = None


class QueueOverview(msgspec.Struct, kw_only=True):
    """The waiting tasks of one class: alike in queue, priority and shape. ``waiting`` counts elements of arrays one
    each; ``why`` has `Broker.explain`'s sentences of the first one, read some seconds ago at most a few times over."""

    name: str
    queue: str
    priority: int
    shape: str
    waiting: int = 0
    first: str = ""
    why: list[str] = []
    until: float | None = None


class FailureGroup(msgspec.Struct, kw_only=True):
    """Tasks that failed or were stopped for the same reason, of one name (as in `Progress`), on one node; ``example``
    is the last one.

    ``ids`` are the last of them, at most 500, for a retry.
    """

    reason: str
    exit_code: int | None = None
    name: str = ""
    node: str = ""
    number: int = 0
    example: str = ""
    message: str = ""
    at: float | None = None
    ids: list[str] = []


class Sample(msgspec.Struct, array_like=True):
    """A part of the last minutes: where it begins (unix seconds), tasks ended in it, cores in use and cores at its
    end; None where nobody has looked."""

    at: float
    ended: int = 0
    used: int | None = None
    cores: int | None = None


class Overview(msgspec.Struct, kw_only=True):
    """One moment of a running pilot.

    ``running`` executions have a slot; ``prefetched`` ones were handed to nodes, and have none yet; ``waiting`` is all
    that is left, ``deferred`` of it waits for other tasks. ``executions`` are at most 4,096 of those that nodes have,
    without short elements of arrays; ``unnamed`` is the number of the others. ``progress``, ``queue`` and ``failures``
    have the largest at most; ``more_classes`` and ``more_failures`` count what is left out. ``behind`` is the number of
    bytes of the journal that are still to be read: until it is 0 names and failures are incomplete. ``seconds`` is what
    one of ``history`` lasts.
    """

    at: float
    counts: Counts
    running: int = 0
    prefetched: int = 0
    waiting: int = 0
    deferred: int = 0
    cores: int = 0
    used: int = 0
    rate: float = 0.0
    left_s: float | None = None
    paused: bool = False
    notes: list[str] = []
    nodes: list[NodeOverview] = []
    executions: list[ExecutionView] = []
    unnamed: int = 0
    progress: list[Progress] = []
    queue: list[QueueOverview] = []
    more_classes: int = 0
    failures: list[FailureGroup] = []
    more_failures: int = 0
    behind: int = 0
    history: list[Sample] = []
    seconds: float = 5.0
