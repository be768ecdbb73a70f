"""The dispatcher: the one process that decides which task gets which cores.

One loop: wait for mail (what workers report) or the bell (there is new work); release dependents; look at the heads
of the class lists; plan (pure, placement.py); claim, which puts the tasks into the nodes' inboxes. All it knows can be
rebuilt: a new dispatcher takes a new term, asks every node what it holds, and goes on. After any lost reply it does
the same, because a claim may have happened whose answer it never saw.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from pilotq.broker import keys
from pilotq.broker.errors import ServerUnavailable, Superseded
from pilotq.broker.floor import ClassInfo, Floor, Lane, Node, ends_by
from pilotq.broker.link import Address, Link
from pilotq.broker.placement import BackfillState, Waiting, plan
from pilotq.broker.reconciler import Reconciler
from pilotq.broker.records import (
    Ended,
    GivenBack,
    Hello,
    NodeInfo,
    NodeLost,
    NodeState,
    Nudge,
    Recall,
    ToDispatcher,
    format_allocation,
)
from pilotq.broker.settings import Settings
from pilotq.broker.store import Head, Slot, Store, to_worker
from pilotq.broker.task import order_of

log = logging.getLogger("pilotq.dispatcher")
RELEASE_LIMIT = 200  # dependents handled in one script call
CLAIM_LIMIT = 500  # tasks handed out in one script call
LANES_PER_TERM = 1_000_000_000  # lane numbers of different terms never meet
_mail = msgspec.msgpack.Decoder(ToDispatcher)


class Dispatcher:
    """Runs until `stop` is set or the queue is not ours any more (StateLost, Superseded)."""

    def __init__(self, address: Address, epoch: str, settings: Settings) -> None:
        self.link = Link(address)
        self.store = Store(self.link, epoch, settings)
        self.settings = settings
        self.stop = False
        self.paused = False
        self._reset()

    def _reset(self) -> None:
        self.floor = Floor(self.settings)
        self.classes: dict[str, ClassInfo] = {}
        self.heads: dict[str, Head] = {}
        self.backfill = BackfillState()
        self.reconciler = Reconciler(self.store)
        self.next_lane = 0
        self.next_check = 0.0
        self.planned: set[str] = set()
        self.gather_until = 0.0
        self.busy_told = -1
        self.used_told: dict[str, str] = {}
        self.fresh = False  # False: class heads must be read again before the next plan

    def run(self) -> None:
        silent_since: float | None = None
        while not self.stop:
            try:
                self._adopt()
                silent_since = None
                while not self.stop:
                    self._turn()
            except ServerUnavailable as error:
                now = time.monotonic()
                if silent_since is None:
                    silent_since = now
                    log.warning("%s; waiting up to %.0f s for it", error, self.settings.server_wait_s)
                elif now - silent_since > self.settings.server_wait_s:
                    raise
                self.link.close()
                time.sleep(0.1)

    # -- one turn -----------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over: a new term, and every node is asked what it holds. Nodes that do not answer get nothing."""
        self._reset()
        term = self.store.take_term()
        self.next_lane = term * LANES_PER_TERM
        self._read_wish()
        self.nodes_known = self._read_nodes()
        for info in self.nodes_known.values():
            self._send(info, Hello(term))
        self.planned = {name.decode() for name in self.link.call("SMEMBERS", keys.PLANNED)}
        self.gather_until = time.monotonic() + self.settings.gather_s
        self.reconciler.requeue_orphans(set(map(_address, self.nodes_known.values())))
        log.info("term %d: %d nodes asked what they hold", term, len(self.nodes_known))

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self.next_check:
            self._check(now)
        timeout = f"{max(self.next_check - now, 0.001):.3f}"
        reply, term = self.link.pipeline(
            [("BLMPOP", timeout, 2, keys.MAIL, keys.BELL, "LEFT", "COUNT", 200), ("GET", keys.TERM)]
        )
        now = time.monotonic()
        if reply is not None:
            key, items = reply
            if term is not None and int(term) != self.store.term:
                # Another dispatcher waits for this, maybe for the answer to its Hello.
                self.store.write("LPUSH", key, *reversed(items))
                raise Superseded("another dispatcher has taken over this queue")
            if key == keys.MAIL.encode():
                for item in items:
                    self._read_mail(item, now)
            else:
                self.fresh = False
                self.store.release(RELEASE_LIMIT)
        self._hand_out(now)

    def _check(self, now: float) -> None:
        """Once in a while: recall what is stuck, reconcile, look at all lists (a bell may have been lost)."""
        self.next_check = now + min(self.settings.reconcile_s, self.settings.recall_s / 4)
        self._recall(now)
        self._tell_used()
        if self.reconciler.due(now):
            self._read_wish()
            for info in self.reconciler.turn(now, self._addresses()):
                self._lose(info, "it has been silent for too long")
            if self.reconciler.tidied:
                self.classes = {}  # as many others may come: their number tells nothing
            self.store.release(RELEASE_LIMIT)
            self.fresh = False

    # -- mail ---------------------------------------------------------------------------------------------------

    def _read_mail(self, item: bytes, now: float) -> None:
        try:
            message = _mail.decode(item)
        except msgspec.DecodeError as error:  # nothing of a stranger may end the loop
            log.warning("unreadable mail dropped: %s", error)
            return
        if isinstance(message, Ended):
            node = self._node(message)
            if node is not None:
                for end in message.ends:
                    self.floor.end(node, end, self.classes.get(end.class_name), now)
        elif isinstance(message, GivenBack):
            self.fresh = False
            node = self._node(message)
            if node is not None:
                for class_name, count in message.counts.items():
                    self.floor.less_ahead(node, class_name, count, now)
        elif isinstance(message, NodeState):
            self._node_state(message, now)
        elif isinstance(message, NodeLost):
            self._node_lost(message)
        elif isinstance(message, Nudge):
            self._read_wish()

    def _node(self, message: Ended | GivenBack) -> Node | None:
        node = self.floor.nodes.get(message.node)
        return node if node is not None and node.info.incarnation == message.incarnation else None

    def _node_state(self, state: NodeState, now: float) -> None:
        if state.term not in (0, self.store.term):
            return  # the answer to an older dispatcher: ours will follow
        info = self._read_nodes().get(state.node)
        if info is None or info.incarnation != state.incarnation:
            return
        here = self.floor.nodes.get(state.node)
        if here is not None and here.info.incarnation == state.incarnation:
            return  # said at birth and asked by us, or sent again after a lost connection: what we know is newer
        known = self.nodes_known.get(state.node)
        if known is not None and known.incarnation < info.incarnation:
            self._lose(known, "it was started again")
        self.nodes_known[state.node] = info
        self._read_classes()
        self.floor.arrive(info, state, self.classes, now)
        self.fresh = False
        log.info("node %s: %d cores, %d lanes in use", info.name, len(info.cores), len(state.lanes))

    def _node_lost(self, message: NodeLost) -> None:
        # A worker that has left is not in the list of nodes any more, one that never said a word not in ours.
        for known in (self.nodes_known.get(message.node), self._read_nodes().get(message.node)):
            if known is not None and known.incarnation == message.incarnation:
                self._lose(known, message.why)
                return

    def _lose(self, info: NodeInfo, why: str) -> None:
        """An incarnation of a node is dead: what it held goes back to the lists."""
        known = self.nodes_known.get(info.name)
        if known is not None and known.incarnation == info.incarnation:
            del self.nodes_known[info.name]
            self.floor.depart(info.name)
        number = self.reconciler.requeue_node(_address(info), why)
        self.store.run("leave", info.name, info.incarnation, "")
        self.fresh = False
        log.warning("node %s is lost (%s): %d tasks go back", info.name, why, number)

    # -- handing out --------------------------------------------------------------------------------------------

    def _hand_out(self, now: float) -> None:
        if self.paused:
            self._tell_busy()
            return
        if not self._gathered(now):
            return
        if not self.fresh:
            self._read_heads()
        for _ in range(50):  # a claim may meet ghosts, and show heads that fit: plan again, but not for ever
            waiting = self._waiting()
            if not waiting or not self.floor.nodes:
                return
            running = ((lane.parts, lane.ends_by) for lane in self.floor.lanes.values())
            placed = plan(
                self.floor.cluster, waiting, running, self.backfill, now, self.settings.backfill_wait_s, CLAIM_LIMIT
            )
            groups = self._open_lanes(placed, now)
            self._add_ahead(groups)
            if not groups or not (self._claim(groups, now) or len(placed) == CLAIM_LIMIT):
                return

    def _gathered(self, now: float) -> bool:
        """Whether all nodes the pilot began with have come, or were waited for: which nodes a task gets must not
        depend on which worker was up a moment earlier."""
        if self.planned and now < self.gather_until and not self.planned <= self.floor.nodes.keys():
            return False
        self.planned = set()
        return True

    def _waiting(self) -> list[Waiting]:
        found = []
        for name, head in self.heads.items():
            info = self.classes.get(name)
            if info is not None and head.length:
                first = order_of(head.ids[0])
                orders = [first] * min(head.elements, 32) if head.elements else [order_of(i) for i in head.ids]
                found.append(Waiting(name, info.priority, info.request, orders, head.waiting))
        return found

    def _open_lanes(self, placed: Iterable[tuple[str, Any]], now: float) -> dict[str, list[Slot]]:
        groups: dict[str, list[Slot]] = {}
        for class_name, parts in placed:
            self.next_lane += 1
            lane = Lane(self.next_lane, class_name, parts, ends_by(self.classes[class_name], now))
            self.floor.open_lane(lane)
            node = self.floor.nodes[parts[0].node]
            groups.setdefault(class_name, []).append(Slot(node.address, lane.number, format_allocation(parts)))
        return groups

    def _add_ahead(self, groups: dict[str, list[Slot]]) -> None:
        """More tasks for lanes that will soon be free, but none on nodes that are being drained for a task that waits:
        lanes that go on there would never drain."""
        draining = self._draining()
        rests = {name: head.waiting - len(groups.get(name, ())) for name, head in self.heads.items()}
        for name in self._not_outranked(rests):
            for node in self.floor.nodes.values():
                number = min(self.floor.wanted_ahead(node, name, rests[name]), rests[name], CLAIM_LIMIT)
                if number > 0 and node.info.name not in draining:
                    groups.setdefault(name, []).extend([Slot(node.address, 0, "")] * number)
                    rests[name] -= number

    def _not_outranked(self, rests: dict[str, int]) -> list[str]:
        """The classes whose lanes may go on: of the highest priority that waits, and before any of that priority that
        has no lane yet."""
        waiting = [n for n, rest in rests.items() if rest > 0 and self.floor.cluster.possible(self.classes[n].request)]
        top = max((self.classes[name].priority for name in waiting), default=0)
        first = {n: order_of(self.heads[n].ids[0]) for n in waiting if self.classes[n].priority == top}
        blocked = min((order for name, order in first.items() if not self._has_lane(name)), default=math.inf)
        return [name for name, order in first.items() if order < blocked]

    def _draining(self) -> set[str]:
        hold = self.backfill.hold
        return {part.node for part in hold.parts} if hold is not None else set()

    def _has_lane(self, class_name: str) -> bool:
        return any(lane.class_name == class_name for lane in self.floor.lanes.values())

    def _claim(self, groups: dict[str, list[Slot]], now: float) -> bool:
        """Claim for these slots; returns whether another plan may find more (some slots stayed empty)."""
        asked = list(groups.items())
        short = False
        for (class_name, slots), (filled, head) in zip(asked, self.store.claim(asked), strict=True):
            self.heads[class_name] = head
            for slot in slots[:filled]:
                if not slot.lane:
                    self.floor.add_ahead(self.floor.nodes[slot.node.rpartition(":")[0]], class_name, 1, now)
            for slot in slots[filled:]:
                short = True
                if slot.lane:
                    lane = self.floor.lanes[slot.lane]
                    self.floor.close_lane(self.floor.nodes[lane.parts[0].node], lane)
        return short

    def _recall(self, now: float) -> None:
        """Take back what was handed ahead and is stuck, when it would fit elsewhere or holds up something better."""
        draining = self._draining()
        for node in self.floor.nodes.values():
            at_once = self.paused or node.info.name in draining
            for class_name, ahead in list(node.ahead.items()):
                if not at_once and now - ahead.since < self.settings.recall_s:
                    continue
                info = self.classes.get(class_name)
                parts = self.floor.cluster.reserve(info.request) if info is not None else None
                if parts is not None:
                    self.floor.cluster.release(parts)
                if parts is not None or at_once or (info is not None and self._outranked(info.priority)):
                    self._send(node.info, Recall(class_name, ahead.count))
                    ahead.since = now

    def _outranked(self, mine: int) -> bool:
        better = [i for n, i in self.classes.items() if i.priority > mine and n in self.heads and self.heads[n].length]
        return any(self.floor.cluster.possible(info.request) for info in better)

    # -- reading ------------------------------------------------------------------------------------------------

    def _read_heads(self) -> None:
        self._read_classes()
        names = list(self.classes)
        self.heads = {n: h for n, h in zip(names, self.store.heads(names), strict=True) if h.length}
        self.fresh = True

    def _read_classes(self) -> None:
        if int(self.link.call("HLEN", keys.CLASSES)) != len(self.classes):
            flat = self.link.call("HGETALL", keys.CLASSES)
            self.classes = {
                name.decode(): msgspec.json.decode(record, type=ClassInfo)
                for name, record in zip(flat[::2], flat[1::2], strict=True)
            }

    def _read_nodes(self) -> dict[str, NodeInfo]:
        infos = [msgspec.json.decode(record, type=NodeInfo) for record in self.link.call("HVALS", keys.NODES)]
        return {info.name: info for info in infos}

    def _read_wish(self) -> None:
        paused, journal = self.link.call("HMGET", keys.WISH, "paused", "journal")
        suspended = self.link.call("EXISTS", keys.SUSPENDED)
        paused = bool(paused or journal or suspended)
        if paused != self.paused:
            log.info("handing out is paused" if paused else "handing out goes on")
            self.fresh = False
        self.paused = paused
        if paused:
            self._recall(time.monotonic())

    def _tell_busy(self) -> None:
        busy = len(self.floor.lanes) + sum(a.count for n in self.floor.nodes.values() for a in n.ahead.values())
        if busy != self.busy_told:
            self.store.write("HSET", keys.WISH, "busy", busy)
            self.busy_told = busy

    def _tell_used(self) -> None:
        """For those who look."""
        floor = self.floor
        used = {name: f"{floor.cluster.used(name)} {len(node.lanes)}" for name, node in floor.nodes.items()}
        changed = [item for item in used.items() if self.used_told.get(item[0]) != item[1]]
        if changed:
            self.store.write("HSET", keys.USED, *(text for item in changed for text in item))
        self.used_told = used

    def _addresses(self) -> dict[str, NodeInfo]:
        return {_address(info): info for info in self.nodes_known.values()}

    def _send(self, info: NodeInfo, message: Hello | Recall) -> None:
        self.store.write(*to_worker(info.name, info.incarnation, message))


def _address(info: NodeInfo) -> str:
    return f"{info.name}:{info.incarnation}"


def run_dispatcher(address: Address, epoch: str, settings: Settings) -> int:
    """Run the dispatcher in this process until SIGTERM; returns the exit code."""
    dispatcher = Dispatcher(address, epoch, settings)

    def end(_signal: int, _frame: Any) -> None:
        dispatcher.stop = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dispatcher.run()
    return 0
