"""Python functions as tasks: the encoding of a call, of its result and of its exception. Pure.

A call names its function, ``module:name``, where that leads to it; else it holds the function itself, pickled by value.
Its arguments are a pickle of ``(args, kwargs)``. Pickles are read by the user's own interpreters and programs only; no
part of a pilot reads one.
"""

from __future__ import annotations

import base64
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.errors import InvalidInput

# Prefetched calls travel in one message, hundreds of them: more than this belongs in a file.
PAYLOAD_BYTES = 1 << 20
EXCEPTION_BYTES = 1 << 20  # of one exception, pickled: of a larger one only the text travels
RESULT_SUFFIX = ".result"  # of a file that holds one large result
TRACE_HEAD, TRACE_TAIL = 2_000, 6_000  # characters of a traceback that are kept: the server holds it for days
_SIMPLE = frozenset({int, float, str, bool, type(None)})
_pack = msgspec.msgpack.Encoder().encode
_targets: dict[Any, str | bytes] = {}  # of functions that were packed before
_TARGETS_MAX = 1000


class Packed:
    """A call that is packed already; stands for the function of a Task."""

    __slots__ = ("payload",)

    def __init__(self, payload: bytes) -> None:
        self.payload = payload


class Payload(msgspec.Struct, array_like=True):
    """A packed call."""

    name: str  # empty: it is pickled
    pickled: bytes
    arguments: bytes


class PayloadName(msgspec.Struct, array_like=True):
    """The beginning of a packed call: what stands behind the name is passed over."""

    name: str


decode_payload = msgspec.msgpack.Decoder(Payload).decode
decode_payload_name = msgspec.msgpack.Decoder(PayloadName).decode


Function = Callable[..., Any] | str | bytes | Packed


def pack_call(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """One call as bytes; ``function`` may be its `target_of`.

    Raises InvalidInput when it cannot be packed, or is larger than PAYLOAD_BYTES.
    """
    if isinstance(function, Packed):
        return function.payload
    try:
        target = target_of(function)
        arguments = dumps((tuple(args), dict(kwargs)))
    except Exception as error:  # pickling runs methods of the user's objects
        raise InvalidInput(f"function {name_of(function)}: its call cannot be pickled: {error}") from error
    payload = _pack(Payload(target, b"", arguments) if isinstance(target, str) else Payload("", target, arguments))
    if len(payload) > PAYLOAD_BYTES:
        raise InvalidInput(
            f"function {name_of(function)}: its arguments take {len(payload):,} bytes, at most {PAYLOAD_BYTES:,} are "
            "possible: write them to a file, and give its name"
        )
    return payload


def target_of(function: Callable[..., Any] | str | bytes) -> str | bytes:
    """A function's name, ``module:name``, or its pickle; a name or a pickle is returned as it is."""
    if isinstance(function, (str, bytes)):
        return function
    try:
        known = _targets.get(function)
    except TypeError:
        return _find_target(function)  # it cannot be a key
    # What is pickled by value may have changed since: a name in its closure, say.
    if known is None:
        known = _find_target(function)
        if isinstance(known, str):
            if len(_targets) >= _TARGETS_MAX:
                _targets.clear()
            _targets[function] = known
    return known


def _find_target(function: Callable[..., Any]) -> str | bytes:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and module != "__main__" and "<" not in name:
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is function:
            return f"{module}:{name}"
    return dumps(function)


def dumps(thing: Any) -> bytes:
    """A pickle; what is defined in ``__main__``, or cannot be found by its name, goes by value (cloudpickle)."""
    import pickle

    try:
        data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        if b"__main__" not in data:
            return data
    except Exception:  # noqa: BLE001  # whatever it was: cloudpickle can more, or raises it again
        pass
    import cloudpickle

    pickled: bytes = cloudpickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    return pickled


def name_of(function: Function) -> str:
    """``module:name``, for people."""
    if isinstance(function, Packed):
        function = decode_payload(function.payload).name or "a function"
    if isinstance(function, (str, bytes)):
        return function if isinstance(function, str) else "a function"
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', '')}:{name}"


def call_text(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The call as one line; only small and simple arguments are shown."""
    if isinstance(function, Packed):
        return f"{name_of(function)}(...)"
    parts = [_argument_text(value) for value in args]
    parts += [f"{name}={_argument_text(value)}" for name, value in kwargs.items()]
    return f"{name_of(function)}({', '.join(parts)})"


def _argument_text(value: Any) -> str:
    if type(value) not in _SIMPLE:
        return "..."
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# -- results and exceptions --------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a pickle lies that is too large for the server: a place in a file of the pilot's output directory."""

    name: str
    offset: int
    length: int


def result_text(data: bytes) -> str:
    """A pickled result in the form that RQ's results stream holds."""
    return base64.b64encode(data).decode()


def stored_text(stored: Stored) -> str:
    """The same for a pickle in a file. No text in base64 has a colon."""
    return f"file:{stored.offset}:{stored.length}:{stored.name}"


def read_text(text: str) -> bytes | Stored:
    """The pickle of `result_text` or `stored_text`; raises ValueError for anything else."""
    if not text.startswith("file:"):
        return base64.b64decode(text)
    _, offset, length, name = text.split(":", 3)
    if "/" in name or not name:
        raise ValueError(f"{name!r} is no file of the output directory")
    return Stored(name, int(offset), int(length))


def failure_text(trace: str, exception: str) -> str:
    """RQ's exc_string, and behind a newline the text of the pickled exception (which may be missing)."""
    if len(trace) > TRACE_HEAD + TRACE_TAIL:
        left_out = len(trace) - TRACE_HEAD - TRACE_TAIL
        trace = f"{trace[:TRACE_HEAD]}\n... {left_out:,} characters are left out ...\n{trace[-TRACE_TAIL:]}"
    text = base64.b64encode(zlib.compress(trace.encode("utf-8", "backslashreplace"), 1)).decode()
    return f"{text}\n{exception}" if exception else text
