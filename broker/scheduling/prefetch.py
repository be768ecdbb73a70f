"""Prefetching: tasks that are sent to a node before a slot of theirs is free there, so that a slot that becomes free
goes on without asking the dispatcher.

Pure but for the inventory, which it updates. Times are monotonic and arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from pilotq.broker.scheduling.giving_way import is_nice
from pilotq.broker.scheduling.inventory import Inventory, NodeRecord, Prefetched
from pilotq.broker.scheduling.placement import BackfillState
from pilotq.broker.scheduling.slot import Slot, ends_by
from pilotq.broker.store.messages import ExecutionEnd, Reopen, RetractTasks
from pilotq.broker.store.resources import ClassInfo, NodeInfo, class_info, format_allocation
from pilotq.broker.store.store import ClaimTarget, Head
from pilotq.broker.tasks.model import order_of
from pilotq.broker.tasks.runtime_estimate import RuntimeEstimates


class Prefetch:
    """Decides how many tasks of which class each node gets in advance, and which of them it is to give back."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._settings = inventory.settings
        self._estimates = RuntimeEstimates()

    # -- what nodes report -----------------------------------------------------------------------------------------

    def record_end(self, node: NodeRecord, end: ExecutionEnd, now: float) -> None:
        """Executions have ended: their run time counts, and after each the slot goes on with a prefetched task if it
        is kept."""
        if end.seconds >= 0:
            self._estimates.add(end.class_name, end.seconds, end.number)
        if end.kept or end.slot == 0:
            self.remove(node, end.class_name, end.number, now)

    def add(self, node: NodeRecord, class_name: str, count: int, now: float) -> None:
        """So many more tasks of the class were sent to the node."""
        prefetched = node.prefetched.setdefault(class_name, Prefetched())
        node.sent += count
        prefetched.count += count
        prefetched.since, prefetched.sent = now, node.sent

    def remove(self, node: NodeRecord, class_name: str, count: int, now: float) -> None:
        """So many of them have started or were returned."""
        prefetched = node.prefetched.get(class_name)
        if prefetched is None:
            return
        prefetched.count -= count
        prefetched.since = now
        if prefetched.count <= 0:
            del node.prefetched[class_name]

    # -- what is sent in advance -----------------------------------------------------------------------------------

    def add_targets(
        self, targets: dict[str, list[ClaimTarget]], heads: Mapping[str, Head], backfill: BackfillState, limit: int
    ) -> None:
        """Add to the targets of a claim, by class, what nodes are to get in advance: up to ``limit`` tasks of a class
        for each node."""
        closed = self.closed_nodes(backfill)
        remaining = {name: head.waiting - len(targets.get(name, ())) for name, head in heads.items()}
        for name in self._not_outranked(heads, remaining):
            if is_nice(name) or self._inventory.cluster.bars_pools(_class(name).request):
                continue  # slots that go on would never give back what the task of the hold waits for
            for node in self._inventory.nodes.values():
                number = min(self._missing(node, name, remaining[name]), remaining[name], limit)
                late = self._inventory.cluster.is_late(node.info.name, _class(name).request)
                if number > 0 and node.info.name not in closed and not late:
                    targets.setdefault(name, []).extend([ClaimTarget(node.address, 0, "")] * number)
                    remaining[name] -= number

    def _missing(self, node: NodeRecord, class_name: str, waiting: int) -> int:
        """How many more tasks of the class should be prefetched by this node, 0 while it has enough."""
        estimate = self._estimates.get(class_name)
        if estimate is None or estimate.ends < self._settings.prefetch_after:
            return 0
        own_slots = sum(slot.class_name == class_name for slot in node.slots.values())
        if not own_slots:
            return 0
        all_slots = self._inventory.slots_of[class_name]
        # Never more than a fair share of what waits, so that the last tasks of a run are spread over all slots.
        per_slot = min(
            self._settings.prefetch_s / max(estimate.mean_s, 1e-4),
            self._settings.prefetch_max,
            math.ceil(waiting / all_slots),
        )
        target = int(per_slot) * own_slots
        present = node.prefetched[class_name].count if class_name in node.prefetched else 0
        # Topped up only when half has started: many tasks in one claim.
        return target - present if present <= target // 2 else 0

    def _not_outranked(self, heads: Mapping[str, Head], remaining: Mapping[str, int]) -> list[str]:
        """The classes whose slots may go on: of the highest priority that waits for cores, and before any of that
        priority that has no slot yet; and of higher ones those that have all the slots that they may have."""
        is_possible = self._inventory.cluster.is_possible
        waiting = [name for name, number in remaining.items() if number > 0 and is_possible(_class(name).request)]
        full = {name for name in waiting if self._is_full(name)}
        highest = max((_class(name).priority for name in waiting if name not in full), default=-math.inf)
        first = {name: order_of(heads[name].places[0]) for name in waiting if _class(name).priority == highest}
        running = self._inventory.slots_of
        blocked = min((order for name, order in first.items() if name not in running), default=math.inf)
        above = [name for name in waiting if name in full and _class(name).priority > highest]
        return above + [name for name, order in first.items() if order < blocked]

    def _is_full(self, class_name: str) -> bool:
        """Whether a class has all the slots that it may have: no other slot would be its."""
        info = _class(class_name)
        return info.at_most > 0 and not self._inventory.room(info, class_name)

    # -- slots that were released too early ------------------------------------------------------------------------

    def reopen(
        self, node: NodeRecord, released: Mapping[str, Sequence[tuple[Slot, bool]]], heads: Mapping[str, Head],
        closed: set[str], now: float,
    ) -> Iterator[Reopen | RetractTasks]:  # fmt: skip
        """Open slots again that a node has released before it got tasks that were on their way to it.

        Nobody else would start these. ``released`` are the slots of each class, and whether something has run there.
        What must not go on is retracted where no slot of its class is left.
        """
        for name, slots in released.items():
            prefetched, info = node.prefetched.get(name), class_info(name)
            deserted = all(slot.class_name != name for slot in node.slots.values())
            has_run = any(ran for _, ran in slots)
            if prefetched is None or info is None or not (prefetched.sent > node.seen or (deserted and has_run)):
                continue
            usable = [slot for slot, _ in slots if _is_on_one_node(info)][: prefetched.count]
            cluster = self._inventory.cluster
            barred = node.info.name in closed or cluster.bars_pools(info.request)
            late = cluster.is_late(node.info.name, info.request)
            if usable and not barred and not late and not self._is_outranked(heads, info.priority):
                for slot in usable:
                    cluster.take(slot.shares)
                    slot.seen, slot.since, slot.ends_by = node.sent, now, ends_by(info, now)
                    self._inventory.open_slot(slot)
                yield Reopen(name, [(slot.number, format_allocation(slot.shares)) for slot in usable])
            elif deserted:
                yield RetractTasks(name, prefetched.count)
                prefetched.since = now

    # -- what is retracted -----------------------------------------------------------------------------------------

    def closed_nodes(self, backfill: BackfillState) -> set[str]:
        """Nodes whose slots must not go on: closed ones, and those that are being drained for a task that waits. Slots
        that go on there would never drain."""
        hold = backfill.hold
        held = {share.node for share in hold.shares} if hold is not None else set()
        cluster = self._inventory.cluster
        return held | {name for name in self._inventory.nodes if not cluster.is_open(name)}

    def to_retract(
        self, heads: Mapping[str, Head], closed: set[str], now: float
    ) -> Iterator[tuple[NodeInfo, RetractTasks]]:
        """What nodes are to give back: ``closed`` ones everything; others what has not started for a while, when it
        would fit elsewhere or delays something of a higher priority."""
        cluster = self._inventory.cluster
        for node in self._inventory.nodes.values():
            for class_name, prefetched in list(node.prefetched.items()):
                info = class_info(class_name)
                is_closed = node.info.name in closed or (info is not None and cluster.bars_pools(info.request))
                if not is_closed and now - prefetched.since < self._settings.retract_after_s:
                    continue
                fits = info is not None and not self._is_full(class_name)
                shares = cluster.reserve(info.request) if info is not None and fits else None
                if shares is not None:
                    cluster.release(shares)
                priority = info.priority if info is not None else math.inf
                if shares is not None or is_closed or self._is_outranked(heads, priority):
                    yield node.info, RetractTasks(class_name, prefetched.count)
                    prefetched.since = now

    def _is_outranked(self, heads: Mapping[str, Head], priority: float) -> bool:
        """Whether something of a higher priority waits that could run here."""
        better = [name for name in heads if _class(name).priority > priority and not self._is_full(name)]
        return any(self._inventory.cluster.is_possible(_class(name).request) for name in better)


def _is_on_one_node(info: ClassInfo) -> bool:
    """Whether a slot of the class is free when its own node says so."""
    return info.request.nodes is None and not info.request.spread


def _class(name: str) -> ClassInfo:
    """The class with this name, of which placement has found that it is one."""
    info = class_info(name)
    assert info is not None, name
    return info
