"""The dispatcher's inventory of nodes, slots and prefetched tasks: memory only, rebuilt from what the nodes report."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import msgspec

from pilotq.broker.scheduling.cluster import Cluster, with_counted
from pilotq.broker.scheduling.slot import Slot, ends_by
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import (
    ExecutionEnd,
    Gone,
    NodeReport,
    PartlyReleased,
    StateReport,
    Sweep,
    Swept,
    TasksReturned,
    ToWorker,
)
from pilotq.broker.store.resources import ClassInfo, NodeInfo, NodeShare, class_info, parse_allocation
from pilotq.broker.tasks.model import Request


class Prefetched(msgspec.Struct):
    """Tasks of one class that were sent to one node without a slot."""

    count: int = 0
    since: float = 0.0  # monotonic, when tasks were last added, started or returned
    sent: int = 0  # `NodeRecord.sent` when tasks were last added


class NodeRecord(msgspec.Struct):
    """A node, the slots that its worker runs, and by class the tasks that it has prefetched."""

    info: NodeInfo
    slots: dict[int, Slot] = {}
    prefetched: dict[str, Prefetched] = {}
    sent: int = 0  # tasks that it was ever sent in advance
    seen: int = 0  # so many of these it had, at least, when it released a slot last

    @property
    def address(self) -> str:
        return self.info.address


class Inventory:
    """All nodes that have reported their state, and all slots. Times are monotonic and arguments."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cluster = Cluster()
        self.nodes: dict[str, NodeRecord] = {}
        self.slots: dict[int, Slot] = {}
        self.slots_of: Counter[str] = Counter()  # by class
        self.unswept: dict[tuple[str, str], list[NodeShare]] = {}  # (lost primary node, node): reserved until swept
        self._unswept_slots: dict[str, Counter[str]] = {}  # lost primary node -> the classes of the slots it had there

    def add_node(self, info: NodeInfo, state: StateReport, now: float) -> None:
        """A node reports what it runs; replaces what was known of it."""
        self.remove_node(info.name)
        node = NodeRecord(info)
        self.nodes[info.name] = node
        self.cluster.add_node(info)
        # What other nodes have reported that they run for it is counted with its slots from here on.
        for key in [key for key in self.unswept if key[0] == info.address]:
            self.cluster.release(self.unswept.pop(key))
        for number, allocation, class_name in state.slots:
            known = class_info(class_name)
            shares = parse_allocation(allocation)
            if known is not None:
                shares = with_counted(shares, known.request, self.cluster.pools)
            slot = Slot(number, class_name, shares, ends_by(known, now), now)
            self._add(node, slot)
        # Shares on this node of slots that other nodes run count here too, whichever node reports first.
        for slot in self.slots.values():
            mine = tuple(share for share in slot.shares if share.node == info.name)
            if mine:
                with suppress(ValueError):  # it has come back with other cores or GPUs: that execution ends
                    self.cluster.take(mine)
            if slot.number in node.slots:
                self.cluster.take(
                    tuple(share for share in slot.shares if share.node != info.name and share.node in self.nodes)
                )
        for class_name, count in state.prefetched.items():
            node.prefetched[class_name] = Prefetched(count, now)
        addresses = {other.address for other in self.nodes.values()}
        for primary, allocation in state.remote:
            if primary not in addresses:
                remote = [share for share in parse_allocation(allocation) if share.node == info.name]
                self.cluster.take(remote)
                self.unswept.setdefault((primary, info.name), []).extend(remote)

    def remove_node(self, name: str, address: str = "", *, clean: bool = False) -> list[tuple[NodeRecord, ToWorker]]:
        """Remove a node with the slots that it ran; returns the messages for other nodes.

        What its executions had on other nodes stays reserved until these have swept (`release_swept`); executions of
        other nodes that used it are ended by their primary nodes. With an ``address`` also for a node that has not
        reported.
        """
        node = self.nodes.pop(name, None)
        if node is None:
            return self._sweeps_of(address)
        self.cluster.remove_node(name)
        for key in [key for key in self.unswept if key[1] == name]:
            del self.unswept[key]
        lost = {primary for primary, _ in self.unswept}
        self._unswept_slots = {primary: slots for primary, slots in self._unswept_slots.items() if primary in lost}
        for slot in node.slots.values():
            self._forget(slot)
            for share in slot.shares:
                if share.node in self.nodes:
                    self.unswept.setdefault((node.address, share.node), []).append(share)
            if any(share.node in self.nodes for share in slot.shares):
                self._unswept_slots.setdefault(node.address, Counter())[slot.class_name] += 1
        messages: list[tuple[NodeRecord, ToWorker]] = [
            (primary, Gone(node.address, clean))
            for primary in self.nodes.values()
            if any(share.node == name for slot in primary.slots.values() for share in slot.shares)
        ]
        return messages + self._sweeps_of(node.address)

    def _sweeps_of(self, lost: str) -> list[tuple[NodeRecord, ToWorker]]:
        return [(self.nodes[other], Sweep(lost)) for primary, other in self.unswept if primary == lost]

    def release_swept(self, message: PartlyReleased | Swept) -> None:
        """Some shares of a slot whose execution is over are free, since their nodes have swept."""
        if isinstance(message, Swept):
            self.cluster.release(self.unswept.pop((message.host, message.node), ()))
        elif (slot := self.slots.get(message.slot)) is not None:
            kept = {share.node for share in parse_allocation(message.allocation)}
            self.cluster.release(share for share in slot.shares if share.node not in kept and share.node in self.nodes)
            slot.shares = tuple(share for share in slot.shares if share.node in kept)

    @property
    def busy(self) -> int:
        """How many slots are in use, and tasks prefetched."""
        return len(self.slots) + sum(tasks.count for node in self.nodes.values() for tasks in node.prefetched.values())

    def never_fits(self, request: Request) -> str | None:
        """Why these nodes can never hold this request; None while they could, or while no node is known."""
        if not self.nodes or self.cluster.is_possible(request):
            return None
        return self.cluster.never_fits(request)

    def sender(self, message: NodeReport | TasksReturned) -> NodeRecord | None:
        """The node that sent a message; None when that incarnation was removed."""
        node = self.nodes.get(message.node)
        return node if node is not None and node.info.incarnation == message.incarnation else None

    def room(self, info: ClassInfo, class_name: str) -> int:
        """How many more slots a class may have whose tasks are limited in how many run at a time: each runs one."""
        lost = {primary for primary, _ in self.unswept}
        unswept = sum(slots[class_name] for primary, slots in self._unswept_slots.items() if primary in lost)
        return max(info.at_most - self.slots_of[class_name] - unswept, 0)

    def is_idle(self, name: str) -> bool:
        """Whether no slot uses this node, and it has prefetched nothing."""
        node = self.nodes[name]
        return not node.slots and not node.prefetched and not self.cluster.used(name)

    def owner(self, slot: Slot) -> NodeRecord:
        """The node whose worker runs a slot: no share may be left there (`release_swept`)."""
        return next(node for node in self.nodes.values() if node.slots.get(slot.number) is slot)

    def open_slot(self, slot: Slot) -> None:
        self._add(self.nodes[slot.shares[0].node], slot)

    def _add(self, node: NodeRecord, slot: Slot) -> None:
        self._forget(self.slots.get(slot.number))
        node.slots[slot.number] = self.slots[slot.number] = slot
        self.slots_of[slot.class_name] += 1

    def _forget(self, slot: Slot | None) -> None:
        if slot is None or self.slots.pop(slot.number, None) is None:
            return
        self.slots_of[slot.class_name] -= 1
        if not self.slots_of[slot.class_name]:
            del self.slots_of[slot.class_name]

    def end_execution(self, node: NodeRecord, end: ExecutionEnd, now: float) -> Slot | None:
        """One execution has ended; its slot goes on (``kept``), or is closed and returned. A slot older than our term
        is unknown here."""
        slot = self.slots.get(end.slot)
        if slot is None:
            return None
        if end.kept:
            slot.ends_by, slot.since = ends_by(class_info(end.class_name), now), now
            return None
        self.close_slot(node, slot)
        node.seen = max(node.seen, slot.seen)
        return slot

    def close_slot(self, node: NodeRecord, slot: Slot) -> None:
        self._forget(slot)
        node.slots.pop(slot.number, None)
        self.cluster.release(self.present(slot.shares))

    def present(self, shares: tuple[NodeShare, ...]) -> tuple[NodeShare, ...]:
        """Those on nodes that are there."""
        return tuple(share for share in shares if share.node in self.nodes)
