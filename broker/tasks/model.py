"""What a task, a resource request and an array are. Pure: no Redis, no clock, no processes.

Three forms of the same thing:

* ``Task`` is what a user describes (Python API, files, command line) and what ``validate`` checks;
* ``Spec`` is what one execution needs and is stored with the task (``pq_spec``), packed with msgpack;
* ``Shared`` is what many tasks of one submission have in common, stored once by the hash of its content.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.functions import Packed, call_text, pack_call
from pilotq.broker.tasks.retry_policy import parse as parse_retry_on
from pilotq.broker.tasks.validation import ARRAY, REQUEST, TASK, wrong

NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,200}")
QUEUE = re.compile(r"[A-Za-z0-9_-]{1,60}")
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
MODELS = frozenset({"default", "threads", "openmpi", "intelmpi", "srunmpi", "mpich"})
# One process each, so these two are the same here. The others start a rank on each core; see workers/multinode/mpi.py.
ONE_PROCESS_MODELS = frozenset({"default", "threads"})
MODEL_OPTS = {
    "default": frozenset[str](),
    "threads": frozenset[str](),
    "openmpi": frozenset({"mpirun", "mpirun_args"}),
    "mpich": frozenset({"mpirun", "mpirun_args"}),
    "intelmpi": frozenset({"mpirun", "mpirun_args"}),
    "srunmpi": frozenset({"srun_args", "mpi"}),
}
PRIORITY_LIMIT = 1000
ARRAY_LIMIT = 10_000_000
CLASS_LIMIT = 256  # class lists of one queue: the dispatcher looks at the head of each
# Time limits are rounded up to these steps (seconds) where they become part of a shape, so that tasks with
# slightly different limits share a class list. Rounding up keeps them true upper bounds.
LIMIT_STEPS = tuple(m * u for u in (1, 60, 3600) for m in (1, 2, 5, 10, 20, 30)) + (86_400, 172_800, 604_800)


class Request(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The resources of one task. Equal requests have one shape.

    ``cores`` is (min, max). Without ``nodes`` they are on one node, or anywhere if ``spread``; with ``nodes``
    (min, max) they are per node; ``nodes`` with ``whole`` asks for entire nodes that nothing else uses.
    ``gpus`` and ``memory`` (bytes) are per node, ``use`` counts named counters of the node.
    ``limit`` is an upper bound of the run time in seconds, rounded up to LIMIT_STEPS; None means unknown.
    """

    cores: tuple[int, int] = (1, 1)
    nodes: tuple[int, int] | None = None
    whole: bool = False
    spread: bool = False
    gpus: int = 0
    memory: int = 0
    use: tuple[tuple[str, int], ...] = ()
    limit: int | None = None

    def label(self) -> str:
        """A short readable name of the shape, of ``[A-Za-z0-9-_]``: ``1c``, ``2-4c``, ``2n4c``, ``1c-t60``."""
        low, high = self.cores
        text = ""
        if self.nodes is not None:
            text = f"{_span(self.nodes)}n"
        if not self.whole:
            text += f"{_span((low, high))}c"
        if self.spread:
            text += "s"
        if self.gpus:
            text += f"-{self.gpus}g"
        if self.memory:
            text += f"-m{self.memory}"
        for name, count in self.use:
            text += f"-{name}_{count}"
        if self.limit is not None:
            text += f"-t{self.limit}"
        if len(text) > 80:
            text = text[:60] + "-" + hashlib.sha256(text.encode()).hexdigest()[:16]
        return text


def _span(pair: tuple[int, int]) -> str:
    low, high = pair
    return str(low) if low == high else f"{low}-{high}"


def limit_step(seconds: float | None) -> int | None:
    """The smallest step of LIMIT_STEPS that is not below ``seconds``; None when there is none."""
    if seconds is None:
        return None
    return next((step for step in LIMIT_STEPS if seconds <= step), None)


class ArrayRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Indices ``start, start+step, ...`` up to and including ``stop``."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return (self.stop - self.start) // self.step + 1


class Task(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One task, or one array of tasks, as a user describes it.

    Exactly one of ``command`` (argument list), ``script`` (text for bash) and ``function`` is set. A function is a
    callable, or ``module:name``; it is called with ``args`` and ``kwargs``, in an array with the element's value (or
    its index, where there are no values) in front of them. Paths may be relative: they are then of the submitter's
    directory (``cwd``) or of the task's ``cwd`` (``stdin``, ``stdout``, ``stderr``).
    In an array ``{index}`` and ``{value}`` in ``command``, ``script``, ``env`` values, ``cwd`` and the three files
    stand for the element's own (only these two words: any other braces stay as they are).
    ``after`` names tasks by name within one submission, or by id (``=ID``: in any case an id); ``after_each`` names
    arrays of the same length, whose element i must end before element i of this array starts.
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
    after_each: list[str] = []
    priority: int = 0
    time_limit: float | None = None
    time_request: float | None = None
    retries: int = 0
    backoff: float = 0.0  # seconds before the first retry, twice as many before each further one
    retry_on: str = ""  # which failures are tried again, as broker/tasks/retry_policy.py says; empty: all
    env: dict[str, str] = {}
    cwd: str | None = None
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    model: str = "default"
    model_opts: dict[str, str] = {}
    launch_at: int = 0  # place in ``command`` where the words of the model's launcher go: a shell may come before it
    queue: str = "default"
    # ``${it}``, ``${ncores}``... of QCG-PilotJob files are filled in at launch: see workers/execution/templating.py.
    qcg: bool = False
    login_shell: bool = False

    @property
    def size(self) -> int:
        """How many tasks this describes: 1, or the number of elements."""
        if self.values is not None:
            return len(self.values)
        return len(self.array) if self.array is not None else 1

    @property
    def is_array(self) -> bool:
        return self.array is not None or self.values is not None

    def shape(self) -> Request:
        """The request with the bound on its run time that placement may count on."""
        bounds = [b for b in (self.time_request, self.time_limit) if b is not None]
        return msgspec.structs.replace(self.request, limit=limit_step(min(bounds) if bounds else None))


_DEFAULT = Task()


class Spec(msgspec.Struct, array_like=True):
    """What a worker needs to know of one task besides ``Shared``; the value of ``pq_spec``.

    ``argv`` is bytes, as the kernel takes it. ``script`` wins over ``argv`` when not empty. Paths are absolute
    unless they contain words that are filled in at launch; then they are joined with ``cwd`` at launch.
    """

    argv: list[bytes]
    script: str = ""
    cwd: str = ""  # empty: the shared one
    stdin: str = ""
    stdout: str = ""  # empty: captured
    stderr: str = ""
    env: dict[str, str] = {}
    time_limit: float = 0.0  # seconds from launch, 0 = none
    model: str = "default"
    model_opts: dict[str, str] = {}
    flags: int = 0  # FLAG_* below
    cores: int = 1
    launch_at: int = 0
    retries: int = 0  # these three as in Task
    backoff: float = 0.0
    retry_on: str = ""


FLAG_ARRAY = 1  # {index} and {value} are filled in
FLAG_QCG = 2  # ${it} and its like are filled in, QCG-PilotJob's rules
FLAG_LOGIN = 4  # scripts run in `bash -l`
FLAG_VALUES = 8  # elements have values, to be fetched by array and position
FLAG_FUNCTION = 32  # a Python function: argv holds functions.pack_call
FLAG_STOCK = 64  # a job of RQ's own producers: what to run stands in its record


class Shared(msgspec.Struct, array_like=True):
    """What the tasks of a submission share: the submitter's surroundings, captured once.

    ``limits`` are soft limits by number of ``resource.RLIMIT_*``; ``env`` is bytes-safe text (surrogateescape
    is not allowed in msgpack, so names or values that are not UTF-8 are left out by the submitter).
    """

    env: dict[str, str]
    cwd: str
    umask: int
    limits: dict[int, int]
    path: str = ""  # the directory of the program that submits, where functions are looked for after cwd

    def key(self) -> str:
        content = (sorted(self.env.items()), self.cwd, self.umask, sorted(self.limits.items()), self.path)
        return hashlib.sha256(msgspec.msgpack.encode(content)).hexdigest()[:24]


def class_name(queue: str, priority: int, shape: Request) -> str:
    """The class list of a queue, a priority and a shape: ``default.p10.2c``."""
    return f"{queue}.p{priority}.{shape.label()}"


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
    text = text[:200]
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def spec_of(task: Task, payload: bytes | None = None) -> Spec:
    """``payload`` is the packed call of a function, where it was made already."""
    argv = [os_encode(a) for a in task.command or []]
    flags = (FLAG_ARRAY if task.is_array else 0) | (FLAG_QCG if task.qcg else 0)
    flags |= FLAG_VALUES if task.values is not None else 0
    if task.function is not None:
        argv = [payload if payload is not None else pack_call(task.function, task.args, task.kwargs)]
        flags |= FLAG_FUNCTION
    return Spec(
        argv=argv,
        script=task.script or "",
        cwd=task.cwd or "",
        stdin=task.stdin or "",
        stdout=task.stdout or "",
        stderr=task.stderr or "",
        env=task.env,
        time_limit=task.time_limit or 0.0,
        model=task.model,
        model_opts=task.model_opts,
        flags=flags | (FLAG_LOGIN if task.login_shell else 0),
        cores=task.request.cores[0],
        launch_at=task.launch_at,
        retries=task.retries,
        backoff=task.backoff,
        retry_on=task.retry_on,
    )


def os_encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _retry_problems(task: Task) -> Iterator[str]:
    if task.retries < 0:
        yield "retries cannot be negative"
    if not 0 <= task.backoff < 1e7:
        yield "backoff must be a number of seconds, at most 115 days"
    if not task.retries and (task.backoff or task.retry_on):
        yield "backoff and retry_on say how retries go: give retries, too"
    if task.retry_on:
        try:
            parse_retry_on(task.retry_on)
        except ValueError as error:
            yield f"retry_on: {error}"


def validate(task: Task, where: str) -> None:
    """Refuse what can never be right, whatever the pilot: raises InvalidInput whose text starts with ``where``."""
    for problem in chain(_wrong_types(task), _problems(task)):
        raise InvalidInput(f"{where}: {problem}")


def _wrong_types(task: Any) -> Iterator[str]:  # Any: the annotations are what is doubted
    yield from wrong(task, _DEFAULT, TASK)
    if not isinstance(task.request, Request):
        yield f"request must be a Request, such as Request(cores=(2, 2)), not {type(task.request).__name__}"
    if task.request is not _DEFAULT.request:
        yield from wrong(task.request, _DEFAULT.request, REQUEST)
    if task.array is not None and not isinstance(task.array, ArrayRange):
        yield f"array must be an ArrayRange(start, stop), both ends included, not {type(task.array).__name__}"
    if task.array is not None:
        yield from wrong(task.array, None, ARRAY)


def _problems(task: Task) -> Any:
    request = task.request
    if (task.command is not None) + (task.script is not None) + (task.function is not None) != 1:
        yield "give exactly one of command, script and function"
    if task.function is None and (task.args or task.kwargs):
        yield "args and kwargs are for a function"
    if isinstance(task.function, str) and not FUNCTION.fullmatch(task.function):
        yield f"function {task.function!r} must be written as module:name"
    elif task.function is not None and not isinstance(task.function, (str, Packed)) and not callable(task.function):
        yield f"function must be a callable or module:name, not {type(task.function).__name__}"
    if task.command is not None and (not task.command or not task.command[0]):
        yield "command is empty"
    if "\0" in (task.script or "") or "\0" in "".join(task.command or ()):
        yield "a command cannot contain a NUL character"
    if task.name is not None and not NAME.fullmatch(task.name):
        yield f"name {task.name!r} must have 1 to 200 characters, without control characters and '/'"
    if not QUEUE.fullmatch(task.queue):
        yield f"queue {task.queue!r} must be 1 to 60 of A-Z a-z 0-9 _ -"
    if task.array is not None and task.values is not None:
        yield "give array or values, not both"
    if task.array is not None and (task.array.step < 1 or task.array.start < 0 or task.array.stop < task.array.start):
        yield f"array {task.array.start}-{task.array.stop}:{task.array.step} has no elements"
    if task.values is not None and not task.values:
        yield "values is empty"
    if task.size > ARRAY_LIMIT:
        yield f"an array may have at most {ARRAY_LIMIT:,} elements, not {task.size:,}"
    if abs(task.priority) > PRIORITY_LIMIT:
        yield f"priority {task.priority} is outside -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}"
    yield from _retry_problems(task)
    for name in ("time_limit", "time_request"):
        value = getattr(task, name)
        if value is not None and not 0 < value < 1e9:
            yield f"{name} must be a positive number of seconds"
    for key, value in task.env.items():
        if not key or "=" in key or "\0" in key + value:
            yield f"env: {key!r} cannot be an environment variable"
    if task.model not in MODELS:
        yield f"model {task.model!r} is unknown (known: {', '.join(sorted(MODELS))})"
    elif not task.qcg and (unknown := task.model_opts.keys() - MODEL_OPTS[task.model]):
        known = ", ".join(sorted(MODEL_OPTS[task.model])) or "it has none"
        yield f"model_opts: {', '.join(sorted(unknown))} unknown for model {task.model!r} (known: {known})"
    for name, span in (("cores", request.cores), ("nodes", request.nodes)):
        if span is not None and not 1 <= span[0] <= span[1]:
            yield f"{name} must be at least 1, and min not above max"
    if min(request.gpus, request.memory, *(n for _, n in request.use), 0) < 0:
        yield "gpus, memory and use cannot be negative"
    if task.after_each and not task.is_array:
        yield "after_each is for arrays: use after"
