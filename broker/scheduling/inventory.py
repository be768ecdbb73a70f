"""What the dispatcher knows of nodes, lanes and tasks handed ahead: memory only, rebuilt from the nodes' own words."""

from __future__ import annotations

import math

import msgspec

from pilotq.broker.scheduling.cluster import Cluster, with_counted
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import (
    End,
    Ended,
    GivenBack,
    Gone,
    NodeInfo,
    NodeState,
    Part,
    Sweep,
    Swept,
    ToWorker,
    Withheld,
    parse_allocation,
)
from pilotq.broker.tasks.model import Request
from pilotq.broker.tasks.runtime_estimate import Pace


class ClassInfo(msgspec.Struct, frozen=True):
    """A class list as it stands in the hash of classes."""

    queue: str
    priority: int
    request: Request


class Lane(msgspec.Struct):
    """One reservation, and the class of the tasks that run in it one after another."""

    number: int
    class_name: str
    parts: tuple[Part, ...]
    ends_by: float  # monotonic; inf when its task has no limit
    since: float = 0.0  # monotonic: its task has it since then


class Ahead(msgspec.Struct):
    """Tasks of one class handed to one node without a lane."""

    count: int = 0
    since: float = 0.0  # monotonic, of the last hand-out or progress


class Node(msgspec.Struct):
    info: NodeInfo
    lanes: dict[int, Lane] = {}
    ahead: dict[str, Ahead] = {}

    @property
    def address(self) -> str:
        return self.info.address


class Floor:
    """All nodes that have said what they hold, and all lanes. Time is monotonic and an argument."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cluster = Cluster()
        self.nodes: dict[str, Node] = {}
        self.lanes: dict[int, Lane] = {}
        self.pace: dict[str, Pace] = {}
        self.remains: dict[tuple[str, str], list[Part]] = {}  # (dead host, node) -> what stays taken until it is swept

    def arrive(self, info: NodeInfo, state: NodeState, requests: dict[str, ClassInfo], now: float) -> None:
        """A node says what it holds; replaces what was known of this incarnation."""
        self.depart(info.name)
        node = Node(info)
        self.nodes[info.name] = node
        self.cluster.add_node(info)
        # What other nodes have said that they do for it is counted with its lanes from here on.
        for key in [key for key in self.remains if key[0] == info.address]:
            self.cluster.release(self.remains.pop(key))
        for number, allocation, class_name in state.lanes:
            known = requests.get(class_name)
            parts = parse_allocation(allocation)
            if known is not None:
                parts = with_counted(parts, known.request)
            lane = Lane(number, class_name, parts, ends_by(known, now), now)
            node.lanes[number] = self.lanes[number] = lane
        # Parts on this node of lanes that other nodes run count here too, whoever arrived first.
        for lane in self.lanes.values():
            mine = tuple(p for p in lane.parts if p.node == info.name)
            if mine:
                self.cluster.take(mine)
            if lane.number in node.lanes:
                self.cluster.take(tuple(p for p in lane.parts if p.node != info.name and p.node in self.nodes))
        for class_name, count in state.ahead.items():
            node.ahead[class_name] = Ahead(count, now)
        hosts = {other.address for other in self.nodes.values()}
        for host, allocation in state.guests:
            if host not in hosts:
                guests = [part for part in parse_allocation(allocation) if part.node == info.name]
                self.cluster.take(guests)
                self.remains.setdefault((host, info.name), []).extend(guests)

    def depart(self, name: str, address: str = "", *, clean: bool = False) -> list[tuple[Node, ToWorker]]:
        """A node is gone, with the lanes that ran on it; returns what other nodes must be told.

        What its executions had on other nodes stays taken until these have swept (`settle`); executions of other nodes
        that used it are ended by their hosts. With an ``address`` also of one that has not said what it holds.
        """
        node = self.nodes.pop(name, None)
        if node is None:
            return self._sweeps_of(address)
        self.cluster.remove_node(name)
        for key in [key for key in self.remains if key[1] == name]:
            del self.remains[key]
        for number, lane in node.lanes.items():
            self.lanes.pop(number, None)
            for part in lane.parts:
                if part.node in self.nodes:
                    self.remains.setdefault((node.address, part.node), []).append(part)
        told: list[tuple[Node, ToWorker]] = [
            (host, Gone(node.address, clean))
            for host in self.nodes.values()
            if any(part.node == name for lane in host.lanes.values() for part in lane.parts)
        ]
        return told + self._sweeps_of(node.address)

    def _sweeps_of(self, dead: str) -> list[tuple[Node, ToWorker]]:
        return [(self.nodes[other], Sweep(dead)) for host, other in self.remains if host == dead]

    def settle(self, message: Withheld | Swept) -> None:
        """Parts of lanes whose executions are over: some are free, since their nodes have swept."""
        if isinstance(message, Swept):
            self.cluster.release(self.remains.pop((message.host, message.node), ()))
        elif (lane := self.lanes.get(message.lane)) is not None:
            kept = {part.node for part in parse_allocation(message.allocation)}
            self.cluster.release(p for p in lane.parts if p.node not in kept and p.node in self.nodes)
            lane.parts = tuple(p for p in lane.parts if p.node in kept)

    def refuses(self, request: Request) -> str | None:
        """Why none of the nodes can ever hold this; None while one could, or none is known."""
        if not self.nodes or self.cluster.possible(request):
            return None
        return self.cluster.never_fits(request)

    def speaker(self, message: Ended | GivenBack) -> Node | None:
        """The node that says it; None when that incarnation is gone."""
        node = self.nodes.get(message.node)
        return node if node is not None and node.info.incarnation == message.incarnation else None

    def idle(self, name: str) -> bool:
        """Whether nothing of any lane is on this node, and nothing was handed ahead to it."""
        node = self.nodes[name]
        return not node.lanes and not node.ahead and not self.cluster.used(name)

    def open_lane(self, lane: Lane) -> None:
        self.lanes[lane.number] = lane
        self.nodes[lane.parts[0].node].lanes[lane.number] = lane

    def end(self, node: Node, end: End, known: ClassInfo | None, now: float) -> None:
        """One execution has ended. Lanes and counts we do not know (older than our term) are no matter."""
        if end.seconds >= 0:
            self.pace.setdefault(end.class_name, Pace()).add(end.seconds)
        if end.kept or end.lane == 0:
            self.less_ahead(node, end.class_name, 1, now)
        lane = self.lanes.get(end.lane)
        if lane is None:
            return
        if end.kept:
            lane.ends_by, lane.since = ends_by(known, now), now
            return
        self.close_lane(node, lane)

    def close_lane(self, node: Node, lane: Lane) -> None:
        del self.lanes[lane.number]
        node.lanes.pop(lane.number, None)
        self.cluster.release(tuple(p for p in lane.parts if p.node in self.nodes))

    def less_ahead(self, node: Node, class_name: str, count: int, now: float) -> None:
        ahead = node.ahead.get(class_name)
        if ahead is None:
            return
        ahead.count -= count
        ahead.since = now
        if ahead.count <= 0:
            del node.ahead[class_name]

    def wanted_ahead(self, node: Node, class_name: str, waiting: int) -> int:
        """How many more tasks of the class should be handed ahead to this node, 0 while it has enough."""
        pace = self.pace.get(class_name)
        if pace is None or pace.ends < self.settings.ahead_after_ends:
            return 0
        lanes = sum(lane.class_name == class_name for lane in node.lanes.values())
        if not lanes:
            return 0
        every = sum(lane.class_name == class_name for lane in self.lanes.values())
        # Never more than a fair share of what waits, so that the last tasks of a run are spread over all lanes.
        each = min(self.settings.ahead_s / max(pace.mean_s, 1e-4), self.settings.ahead_max, math.ceil(waiting / every))
        target = int(each) * lanes
        have = node.ahead[class_name].count if class_name in node.ahead else 0
        # Topped up only when half is gone: many tasks in one claim.
        return target - have if have <= target // 2 else 0

    def add_ahead(self, node: Node, class_name: str, count: int, now: float) -> None:
        ahead = node.ahead.setdefault(class_name, Ahead())
        ahead.count += count
        ahead.since = now


def ends_by(known: ClassInfo | None, now: float) -> float:
    """When a task of this class that starts now must have ended (monotonic)."""
    if known is None or known.request.limit is None:
        return math.inf
    return now + known.request.limit
