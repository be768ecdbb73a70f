"""Python functions as tasks: the encoding of a call, of its result and of its exception. Pure.

A call names its function, ``module:name``, where that leads to it; else it holds the function itself, pickled by value.
Its arguments are a pickle of ``(args, kwargs)``. Pickles are read by the user's own interpreters and programs only; no
part of a pilot reads one.
"""

from __future__ import annotations

import base64
import pickle
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pilotq.broker.errors import FunctionFailed, InvalidInput

# Prefetched calls travel in one message, hundreds of them: more than this belongs in a file.
PAYLOAD_BYTES = 1 << 20
RESULT_BYTES = 16 << 20  # of one result, pickled: it is in the server's memory until its record goes
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


decode_payload = msgspec.msgpack.Decoder(Payload).decode


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


def result_text(data: bytes) -> str:
    """A pickled result in the form that RQ's results stream holds."""
    return base64.b64encode(data).decode()


def failure_text(trace: str, exception: bytes) -> str:
    """RQ's exc_string, and behind a newline the pickled exception (which may be missing), both encoded."""
    text = base64.b64encode(zlib.compress(trace.encode("utf-8", "backslashreplace"), 1)).decode()
    return f"{text}\n{base64.b64encode(exception).decode()}" if exception else text


class RemoteTraceback(Exception):
    """The traceback in the interpreter that ran the function, as text: the cause of the exception raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def read_result(text: bytes) -> Any:
    """The value of `result_text`; raises FunctionFailed when it cannot be read here."""
    try:
        return pickle.loads(base64.b64decode(text))
    except Exception as error:
        raise FunctionFailed(f"the result of the function cannot be read here: {error}") from error


def read_failure(what: str, trace: bytes, exception: bytes) -> BaseException:
    """The exception of a function as it is to be raised here: its own where that can be read, else FunctionFailed."""
    text = zlib.decompress(base64.b64decode(trace)).decode("utf-8", "replace") if trace else ""
    found: Any = None
    if exception:
        try:
            found = pickle.loads(base64.b64decode(exception))
        except Exception:  # noqa: BLE001  # the text says what it was
            pass
    last = text.strip().splitlines()[-1] if text.strip() else "it failed"
    error = found if isinstance(found, BaseException) else FunctionFailed(f"{what}: {last}")
    if text:
        error.__cause__ = RemoteTraceback(text)
    return error
