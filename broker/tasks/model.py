"""What a user describes: `Task`, its `Request` for resources and its `ArrayRange`; ids and names of classes. Pure.

No Redis, no clock, no processes here. `validate` (validation.py) checks a task, `spec_of` (spec.py) makes of it what is
stored for the workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.os_strings import printable
from pilotq.broker.tasks import array_indices
from pilotq.broker.tasks.functions import call_text

MODELS = frozenset({"default", "threads", "openmpi", "intelmpi", "srunmpi", "mpich"})
# One process each, so these two are the same here. The others start a rank on each core; see workers/multinode/mpi.py.
ONE_PROCESS_MODELS = frozenset({"default", "threads"})
PRIORITY_LIMIT = 1000
NICE = -PRIORITY_LIMIT - 1  # the priority of nice tasks, which give way to all others
ARRAY_LIMIT = 10_000_000
INDEX_LIMIT = array_indices.INDEX_LIMIT  # also of retries
GPU_PARTS = 10_000  # of which shares of a GPU are counted
GPU_KIND = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
PACK, SPREAD = "pack", "spread"  # how cores lie over NUMA nodes
COUNTER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,30}")  # names of counters
# Time limits are rounded up to these steps (seconds) where they become part of a shape, so that tasks with
# slightly different limits share a class list. Rounding up keeps them true upper bounds.
LIMIT_STEPS = tuple(m * u for u in (1, 60, 3600) for m in (1, 2, 5, 10, 20, 30)) + (86_400, 172_800, 604_800)


class Request(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The resources that one task asks for. Tasks with equal requests have one shape, and wait in one class list.

        Request(cores=(2, 4), memory=4 << 30)     # 2 to 4 cores of one node, and 4 GiB there
        Request(nodes=(2, 2), whole=True)         # two entire nodes

    ``cores`` is (min, max). Without ``nodes`` they are on one node, or anywhere if ``spread``; with ``nodes``
    (min, max) they are per node; ``nodes`` with ``whole`` asks for entire nodes that nothing else uses.
    ``gpus`` and ``memory`` (bytes) are per node, ``use`` counts named counters of the node. ``gpus`` below 1 is a share
    of one GPU, in steps of 1/GPU_PARTS; ``gpu_kind`` are words of its model, with _ between (``a100``, ``a100_80gb``).
    ``numa`` is how cores lie over the NUMA nodes of a node: ``spread`` evenly, ``pack`` (or empty) on as few as can be.
    ``limit`` is an upper bound of the run time in seconds, rounded up to LIMIT_STEPS; None means unknown.
    """

    cores: tuple[int, int] = (1, 1)
    nodes: tuple[int, int] | None = None
    whole: bool = False
    spread: bool = False
    gpus: float = 0
    gpu_kind: str = ""
    memory: int = 0
    use: tuple[tuple[str, int], ...] = ()
    limit: int | None = None
    numa: str = ""

    @property
    def gpu_share(self) -> int:
        """How many parts of a GPU it asks for, of GPU_PARTS; 0 where it asks for whole ones, or for none."""
        return round(self.gpus * GPU_PARTS) if 0 < self.gpus < 1 else 0

    def label(self) -> str:
        """A readable name of the shape, of ``[A-Za-z0-9-_]``: ``1c``, ``2-4c``, ``2n4c``, ``1c-t60``.

        It says all of the shape: `shape_of` is the reverse.
        """
        low, high = self.cores
        text = ""
        if self.nodes is not None:
            text = f"{_span(self.nodes)}n"
        if not self.whole:
            text += f"{_span((low, high))}c"
        if self.spread:
            text += "s"
        if self.gpus:
            text += f"-{self.gpu_share}gs" if self.gpu_share else f"-{int(self.gpus)}g"
            text += f"_{self.gpu_kind}" if self.gpu_kind else ""
        if self.memory:
            text += f"-m{self.memory}"
        for name, count in self.use:
            text += f"-{name}_{count}"
        if self.limit is not None:
            text += f"-t{self.limit}"
        if self.numa:
            text += f"-n{self.numa}"
        return text


def _span(pair: tuple[int, int]) -> str:
    low, high = pair
    return str(low) if low == high else f"{low}-{high}"


_PAIR = r"([0-9]+)(?:-([0-9]+))?"
_LABEL = re.compile(
    rf"(?:{_PAIR}n)?(?:{_PAIR}c)?(s)?(?:-([0-9]+)g(s)?((?:_[a-z0-9]+)*))?(?:-m([0-9]+))?"
    r"((?:-[A-Za-z][A-Za-z0-9_]*_[0-9]+)*)(?:-t([0-9]+))?(?:-n(pack|spread))?"
)


def shape_of(label: str) -> Request | None:
    """The reverse of `Request.label`; None for a text that is no label."""
    match = _LABEL.fullmatch(label)
    if match is None:
        return None
    fewest, most, low, high, spread, gpus, share, kind, memory, counters, limit, numa = match.groups()
    use = [counter.rpartition("_") for counter in counters.split("-")[1:]]
    return Request(
        cores=(int(low), int(high or low)) if low else (1, 1),
        nodes=(int(fewest), int(most or fewest)) if fewest else None,
        whole=low is None,
        spread=spread is not None,
        gpus=int(gpus) / GPU_PARTS if share else int(gpus or 0),
        gpu_kind=(kind or "")[1:],
        memory=int(memory or 0),
        use=tuple((name, int(count)) for name, _, count in use),
        limit=int(limit) if limit else None,
        numa=numa or "",
    )


def limit_step(seconds: float | None) -> int | None:
    """The smallest step of LIMIT_STEPS that is not below ``seconds``; None when there is none."""
    if seconds is None:
        return None
    return next((step for step in LIMIT_STEPS if seconds <= step), None)


class ArrayRange(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The indices of an array, and how many of its elements may run at a time.

        ArrayRange(0, 99)                         # 0 to 99, both included: 100 elements
        ArrayRange(0, 99, 5, limit=4)             # 0, 5, ... 95, at most four of them at a time
        ArrayRange.parse("1,3-5,10-20:2%4")       # as files and the command line have it
        ArrayRange.of([3, 1, 40], limit=2)

    ``more`` has the further ranges, (start, stop, step) each, as `parse` and `of` make them. Elements are ordered by
    their indices. ``limit`` None: as many at a time as there is room for.
    """

    start: int
    stop: int
    step: int = 1
    limit: int | None = None
    more: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ArrayRange:
        """From ``1,3-5,10-20:2%4``; raises InvalidInput, also for an index that is named twice."""
        ranges, limit = array_indices.ranges_of(text)
        return cls._of_ranges(ranges, limit)

    @classmethod
    def of(cls, indices: Iterable[int], limit: int | None = None) -> ArrayRange:
        """Of any indices, in any order; raises InvalidInput when there are none, or one of them is there twice."""
        ranges = array_indices.joined_indices(indices)
        if not ranges:
            raise InvalidInput("an array needs an index: there is none")
        return cls._of_ranges(ranges, limit)

    @classmethod
    def _of_ranges(cls, ranges: Sequence[range], limit: int | None) -> ArrayRange:
        (start, stop, step), *more = ((part.start, part.stop - 1, part.step) for part in ranges)
        return cls(start, stop, step, limit, tuple(more))

    @property
    def ranges(self) -> tuple[range, ...]:
        return tuple(range(low, high + 1, by) for low, high, by in ((self.start, self.stop, self.step), *self.more))

    def __len__(self) -> int:
        return sum(max((high - low) // by + 1, 0) for low, high, by in ((self.start, self.stop, self.step), *self.more))

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self.ranges)

    def __contains__(self, index: object) -> bool:
        return any(index in part for part in self.ranges)


class Task(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One task, or one array of tasks, as a user describes it.

        Task(command=["python", "fit.py", "{index}"], array=ArrayRange(0, 99), request=Request(cores=(2, 2)))
        Task(function=math.hypot, args=(3, 4), retries=2, time_limit=60.0)

    Exactly one of ``command`` (argument list), ``script`` (text, for the program that its first line names, else bash)
    and ``function`` is set. A function is a
    callable, or ``module:name``; it is called with ``args`` and ``kwargs``, in an array with the element's value (or
    its index, where there are no values) in front of them. Paths may be relative: they are then of the submitter's
    directory (``cwd``) or of the task's ``cwd`` (``stdin``, ``stdout``, ``stderr``).
    ``array`` and ``values`` make it an array: of these indices, of these values (their indices count from 0), or with
    both of the values that have these indices.
    In an array ``{index}`` and ``{value}`` in ``command``, ``script``, ``env`` values, ``cwd`` and the three files
    stand for the element's own (only these two: any other braces stay as they are). A value is never code of a shell:
    see shell_code.py. Programs have it as PILOTQ_VALUE, too. In ``cwd`` and the three files ``{id}`` is the task's id.
    In all of these ``{attempt}`` is the number of the execution, 1 at first, of any task.
    ``after`` names tasks by name within one submission, or by id (``=ID``: in any case an id): they must finish before
    it starts. Those of ``after_any`` must end in any way, and those of ``after_notok`` otherwise than by finishing
    (they fail, are stopped or canceled). ``after_each`` names arrays of the same length, whose element i must finish
    before element i of this array starts. When more elements of an array have failed than ``stop_on_failures`` says
    (``20``, or ``5%`` of them), those that wait are canceled. A task with ``join`` ends when its process has ended, and
    all tasks that were submitted from within it (its children) have. A ``nice`` task begins only when no other waits
    for the cores, and is ended and queued again when another one can use them.
    """

    command: list[str] | None = None
    script: str | None = None
    function: Any = None
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = {}
    name: str | None = None
    request: Request = Request()
    array: ArrayRange | None = None
    values: list[str] | None = None
    after: list[str] = []
    after_any: list[str] = []
    after_notok: list[str] = []
    after_each: list[str] = []
    join: bool = False
    priority: int = 0
    nice: bool = False
    time_limit: float | None = None
    time_request: float | None = None
    retries: int = 0
    backoff: float = 0.0  # seconds before the first retry, twice as many before each further one
    retry_on: str = ""  # which failures are tried again, as broker/tasks/retry_policy.py says; empty: all
    memory_grow: float = 0.0  # what has used too much memory is tried again with so many times as much ...
    memory_max: int = 0  # ... up to so many bytes
    time_grow: float = 0.0  # the same of what has reached its time limit
    time_max: float = 0.0  # seconds
    stop_on_failures: str = ""
    env: dict[str, str] = {}
    cwd: str | None = None
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    model: str = "default"
    model_opts: dict[str, str] = {}
    launch_at: int = 0  # place in ``command`` where the model's launcher goes: a shell may come before it
    queue: str = "default"
    # ``${it}``, ``${ncores}``... of QCG-PilotJob files are filled in at launch: see workers/execution/templating.py.
    qcg: bool = False
    login_shell: bool = False

    @property
    def size(self) -> int:
        """How many tasks this describes: 1, or the number of elements."""
        if self.array is not None:
            return len(self.array)
        return len(self.values) if self.values is not None else 1

    @property
    def rank(self) -> int:
        """The priority of its class."""
        return NICE if self.nice else self.priority

    @property
    def is_array(self) -> bool:
        return self.array is not None or self.values is not None

    def shape(self) -> Request:
        """The request with the bound on its run time that placement may count on."""
        bounds = [b for b in (self.time_request, self.time_limit) if b is not None]
        return msgspec.structs.replace(self.request, limit=limit_step(min(bounds) if bounds else None))

    def largest_shape(self) -> Request:
        """The same of the last retry, when it has asked for all that it may ask for."""
        return msgspec.structs.replace(self.shape(), memory=max(self.memory_max, self.request.memory))


def class_name(queue: str, priority: int, shape: Request) -> str:
    """The class list of a queue, a priority and a shape: ``default.p10.2c``."""
    return f"{queue}.p{priority}.{shape.label()}"


_LIMITED = re.compile(r"-([0-9]+)at[0-9a-v]+$")


def limited_class_name(name: str, limit: int, array: str) -> str:
    """The class of an array of which only so many elements may run at a time: it has that of no other task.

    >>> limited_class_name("default.p10.2c", 4, "1f")
    'default.p10.2c-4at1f'
    """
    return f"{name}-{limit}at{array}"


def limit_of_label(label: str) -> tuple[str, int]:
    """The label of the shape within a class name, and how many of the class may run at a time; 0: any number."""
    match = _LIMITED.search(label)
    return (label[: match.start()], int(match[1])) if match else (label, 0)


DIGITS = "0123456789abcdefghijklmnopqrstuv"


def id_of(number: int) -> str:
    """The id of the task with this number: base 32, which sorts as ``int(id, 32)``."""
    text = ""
    while True:
        number, digit = divmod(number, 32)
        text = DIGITS[digit] + text
        if not number:
            return text


def order_of(task_id: str) -> int:
    """The place of one of our ids in the order of submission; an element has its array's."""
    return int(task_id.partition("_")[0], 32)


def description(task: Task) -> str:
    """One line for dashboards and listings: the command, shortened, control characters removed."""
    if task.function is not None:
        text = call_text(task.function, task.args, task.kwargs)
    else:
        text = " ".join(task.command) if task.command else (task.script or "").strip()
    return one_line(text)


def one_line(text: str | bytes) -> str:
    """A text of users for listings: shortened, control characters removed."""
    text = printable(text[:200])
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
