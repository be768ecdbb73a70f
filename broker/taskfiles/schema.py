"""The meaning of the keys of a file of tasks, and the JSON schema of such files.

Both come from one place: the schema's types from `native.File`, which reads the files, and its descriptions from KEYS.
The schema tells an editor what may be written; what it cannot express (cycles, names, paths) is refused by the reader.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from pilotq.broker.taskfiles.native import Entry, File
from pilotq.broker.tasks.dependencies import FIELDS
from pilotq.broker.tasks.model import MODELS, PRIORITY_LIMIT

# key, or keys of one kind -> (what is written, what it means), as docs/files.md and `pilotq help files` show them
KEYS: Final[dict[str, tuple[str, str]]] = {
    "command": (
        "list of texts and numbers, or one text",
        "the program and its arguments. One text is split as a line is, and with `--shell` it is a script",
    ),
    "script": ("text", "a script: the program that its first line names (`#!`) runs it, else bash"),
    "function": (
        'text `"module:name"`',
        "a Python function; `module` is looked for in the submitter's directory first. A task has one of these three",
    ),
    "args, kwargs": ("list, table", "its arguments; in an array the element's value comes first, or its index"),
    "name": ("text", "a name, unique in the file: up to 200 characters, without `/`"),
    "array": (
        "text",
        'a task for each index: `"0-99"`, both ends included, or `"1,3-5,10-20:2"`; `"0-99%4"`: four at a time at most',
    ),
    "values": (
        "list of texts and numbers",
        "a task for each value; the index counts from 0. With `array`, too, for the values with these indices",
    ),
    "cores": (
        'number, or text `"2-4"`',
        "cores on one node; with `nodes` on each of them. Default 1. Of a range the task gets as many as are free",
    ),
    "nodes": ('number, or text `"2-4"`', "nodes; without `cores` entire ones that nothing else uses"),
    "gpus": (
        'number, or text `"a100:2"`',
        "GPUs on each node; a number below 1 is a share of one. A kind is words of its model",
    ),
    "memory": (
        'number of bytes, or text `"2G"`',
        (
            "on each node; K, M, G, T, P are powers of 1024, and below 1 MiB one of them is needed. Reserved if the "
            "node is a machine, and a limit"
        ),
    ),
    "numa": (
        'text `"spread"` or `"pack"`',
        (
            "cores lie evenly over the NUMA nodes, or on as few as can be, and OpenMP's threads so. Default: few NUMA "
            "nodes, and OpenMP's threads are not bound"
        ),
    ),
    "use": (
        "table, name to number",
        "units of counters, which each node (`--counter NAME=N`) or all together (`--pool NAME=N`) have",
    ),
    "after": (
        "text, or list of texts",
        "names of tasks of this file, ids, or `name:INDEX` for one element: all of them must have finished",
    ),
    "after_any": ("the same", "they must have ended, in any way"),
    "after_notok": ("the same", "they must have ended and not finished: failed, been stopped or canceled"),
    "after_each": (
        "text, or list of texts",
        "arrays of the same length: element number i waits for number i of each. Not together with the others",
    ),
    "join": (
        "true or false",
        "it ends when its process and all tasks that were submitted within it have ended. Not of an array",
    ),
    "priority": ("number, -1000 to 1000", "higher goes first. Default 0"),
    "nice": (
        "true or false",
        "it begins only when nothing else waits for its cores, and is ended and queued again when something else does",
    ),
    "time_limit": (
        'seconds, or text `"1h30m"`, `"1:30:00"`, `"2-00:00:00"`',
        "the task is ended when it has run so long",
    ),
    "time_request": (
        "the same",
        "how long it will run at most: it may use cores kept for a waiting task meanwhile. Nothing enforces it",
    ),
    "retries": ("number", "how often it is tried again after failing. Default 0"),
    "backoff": (
        'seconds, or text `"30s"`',
        "the pause before the first retry; before each further one twice as long, up to an hour. Default none",
    ),
    "retry_on": (
        'text `"75,100-110"`, number, list',
        "only these failures are tried again: exit codes, ranges, `signal`, `limit` (of time), `memory`. Default all",
    ),
    "memory_grow, memory_max": (
        'number, and number of bytes or text `"16G"`',
        "what has used too much memory is tried again with so many times as much, up to `memory_max`: beside `retries`",
    ),
    "time_grow, time_max": (
        'number, and seconds or text `"4h"`',
        "what has reached its time limit is tried again with so many times as much, up to `time_max`: beside `retries`",
    ),
    "stop_on_failures": (
        'number, or text `"5%"`',
        "when more elements of the array have failed, those that wait are canceled; what runs goes on",
    ),
    "env": ("table, name to text or number", "variables, on top of the environment"),
    "cwd": ("text", "where it runs. Relative to the submitter's directory, which is the default. It must exist"),
    "stdin, stdout, stderr": (
        "text",
        "files, relative to `cwd`. Default: `/dev/null`, captured, captured. Directories of output files are made",
    ),
    "model": ("text", "how it is started: `default` and `threads` as one process, the others by MPI"),
    "model_opts": ("table, name to text or number", "options of the model, such as `mpirun_args`"),
    "queue": ("text", "the queue it waits in. Default `default`"),
}
# Of each of these a task may have one.
ONE_OF: Final = (("command", "script", "function"), ("array", "values"), *((key, "after_each") for key in FIELDS))


def keys() -> dict[str, tuple[str, str]]:
    """KEYS with an entry for each single key."""
    return {key: entry for names, entry in KEYS.items() for key in names.split(", ")}


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a file of tasks."""
    _, parts = msgspec.json.schema_components([File], ref_template="#/$defs/{name}")
    entry, file = parts[Entry.__name__], parts[File.__name__]
    for key, (_, text) in keys().items():
        entry["properties"][key] = {"description": text.replace("`", ""), **_plain(entry["properties"][key])}
    entry["properties"]["priority"] |= {"minimum": -PRIORITY_LIMIT, "maximum": PRIORITY_LIMIT}
    entry["properties"]["model"] |= {"enum": [*sorted(MODELS), None]}
    entry["not"] = {"anyOf": [{"required": [a, b], "properties": {a: _NOT_NULL, b: _NOT_NULL}} for a, b in _pairs()]}
    for part in (entry, file):
        part.pop("title", None)
    file["properties"]["tasks"] |= {"minItems": 1, "description": "the tasks, in the order of submission"}
    defaults = {"description": "keys for all tasks that do not set them", **file["properties"]["defaults"]}
    file["properties"]["defaults"] = defaults
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A file of tasks for pilotq, in JSON or TOML",
        **file,
        "$defs": {Entry.__name__: entry},
    }


_NOT_NULL: Final = {"not": {"type": "null"}}  # null counts as not given


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """Without the default, which is always null: not given."""
    return {name: value for name, value in part.items() if name != "default"}


def _pairs() -> list[tuple[str, str]]:
    return [(a, b) for group in ONE_OF for i, a in enumerate(group) for b in group[i + 1 :]]
