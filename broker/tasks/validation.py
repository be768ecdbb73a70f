"""Whether the fields of a Task hold what they must: Python does not check annotations, and a text where a list must be
would be taken letter by letter. Pure; files of tasks are read by a schema of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Check = tuple[Callable[[Any], bool], str]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value)) and all(map(_text, value.values()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


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

TASK: dict[str, Check] = {
    "command": (_texts, "a list of texts, such as shlex.split makes of a line"),
    "script": _TEXT,
    "args": (lambda value: isinstance(value, Sequence) and not isinstance(value, (str, bytes)), "a list or tuple"),
    "kwargs": (lambda value: isinstance(value, Mapping) and all(map(_text, value)), "a dict with names as keys"),
    "name": _TEXT,
    "values": _TEXTS,
    "after": (_texts, "a list of ids or names"),
    "after_each": (_texts, "a list of ids or names"),
    "priority": _WHOLE,
    "time_limit": _SECONDS,
    "time_request": _SECONDS,
    "retries": _WHOLE,
    "backoff": _SECONDS,
    "retry_on": _TEXT,
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
REQUEST: dict[str, Check] = {
    "cores": (_span, "a tuple (min, max)"),
    "nodes": (_span, "a tuple (min, max)"),
    "whole": _FLAG,
    "spread": _FLAG,
    "gpus": _WHOLE,
    "memory": (_whole, "a whole number of bytes"),
    "use": (_counters, "a tuple of (name, number)"),
}
ARRAY: dict[str, Check] = {"start": _WHOLE, "stop": _WHOLE, "step": _WHOLE}


def wrong(record: Any, default: Any, checks: Mapping[str, Check]) -> Iterator[str]:
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
