"""What a task asks for when it is tried again because it had too little: more memory, or more time. Pure."""

from __future__ import annotations

import msgspec

from pilotq.broker.store.messages import Run
from pilotq.broker.store.resources import class_info
from pilotq.broker.tasks.model import class_name, limit_step
from pilotq.broker.tasks.spec import Spec

UNCHANGED = ("", b"")


def larger_request(run: Run, spec: Spec, reason: str) -> tuple[str, bytes]:
    """Class and packed Spec of the next execution of a task that has failed for this ``reason``.

    UNCHANGED where it does not ask for more; no Spec where that stays as it is.

    ``spec`` is that of the task, with or without its variables filled in: the packed one in ``run`` is what is changed.
    """
    grow, info = spec.grow, class_info(run.class_name)
    if grow is None or info is None or info.at_most:
        return UNCHANGED
    request = info.request
    if reason == "memory" and grow.memory and request.memory < grow.memory_max:
        more = min(int(request.memory * grow.memory), grow.memory_max)
        return class_name(info.queue, info.priority, msgspec.structs.replace(request, memory=more)), b""
    if reason == "time limit" and grow.time and spec.time_limit < grow.time_max:
        longer = min(spec.time_limit * grow.time, grow.time_max)
        packed = msgspec.msgpack.decode(run.spec, type=Spec)
        packed.time_limit = longer
        shape = msgspec.structs.replace(request, limit=limit_step(longer))
        return class_name(info.queue, info.priority, shape), msgspec.msgpack.encode(packed)
    return UNCHANGED
