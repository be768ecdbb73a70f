"""What a job of RQ's own producers requests: its class and its Spec, from the fields of its record.

Only `meta`, `timeout` and `webhooks` are read. `meta` is pickled by the producer (or JSON, with RQ's JSON serializer):
it is read without running anything of it. Fields of `meta` other than META_TYPES belong to the application.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.model import PRIORITY_LIMIT, Request, class_name, limit_step
from pilotq.broker.tasks.quantities import request_of
from pilotq.broker.tasks.spec import FLAG_RQ_JOB, Spec, command_text, pack_spec
from pilotq.broker.tasks.validation import request_problems

DEFAULT_TIMEOUT_S = 180  # RQ's, for a record that names none
META_BYTES = 1 << 20
META_TYPES: Final = {  # fields of `meta`, with the types they may have
    "cores": (int, str), "nodes": (int, str), "gpus": (int, float, str), "memory": (int, str), "use": (dict,),
    "numa": (str,), "priority": (int,),
}  # fmt: skip
# What is refused, for docs/rq.md.
REFUSED: Final = (
    "Webhooks: nobody would send them",
    "`meta` that asks for what cannot be: `cores: 0`, a text where a number must be, more than any node has",
    "`meta` that is neither a pickle nor JSON, is no dictionary, or is larger than 1 MiB",
    "A `timeout` that is no number",
)


def own_description(spec: bytes) -> str:
    """What the record of a task of ours says of its command, from its packed Spec; empty where that is damaged."""
    try:
        return command_text(msgspec.msgpack.decode(spec, type=Spec))
    except msgspec.MsgspecError:
        return ""


class JobRequest(NamedTuple):
    """What a job requests: the name of its class, the packed Spec, the resources."""

    class_name: str
    spec: bytes
    request: Request


class _Opaque:
    """Stands for any object in a pickle that is no plain value; accepts what is done to it, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Opaque:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Opaque:
        return self

    def __hash__(self) -> int:
        return id(self)


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values, and imports and calls nothing that a pickle names."""

    def find_class(self, _module: str, _name: str) -> Any:
        return _Opaque

    def persistent_load(self, _: Any) -> Any:
        return _Opaque()


def read_meta(data: bytes) -> dict[str, Any]:
    """`meta` as plain values. Raises InvalidInput when it cannot be read."""
    if not data:
        return {}
    if len(data) > META_BYTES:
        raise InvalidInput(f"its meta has {len(data):,} bytes: at most {META_BYTES:,} are read")
    try:
        found = json.loads(data) if data[:1] in b"{n" else _PlainUnpickler(io.BytesIO(data)).load()
    except Exception:  # noqa: BLE001 - whatever foreign bytes do to a decoder, only this job fails
        raise InvalidInput("its meta is neither a pickle nor JSON that can be read: use RQ's own serializers") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidInput("its meta is no dictionary")
    return found


@lru_cache(maxsize=4096)
def job_request_of(queue: str, timeout: bytes, meta: bytes) -> JobRequest:
    """What a job of this queue requests. Raises InvalidInput; its text becomes the reason why the job failed.

    job_request_of("sums", b"180", pickle.dumps({"cores": 2}))
    """
    asked = {field: value for field, value in read_meta(meta).items() if field in META_TYPES}
    for field, value in asked.items():
        if not isinstance(value, META_TYPES[field]) or isinstance(value, bool):
            words = {int: "a number", float: "a number", str: "a text", dict: "a dictionary"}
            kinds = " or ".join(dict.fromkeys(words[kind] for kind in META_TYPES[field]))
            raise InvalidInput(f"meta[{field!r}] must be {kinds}")
    priority = asked.pop("priority", 0)
    if abs(priority) > PRIORITY_LIMIT:
        raise InvalidInput(f"meta['priority'] is outside -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}")
    for name, count in asked.get("use", {}).items():
        if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool):
            raise InvalidInput("meta['use'] must have names of counters and whole numbers")
    limit = _limit(timeout)
    try:
        request = request_of(Request(), **asked)
    except InvalidInput as error:
        raise InvalidInput(f"meta: {error}") from None
    for problem in request_problems(request):
        raise InvalidInput(f"meta: {problem}")
    shape = msgspec.structs.replace(request, limit=limit_step(limit))
    spec = Spec([], time_limit=limit or 0.0, flags=FLAG_RQ_JOB, cores=request.cores[0])
    return JobRequest(class_name(queue, priority, shape), pack_spec(spec), shape)


def _limit(timeout: bytes) -> float | None:
    """RQ's timeout in seconds; -1 is none, and 0 is its default, as for RQ's worker."""
    try:
        seconds = float(timeout or 0) or DEFAULT_TIMEOUT_S
    except ValueError:
        raise InvalidInput(f"its timeout {timeout.decode('utf-8', 'replace')!r} is no number of seconds") from None
    return seconds if 0 < seconds < 1e9 else None


def rq_error_text(text: str) -> str:
    """A text in the form in which RQ keeps the reason of a failure."""
    return base64.b64encode(zlib.compress(text.encode())).decode()
