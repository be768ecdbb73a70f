"""`validate`: whether a `Task` can be right at all, whatever the pilot. Pure.

First the types of its fields: Python does not check annotations, and a text where a list must be would be taken letter
by letter (files of tasks are read by a schema of their own). Then the values, and whether they go together.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.os_strings import encode, unusable
from pilotq.broker.tasks.array_indices import RANGES_MAX, range_problem
from pilotq.broker.tasks.failure_limit import failures_allowed
from pilotq.broker.tasks.functions import Packed
from pilotq.broker.tasks.model import (
    ARRAY_LIMIT,
    COUNTER,
    GPU_KIND,
    GPU_PARTS,
    INDEX_LIMIT,
    MODELS,
    PACK,
    PRIORITY_LIMIT,
    SPREAD,
    ArrayRange,
    Request,
    Task,
)
from pilotq.broker.tasks.retry_policy import parse_retry_on
from pilotq.broker.tasks.script_text import ARGUMENT_BYTES, problem_of
from pilotq.broker.tasks.shell_code import VALUE, code_of, is_for_shell, refer_to_value
from pilotq.broker.tasks.spec import ATTEMPT

NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,200}")
QUEUE = re.compile(r"[A-Za-z0-9_-]{1,60}")
GPUS_LIMIT = 1_000_000
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
MODEL_OPTS = {
    "default": frozenset[str](),
    "threads": frozenset[str](),
    "openmpi": frozenset({"mpirun", "mpirun_args"}),
    "mpich": frozenset({"mpirun", "mpirun_args"}),
    "intelmpi": frozenset({"mpirun", "mpirun_args"}),
    "srunmpi": frozenset({"srun_args", "mpi"}),
}
GROW_MIN, GROW_MAX = 1.1, 100.0  # factors: with a smaller one a task would be tried for ever
SPLIT_OPTS = frozenset({"mpirun_args", "srun_args"})  # of these, those that are split as a shell does

Check = tuple[Callable[[Any], bool], str]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value)) and all(map(_text, value.values()))


def _whole(value: Any) -> bool:
    return type(value) is int or isinstance(value, IntEnum)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _ranges(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(r, tuple) and len(r) == 3 and all(map(_whole, r)) for r in value)


def _span(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_whole, value))


def _counters(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and _text(pair[0]) and _whole(pair[1]) for pair in value
    )


_TEXT = (_text, "a text")
_TEXTS = (_texts, "a list of texts")
_TABLE = (_table, "a dict of texts")
_WHOLE = (_whole, "a whole number")
_SECONDS = (_number, "a number of seconds")
_FLAG = (lambda value: isinstance(value, bool), "True or False")

_TASK: dict[str, Check] = {
    "command": (_texts, "a list of texts, such as shlex.split makes of a line"),
    "script": _TEXT,
    "args": (lambda value: isinstance(value, Sequence) and not isinstance(value, (str, bytes)), "a list or tuple"),
    "kwargs": (lambda value: isinstance(value, Mapping) and all(map(_text, value)), "a dict with names as keys"),
    "name": _TEXT,
    "values": _TEXTS,
    "after": (_texts, "a list of ids or names"),
    "after_any": (_texts, "a list of ids or names"),
    "after_notok": (_texts, "a list of ids or names"),
    "after_each": (_texts, "a list of ids or names"),
    "join": _FLAG,
    "priority": _WHOLE,
    "nice": _FLAG,
    "time_limit": _SECONDS,
    "time_request": _SECONDS,
    "retries": _WHOLE,
    "backoff": _SECONDS,
    "retry_on": _TEXT,
    "memory_grow": (_number, "a number"),
    "memory_max": (_whole, "a whole number of bytes"),
    "time_grow": (_number, "a number"),
    "time_max": _SECONDS,
    "stop_on_failures": _TEXT,
    "env": _TABLE,
    "cwd": _TEXT,
    "stdin": _TEXT,
    "stdout": _TEXT,
    "stderr": _TEXT,
    "model": _TEXT,
    "model_opts": _TABLE,
    "launch_at": _WHOLE,
    "queue": _TEXT,
    "qcg": _FLAG,
    "login_shell": _FLAG,
}
_REQUEST: dict[str, Check] = {
    "cores": (_span, "a tuple (min, max)"),
    "nodes": (_span, "a tuple (min, max)"),
    "whole": _FLAG,
    "spread": _FLAG,
    "gpus": (_number, "a number"),
    "gpu_kind": _TEXT,
    "numa": _TEXT,
    "memory": (_whole, "a whole number of bytes"),
    "use": (_counters, "a tuple of (name, number)"),
}
_ARRAY: dict[str, Check] = {
    "start": _WHOLE, "stop": _WHOLE, "step": _WHOLE, "limit": _WHOLE,
    "more": (_ranges, "a tuple of (start, stop, step)"),
}  # fmt: skip
_DEFAULT = Task()


def validate(task: Task, where: str) -> None:
    """Refuse what can never be right, whatever the pilot: raises InvalidInput whose text starts with ``where``."""
    for problem in chain(_wrong_types(task), _problems(task)):
        raise InvalidInput(f"{where}: {problem}")


_COMMAND, _NAME = Task.__struct_fields__.index("command"), Task.__struct_fields__.index("name")
Rest = tuple[Any, ...]


def rest_of(task: Task) -> Rest:
    """What a task has beside command and name, for `is_like`."""
    fields = msgspec.structs.astuple(task)
    return fields[_COMMAND + 1 : _NAME] + fields[_NAME + 1 :]


def is_like(task: Task, rest: Rest) -> bool:
    """Whether a task differs only in command and name from one that was checked, of which ``rest`` is `rest_of`, and
    these are right: then nothing is left to check. False where that is not known: also where a command has something to
    be filled in, or characters that are not ASCII."""
    command, name = task.command, task.name
    if type(command) is not list or not command or task.script is not None or task.function is not None:
        return False
    try:
        together = "".join(command)
        same = rest_of(task) == rest
    except Exception:  # noqa: BLE001  # what is no text, or cannot be compared, `validate` names
        return False
    if not same or not command[0] or len(together) > ARGUMENT_BYTES // 4 or not together.isascii():
        return False
    if task.launch_at or "\0" in together or ATTEMPT in together:
        return False
    return name is None or (type(name) is str and NAME.fullmatch(name) is not None)


def _wrong_types(task: Any) -> Iterator[str]:  # Any: the annotations are what is doubted
    yield from _wrong_fields(task, _DEFAULT, _TASK)
    if not isinstance(task.request, Request):
        yield f"request must be a Request, such as Request(cores=(2, 2)), not {type(task.request).__name__}"
    if task.request is not _DEFAULT.request:
        yield from _wrong_fields(task.request, _DEFAULT.request, _REQUEST)
    if task.array is not None and not isinstance(task.array, ArrayRange):
        yield f"array must be an ArrayRange(start, stop), both ends included, not {type(task.array).__name__}"
    if task.array is not None:
        yield from _wrong_fields(task.array, None, _ARRAY)


def _wrong_fields(record: Any, default: Any, checks: Mapping[str, Check]) -> Iterator[str]:
    """A sentence for each field that holds what it cannot; a field that is as in ``default`` is right."""
    for name, (right, what) in checks.items():
        value = getattr(record, name)
        usual = getattr(default, name, None)
        if value is not usual and (value or usual is None or type(value) is not type(usual)) and not right(value):
            yield f"{name} must be {what}, not {_kind(value, texts='text' in what or 'ids' in what)}"


def _kind(value: Any, *, texts: bool) -> str:
    """What it is, without what is in it: that may be a secret."""
    kind = type(value).__name__
    inside = [*value, *value.values()] if isinstance(value, Mapping) else value
    odd = next((v for v in inside if not _text(v)), None) if texts and isinstance(inside, (list, tuple)) else None
    return f"{kind} with {type(odd).__name__} in it" if odd is not None else kind


def _problems(task: Task) -> Iterator[str]:
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
    if not _is_plain(task):
        yield from _string_problems(task)
    if task.script is not None and not (task.qcg or task.login_shell) and (problem := problem_of(task.script)):
        yield problem
    if task.env or task.script is not None or sum(map(len, task.command or ())) > ARGUMENT_BYTES // 4:
        yield from _too_long(task)
    if task.name is not None and not NAME.fullmatch(task.name):
        yield f"name {task.name!r} must have 1 to 200 characters, without control characters and '/'"
    if not QUEUE.fullmatch(task.queue):
        yield f"queue {task.queue!r} must be 1 to 60 of A-Z a-z 0-9 _ -"
    if task.array is not None:
        yield from _array_problems(task.array)
    if task.values is not None and not task.values:
        yield "values is empty"
    elif task.values is not None and task.array is not None and task.array.ranges[-1][-1] >= len(task.values):
        last = task.array.ranges[-1][-1]
        yield f"array names the index {last:,}, but the last of the values has the index {len(task.values) - 1:,}"
    if task.values and task.function is None:
        yield from _value_problems(task, task.values)
    if task.size > ARRAY_LIMIT:
        yield f"an array may have at most {ARRAY_LIMIT:,} elements, not {task.size:,}"
    if task.nice and task.priority:
        yield "nice and priority do not go together: a nice task comes after all priorities"
    if abs(task.priority) > PRIORITY_LIMIT:
        yield f"priority {task.priority} is outside -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}"
    yield from _retry_problems(task)
    for name in ("time_limit", "time_request"):
        value = getattr(task, name)
        if value is not None and not 0 < value < 1e9:
            yield f"{name} must be a positive number of seconds, at most 31 years"
    for key in task.env:
        if not key or "=" in key:
            yield f"env: {key!r} cannot be an environment variable"
    if task.model not in MODELS:
        yield f"model {task.model!r} is unknown (known: {', '.join(sorted(MODELS))})"
    elif not task.qcg and (unknown := task.model_opts.keys() - MODEL_OPTS[task.model]):
        known = ", ".join(sorted(MODEL_OPTS[task.model])) or "it has none"
        yield f"model_opts: {', '.join(sorted(unknown))} unknown for model {task.model!r} (known: {known})"
    if task.model_opts or task.launch_at:
        yield from _launch_problems(task)
    yield from request_problems(task.request)
    if task.after_each and not task.is_array:
        yield "after_each is for arrays: use after"
    if task.join and task.is_array:
        yield "join is for single tasks: an element of an array cannot join what it submits"
    if task.stop_on_failures:
        yield from _failure_limit_problems(task)


def _array_problems(array: ArrayRange) -> Iterator[str]:
    end = -1
    for start, stop, step in ((array.start, array.stop, array.step), *array.more):
        if problem := range_problem(start, stop, step):
            yield f"array {problem}"
        if start <= end:
            yield "array: its ranges must be apart and ascending, as ArrayRange.of and ArrayRange.parse make them"
        end = stop
    if len(array.more) >= RANGES_MAX:
        yield f"an array may have at most {RANGES_MAX:,} ranges of indices, not {len(array.more) + 1:,}"
    if array.limit is not None and not 1 <= array.limit <= INDEX_LIMIT:
        yield f"array: limit must be at least 1, or None for as many at a time as there is room for, not {array.limit}"


def request_problems(request: Request) -> Iterator[str]:
    """What is wrong with the values of a request, whatever the nodes, as sentences."""
    for name, span in (("cores", request.cores), ("nodes", request.nodes)):
        if span is not None and not 1 <= span[0] <= span[1]:
            yield f"{name} must be at least 1, and min not above max"
    if min(request.gpus, request.memory, *(n for _, n in request.use), 0) < 0:
        yield "gpus, memory and use cannot be negative"
    if not request.gpus < GPUS_LIMIT or (request.gpus > 1 and request.gpus % 1) or _uneven(request.gpus * GPU_PARTS):
        yield f"gpus must be a whole number, or a share of one GPU in steps of {1 / GPU_PARTS:g}, such as 0.25"
    if request.gpu_kind and not (request.gpus and GPU_KIND.fullmatch(request.gpu_kind)):
        yield "gpu_kind must be words of the model of the GPUs that gpus asks for, with _ between, such as a100_80gb"
    if request.numa not in ("", PACK, SPREAD):
        yield f"numa must be {PACK!r} or {SPREAD!r}, not {request.numa!r}"
    for name, _ in request.use:
        if not COUNTER.fullmatch(name):
            yield f"use: {name!r} is no name of a counter: use letters, digits and _"


def _uneven(parts: float) -> bool:
    """Whether it is no whole number; a product of a decimal fraction is one only nearly."""
    return abs(parts - round(parts)) > 1e-6


def _is_plain(task: Task) -> bool:
    """Whether all that it gives to the system is ASCII without NUL characters: then there is no problem with that."""
    texts = [*(task.command or ()), task.script or "", task.cwd or "", task.stdin or "", task.stdout or ""]
    texts.append(task.stderr or "")
    if task.env:
        texts += chain.from_iterable(task.env.items())
    if task.model_opts:
        texts += task.model_opts.values()
    if task.values and task.function is None:
        texts += task.values
    together = "".join(texts)
    return together.isascii() and "\0" not in together


def _string_problems(task: Task) -> Iterator[str]:
    """What the system cannot take as an argument, a variable or a path."""
    command: tuple[str, ...] = (*(task.command or ()), task.script or "")
    fields: list[tuple[str, Iterable[str]]] = [("a command", command)]
    fields += [(name, (getattr(task, name) or "",)) for name in ("cwd", "stdin", "stdout", "stderr")]
    fields += [("env", chain.from_iterable(task.env.items())), ("model_opts", task.model_opts.values())]
    if task.function is None:
        fields.append(("values", task.values or ()))
    for name, texts in fields:
        yield from (f"{name} {why}" for why in map(unusable, texts) if why)


def _too_long(task: Task) -> Iterator[str]:
    """What no process can be started with. A script is written to a file, but for those of QCG-PilotJob."""
    texts = task.command or []
    if task.script is not None and (task.qcg or task.login_shell):
        texts = [task.script]
    if texts and len(longest := max(texts, key=len)) > ARGUMENT_BYTES // 4:
        size = len(encode(longest))
        if size > ARGUMENT_BYTES:
            yield (
                f"an argument has {size:,} bytes, and the system takes at most {ARGUMENT_BYTES:,}: put it into a file"
            )
    for name, value in task.env.items():
        if len(name) + len(value) <= ARGUMENT_BYTES // 4:
            continue
        size = len(encode(f"{name}={value}"))
        if size > ARGUMENT_BYTES:
            yield f"env: {name} has {size:,} bytes, and the system takes at most {ARGUMENT_BYTES:,}: put it into a file"


def _value_problems(task: Task, values: list[str]) -> Iterator[str]:
    """What is wrong with values that programs get as a variable, and may have in their code."""
    most = ARGUMENT_BYTES - len("PILOTQ_VALUE=")
    for number, value in enumerate(values):
        if len(value) > most // 4 and (size := len(encode(value))) > most:
            yield f"values[{number}] has {size:,} bytes, and the system takes at most {most:,}: put it into a file"
    code = task.script or ""
    if task.command and any(VALUE in word for word in task.command) and (number := code_of(task.command)) >= 0:
        code = task.command[number]
    if VALUE in code and not task.qcg and (task.command or is_for_shell(code)):
        try:
            refer_to_value(code)
        except InvalidInput as error:
            yield str(error)


def _launch_problems(task: Task) -> Iterator[str]:
    """What would only be found when a worker makes the command of the task's launcher, or opens its files."""
    for name, value in task.model_opts.items():
        if name in SPLIT_OPTS:
            try:
                shlex.split(value)
            except ValueError as error:
                yield f"model_opts: {name} {value!r} cannot be split into words as a shell does: {error}"
    if not 0 <= task.launch_at <= len(task.command or ()):
        yield f"launch_at {task.launch_at} is no place in a command of {len(task.command or ())} words"


def _grow_problems(what: str, factor: float, first: float, most: float) -> Iterator[str]:
    limit = {"memory": "memory", "time": "time_limit"}[what]
    if bool(factor) != bool(most):
        yield f"{what}_grow and {what}_max go together: by which factor it grows, and how far"
    elif factor and not first:
        yield f"{what}_grow makes {limit} larger for the next try: give {limit}, too"
    elif factor and not (GROW_MIN <= factor <= GROW_MAX and first < most < 1e15):
        yield f"{what}_grow must be a number from {GROW_MIN:g} to {GROW_MAX:g}, and {what}_max above {limit}"


def _failure_limit_problems(task: Task) -> Iterator[str]:
    if not task.is_array:
        yield "stop_on_failures is for arrays"
    try:
        failures_allowed(task.stop_on_failures, 1)
    except InvalidInput as error:
        yield f"stop_on_failures: {error}"


def _retry_problems(task: Task) -> Iterator[str]:
    if not 0 <= task.retries <= INDEX_LIMIT:
        yield f"retries cannot be negative, and at most {INDEX_LIMIT:,}"
    if not 0 <= task.backoff < 1e7:
        yield "backoff must be a number of seconds, at most 115 days"
    if (task.memory_grow or task.time_grow) and task.array is not None and task.array.limit is not None:
        # A class counts what of it runs: those that ask for more would run beside the others.
        yield "memory_grow and time_grow are not for an array of which only some elements may run at a time (%N)"
    yield from _grow_problems("memory", task.memory_grow, task.request.memory, task.memory_max)
    yield from _grow_problems("time", task.time_grow, task.time_limit or 0.0, task.time_max)
    if not task.retries and (task.backoff or task.retry_on):
        yield "backoff and retry_on say how retries go: give retries, too"
    if task.retry_on:
        try:
            parse_retry_on(task.retry_on)
        except ValueError as error:
            yield f"retry_on: {error}"
