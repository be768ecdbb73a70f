"""What waits; which classes and nodes may be handed tasks ahead, and which are to give them back. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pilotq.broker.scheduling.inventory import ClassInfo, Floor
from pilotq.broker.scheduling.placement import BackfillState, Waiting
from pilotq.broker.store.messages import NodeInfo, Recall
from pilotq.broker.store.store import Head
from pilotq.broker.tasks.model import order_of


def waiting(classes: Mapping[str, ClassInfo], heads: Mapping[str, Head]) -> list[Waiting]:
    """What waits, as placement wants to know it."""
    found = []
    for name, head in heads.items():
        info = classes.get(name)
        if info is not None and head.length:
            first = order_of(head.places[0])
            orders = [first] * min(head.elements, 32) if head.elements else [order_of(i) for i in head.places]
            found.append(Waiting(name, info.priority, info.request, orders, head.waiting))
    return found


def shut(floor: Floor, backfill: BackfillState) -> set[str]:
    """Nodes whose lanes must not go on: closed ones, and those that are being drained for a task that waits. Lanes that
    go on there would never drain."""
    hold = backfill.hold
    held = {part.node for part in hold.parts} if hold is not None else set()
    return held | {name for name in floor.nodes if not floor.cluster.is_open(name)}


def not_outranked(
    floor: Floor, classes: Mapping[str, ClassInfo], heads: Mapping[str, Head], rests: Mapping[str, int]
) -> list[str]:
    """The classes whose lanes may go on: of the highest priority that waits, and before any of that priority that has
    no lane yet."""
    waiting = [name for name, rest in rests.items() if rest > 0 and floor.cluster.possible(classes[name].request)]
    top = max((classes[name].priority for name in waiting), default=0)
    first = {name: order_of(heads[name].places[0]) for name in waiting if classes[name].priority == top}
    busy = {lane.class_name for lane in floor.lanes.values()}
    blocked = min((order for name, order in first.items() if name not in busy), default=math.inf)
    return [name for name, order in first.items() if order < blocked]


def outranked(floor: Floor, classes: Mapping[str, ClassInfo], heads: Mapping[str, Head], mine: float) -> bool:
    """Whether something of a higher priority waits that could run here."""
    better = [info for name, info in classes.items() if info.priority > mine and name in heads and heads[name].length]
    return any(floor.cluster.possible(info.request) for info in better)


def recalls(
    floor: Floor, classes: Mapping[str, ClassInfo], heads: Mapping[str, Head], shut: set[str], now: float
) -> Iterator[tuple[NodeInfo, Recall]]:
    """What was handed ahead and is to be given back: on nodes that are ``shut`` all, elsewhere what is stuck."""
    for node in floor.nodes.values():
        at_once = node.info.name in shut
        for class_name, handed in list(node.ahead.items()):
            if not at_once and now - handed.since < floor.settings.recall_s:
                continue
            info = classes.get(class_name)
            parts = floor.cluster.reserve(info.request) if info is not None else None
            if parts is not None:
                floor.cluster.release(parts)
            priority = info.priority if info is not None else math.inf
            if parts is not None or at_once or outranked(floor, classes, heads, priority):
                yield node.info, Recall(class_name, handed.count)
                handed.since = now
