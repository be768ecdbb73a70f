"""The dispatcher: the one process that decides which task gets which cores.

One loop: wait for events (what workers report) or for a wake-up (there is new work); release dependents; read the
heads of the class lists; plan (pure, placement.py); claim, which puts the tasks into the nodes' inboxes. All it knows
can be rebuilt: a new dispatcher takes a new term, asks every node for its state, and goes on. After any lost reply it
does the same, because a claim may have happened whose answer it never saw.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.errors import ServerUnavailable, Superseded
from pilotq.broker.log import log
from pilotq.broker.os_strings import UNREADABLE
from pilotq.broker.rq.ingest import RqIngest
from pilotq.broker.rq.job_requests import JobRequest
from pilotq.broker.scheduling.availability import Availability
from pilotq.broker.scheduling.backlog import CLASSES_MAX, Backlog, Room, waiting_tasks
from pilotq.broker.scheduling.giving_way import is_nice, make_room, plan_nice
from pilotq.broker.scheduling.inventory import Inventory, NodeRecord
from pilotq.broker.scheduling.placement import BackfillState, Shares, plan
from pilotq.broker.scheduling.prefetch import Prefetch
from pilotq.broker.scheduling.reconciler import Reconciler
from pilotq.broker.scheduling.slot import Slot, ends_by
from pilotq.broker.scheduling.status import StatusPublisher
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Argument, Connection
from pilotq.broker.store.messages import (
    ControlChanged,
    Draining,
    ExecutionEnd,
    NodeLost,
    NodeReport,
    PartlyReleased,
    StateReport,
    StateRequest,
    Sweep,
    Swept,
    TasksReturned,
    ToDispatcher,
    ToWorker,
    Vacate,
)
from pilotq.broker.store.registry import read_node, registered_nodes
from pilotq.broker.store.resources import NodeInfo, class_info, format_allocation
from pilotq.broker.store.store import ClaimTarget, Head, Store, to_worker
from pilotq.broker.tasks.submit_context import SubmitContext, capture_context, without_secret

RELEASE_LIMIT = 200  # dependents handled in one script call
CLAIM_LIMIT = 500  # tasks claimed in one script call
SLOTS_PER_TERM = 1_000_000_000  # slot numbers of different terms never meet
_event = msgspec.msgpack.Decoder(ToDispatcher)


class Dispatcher:
    """Runs until `stop` is set or the queue is not ours any more (StateLost, Superseded).

    ``shared`` is the submit context of jobs of RQ's own producers.
    """

    def __init__(
        self, address: Address, queue_id: str, settings: Settings, shared: SubmitContext | None = None
    ) -> None:
        self.link = Connection(address)
        self.store = Store(self.link, queue_id, settings)
        self.ingest = RqIngest(address, self.store, without_secret(shared or capture_context(), address.password))
        self.settings = settings
        self.stop = False
        self.paused = False
        self._reset()

    def _reset(self) -> None:
        self.inventory = Inventory(self.settings)
        self.backlog = Backlog(self.store)
        self.damaged_nodes: set[str] = set()
        self.backfill, self.nice_backfill = BackfillState(), BackfillState()
        self.reconciler = Reconciler(self.store)
        self.next_slot = 0
        self.next_check = 0.0
        self.expected_nodes: set[str] = set()
        self.initial_wait_until = 0.0
        self.known_nodes: dict[str, NodeInfo] = {}
        self.status = StatusPublisher(self.store)
        self.availability = Availability(self.store, self.inventory)
        self.prefetch = Prefetch(self.inventory)
        self.heads_current = False  # False: what has changed must be read before the next plan

    def run(self) -> None:
        unreachable_since: float | None = None
        while not self.stop:
            try:
                self._take_over()
                unreachable_since = None
                while not self.stop:
                    self._turn()
            except ServerUnavailable as error:
                now = time.monotonic()
                if unreachable_since is None:
                    unreachable_since = now
                    log(f"{error}; waiting up to {self.settings.server_wait_s:.0f} s for it", level="warning")
                elif now - unreachable_since > self.settings.server_wait_s:
                    raise
                self.close()
                time.sleep(0.1)

    def close(self) -> None:
        self.link.close()
        self.ingest.close()

    # -- one turn -----------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Take a new term, and ask every node for its state. Nodes that do not answer get no tasks."""
        self._reset()
        term = self.store.take_term()
        failpoints.hit("term taken")
        self.next_slot = term * SLOTS_PER_TERM
        self.ingest.start(term)
        self._read_control()
        self.known_nodes = self._read_nodes()
        for info in self.known_nodes.values():
            self._send(info, StateRequest(term))
        failpoints.hit("nodes asked")
        named = [name.decode() for name in self.link.call("LRANGE", keys.EXPECTED_NODES, 0, -1)]
        self.inventory.cluster.set_order(named)
        self.expected_nodes = set(named)
        self.initial_wait_until = time.monotonic() + self.settings.initial_nodes_wait_s
        self.backlog.read_all()
        self.reconciler.requeue_orphans({info.address for info in self.known_nodes.values()})
        log(f"term {term}: {len(self.known_nodes)} nodes asked for their state")

    def _refuse(self, job: JobRequest) -> str | None:
        """Why no node of this pilot can ever hold what a job asks for."""
        return None if self.expected_nodes else self.inventory.never_fits(job.request)

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self.next_check:
            self._run_periodic_work(now)
        reads_on = self.backlog.more and not (self.paused or self.expected_nodes)
        timeout = f"{max(0.0 if reads_on else self.next_check - now, 0.001):.3f}"
        wait = ("BLMPOP", timeout, 2, keys.EVENTS, keys.WAKEUP, "LEFT", "COUNT", 200)
        # At the moment when there is something:
        look: list[tuple[Argument, ...]] = [("LPOP", keys.WAKEUP), ("GET", keys.TERM), ("EXISTS", keys.RELEASE)]
        if not (self.inventory.slots or self.backlog.heads):  # what comes is new work: one round trip less
            look.append(self.backlog.command())
        reply, woken, term, released, *changed = self.ingest.pipeline(self.link, [wait, *look], self._refuse)
        now = time.monotonic()
        for answer in (reply, woken, term, released):
            if isinstance(answer, Exception):
                raise answer
        taken = [] if reply is None else [(reply[0].decode(), reply[1])]
        taken += [] if woken is None else [(keys.WAKEUP, [woken])]
        if taken:
            failpoints.hit("events taken")
        if taken and term is not None and int(term) != self.store.term:
            for key, items in taken:  # another dispatcher waits for this, maybe for the answer to its StateRequest
                self.store.write("LPUSH", key, *reversed(items))
            raise Superseded("another dispatcher has taken over this queue")
        is_read = [self.backlog.take(answer) for answer in changed] == [True]
        # A wake-up often comes with an event, and needs no turn of its own then.
        if changed or any(key == keys.WAKEUP for key, _ in taken):
            self.heads_current = is_read
        for key, items in taken:
            for item in items if key == keys.EVENTS else ():
                self._handle_event(item, now)
        if taken and released:  # what comes next waits for it: not only when its wake-up is read
            *_, [heads] = self.store.release_dependents(RELEASE_LIMIT, self.backlog.command())
            self.heads_current = self.backlog.take(heads)
        self._start_tasks(now)

    def _run_periodic_work(self, now: float) -> None:
        """Once in a while: retract what is stuck, reconcile, read all lists (a wake-up may have been lost)."""
        self.next_check = now + min(self.settings.reconcile_s, self.settings.retract_after_s / 4)
        self._retract(now)
        self.status.publish_usage(self.inventory)
        self.status.publish_hold(self.backfill.hold or self.nice_backfill.hold, now)
        self.ingest.poll(now, self._refuse)
        self._update_availability(now)
        if self.reconciler.due(now):
            self._read_control()
            names = self.backlog.read_some()
            walked, idle = self.backlog.walked, self._is_idle() and not self.backlog.heads
            for info in self.reconciler.turn(now, self._addresses(), names, walked=walked, idle=idle):
                self._remove_node(info, "it was out of touch for too long")
            self.store.release_dependents(RELEASE_LIMIT)
            self.heads_current = False

    # -- events -------------------------------------------------------------------------------------------------

    def _handle_event(self, item: bytes, now: float) -> None:
        try:
            message = _event.decode(item)
        except UNREADABLE as error:  # whatever somebody else has written there must not end the loop
            log(f"unreadable event dropped: {error}", level="error")
            return
        if isinstance(message, NodeReport):
            node = self.inventory.sender(message)
            if node is not None:
                self._handle_ends(node, message.ends, now)
        elif isinstance(message, TasksReturned):
            self.heads_current = False
            node = self.inventory.sender(message)
            if node is not None:
                for class_name, count in message.counts.items():
                    self.prefetch.remove(node, class_name, count, now)
        elif isinstance(message, StateReport):
            self._handle_state(message, now)
        elif isinstance(message, (NodeLost, Draining)):
            self._handle_departure(message, now)
        elif isinstance(message, (PartlyReleased, Swept)):
            self.inventory.release_swept(message)
        elif isinstance(message, ControlChanged):
            self._read_control()

    def _handle_ends(self, node: NodeRecord, ends: Iterable[ExecutionEnd], now: float) -> None:
        changed, suspected = False, self.availability.suspected
        released: dict[str, list[tuple[Slot, bool]]] = {}
        for end in ends:
            self.prefetch.record_end(node, end, now)
            if (slot := self.inventory.end_execution(node, end, now)) is not None:
                released.setdefault(slot.class_name, []).append((slot, end.seconds >= 0))
            changed |= self.availability.record_end(node.info.name, end, now)
        if changed:
            self._update_availability(now)
        if released.keys() & node.prefetched.keys():
            for message in self.prefetch.reopen(node, released, self._first(), self._closed(), now):
                self._send(node.info, message)
        if self.availability.suspected > suspected:
            self._retract(now)

    def _handle_state(self, state: StateReport, now: float) -> None:
        if state.term not in (0, self.store.term):
            return  # the answer to an older dispatcher: ours will follow
        info = read_node(self.link, state.node)
        if info is None or info.incarnation != state.incarnation or not info.cores:
            return  # one whose record is damaged reports again when it has written another one
        present = self.inventory.nodes.get(state.node)
        if present is not None and present.info.incarnation == state.incarnation:
            return  # sent at its start and asked by us, or sent again after a lost connection: what we know is newer
        known = self.known_nodes.get(state.node)
        if known is not None and known.incarnation < info.incarnation:
            self._remove_node(known, "it was started again")
        self.known_nodes[state.node] = info
        self.inventory.add_node(info, state, now)
        for primary in {primary for primary, _ in state.remote} - {node.address for node in self.known_nodes.values()}:
            self._send(info, Sweep(primary))
        if info.job:
            self.availability.read()  # whoever started it has written when its allocation ends
        self._update_availability(now)
        self.heads_current = False
        log(f"node {info.name}: {len(info.cores)} cores, {len(state.slots)} slots in use", node=info.name)

    def _handle_departure(self, message: NodeLost | Draining, now: float) -> None:
        if isinstance(message, Draining):
            self.availability.set_draining(message)
            self._update_availability(now)
            return
        # A worker that has left is not registered any more, one that never reported is not among our known nodes.
        for known in (self.known_nodes.get(message.node), read_node(self.link, message.node)):
            if known is not None and known.incarnation == message.incarnation:
                self._remove_node(known, message.why, clean=message.clean)
                return

    def _update_availability(self, now: float) -> None:
        for info, message in self.availability.update(self.known_nodes, now):
            self._send(info, message)

    def _remove_node(self, info: NodeInfo, why: str, *, clean: bool = False) -> None:
        """An incarnation of a node is lost, or has left cleanly: its tasks go back to the lists."""
        known = self.known_nodes.get(info.name)
        if known is not None and known.incarnation == info.incarnation:
            del self.known_nodes[info.name]
            for node, message in self.inventory.remove_node(info.name, info.address, clean=clean):
                self._send(node.info, message)
        number = self.reconciler.requeue_node(info.address, why, clean=clean)
        self.store.run("deregister", info.name, info.incarnation, "")
        self.heads_current = False
        log(f"node {info.name} is lost ({why}): {number} tasks go back", level="warning", node=info.name)

    # -- starting tasks -----------------------------------------------------------------------------------------

    def _start_tasks(self, now: float) -> None:
        if self.paused:
            self.status.publish_busy(self.inventory)
            return
        if not self._initial_nodes_present(now):
            return
        if not self.heads_current or self.backlog.more:
            self.backlog.read_changed()
            self.heads_current = True
        self.inventory.cluster.set_time(now)
        for _ in range(50):  # a claim may meet missing records, and show heads that fit: plan again, but not for ever
            heads = self._first()
            if not heads:
                return
            placed = self._place(heads, now)
            targets = self._open_slots(placed, now)
            self.prefetch.add_targets(targets, heads, self.backfill, CLAIM_LIMIT)
            if not targets or not (
                self._claim(targets, now) or len(placed) == CLAIM_LIMIT or (placed and len(heads) >= CLASSES_MAX)
            ):
                return

    def _place(self, heads: dict[str, Head], now: float) -> list[tuple[str, Shares]]:
        """Reserve for waiting tasks: for nice ones when nothing else could have their cores."""
        nice = {name: head for name, head in heads.items() if is_nice(name)}
        others = {name: head for name, head in heads.items() if name not in nice} if nice else heads
        wait_s = self.settings.backfill_wait_s
        placed = self._plan(plan, others, self.backfill, now, wait_s, CLAIM_LIMIT)
        hold = self.backfill.hold
        slots, in_the_way = make_room(
            self.inventory, others, self.backfill.since, "" if hold is None else hold.class_name
        )
        asked: dict[str, list[int]] = {}
        for slot in slots:
            asked.setdefault(self.inventory.owner(slot).info.name, []).append(slot.number)
        for node, numbers in asked.items():
            self._send(self.inventory.nodes[node].info, Vacate(numbers))
        if nice and not in_the_way and len(placed) < CLAIM_LIMIT:
            placed += self._plan(plan_nice, nice, self.nice_backfill, now, wait_s, CLAIM_LIMIT - len(placed))
        elif not nice:
            self.nice_backfill = BackfillState()
        return placed

    def _plan(
        self,
        place: Callable[..., list[tuple[str, Shares]]],
        heads: dict[str, Head],
        state: BackfillState,
        now: float,
        wait_s: float,
        limit: int,
    ) -> list[tuple[str, Shares]]:
        waiting = waiting_tasks(heads, limit, self._room())
        running = ((slot.shares, slot.ends_by) for slot in self.inventory.slots.values())
        return place(self.inventory.cluster, waiting, running, state, now, wait_s, limit)

    def _initial_nodes_present(self, now: float) -> bool:
        """Whether all nodes the pilot began with are there, or were waited for long enough: which nodes a task gets
        must not depend on which worker was up a moment earlier."""
        if len(self.inventory.nodes) < self.availability.min_nodes and self.expected_nodes:
            return False
        if (
            self.expected_nodes
            and now < self.initial_wait_until
            and not self.expected_nodes <= self.inventory.nodes.keys()
        ):
            return False
        self.expected_nodes = set()
        return True

    def _first(self) -> dict[str, Head]:
        """The heads of the class lists that placement looks at."""
        if not self.inventory.nodes:
            return {}
        cluster = self.inventory.cluster
        return self.backlog.first(cluster.is_possible, cluster.widenings, self._room())

    def _room(self) -> Room:
        """How many more tasks of a class may begin that has a limit; none while a node has not said what it runs."""
        return self.inventory.room if self._all_have_reported() else lambda *_: 0

    def _all_have_reported(self) -> bool:
        return self.known_nodes.keys() <= self.inventory.nodes.keys()

    def _open_slots(self, placed: Iterable[tuple[str, Shares]], now: float) -> dict[str, list[ClaimTarget]]:
        """A slot for each reservation; returns what to claim for, by class."""
        targets: dict[str, list[ClaimTarget]] = {}
        for class_name, shares in placed:
            self.next_slot += 1
            if not self.availability.admits(shares, self.next_slot):
                self.inventory.cluster.release(shares)
                continue
            slot = Slot(self.next_slot, class_name, shares, ends_by(class_info(class_name), now), now)
            self.inventory.open_slot(slot)
            node = self.inventory.nodes[shares[0].node]
            targets.setdefault(class_name, []).append(ClaimTarget(node.address, slot.number, format_allocation(shares)))
        return targets

    def _claim(self, targets: dict[str, list[ClaimTarget]], now: float) -> bool:
        """Claim tasks for these targets; returns whether another plan may find more (some got none)."""
        asked = list(targets.items())
        short, opened = False, []
        for (class_name, wanted), (filled, head) in zip(asked, self.store.claim(asked), strict=True):
            self.backlog.set(class_name, head)
            for target in wanted[:filled]:
                node = self.inventory.nodes[target.node.rpartition(":")[0]]
                if target.slot:
                    opened.append((self.inventory.slots[target.slot], node))
                else:
                    self.prefetch.add(node, class_name, 1, now)
            for target in wanted[filled:]:
                short = True
                if target.slot:
                    slot = self.inventory.slots[target.slot]
                    self.inventory.close_slot(self.inventory.nodes[slot.shares[0].node], slot)
        for slot, node in opened:  # one message brings all of it to a node
            slot.seen = node.sent
        return short

    def _retract(self, now: float) -> None:
        """Take back prefetched tasks that are stuck, when they would fit elsewhere or delay something better."""
        for info, message in self.prefetch.to_retract(self._first(), self._closed(), now):
            self._send(info, message)

    def _closed(self) -> set[str]:
        """Nodes whose slots must not go on."""
        return set(self.inventory.nodes) if self.paused else self.prefetch.closed_nodes(self.backfill)

    # -- reading ------------------------------------------------------------------------------------------------

    def _read_nodes(self) -> dict[str, NodeInfo]:
        nodes, damaged = registered_nodes(self.link)
        for name in sorted(damaged - self.damaged_nodes):
            log(
                f"the record of node {name} is damaged: it gets no new tasks until its worker has written it again",
                level="warning",
                node=name,
            )
        self.damaged_nodes = damaged
        return {info.name: info for info in nodes}

    def _read_control(self) -> None:
        paused, journal, suspended = self.link.pipeline(
            [("HGET", keys.CONTROL, "paused"), ("HGET", keys.STATUS, "journal"), ("EXISTS", keys.SUSPENDED)]
        )
        self.availability.read()
        self._update_availability(time.monotonic())  # what is submitted after a node was closed must not get there
        paused = bool(paused or journal or suspended)
        if paused != self.paused:
            log("starting of tasks is paused" if paused else "starting of tasks is resumed")
            self.heads_current = False
        self.paused = paused
        if paused:
            self._retract(time.monotonic())

    def _is_idle(self) -> bool:
        """Whether no node holds a task; not while one that was asked has not said what it holds."""
        return not self.inventory.busy and self._all_have_reported()

    def _addresses(self) -> dict[str, NodeInfo]:
        return {info.address: info for info in self.known_nodes.values()}

    def _send(self, info: NodeInfo, message: ToWorker) -> None:
        self.store.write(*to_worker(info.name, info.incarnation, message))


def run_dispatcher(address: Address, queue_id: str, settings: Settings, shared: SubmitContext) -> int:
    """Run the dispatcher in this process until SIGTERM; returns the exit code."""
    dispatcher = Dispatcher(address, queue_id, settings, shared)

    def end(_signal: int, _frame: Any) -> None:
        dispatcher.stop = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dispatcher.run()
    return 0
