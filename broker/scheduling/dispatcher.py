"""The dispatcher: the one process that decides which task gets which cores.

One loop: wait for mail (what workers report) or the bell (there is new work); release dependents; look at the heads
of the class lists; plan (pure, placement.py); claim, which puts the tasks into the nodes' inboxes. All it knows can be
rebuilt: a new dispatcher takes a new term, asks every node what it holds, and goes on. After any lost reply it does
the same, because a claim may have happened whose answer it never saw.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.errors import ServerUnavailable, Superseded
from pilotq.broker.rq.ingest import Inbound
from pilotq.broker.rq.job_requests import Way
from pilotq.broker.scheduling import prefetch
from pilotq.broker.scheduling.inventory import ClassInfo, Floor, Lane, Node, ends_by
from pilotq.broker.scheduling.placement import BackfillState, plan
from pilotq.broker.scheduling.reconciler import Reconciler
from pilotq.broker.scheduling.status import Told
from pilotq.broker.scheduling.watch import Watch
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link
from pilotq.broker.store.messages import (
    End,
    Ended,
    GivenBack,
    Hello,
    Leaving,
    NodeInfo,
    NodeLost,
    NodeState,
    Nudge,
    Sweep,
    Swept,
    ToDispatcher,
    ToWorker,
    Withheld,
    format_allocation,
)
from pilotq.broker.store.store import Head, Slot, Store, to_worker
from pilotq.broker.tasks.model import Shared
from pilotq.broker.tasks.submit_context import capture, without_secret

log = logging.getLogger("pilotq.dispatcher")
RELEASE_LIMIT = 200  # dependents handled in one script call
CLAIM_LIMIT = 500  # tasks handed out in one script call
LANES_PER_TERM = 1_000_000_000  # lane numbers of different terms never meet
_mail = msgspec.msgpack.Decoder(ToDispatcher)


class Dispatcher:
    """Runs until `stop` is set or the queue is not ours any more (StateLost, Superseded).

    ``shared`` is what jobs of RQ's own producers get as their surroundings.
    """

    def __init__(self, address: Address, epoch: str, settings: Settings, shared: Shared | None = None) -> None:
        self.link = Link(address)
        self.store = Store(self.link, epoch, settings)
        self.inbound = Inbound(address, self.store, without_secret(shared or capture(), address.password))
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
        self.nodes_known: dict[str, NodeInfo] = {}
        self.told = Told(self.store)
        self.watch = Watch(self.store)
        self.gate = self.watch.gate
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
                self.close()
                time.sleep(0.1)

    def close(self) -> None:
        self.link.close()
        self.inbound.close()

    # -- one turn -----------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over: a new term, and every node is asked what it holds. Nodes that do not answer get nothing."""
        self._reset()
        term = self.store.take_term()
        failpoints.at("term taken")
        self.next_lane = term * LANES_PER_TERM
        self.inbound.begin(term)
        self._read_wish()
        self.nodes_known = self._read_nodes()
        for info in self.nodes_known.values():
            self._send(info, Hello(term))
        failpoints.at("nodes asked")
        self.planned = {name.decode() for name in self.link.call("SMEMBERS", keys.PLANNED)}
        self.gather_until = time.monotonic() + self.settings.gather_s
        self.reconciler.requeue_orphans({info.address for info in self.nodes_known.values()})
        log.info("term %d: %d nodes asked what they hold", term, len(self.nodes_known))

    def _refuse(self, way: Way) -> str | None:
        """Why no node of this pilot can ever hold what a job asks for."""
        return None if self.planned else self.floor.refuses(way.request)

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self.next_check:
            self._check(now)
        timeout = f"{max(self.next_check - now, 0.001):.3f}"
        wait = ("BLMPOP", timeout, 2, keys.MAIL, keys.BELL, "LEFT", "COUNT", 200)
        reply, term = self.inbound.wait(self.link, [wait, ("GET", keys.TERM)], self._refuse)
        now = time.monotonic()
        if reply is not None:
            failpoints.at("mail taken")
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
        self.told.used(self.floor)
        self.told.hold(self.backfill.hold, now)
        self.inbound.turn(now, self._refuse)
        self._mind_gate(now)
        if self.reconciler.due(now):
            self._read_wish()
            for info in self.reconciler.turn(now, self._addresses()):
                self._lose(info, "it was out of touch for too long")
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
            node = self.floor.speaker(message)
            if node is not None:
                self._read_ends(node, message.ends, now)
        elif isinstance(message, GivenBack):
            self.fresh = False
            node = self.floor.speaker(message)
            if node is not None:
                for class_name, count in message.counts.items():
                    self.floor.less_ahead(node, class_name, count, now)
        elif isinstance(message, NodeState):
            self._node_state(message, now)
        elif isinstance(message, (NodeLost, Leaving)):
            self._node_goes(message, now)
        elif isinstance(message, (Withheld, Swept)):
            self.floor.settle(message)
        elif isinstance(message, Nudge):
            self._read_wish()

    def _read_ends(self, node: Node, ends: Iterable[End], now: float) -> None:
        judge = self.watch.judge
        news, known = False, len(judge.cases)
        for end in ends:
            self.floor.end(node, end, self.classes.get(end.class_name), now)
            if end.said or end.spared or end.lane in judge.trials:
                judge.heard(node.info.name, end, now)
                news = True
        if news and judge.cases:
            self._mind_gate(now)
        if len(judge.cases) > known:
            self._recall(now)

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
        for host in {host for host, _ in state.guests} - {known.address for known in self.nodes_known.values()}:
            self._send(info, Sweep(host))
        if info.job:
            self.gate.read()  # whoever started it has said when its allocation ends
        self._mind_gate(now)
        self.fresh = False
        log.info("node %s: %d cores, %d lanes in use", info.name, len(info.cores), len(state.lanes))

    def _node_goes(self, message: NodeLost | Leaving, now: float) -> None:
        if isinstance(message, Leaving):
            self.gate.leaving(message)
            self._mind_gate(now)
            return
        # A worker that has left is not in the list of nodes any more, one that never said a word not in ours.
        for known in (self.nodes_known.get(message.node), self._read_nodes().get(message.node)):
            if known is not None and known.incarnation == message.incarnation:
                self._lose(known, message.why, clean=message.clean)
                return

    def _mind_gate(self, now: float) -> None:
        for info, pardon in self.watch.turn(self.floor, self.classes, self.nodes_known, now):
            self._send(info, pardon)
        for info, word in self.gate.apply(self.floor, now):
            log.info("node %s is told to leave (%s)", info.name, word.reason)
            self._send(info, word)

    def _lose(self, info: NodeInfo, why: str, *, clean: bool = False) -> None:
        """An incarnation of a node is dead, or has left cleanly: what it held goes back to the lists."""
        known = self.nodes_known.get(info.name)
        if known is not None and known.incarnation == info.incarnation:
            del self.nodes_known[info.name]
            for node, message in self.floor.depart(info.name, info.address, clean=clean):
                self._send(node.info, message)
        number = self.reconciler.requeue_node(info.address, why, clean=clean)
        self.store.run("leave", info.name, info.incarnation, "")
        self.fresh = False
        log.warning("node %s is lost (%s): %d tasks go back", info.name, why, number)

    # -- handing out --------------------------------------------------------------------------------------------

    def _hand_out(self, now: float) -> None:
        if self.paused:
            self.told.busy(self.floor)
            return
        if not self._gathered(now):
            return
        if not self.fresh:
            self._read_heads()
        for _ in range(50):  # a claim may meet ghosts, and show heads that fit: plan again, but not for ever
            waiting = prefetch.waiting(self.classes, self.heads)
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
        if len(self.floor.nodes) < self.gate.least and self.planned:
            return False
        if self.planned and now < self.gather_until and not self.planned <= self.floor.nodes.keys():
            return False
        self.planned = set()
        return True

    def _open_lanes(self, placed: Iterable[tuple[str, Any]], now: float) -> dict[str, list[Slot]]:
        groups: dict[str, list[Slot]] = {}
        judge, tried = self.watch.judge, len(self.watch.judge.trials)
        for class_name, parts in placed:
            self.next_lane += 1
            if judge.cases and not judge.begin(parts, self.next_lane):
                self.floor.cluster.release(parts)
                continue
            lane = Lane(self.next_lane, class_name, parts, ends_by(self.classes[class_name], now), now)
            self.floor.open_lane(lane)
            node = self.floor.nodes[parts[0].node]
            groups.setdefault(class_name, []).append(Slot(node.address, lane.number, format_allocation(parts)))
        if len(judge.trials) > tried:
            self._mind_gate(now)  # a node that is tried gets nothing else
        return groups

    def _add_ahead(self, groups: dict[str, list[Slot]]) -> None:
        """More tasks for lanes that will soon be free."""
        shut = prefetch.shut(self.floor, self.backfill)
        rests = {name: head.waiting - len(groups.get(name, ())) for name, head in self.heads.items()}
        for name in prefetch.not_outranked(self.floor, self.classes, self.heads, rests):
            for node in self.floor.nodes.values():
                number = min(self.floor.wanted_ahead(node, name, rests[name]), rests[name], CLAIM_LIMIT)
                late = self.floor.cluster.is_late(node.info.name, self.classes[name].request)
                if number > 0 and node.info.name not in shut and not late:
                    groups.setdefault(name, []).extend([Slot(node.address, 0, "")] * number)
                    rests[name] -= number

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
        shut = set(self.floor.nodes) if self.paused else prefetch.shut(self.floor, self.backfill)
        for info, word in prefetch.recalls(self.floor, self.classes, self.heads, shut, now):
            self._send(info, word)

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
        self.gate.read()
        self._mind_gate(time.monotonic())  # what is submitted after a node was closed must not get there
        suspended = self.link.call("EXISTS", keys.SUSPENDED)
        paused = bool(paused or journal or suspended)
        if paused != self.paused:
            log.info("handing out is paused" if paused else "handing out goes on")
            self.fresh = False
        self.paused = paused
        if paused:
            self._recall(time.monotonic())

    def _addresses(self) -> dict[str, NodeInfo]:
        return {info.address: info for info in self.nodes_known.values()}

    def _send(self, info: NodeInfo, message: ToWorker) -> None:
        self.store.write(*to_worker(info.name, info.incarnation, message))


def run_dispatcher(address: Address, epoch: str, settings: Settings, shared: Shared) -> int:
    """Run the dispatcher in this process until SIGTERM; returns the exit code."""
    dispatcher = Dispatcher(address, epoch, settings, shared)

    def end(_signal: int, _frame: Any) -> None:
        dispatcher.stop = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dispatcher.run()
    return 0
