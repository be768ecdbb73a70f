"""Which classes and nodes may be handed tasks ahead, and which are to give them back. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pilotq.broker.floor import ClassInfo, Floor
from pilotq.broker.placement import BackfillState
from pilotq.broker.store import Head
from pilotq.broker.task import order_of


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
