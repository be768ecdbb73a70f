"""Availability: which nodes get new tasks, and why not: their allocation ends, or they are drained, retired,
quarantined.

`NodeLimits` is what stands in Redis, for everybody who asks. `Availability` is the dispatcher's: it applies that and
the decisions of the quarantine to the inventory, and returns the messages that follow for workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection

from pilotq.broker.log import log
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.scheduling.inventory import Inventory
from pilotq.broker.scheduling.quarantine import Decision, Quarantine
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.messages import ClearSuspicion, Draining, ExecutionEnd, Leave
from pilotq.broker.store.registry import RETIRED, decode_texts
from pilotq.broker.store.resources import NodeInfo, NodeShare, class_info
from pilotq.broker.store.store import Store


class AllocationEnd:
    """When the nodes of a Slurm job get no new tasks any more (unix seconds), and how they are to leave then."""

    def __init__(self, text: bytes) -> None:
        at, grace, notice = text.split()
        self.at = float(at)
        self.leave = Leave(float(grace), "walltime", int(notice))


class NodeLimits:
    """What Redis holds of nodes that get no new tasks (`keys.ALLOCATION_ENDS`, `keys.DRAINED`, `keys.QUARANTINE`)."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self.quarantined: dict[str, str] = {}  # node -> why
        self.closed: dict[str, str] = {}  # node -> its state: drained or retired
        self.min_nodes = 0  # with fewer nodes nothing starts
        self._ends: dict[str, AllocationEnd] = {}  # by Slurm job

    def read(self) -> None:
        hashes = [("HGETALL", key) for key in (keys.ALLOCATION_ENDS, keys.DRAINED, keys.QUARANTINE)]
        ends, closed, quarantined, least = self._link.pipeline([*hashes, ("HGET", keys.CONTROL, "min_nodes")])
        self.min_nodes = int(least or 0)
        self._ends = {job.decode(): AllocationEnd(text) for job, text in zip(ends[::2], ends[1::2], strict=True)}
        self.closed = {name: text.partition(" ")[0] for name, text in decode_texts(closed).items()}
        self.quarantined = decode_texts(quarantined)

    def end(self, info: NodeInfo, clock: float) -> AllocationEnd | None:
        """How its allocation ends, once it has (``clock``: unix seconds)."""
        end = self._ends.get(info.job)
        return end if end is not None and clock >= end.at else None

    def apply(self, cluster: Cluster, info: NodeInfo, is_open: bool, now: float, clock: float) -> None:
        """Open or close one node of a cluster, whose clock shows ``now`` at ``clock`` unix seconds. With ``is_open``
        it is closed only if Redis says so."""
        end = self._ends.get(info.job)
        is_open = is_open and info.name not in self.closed and self.end(info, clock) is None
        cluster.set_end(info.name, now + end.at - clock if end is not None else math.inf)
        if cluster.is_open(info.name) is not is_open:
            cluster.set_open(info.name, is_open)


class Availability:
    """Opens and closes the nodes of the dispatcher's inventory. Times are monotonic.

    Which nodes are quarantined stands in Redis, for readers and for the next dispatcher. How long each one waits for
    its next probe does not: the next dispatcher begins with the first pause.
    """

    def __init__(self, store: Store, inventory: Inventory) -> None:
        self._store = store
        self._inventory = inventory
        self._limits = NodeLimits(store.link)
        self._quarantine = Quarantine(store.settings)
        self._draining: set[tuple[str, int]] = set()  # incarnations that have reported that they leave
        self._told_to_leave: set[tuple[str, int]] = set()

    @property
    def min_nodes(self) -> int:
        """With fewer nodes nothing starts."""
        return self._limits.min_nodes

    @property
    def suspected(self) -> int:
        """How many nodes are suspected or quarantined."""
        return len(self._quarantine.breakers)

    # -- what is observed ------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read again what stands in Redis."""
        self._limits.read()

    def set_draining(self, message: Draining) -> None:
        self._draining.add((message.node, message.incarnation))

    def record_end(self, node: str, end: ExecutionEnd, now: float) -> bool:
        """An execution has ended; whether `update` may find something new."""
        return self._quarantine.record_end(node, end, now)

    def admits(self, shares: tuple[NodeShare, ...], slot: int) -> bool:
        """Whether a task that was placed on these nodes may start there. A node that is probed gets nothing else."""
        if not self._quarantine.breakers:
            return True
        if not self._quarantine.start_probe(shares, slot):
            return False
        for share in shares:
            if share.node in self._quarantine.breakers:
                self._inventory.cluster.set_open(share.node, False)
        return True

    # -- what follows ----------------------------------------------------------------------------------------------

    def update(self, registered: Collection[str], now: float) -> list[tuple[NodeInfo, ClearSuspicion | Leave]]:
        """Open and close nodes; returns the messages for workers. ``registered``: the names of all registered nodes."""
        clock = time.time()
        cleared = self._update_quarantine(registered, now, clock)
        return [*cleared, *self._open_and_close(now, clock)]

    def _open_and_close(self, now: float, clock: float) -> list[tuple[NodeInfo, Leave]]:
        """The nodes that are to leave, each incarnation once."""
        leaving = []
        for node in self._inventory.nodes.values():
            info = node.info
            incarnation = (info.name, info.incarnation)
            is_open = incarnation not in self._draining and not self._quarantine.is_blocked(info.name, now)
            self._limits.apply(self._inventory.cluster, info, is_open, now, clock)
            end = self._limits.end(info, clock)
            message = end.leave if end is not None else None
            if self._limits.closed.get(info.name) == RETIRED and self._inventory.is_idle(info.name):
                message = message or Leave(0.0)
                if incarnation not in self._told_to_leave:  # its supervisor starts it again if it is resumed by then
                    self._store.write("SADD", keys.LEAVING, info.name)
            if message is not None and incarnation not in self._told_to_leave:
                self._told_to_leave.add(incarnation)
                log(f"node {info.name} is told to leave ({message.reason})", node=info.name)
                leaving.append((info, message))
        return leaving

    def _is_usable(self, info: NodeInfo, clock: float) -> bool:
        """Whether nothing but the quarantine keeps new tasks from it."""
        draining = (info.name, info.incarnation) in self._draining
        return not draining and info.name not in self._limits.closed and self._limits.end(info, clock) is None

    def _update_quarantine(
        self, registered: Collection[str], now: float, clock: float
    ) -> list[tuple[NodeInfo, ClearSuspicion]]:
        """Quarantine nodes, and use them again; returns the messages for their workers."""
        inventory, quarantine = self._inventory, self._quarantine
        messages = self._follow_redis(now)
        # The nodes report to a new dispatcher one after the other: the first is not the only one.
        if not quarantine.breakers or any(name not in inventory.nodes for name in registered):
            return messages
        usable = [name for name, node in inventory.nodes.items() if self._is_usable(node.info, clock)]

        def elsewhere(class_name: str, name: str) -> bool:
            if inventory.cluster.is_open(name):
                inventory.cluster.set_open(name, False)
            info = class_info(class_name)
            return info is None or inventory.cluster.is_possible(info.request)

        for decision in quarantine.decide(now, usable, inventory.slots, elsewhere):
            self._publish(decision)
            if not decision.quarantined and decision.healthy:
                messages.append((inventory.nodes[decision.node].info, ClearSuspicion(healthy=True)))
            elif not decision.quarantined:  # it is the tasks: other nodes need not find that out by themselves
                others = [name for name in quarantine.failing - quarantine.breakers.keys() if name in inventory.nodes]
                messages += [(inventory.nodes[name].info, ClearSuspicion()) for name in others]
                quarantine.failing.clear()
        return list({info.name: (info, message) for info, message in messages}.values())

    def _follow_redis(self, now: float) -> list[tuple[NodeInfo, ClearSuspicion]]:
        """Adopt what an earlier dispatcher has quarantined, and clear what the user has resumed."""
        breakers, messages = self._quarantine.breakers, []
        for name, why in self._limits.quarantined.items():
            if name not in breakers:
                self._quarantine.adopt(name, why, now)
        for name in self._quarantine.quarantined - self._limits.quarantined.keys():
            del breakers[name]
            log(f"node {name} is used again: its user has resumed it", node=name)
            if (node := self._inventory.nodes.get(name)) is not None:
                messages.append((node.info, ClearSuspicion(healthy=True)))
        return messages

    def _publish(self, decision: Decision) -> None:
        node, quarantined = decision.node, self._limits.quarantined
        if not decision.quarantined:
            if quarantined.pop(node, None) is not None:
                log(f"node {node} is used again: {decision.why}", node=node)
                self._store.write("HDEL", keys.QUARANTINE, node)
            return
        pause = self._quarantine.breakers[node].pause
        at = time.strftime("%H:%M:%S", time.localtime(time.time() + pause))
        quarantined[node] = why = f"{decision.why}{at}"
        log(f"node {node} is quarantined: {why}", level="warning", node=node)
        self._store.write("HSET", keys.QUARANTINE, node, why)
