"""Strings of the operating system, which are bytes: arguments, environment variables, paths, values of arrays.

Python shows them as text in which each byte that cannot be decoded is a lone surrogate (``surrogateescape``). One rule
holds for all of them: they enter by `encode` (or as bytes), travel as bytes, and are given to the system as these very
bytes, whatever the locale is on either side. Where they meet people, in names, messages and logs, they are `printable`:
``caf\\xe9`` for what is not UTF-8. In JSON (`to_json`) such a byte is an escape, ``\\udce9``, as Python's json has it.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_encoding, _errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_json = msgspec.json.Encoder().encode
# What a decoder raises for damaged data: also a text that is no UTF-8, and what is nested too deep.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode(text: str) -> bytes:
    """The bytes that the system takes for this text, as os.fsencode (which pure modules cannot import)."""
    return text.encode(_encoding, _errors)


def decode(data: bytes) -> str:
    """The text that Python uses for these bytes, as os.fsdecode."""
    return data.decode(_encoding, _errors)


def unusable(text: str) -> str:
    """Why the system cannot take this text; empty when it can."""
    if "\0" in text:
        return "cannot contain a NUL character"
    try:
        encode(text)
    except UnicodeEncodeError as error:
        return f"cannot contain {text[error.start]!a}, which is no character in this locale ({_encoding})"
    return ""


def printable(text: str | bytes) -> str:
    """The same for people, as text that can be stored and written anywhere: ``\\xe9`` for a byte that is not UTF-8."""
    if not isinstance(text, bytes):
        if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
            return text
        try:
            data = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            data = text.encode("utf-8", "backslashreplace")  # half of a character: no byte stands behind it
    else:
        data = text
    return data.decode("utf-8", "backslashreplace")


def to_utf8(text: str) -> str:
    """A string of this process as it stands in JSON: for readers in another locale, its bytes are read as UTF-8."""
    return encode(text).decode("utf-8", "surrogateescape")


def from_utf8(text: str) -> str:
    """The string for this process of what `to_utf8` has made, maybe in another locale."""
    return decode(text.encode("utf-8", "surrogateescape"))


def to_json(value: Any) -> bytes:
    """JSON as msgspec writes it; where a text holds bytes that are not UTF-8, with escapes."""
    try:
        return _json(value)
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(value, str_keys=True)
        return json.dumps(plain, separators=(",", ":")).encode()


def from_json(data: bytes | str, kind: type[T]) -> T:
    """What `to_json` has written; raises msgspec.DecodeError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except RecursionError:
        raise msgspec.DecodeError("its values are nested too deep") from None
    except msgspec.DecodeError as error:
        if (b"\\ud" if isinstance(data, bytes) else "\\ud") not in data:  # type: ignore[operator]
            raise
        try:
            plain = json.loads(data)
        except (ValueError, RecursionError):
            raise error from None
        return msgspec.convert(plain, kind, str_keys=True)
