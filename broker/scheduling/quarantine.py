"""Quarantine of nodes on which task after task fails at once: a circuit breaker for each node.

Pure: time is an argument.

As with any circuit breaker, failures in a row open it, and a probe closes it again. What is special is that a broken
array of tasks must not open it: between closed and open a node is suspected until other nodes have run its tasks.

    closed     nothing speaks against the node: it has no breaker
    suspected  a worker has counted failures in a row of different tasks (workers/execution/failure_streak.py): no new
               tasks; what it goes on failing is queued again, for other nodes to run
    open       quarantined: such tasks run elsewhere, or none has ended there for some seconds
    half-open  quarantined, and its pause is over: it runs one task, the probe. Fails that at once, the pause is doubled

Where the same tasks fail at once on other nodes, too, where more than half of the nodes are suspected, and where no
other node could run them, the tasks are to blame: the node is used again, and is suspected more slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from enum import Enum, auto
from typing import NamedTuple

import msgspec

from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import FAILED, HEALTHY, SUSPECT, UNKNOWN, ExecutionEnd
from pilotq.broker.store.resources import NodeShare

NEXT_PROBE = "; it gets one task to try after "
DECISIVE = 3  # so many ends on other nodes decide


class State(Enum):
    """Of a breaker; see above."""

    SUSPECTED = auto()
    OPEN = auto()
    HALF_OPEN = auto()
    CLOSED = auto()  # its probe has finished: `decide` removes it


class Breaker(msgspec.Struct):
    """The circuit breaker of one node that fails tasks. Times are monotonic."""

    since: float
    class_name: str  # of the task that it failed last
    why: str = ""
    state: State = State.SUSPECTED
    excused: int = 0  # tasks that other nodes are to run
    ran: int = 0  # ... and that ran there
    failed: int = 0  # ... and that failed there, too
    pause: float = 0.0
    probe_at: float = math.inf
    probe_slot: int = 0  # of the probe, if half-open
    changed: bool = False  # it was opened, or stays open for longer

    @property
    def reason(self) -> str:
        """Why it is quarantined; the time of its next probe is still to be added."""
        elsewhere = "such tasks run on other nodes" if self.ran else "no other node has ended them yet"
        return f"{self.why or 'task after task failed at once'}; {elsewhere}{NEXT_PROBE}"

    @property
    def is_decided(self) -> bool:
        """Whether other nodes have ended enough of its tasks."""
        return self.ran + self.failed >= max(min(DECISIVE, self.excused), 1)

    def open(self, pause: float, now: float) -> None:
        self.state, self.pause, self.probe_at, self.changed = State.OPEN, pause, now + pause, True


class Decision(NamedTuple):
    """A node is quarantined, or stays so for longer, or is used again (not ``quarantined``)."""

    node: str
    quarantined: bool
    why: str  # if quarantined, the time of its next probe is still to be added
    healthy: bool = False  # it has shown that it can run tasks


class Quarantine:
    """Decides which nodes are suspected and quarantined.

    `record_end` is told what ends, `start_probe` what is placed; `decide` says what follows, `is_blocked` which nodes
    get no new tasks meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.breakers: dict[str, Breaker] = {}  # by node
        self.failing: set[str] = set()  # nodes on which something has failed at once since the tasks were last blamed

    # -- what is observed ------------------------------------------------------------------------------------------

    def record_end(self, node: str, end: ExecutionEnd, now: float) -> bool:
        """An execution has ended; whether `decide` may find something new."""
        probed = [name for name, b in self.breakers.items() if b.state is State.HALF_OPEN and b.probe_slot == end.slot]
        if not (probed or end.health or end.last_suspect_node):
            return False
        # Where nothing ran a slot is free, or its end was reported before.
        health = UNKNOWN if end.health == HEALTHY and end.seconds < 0 else end.health
        if health >= FAILED:
            self.failing.add(node)
        if end.last_suspect_node != node and (other := self.breakers.get(end.last_suspect_node)) is not None:
            other.ran += health == HEALTHY
            if health == FAILED and node not in self.breakers:  # on a node that is suspected itself it means nothing
                other.failed += 1
                if other.state is State.OPEN and other.ran:
                    other.probe_at = now  # its probe would have failed anywhere: that does not count, the next one does
        for name in probed:
            self._end_probe(self.breakers[name], health, now)
        if health == SUSPECT and node not in probed:
            breaker = self.breakers.setdefault(node, Breaker(now, end.class_name))
            breaker.why = end.why or breaker.why
            breaker.class_name = end.class_name
            breaker.excused += end.last_suspect_node != node
        return bool(self.breakers)

    def _end_probe(self, breaker: Breaker, health: int, now: float) -> None:
        if health == HEALTHY:
            breaker.state = State.CLOSED
            return
        pause = breaker.pause
        if health != UNKNOWN:
            pause = min(max(2 * pause, self._settings.probe_after_s), self._settings.probe_after_max_s)
        breaker.open(pause, now)

    def adopt(self, node: str, why: str, now: float) -> None:
        """An earlier dispatcher has quarantined it."""
        breaker = self.breakers[node] = Breaker(now, "", why.partition(NEXT_PROBE)[0], ran=1)
        breaker.open(self._settings.probe_after_s, now)
        breaker.changed = False

    # -- what follows ----------------------------------------------------------------------------------------------

    @property
    def quarantined(self) -> set[str]:
        return {name for name, breaker in self.breakers.items() if breaker.state is not State.SUSPECTED}

    def is_blocked(self, node: str, now: float) -> bool:
        """Whether it gets no task now; a node that is due for a probe gets one until `start_probe`."""
        breaker = self.breakers.get(node)
        return breaker is not None and (breaker.state is State.HALF_OPEN or now < breaker.probe_at)

    def start_probe(self, shares: tuple[NodeShare, ...], slot: int) -> bool:
        """A task was placed on these nodes; whether it may start: only one at a time on a node that is probed."""
        probed = [share.node for share in shares if share.node in self.breakers]
        if any(self.breakers[node].state is State.HALF_OPEN for node in probed):
            return False
        for node in probed:
            self.breakers[node].state, self.breakers[node].probe_slot = State.HALF_OPEN, slot
        return True

    def decide(
        self, now: float, usable: Collection[str], slots: Mapping[int, Slot], elsewhere: Callable[[str, str], bool]
    ) -> list[Decision]:
        """What has become clear. ``usable``: nodes that are there, and that nothing else closes. ``elsewhere`` tells
        whether a class could run without a node."""
        most = 2 * sum(name in self.breakers for name in usable) > len(usable)
        decisions = []
        for node, breaker in list(self.breakers.items()):
            if breaker.state is State.HALF_OPEN and breaker.probe_slot not in slots:
                breaker.state = State.OPEN  # no task was left for its probe, or the node was lost
            suspected = breaker.state is State.SUSPECTED
            if node not in usable:
                if suspected:
                    del self.breakers[node]
                continue
            healthy = self._is_healthy(node, breaker, now, slots)
            cleared = healthy
            if breaker.is_decided and breaker.failed > breaker.ran and (suspected or not breaker.ran):
                cleared = cleared or "its tasks failed at once on other nodes, too"
            if self.quarantined.union([node]).issuperset(usable):
                cleared = cleared or "no other node can be used"
            if suspected and most:
                cleared = cleared or "most nodes are suspected: it is the tasks"
            if suspected and not cleared and not elsewhere(breaker.class_name, node):
                cleared = "such tasks can run on no other node"
            if cleared:
                del self.breakers[node]
                decisions.append(Decision(node, False, cleared, bool(healthy)))
                continue
            if suspected:
                self._open_if_clear(breaker, now)
            if breaker.changed:
                breaker.changed = False
                decisions.append(Decision(node, True, breaker.reason))
        return decisions

    def _open_if_clear(self, breaker: Breaker, now: float) -> None:
        if breaker.ran >= DECISIVE or now - breaker.since > 2 * self._settings.quick_failure_s:
            breaker.open(self._settings.probe_after_s, now)
        elif breaker.is_decided:
            breaker.open(0.0, now)  # by few: a probe at once, to be sure

    def _is_healthy(self, node: str, breaker: Breaker, now: float, slots: Mapping[int, Slot]) -> str:
        """What shows that it can run tasks; empty if nothing does."""
        quick = self._settings.quick_failure_s
        if breaker.state is State.CLOSED:
            return "a task ran there"
        running: list[Slot] = []
        if breaker.state is State.HALF_OPEN:
            running = [slots[breaker.probe_slot]]
        elif breaker.state is State.SUSPECTED:  # what began with those that failed
            own = (slot for slot in slots.values() if slot.shares and slot.shares[0].node == node)
            running = [slot for slot in own if slot.since > breaker.since - quick]
        return "a task lives there" if any(now - slot.since > quick for slot in running) else ""
