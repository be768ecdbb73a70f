"""A slot: one numbered reservation of cores, in which tasks of one class run one after another. Pure."""

from __future__ import annotations

import math

import msgspec

from pilotq.broker.store.resources import ClassInfo, NodeShare


class Slot(msgspec.Struct):
    """One reservation, and the class of the tasks that run in it."""

    number: int
    class_name: str
    shares: tuple[NodeShare, ...]  # the first is on the primary node, whose worker runs the slot
    ends_by: float  # monotonic; inf when its task has no limit
    since: float = 0.0  # monotonic: when its present task got it
    vacated: bool = False  # its node was asked to end its task, which is nice
    seen: int = 0  # `NodeRecord.sent` when its node was told of it: so many the node has when it releases the slot


def ends_by(info: ClassInfo | None, now: float) -> float:
    """When a task of this class that starts now must have ended (monotonic).

    >>> ends_by(None, 100.0)
    inf
    """
    if info is None or info.request.limit is None:
        return math.inf
    return now + info.request.limit
