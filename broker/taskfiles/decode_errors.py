"""Messages for the errors of the JSON and TOML decoders: file, place, what is wrong, and what was probably meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from pilotq.broker.errors import InvalidInput

_KINDS = {
    "str": "text", "int": "a whole number", "float": "a number", "array": "a list", "object": "a table",
    "bool": "true or false", "null": "nothing",
}  # fmt: skip
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def place_in(file: str, *path: str) -> str:
    """``file`` and ``tasks[3]`` and ``.cores`` -> ``file: tasks[3].cores``."""
    place = "".join(character if character.isprintable() else "?" for character in "".join(path).lstrip("."))
    return f"{file}: {place}" if place else file


def wrong_field(error: msgspec.ValidationError, file: str, prefix: str, keys: Iterable[str]) -> InvalidInput:
    """The error of a typed decoder; ``prefix`` is the place of what it decoded, ``keys`` are those it knows."""
    text, _, path = str(error).partition(" - at `$")
    path = prefix + path.rstrip("`")
    if unknown := _UNKNOWN.fullmatch(text):
        close = difflib.get_close_matches(unknown[1], sorted(set(keys)), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return InvalidInput(f"{place_in(file, path, '.' + unknown[1])}: unknown key{hint}")
    if missing := _MISSING.fullmatch(text):
        return InvalidInput(f"{place_in(file, path)}: the key {missing[1]} is missing")
    text = re.sub(r"`([^`]+)`", lambda kinds: _kind_names(kinds[1]), text)
    return InvalidInput(f"{place_in(file, path)}: {text[:1].lower()}{text[1:]}")


def _kind_names(kinds: str) -> str:
    parts = kinds.split(" | ")
    if len(parts) > 1 and "null" in parts:
        parts.remove("null")
    return " or ".join(_KINDS.get(part, part) for part in parts)


def malformed_json(data: bytes, file: str) -> InvalidInput:
    """Where and why ``data`` is no JSON. Reads it again with the slower decoder, which knows the line and column."""
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return InvalidInput(f"{file}: line {error.lineno}, column {error.colno}: this is not JSON: {error.msg}")
    except ValueError as error:
        return InvalidInput(f"{file}: this is not JSON: {error}")
    for pair in _HALF_PAIR.finditer(data):
        line = data.count(b"\n", 0, pair.start()) + 1
        return InvalidInput(f"{file}: line {line}: {pair[0].decode()} is half of a character")
    return InvalidInput(f"{file}: this is not JSON: NaN and Infinity are no numbers there")


def utf8(data: bytes, file: str) -> str:
    """The text of ``data``, without a byte order mark; refuses what is not UTF-8 and says in which line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{file}: line {line}: the text is not UTF-8: convert the file") from None


def refuse_nul(value: Any, file: str) -> None:
    """Refuse decoded data that holds a NUL character anywhere: no argument, path or variable can contain one."""
    for path in _nuls(value, ""):
        raise InvalidInput(f"{place_in(file, path)}: the text contains a NUL character")


def _nuls(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, str):
        if "\0" in value:
            yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nuls(key, path)
            yield from _nuls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _nuls(item, f"{path}[{number}]")
