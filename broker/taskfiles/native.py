"""Reader of pilotq's own files: ``[[tasks]]`` in TOML, ``{"tasks": [...]}`` in JSON, with an optional ``defaults``.

A task that does not set a key has the value of ``defaults``, else the option of the command line, else that of
``Task``. ``env`` is merged. A number in ``command``, ``values`` or ``env`` is taken as its text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.batch import Batch
from pilotq.broker.taskfiles.decode_errors import malformed_json, refuse_nul, utf8, wrong_field
from pilotq.broker.taskfiles.directives import read_directives
from pilotq.broker.taskfiles.lines import split_words
from pilotq.broker.tasks.dependencies import ALL_FIELDS, check_cycles, resolve
from pilotq.broker.tasks.model import ArrayRange, Request, Task
from pilotq.broker.tasks.quantities import parse_duration, parse_size, request_of
from pilotq.broker.tasks.validation import validate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Scalar = str | int | float
Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
Whole = Annotated[int, msgspec.Meta(ge=-(10**9), le=10**9)]


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One task as the file writes it; None where it says nothing."""

    name: str | None = None
    command: str | list[Scalar] | None = None
    script: str | None = None
    function: str | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    cores: Count | str | None = None
    nodes: Count | str | None = None
    gpus: float | str | None = None
    memory: Count | str | None = None
    use: dict[str, Count] | None = None
    numa: str | None = None
    array: str | None = None
    values: list[Scalar] | None = None
    after: str | list[str] | None = None
    after_any: str | list[str] | None = None
    after_notok: str | list[str] | None = None
    after_each: str | list[str] | None = None
    join: bool | None = None
    priority: Whole | None = None
    nice: bool | None = None
    time_limit: float | str | None = None
    time_request: float | str | None = None
    retries: Count | None = None
    backoff: float | str | None = None
    retry_on: str | int | list[str | int] | None = None
    stop_on_failures: Count | str | None = None
    memory_grow: float | None = None
    memory_max: Count | str | None = None
    time_grow: float | None = None
    time_max: float | str | None = None
    env: dict[str, Scalar] | None = None
    cwd: str | None = None
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    model: str | None = None
    model_opts: dict[str, Scalar] | None = None
    queue: str | None = None


class File(msgspec.Struct, forbid_unknown_fields=True):
    """A whole file."""

    tasks: list[Entry]
    defaults: Entry | None = None


KEYS = (*Entry.__struct_fields__, "tasks", "defaults")
# Keys whose value is the field of Task unchanged.
_PLAIN = (
    "args", "kwargs", "name", "join", "priority", "nice", "retries", "memory_grow", "time_grow", "cwd", "stdin",
    "stdout", "stderr", "model", "queue",
)  # fmt: skip
# Keys whose text these read.
_QUANTITIES: dict[str, Callable[[str], Any]] = {
    "time_limit": parse_duration, "time_request": parse_duration, "backoff": parse_duration, "time_max": parse_duration,
    "memory_max": parse_size,
}  # fmt: skip
_WORDS = ("retry_on", "stop_on_failures")  # text, a number, or a list of such
_NO_REQUEST = (None,) * 6


def read_json(data: bytes, file: str, *, base: Task, shell: bool) -> Batch:
    """The tasks of a JSON file. ``base`` holds what the command line says for all of them."""
    utf8(data, file)
    try:
        found = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=File)
        if b"\\u0000" in data:  # rare, and expensive to search for
            refuse_nul(msgspec.json.decode(data), file)
    except msgspec.ValidationError as error:
        raise wrong_field(error, file, "", KEYS) from None
    except msgspec.DecodeError:
        raise malformed_json(data, file) from None
    return _batch(found, file, base, shell)


def read_toml(data: bytes, file: str, *, base: Task, shell: bool) -> Batch:
    """The tasks of a TOML file. ``base`` holds what the command line says for all of them."""
    text = utf8(data, file)
    try:
        table = tomllib.loads(text)
        refuse_nul(table, file)
        found = msgspec.convert(table, type=File)
    except msgspec.ValidationError as error:
        raise wrong_field(error, file, "", KEYS) from None
    except ValueError as error:  # the decoder's own error, and numbers of thousands of digits
        what, _, place = str(error).rstrip(")").rpartition(" (at ")
        raise InvalidInput(f"{file}: {place + ': ' if place else ''}this is not TOML: {what or error}") from None
    return _batch(found, file, base, shell)


def _batch(found: File, file: str, base: Task, shell: bool) -> Batch:
    notes: list[str] = []
    if found.defaults is not None:
        base = _task(found.defaults, f"{file}: defaults", base, shell, {}, notes)
    requests: dict[object, Request] = {}
    tasks = []
    for number, entry in enumerate(found.tasks):
        where = f"{file}: tasks[{number}]"
        task = _task(entry, where, base, shell, requests, notes)
        validate(task, where)
        tasks.append(task)

    def place(number: int, field: str) -> str:
        return f"{file}: tasks[{number}].{field}" if field else f"{file}: tasks[{number}]"

    check_cycles(tasks, resolve(tasks, place), place)
    return Batch(tasks, notes=notes)


def _task(entry: Entry, where: str, base: Task, shell: bool, requests: dict[object, Request], notes: list[str]) -> Task:
    directives = None if entry.script is None else read_directives(entry.script, f"{where}.script")
    if directives is None:
        return _described(entry, where, base, shell, requests)
    directives.pass_over("name")  # in a file names are what other tasks call it
    base = msgspec.structs.replace(base, request=directives.request(base.request))
    task = _described(entry, where, base, shell, {})
    notes += directives.complete(task, {key for key in KEYS if getattr(entry, key, None) is not None})
    return task


def _described(entry: Entry, where: str, base: Task, shell: bool, requests: dict[object, Request]) -> Task:
    changes: dict[str, Any] = {}
    for key in _PLAIN:
        if (value := getattr(entry, key)) is not None:
            changes[key] = value
    if entry.command is not None or entry.script is not None or entry.function is not None:
        changes["command"], changes["script"] = _what_runs(entry, where, shell)
        changes["function"] = entry.function
    if (asked := (entry.cores, entry.nodes, entry.gpus, entry.memory, entry.use, entry.numa)) != _NO_REQUEST:
        changes["request"] = _request(asked, where, base.request, requests)
    if entry.array is not None or entry.values is not None:
        changes["array"] = None if entry.array is None else _read(ArrayRange.parse, entry.array, f"{where}.array")
        changes["values"] = None if entry.values is None else texts(entry.values)
    names = {key: found for key in ALL_FIELDS if (found := getattr(entry, key)) is not None}
    changes |= {key: [found] if isinstance(found, str) else found for key, found in names.items()}
    changes |= {key: _joined(words) for key in _WORDS if (words := getattr(entry, key)) is not None}
    for key, parse in _QUANTITIES.items():
        value = getattr(entry, key)
        if value is not None:
            changes[key] = _read(parse, value, f"{where}.{key}") if isinstance(value, str) else value
    if entry.env is not None:
        changes["env"] = base.env | {name: str(value) for name, value in entry.env.items()}
    changes["model_opts"] = {name: str(value) for name, value in (entry.model_opts or base.model_opts).items()}
    return msgspec.structs.replace(base, **changes)


def _joined(words: Any) -> str:
    return ",".join(map(str, words if isinstance(words, list) else [words]))


def _what_runs(entry: Entry, where: str, shell: bool) -> tuple[list[str] | None, str | None]:
    if not isinstance(entry.command, str):
        return None if entry.command is None else texts(entry.command), entry.script
    if shell and entry.script is None:
        return None, entry.command
    return split_words(entry.command, f"{where}.command"), entry.script


def _request(asked: tuple[Any, ...], where: str, base: Request, known: dict[object, Request]) -> Request:
    """Tasks that ask for the same share one Request: a file of many tasks has few shapes."""
    cores, nodes, gpus, memory, use, numa = asked
    key = (cores, nodes, gpus, memory, None if use is None else tuple(use.items()), numa)
    if key not in known:
        try:
            known[key] = request_of(base, cores=cores, nodes=nodes, gpus=gpus, memory=memory, use=use, numa=numa)
        except InvalidInput as error:
            raise InvalidInput(f"{where}.{error}") from None
    return known[key]


def _read(parse: Callable[[str], Any], text: str, where: str) -> Any:
    try:
        return parse(text)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def texts(values: list[Any]) -> list[str]:
    return [str(value) for value in values]
