"""``#HQ``: what the options of HyperQueue's submit come to for a task."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.directive_options import Option, Requested, Syntax, number_of
from pilotq.broker.tasks.model import COUNTER, PRIORITY_LIMIT, ArrayRange, Task
from pilotq.broker.tasks.quantities import parse_duration

_VALUES = """
    array cpus crash-limit cwd directives each-line env from-json job log max-fails name nodes on-notify output-mode pin
    priority resource server-dir stderr stdout stream time-limit time-request weight
"""
_FLAGS = "progress stdin task-dir wait"
SYNTAX = Syntax("#HQ", frozenset(_VALUES.split()), frozenset(_FLAGS.split()), frozenset(), {})
REPEATED = frozenset({"env", "resource"})
MEM_MAX = 1 << 24  # in MiB
MEM_DIGITS = 15
_UNIT = re.compile(
    r"(\d{1,9}(?:\.\d{1,9})?)\s*(d|days?|h|hr|hrs|hours?|m|min|mins|minutes?|s|sec|secs|seconds?)\b\s*", re.I
)
_SHARE = re.compile(r"0?\.[0-9]{1,4}")  # of a GPU
_SECONDS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


def parse_time(text: str) -> float:
    """``10min``, ``1h 30m``, ``1:30:00`` or seconds -> seconds.

    >>> [parse_time(text) for text in ("10min", "1h 30m", "1:30:00", "90")]
    [600.0, 5400.0, 5400.0, 90.0]
    """
    if _UNIT.sub("", text.strip()):
        return parse_duration(text)
    return sum(float(number) * _SECONDS[unit[0].lower()] for number, unit in _UNIT.findall(text))


def read(options: dict[str, Option], asked: Requested) -> None:
    """Enter what the options ask for; the last one of a name counts, but for REPEATED. Raises InvalidInput."""
    for option in options.values():
        name = option.name
        if name in _SIMPLE:
            what, parse = _SIMPLE[name]
            asked.fields[what] = asked.parsed(option, parse)
            asked.obeyed[option] = what
        elif name in ("each-line", "from-json"):
            asked.needed["array"] = f"{option.text}: give --each-line FILE on the command line"
        elif name == "env":
            variable, _, value = option.value.partition("=")
            asked.env[variable] = value
            asked.obeyed[option] = "env of the script"
        elif name in ("log", "stream") and (path := _file(option.value)) is not None:
            # HyperQueue writes a file of a kind of its own there; who reads it, as Nextflow's users do, expects text.
            asked.fields = {"stdout": path, "stderr": path, **asked.fields}
            asked.obeyed[option] = "stdout"
        elif name in ("stdout", "stderr") and (path := _file(option.value)) is not None:
            asked.fields[name] = path
            asked.obeyed[option] = name
        elif what := asked.parsed(option, partial(_request, name, request=asked.request)):
            asked.obeyed[option] = what
        else:
            asked.ignored.append(option)


def variables(task: Task, asked: Requested) -> dict[str, str]:
    """Variables that such a script reads."""
    found = {**asked.env, "HQ_TASK_ID": "{index}" if task.is_array else "0"}
    if task.values is not None:
        found["HQ_ENTRY"] = "{value}"
    return found


def _priority(value: str) -> int:
    if not re.fullmatch(r"-?\d{1,9}", value):
        raise InvalidInput(f"{value!r} is no whole number")
    return max(-PRIORITY_LIMIT, min(int(value), PRIORITY_LIMIT))


_SIMPLE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "array": ("array", ArrayRange.parse),
    "name": ("name", str),
    "cwd": ("cwd", str),
    "priority": ("priority", _priority),
    "time-limit": ("time_limit", parse_time),
    "time-request": ("time_request", parse_time),
}


def _request(option: str, value: str, request: dict[str, Any]) -> str:
    """Enter a request for resources; returns what it is of, or nothing where it has no meaning here."""
    if option == "cpus" and value == "all":
        request |= {"nodes": (1, 1), "whole": True}
        return "cores"
    if option == "nodes":
        request |= {"nodes": (number_of(value),) * 2, "whole": True}
        return "nodes"
    name, _, count = value.partition("=") if option == "resource" else (option, "", value)
    if option == "resource" and name.partition("/")[0] == "gpus" and _SHARE.fullmatch(count):
        request["gpus"] = float(count)
        return "gpus"
    memory = option == "resource" and name == "mem"
    if not count.isdecimal():
        return ""
    # Bytes have more digits than `number_of` takes.
    number = int(count) if memory and len(count) <= MEM_DIGITS else number_of(count, 0)
    if not number:
        return ""
    found = ""
    if name == "cpus":
        found, request["cores"] = "cores", (number, number)
    elif memory:
        # In MiB there; Nextflow gives bytes. No node has 16 TiB.
        found, request["memory"] = "memory", number << 20 if number <= MEM_MAX else number
    elif option == "resource" and name.partition("/")[0] == "gpus":
        found, request["gpus"] = "gpus", number
    elif option == "resource" and COUNTER.fullmatch(name):
        found, request["use"] = "use", tuple(sorted({**dict(request.get("use", ())), name: number}.items()))
    return found


def _file(text: str) -> str | None:
    """The path for one with placeholders; None where something in it is not known here."""
    if text == "none":
        return "/dev/null"
    for prefix in ("%{CWD}/", "%{SUBMIT_DIR}/"):
        text = text.removeprefix(prefix)
    text = text.replace("%{TASK_ID}", "{index}").replace("%{JOB_ID}", "{id}")
    return None if "%{" in text or text.endswith(":rm-if-finished") else text
