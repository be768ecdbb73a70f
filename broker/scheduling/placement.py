"""Placement: which waiting tasks get which cores now, in one pass over their classes. Pure: time is an argument.

Priority is strict; tasks of equal priority go by their order numbers, across classes. A class whose head does not fit
is blocked for the rest of the pass, and later tasks may overtake it (backfill). The first blocked task, the one that
all others of its pass come after, is overtaken for at most W seconds. Then cores are held for it (`Hold`): nobody
else may use them but tasks that end before the hold's cores are free by the limits of what runs there, and tasks of
higher priority. So it starts at latest W + the longest limit of a running task (its run time where there is no
limit) after it was first seen blocked, plus the time to the next pass; an endless stream of small tasks cannot
starve a large one.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import itemgetter
from typing import NamedTuple

import msgspec

from pilotq.broker.scheduling.cluster import Cluster, is_plain
from pilotq.broker.scheduling.core_masks import bits, compact, lowest, mask_of
from pilotq.broker.scheduling.node_cores import NodeCores
from pilotq.broker.store.resources import NodeShare
from pilotq.broker.tasks.model import Request

__all__ = ["BackfillState", "Cluster", "Hold", "Waiting", "drain", "plan"]
Shares = tuple[NodeShare, ...]


class Waiting(msgspec.Struct, frozen=True):
    """The waiting tasks of one class list; class names are unique within a pass.

    ``orders`` (never empty) are the order numbers of the first of them, ascending; of all ``count``. Those beyond
    ``orders`` are taken to go on in the same steps, which is exact for tasks of one submission and for arrays.
    """

    class_name: str
    priority: int
    request: Request
    orders: Sequence[int]
    count: int


class Hold(NamedTuple):
    """The one reservation that is being drained for the first blocked task.

    ``frees_at`` is when the held cores are free by the limits of what runs there, math.inf if that is unknown.
    """

    class_name: str
    priority: int
    since: float
    shares: Shares
    frees_at: float
    request: Request

    def admits(self, waiting: Waiting, now: float) -> bool:
        """Whether a task of another class may use held cores."""
        if waiting.priority > self.priority:
            return True
        limit = waiting.request.limit
        return limit is not None and now + limit <= self.frees_at < math.inf


class BackfillState:
    """What one pass keeps for the next. Starts empty, also when a dispatcher takes over."""

    def __init__(self) -> None:
        self.since: dict[str, float] = {}  # blocked class -> when its head was first seen blocked
        self.hold: Hold | None = None


def plan(
    cluster: Cluster,
    waiting: Iterable[Waiting],
    running: Iterable[tuple[Shares, float]],
    state: BackfillState,
    now: float,
    wait_s: float = 1.0,
    limit: int = 500,
) -> list[tuple[str, Shares]]:
    """Reserve for up to ``limit`` waiting tasks; returns (class name, shares), in each class's order.

    The reservations are made in ``cluster``, and ``state`` is brought up to date. ``running`` is each live
    reservation with the time by which it must have ended (math.inf if unknown); it is read only when a hold begins,
    so give a generator. Times are seconds of any one clock. A class that no set of open nodes can ever hold is
    passed over; it neither blocks others nor gets a hold.
    """
    cluster.set_time(now)
    return _Pass(cluster, running, state, now, wait_s).run(waiting, limit)


class _Turn:
    """A class in the heap, and how many of its tasks this pass has placed."""

    __slots__ = ("done", "waiting")

    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting
        self.done = 0

    def _step(self) -> float:
        orders = self.waiting.orders
        return (orders[-1] - orders[0]) / max(len(orders) - 1, 1)

    def order(self) -> float:
        """The order number of the next task."""
        orders = self.waiting.orders
        beyond = self.done - len(orders) + 1
        return orders[self.done] if beyond <= 0 else orders[-1] + beyond * self._step()

    def until(self, order: float) -> int:
        """How many of the next tasks have at most this order number; the very next one is known to."""
        orders, count, after = self.waiting.orders, self.waiting.count, self.done + 1
        known = len(orders)
        if after < known and orders[after] > order:  # the usual case where classes alternate
            return 1
        end = bisect_right(orders, order)
        if end == known:
            step = self._step()
            end = known + int((order - orders[-1]) / step) if step else count
        return max(min(end, count) - self.done, 1)


Entry = tuple[int, float, str, _Turn]  # minus priority, order of the next task, class name


class _Pass:
    def __init__(
        self, cluster: Cluster, running: Iterable[tuple[Shares, float]], state: BackfillState, now: float, wait_s: float
    ) -> None:
        self.cluster = cluster
        self.running = running
        self.state = state
        self.now = now
        self.wait_s = wait_s
        self.blocked: dict[str, float] = {}

    def run(self, waiting: Iterable[Waiting], limit: int) -> list[tuple[str, Shares]]:
        heap: list[Entry] = [(-w.priority, w.orders[0], w.class_name, _Turn(w)) for w in waiting if w.count]
        hold = self.state.hold
        # The cluster drops a hold when a node of it is removed or closed.
        if hold and not (self.cluster.holding and any(entry[2] == hold.class_name for entry in heap)):
            self._end_hold()
        heapq.heapify(heap)
        placed: list[tuple[str, Shares]] = []
        while heap and len(placed) < limit:
            rank, _, name, turn = heap[0]
            count = turn.waiting.count - turn.done
            if len(heap) > 1:
                rival = heap[1] if len(heap) == 2 or heap[1] < heap[2] else heap[2]
                if rival[0] == rank:
                    count = turn.until(rival[1])
            found = self._reserve(turn.waiting, min(count, limit - len(placed)))
            placed += zip(repeat(name), found)
            turn.done += len(found)
            if found and turn.done < turn.waiting.count:
                # Perhaps not all of ``count``: then the next try finds it blocked.
                heapq.heapreplace(heap, (rank, turn.order(), name, turn))
                continue
            heapq.heappop(heap)
            if not found:
                self._block(turn, alone=not heap)
                if self.blocked and not self.cluster.any_free:
                    break
        self._remember(heap)
        return placed

    def _remember(self, heap: list[Entry]) -> None:
        """Keep since when classes have been blocked; those left in the heap are blocked only if nothing is free."""
        since = self.state.since
        for *_, name, turn in heap:
            if turn.done:
                continue
            if name in since:
                self.blocked[name] = since[name]
            elif not self.cluster.any_free:
                self.blocked[name] = self.now
        self.state.since = self.blocked

    def _reserve(self, waiting: Waiting, count: int) -> list[Shares]:
        hold = self.state.hold
        if hold is None:
            return self.cluster.reserve_many(waiting.request, count)
        if hold.class_name == waiting.class_name:
            found = self.cluster.reserve_many(waiting.request, 1, held=True)
            if found:
                self._end_hold()
            return found
        found = self.cluster.reserve_many(waiting.request, count)
        if len(found) < count and hold.admits(waiting, self.now):
            found += self.cluster.reserve_many(waiting.request, count - len(found), held=True)
        return found

    def _block(self, turn: _Turn, alone: bool) -> None:
        """The next task of a class does not fit. If it is the first such of this pass, it may get a hold.

        ``alone``: no class comes after it that could overtake.
        """
        waiting, state = turn.waiting, self.state
        if not self.cluster.is_possible(waiting.request):
            return
        since = self.now if turn.done else state.since.get(waiting.class_name, self.now)
        is_first = not self.blocked
        self.blocked[waiting.class_name] = since
        if not is_first:
            return
        # Decided before any later task of this very pass is placed: none may overtake after W.
        due = self.now - since >= self.wait_s and not alone
        if state.hold is not None:
            if state.hold.class_name == waiting.class_name:
                return
            # Of equal priority and earlier in order (given back, or released late): its own W counts, then the hold
            # is its. Higher priority ends a hold at once.
            if waiting.priority <= state.hold.priority and not due:
                return
            self._end_hold()
        drained = drain(self.cluster, waiting.request, self.running) if due else None
        if drained is not None:
            shares, frees_at = drained
            state.hold = Hold(waiting.class_name, waiting.priority, since, shares, frees_at, waiting.request)
            self.cluster.hold(shares, waiting.request)

    def _end_hold(self) -> None:
        self.state.hold = None
        self.cluster.unhold()


def drain(cluster: Cluster, request: Request, running: Iterable[tuple[Shares, float]]) -> tuple[Shares, float] | None:
    """The cores that can be free soonest for a request, and when; math.inf if the limits do not tell.

    Nodes that free soonest by limits come first, then those with most free cores. None if it can never fit.
    """
    ends: dict[str, list[tuple[float, NodeShare]]] = {}
    for shares, end in running:
        for share in shares:
            ends.setdefault(share.node, []).append((end, share))
    open_nodes = (node for node in cluster.open_nodes if not cluster.is_late(node.name, request))
    nodes = [node for node in open_nodes if _could_hold(node, request)]
    if request.spread:
        return _drain_anywhere(nodes, request, ends)
    wanted = (request.nodes or (1, 1))[0]
    if len(nodes) < wanted:
        return None
    for known in ends.values():
        known.sort(key=itemgetter(0))
    ready = [(_ready(n, request, ends.get(n.name, [])), -n.free.bit_count(), n.index, n) for n in nodes]
    chosen = sorted(heapq.nsmallest(wanted, ready), key=itemgetter(2))
    held = tuple(NodeShare(node.name, _soonest(node, request, ends.get(node.name, []))) for *_, node in chosen)
    return held, max(when for when, *_ in chosen)


def _could_hold(node: NodeCores, request: Request) -> bool:
    if not (request.spread or request.whole) and node.size < request.cores[0]:
        return False
    return node.could_give_extras(request)


def _size(node: NodeCores, request: Request) -> int:
    return node.size if request.whole else request.cores[0]


def _ready(node: NodeCores, request: Request, ends: list[tuple[float, NodeShare]]) -> float:
    """When the node alone could hold its share of the request; -inf for now, inf if no limit tells."""
    size = _size(node, request)
    if is_plain(request):  # counting is enough, and large clusters run very many tasks
        cores = node.free.bit_count()
        when = -math.inf
        for end, share in ends:
            if cores >= size:
                break
            when, cores = end, cores + len(share.cores)
        return when if cores >= size else math.inf
    future = node.copy()
    when = -math.inf
    for end, share in ends:
        if future.free.bit_count() >= size and future.has_free_extras(request):
            break
        when = end
        future.release(share)
    return when if future.free.bit_count() >= size and future.has_free_extras(request) else math.inf


def _soonest(node: NodeCores, request: Request, ends: list[tuple[float, NodeShare]]) -> tuple[int, ...]:
    """The cores to hold on a node: those that are free, then those that will be soonest."""
    size = _size(node, request)
    if node.free.bit_count() >= size:
        return tuple(bits(compact(node.free, node.groups, size)))
    mask = node.free
    # Last come cores that are reserved without a known end.
    for more in [*(mask_of(share.cores) for _, share in ends), node.all]:
        mask |= lowest(more & ~mask, min(size - mask.bit_count(), (more & ~mask).bit_count()))
    return tuple(bits(mask))


def _drain_anywhere(
    nodes: list[NodeCores], request: Request, ends: dict[str, list[tuple[float, NodeShare]]]
) -> tuple[Shares, float] | None:
    """As `drain`, for cores that may lie on several nodes: those that are free, then those that free soonest."""
    steps = [(-math.inf, node, node.free) for node in nodes]
    for node in nodes:
        known = node.free
        for end, share in ends.get(node.name, []):
            steps.append((end, node, mask_of(share.cores)))
            known |= mask_of(share.cores)
        steps.append((math.inf, node, node.all & ~known))
    steps.sort(key=itemgetter(0))
    held: dict[str, int] = {}
    left, when = request.cores[0], -math.inf
    for end, node, mask in steps:
        count = min(left, mask.bit_count())
        if count:
            held[node.name] = held.get(node.name, 0) | lowest(mask, count)
            left, when = left - count, end
    if left:
        return None
    return tuple(NodeShare(node.name, tuple(bits(held[node.name]))) for node in nodes if node.name in held), when
