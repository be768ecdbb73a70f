"""The free resources of all nodes, and what a request gets there. Pure: no Redis, no clock, no processes.

Nodes stand in the order in which the user named them, then in natural order of their names (n2 before n10), whatever
the order in which they joined. A *hold* hides cores that are being drained for one waiting task: there are then two
views of what is free, ``inside`` with the held cores and ``outside`` without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from pilotq.broker.scheduling.core_masks import bits, carve, mask_of
from pilotq.broker.scheduling.node_cores import FreeCoreIndex, NodeCores
from pilotq.broker.scheduling.pools import Pools
from pilotq.broker.scheduling.shortage import Room, shortage
from pilotq.broker.store.resources import NodeInfo, NodeShare
from pilotq.broker.tasks.model import SPREAD, Request

POSSIBLE_MAX = 10_000  # kinds of requests of which it is kept whether they could ever fit
END_S = 0.5  # ends of nodes that differ by less are the same


class Cluster:
    """The free resources of each node. Mutable; nothing in it waits or fails but for misuse (ValueError)."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeCores] = {}
        self._order: list[NodeCores] = []  # by index
        self._named: dict[str, int] = {}  # name -> its place in the order that the user gave
        self._sizes: dict[int, int] = {}  # number of cores -> indexes of the nodes that have so many
        self.pools = Pools()
        self._inside = FreeCoreIndex([], 0)
        self._outside: FreeCoreIndex | None = None  # only while there is a hold
        self._held_for = Request()
        self._held_nodes = 0
        self._possible: dict[tuple[Request, int], bool] = {}  # valid until a node is added, removed, opened or closed
        self.widenings = 0  # how often nodes have changed so that more may be possible than before
        # Nodes that lack what a request wants besides cores: true until something is released.
        self._barred: dict[Request, int] = {}
        self._ends: dict[float, int] = {}  # when nodes get nothing new -> their indexes
        self._now = 0.0

    # Nodes

    def set_order(self, names: Sequence[str]) -> None:
        """The order in which the user named the nodes; others come after these, in natural order of their names."""
        self._named = {name: place for place, name in enumerate(names)}
        self._arrange()

    def add_node(self, info: NodeInfo) -> None:
        """A node joins, empty and open. One of that name must have been removed before (ValueError)."""
        if info.name in self._nodes:
            raise ValueError(f"node {info.name} is there already: remove its last incarnation first")
        node = self._nodes[info.name] = NodeCores(info)
        node.pools = self.pools.total
        self.widenings += 1
        self.pools.add(info)
        self._arrange()

    def remove_node(self, name: str) -> None:
        """A node is removed with all that is reserved on it. An unknown name is ignored."""
        node = self._nodes.pop(name, None)
        if node is not None:
            self.pools.remove(name)
            if node.held:
                self.unhold()
            self._arrange()

    def set_open(self, name: str, open: bool) -> None:
        """A closed node gets no new tasks; what runs there continues. A hold on it ends."""
        node = self._nodes[name]
        node.open = open
        self.widenings += open
        if node.held:
            self.unhold()
        self._possible.clear()
        self._refresh(node)

    def is_open(self, name: str) -> bool:
        return self._nodes[name].open

    def set_end(self, name: str, end: float) -> None:
        """From ``end`` on, by the clock of `set_time`, nothing new runs there: nor does what cannot have ended by
        then."""
        node = self._nodes[name]
        # It is computed from two clocks, so that it varies a little: equal ends must not clear what is cached.
        if node.end != end and not abs(node.end - end) < END_S:
            self.widenings += end > node.end
            node.end = end
            self._possible.clear()
            self._count_ends()

    def set_time(self, now: float) -> None:
        """Set the time for all that is asked next."""
        self._now = now

    def is_late(self, name: str, request: Request) -> bool:
        """Whether a task of this limit that began now might not have ended when its node does."""
        return request.limit is not None and self._now + request.limit > self._nodes[name].end

    def _late(self, request: Request) -> int:
        """The nodes on which it is too late to start this request, as a mask."""
        late = 0
        if request.limit is not None:
            for end, indexes in self._ends.items():
                if self._now + request.limit > end:
                    late |= indexes
        return late

    def _count_ends(self) -> None:
        self._ends.clear()
        for node in self._order:
            if node.end < math.inf:
                self._ends[node.end] = self._ends.get(node.end, 0) | 1 << node.index

    def _arrange(self) -> None:
        last = len(self._named)
        self._order = sorted(
            self._nodes.values(), key=lambda node: (self._named.get(node.name, last), _natural(node.name))
        )
        self._sizes.clear()
        for index, node in enumerate(self._order):
            node.index = index
            self._sizes[node.size] = self._sizes.get(node.size, 0) | 1 << index
        self._count_ends()
        self._inside = self._view(outside=False)
        if self._outside is not None:
            self._outside = self._view(outside=True)
            self._held_nodes = sum(1 << node.index for node in self._order if node.held)
        self._possible.clear()
        self._barred.clear()

    def _view(self, outside: bool) -> FreeCoreIndex:
        most = max(self._sizes, default=0)
        return FreeCoreIndex([_visible(node, outside).bit_count() for node in self._order], most)

    def _refresh(self, node: NodeCores) -> None:
        self._inside.set(node.index, node.free.bit_count() if node.open else 0)
        if self._outside is not None:
            self._outside.set(node.index, _visible(node, True).bit_count())

    @property
    def open_nodes(self) -> list[NodeCores]:
        return [node for node in self._order if node.open]

    @property
    def any_free(self) -> bool:
        """Whether an open node has a free core, held or not."""
        return self._inside.total > 0

    @property
    def names(self) -> list[str]:
        return [node.name for node in self._order]

    @property
    def total_cores(self) -> int:
        return sum(node.size for node in self._order)

    @property
    def used_cores(self) -> int:
        return sum(self.used(name) for name in self._nodes)

    @property
    def free_cores(self) -> int:
        """Cores without a reservation, of closed nodes too."""
        return self.total_cores - self.used_cores

    def used(self, name: str) -> int:
        node = self._nodes[name]
        return node.size - node.free.bit_count()

    def free(self, name: str) -> int:
        return self._nodes[name].free.bit_count()

    # What could fit, and why not

    def never_fits(self, request: Request) -> str | None:
        """Why these nodes, closed ones too, could not hold it even if all were empty; None if they could."""
        return self._shortage(request, [_total(node) for node in self._order], now=False)

    def is_possible(self, request: Request) -> bool:
        """Whether the open nodes could hold it if they were empty, and have it done before they end."""
        key = (request, self._late(request))
        found = self._possible.get(key)
        if found is None:
            if len(self._possible) >= POSSIBLE_MAX:
                self._possible.clear()
            rooms = [_total(node) for node in self.open_nodes if not key[1] >> node.index & 1]
            found = self._possible[key] = self._shortage(request, rooms, now=False) is None
        return found

    def fits(self, request: Request) -> bool:
        """Whether the open nodes have free what it asks for, held or not."""
        return self._shortage(request, [_room(node, node.free) for node in self.open_nodes], now=True) is None

    def _shortage(self, request: Request, rooms: Sequence[Room], *, now: bool) -> str | None:
        return self.pools.shortage(request, now=now) or shortage(self.pools.without(request), rooms, now=now)

    def waits_for(self, request: Request) -> str:
        """What is missing now, as a sentence."""
        never = self.never_fits(request)
        if never is not None:
            return never
        if not self.open_nodes:
            return "all nodes are closed: drained, retired, quarantined, or their allocation ends"
        if self._late(request) and not self.is_possible(request):
            left = max(0.0, max(self._ends) - self._now)
            return (
                f"it may take {request.limit} s, but the nodes that could hold it take nothing new in {left:.0f} s, "
                "when their allocation ends: it starts in the next one"
            )
        missing = self._shortage(request, [_room(node, node.free) for node in self.open_nodes], now=True)
        if missing is not None:
            return missing
        if self._outside is not None:
            rooms = [_room(node, node.free & ~node.held) for node in self.open_nodes if not self._bars(request, node)]
            if self.bars_pools(request) or self._shortage(request, rooms, now=True) is not None:
                return "what it needs is free, but held for a task that has waited longer"
        return "what it needs is free: it starts as soon as the tasks before it have been placed"

    # Reservations

    def reserve(self, request: Request, *, held: bool = False) -> tuple[NodeShare, ...] | None:
        """Take now what the request asks for, or None. The cores of a hold are taken only with ``held``."""
        found = self.reserve_many(request, 1, held=held)
        return found[0] if found else None

    def reserve_many(self, request: Request, count: int, *, held: bool = False) -> list[tuple[NodeShare, ...]]:
        """Up to ``count`` reservations for equal requests, as if made one after the other."""
        outside = not held and self._outside is not None
        view = self._outside if outside and self._outside is not None else self._inside
        usable = ~self._late(request)
        plain = is_plain(request)
        if not plain:
            if not self.is_possible(request) or (outside and self.bars_pools(request)):
                return []
            count = self.pools.room(request, count)
            usable &= ~self._barred.get(request, 0)
            if outside and competes(request, self._held_for):
                usable &= ~self._held_nodes
        if request.nodes is None and not request.spread and not request.whole:
            return self._on_one(request, count, view, usable, plain)
        found: list[tuple[NodeShare, ...]] = []
        while len(found) < count:
            indexes = self._choose(request, view, usable)
            if indexes is None:
                break
            left = request.cores[1]
            shares: list[NodeShare] = []
            for index in indexes:
                node = self._order[index]
                size = node.size if request.whole else min(left, view.counts[index])
                if request.spread:
                    left -= size
                shares.append(self._cut(node, size, outside, self.pools.without(request) if shares else request))
            found.append(tuple(shares))
        return found

    def _on_one(
        self, request: Request, count: int, view: FreeCoreIndex, usable: int, plain: bool
    ) -> list[tuple[NodeShare, ...]]:
        low, high = request.cores
        outside = view is self._outside
        found: list[tuple[NodeShare, ...]] = []
        while count:
            index = view.best(low, high, usable)
            if index < 0:
                break
            node = self._order[index]
            if not plain:
                if node.has_free_extras(request):
                    count -= 1
                    found.append((self._cut(node, min(high, view.counts[index]), outside, request),))
                else:
                    usable &= ~(1 << index)
                    self._barred[request] = self._barred.get(request, 0) | 1 << index
                continue
            # The tightest node stays the tightest until it is too small, so it is filled in one go.
            free = view.counts[index]
            pieces = min(count, free // high) or 1
            visible = node.free & ~node.held if outside else node.free
            mask, cores = carve(visible, node.groups, min(high, free), pieces)
            node.free ^= mask
            self._refresh(node)
            count -= pieces
            name = node.name
            found += [(_new_share(NodeShare, (name, piece, (), 0, ())),) for piece in cores]
        return found

    def _choose(self, request: Request, view: FreeCoreIndex, usable: int) -> list[int] | None:
        """The indexes of nodes for a request of several nodes, in their order; None if it does not fit."""
        low, high = request.cores
        if request.spread:
            fewest, most = 1, len(self._order)
            if view.total < low or not self._order:
                return None
            candidates = bits(((1 << len(self._order)) - 1) & ~view.rows[0])
        elif request.whole:
            fewest, most = request.nodes or (1, 1)
            idle = 0
            for size, indexes in self._sizes.items():
                idle |= view.rows[size] & indexes if size else 0
            candidates = bits(idle)
        else:
            fewest, most = request.nodes or (1, 1)
            candidates = view.indexes(low, high)
        plain = is_plain(request)
        chosen: list[int] = []
        cores = 0
        for index in candidates:
            if usable >> index & 1 and (plain or self._order[index].has_free_extras(request)):
                chosen.append(index)
                cores += view.counts[index]
                if len(chosen) == most or (request.spread and cores >= high):
                    break
        if len(chosen) < fewest or (request.spread and cores < low):
            return None
        return sorted(chosen)

    def _cut(self, node: NodeCores, size: int, outside: bool, request: Request) -> NodeShare:
        """Take ``size`` cores of a node that is known to have them, and what else the request wants of it."""
        free = node.free & ~node.held if outside else node.free
        share = node.choose(size, request, free)
        node.take(share)
        self.pools.count(share, 1)
        self._refresh(node)
        return share

    def take(self, shares: Iterable[NodeShare]) -> None:
        """Adopt a reservation that exists. Shares read from an allocation text first need `with_counted`.

        Shares on unknown nodes are ignored; ValueError if something is reserved already (nothing was taken of that
        share, the shares before it were).
        """
        for share in shares:
            node = self._nodes.get(share.node)
            if node is not None:
                node.take(share)
                self.pools.count(share, 1)
                self._refresh(node)

    def fill(self, name: str, count: int) -> None:
        """Take so many of the free cores of a node, or all there are: somebody has them, it is not known which."""
        free = tuple(bits(self._nodes[name].free))[: max(count, 0)]
        if free:
            self.take([NodeShare(name, free)])

    def release(self, shares: Iterable[NodeShare]) -> None:
        """Give back what `reserve` gave or `take` took. Shares on nodes that were removed are ignored.

        The caller leaves out shares of an earlier incarnation of a node: they went with it.
        """
        for share in shares:
            node = self._nodes.get(share.node)
            if node is not None:
                node.release(share)
                self.pools.count(share, -1)
                self._refresh(node)
        self._barred.clear()

    # The hold

    @property
    def holding(self) -> bool:
        return self._outside is not None

    def hold(self, shares: Iterable[NodeShare], request: Request) -> None:
        """Hide these cores, free or not, from `reserve` without ``held``; and what else the request wants there."""
        self.unhold()
        for share in shares:
            node = self._nodes[share.node]
            node.held = mask_of(share.cores)
            self._held_nodes |= 1 << node.index
        self._held_for = request
        self._outside = self._view(outside=True)

    def unhold(self) -> None:
        for index in bits(self._held_nodes):
            self._order[index].held = 0
        self._held_nodes = 0
        self._outside = None

    def bars_pools(self, request: Request) -> bool:
        """Whether it takes units of a pool that the task of the hold waits for, too."""
        return self._outside is not None and bool(self.pools.names(request) & self.pools.names(self._held_for))

    def _bars(self, request: Request, node: NodeCores) -> bool:
        return bool(node.held) and competes(request, self._held_for)


def is_plain(request: Request) -> bool:
    """Whether it asks for nothing but cores, and those lie as close together as they can."""
    return not (request.gpus or request.memory or request.use or request.numa == SPREAD)


def competes(request: Request, other: Request) -> bool:
    """Whether both want some of the same kind of GPUs, memory or counters."""
    if (request.gpus and other.gpus) or (request.memory and other.memory):
        return True
    return bool(request.use and other.use and {n for n, _ in request.use} & {n for n, _ in other.use})


def with_counted(shares: Iterable[NodeShare], request: Request, pools: Pools) -> tuple[NodeShare, ...]:
    """Shares as read from an allocation text, with the memory and counters that the text leaves out."""
    others = pools.without(request).use
    return tuple(
        share._replace(memory=request.memory, use=others if number else request.use)
        for number, share in enumerate(shares)
    )


_new_share = tuple.__new__  # half the time of calling NodeShare, which is what placing many small tasks spends most on


def _visible(node: NodeCores, outside: bool) -> int:
    if not node.open:
        return 0
    return node.free & ~node.held if outside else node.free


def _total(node: NodeCores) -> Room:
    return Room(
        node.name, node.size, lambda r: node.gpus.room(r, now=False), node.memory or None, node.counters, True
    )  # fmt: skip


def _room(node: NodeCores, free: int) -> Room:
    memory = node.memory_free if node.memory else None
    return Room(
        node.name, free.bit_count(), lambda r: node.gpus.room(r, now=True), memory, node.counters_free, free == node.all
    )  # fmt: skip


def _natural(name: str) -> tuple[list[int | str], str]:
    """Sorts numbers within names by value; text and numbers alternate, so that like is compared with like."""
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], name
