"""Quarantine of nodes on which task after task fails at once: a circuit breaker for each node.

Pure: time is an argument.

As with any circuit breaker, failures in a row open it, and a single probe closes it again. What is special is that a
broken array of tasks must not open it, so successes elsewhere are asked for in between:

1. *Suspected.* A worker has counted failures in a row of different tasks (workers/execution/failure_streak.py). Its
   node gets no new tasks, and what it goes on failing is queued again, for other nodes to run.
2. Other nodes run such tasks:

       they succeed there                     -> after three of these the node is *quarantined*
       they fail at once there, too           -> it was the tasks: the node is used again, and is suspected more slowly
       none has ended for some seconds        -> quarantined until one has
       a task that began with the others still runs on the node -> the node can run tasks: it is used again

3. *Quarantined.* After a pause the node gets one task as a *probe* (half-open), again after twice as long, and so on;
   it is used again when a probe finishes, or does not fail at once.

Where more than half of the nodes are suspected the tasks are to blame; the last node that can be used is never closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import msgspec

from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import FAILED, HEALTHY, SUSPECT, UNKNOWN, ExecutionEnd
from pilotq.broker.store.resources import NodeShare

NEXT_PROBE = "; it gets one task to try after "
DECISIVE = 3  # so many ends on other nodes decide


class Suspicion(msgspec.Struct):
    """What speaks against one node, and for it. Times are monotonic."""

    since: float
    class_name: str  # of the task that it failed last
    why: str = ""
    tasks: int = 0  # that other nodes are to run
    ran_elsewhere: int = 0  # ... and that ran there
    failed_elsewhere: int = 0  # ... and that failed there, too
    quarantined: bool = False
    confirmed: bool = False  # one of its tasks ran elsewhere
    pause: float = 0.0
    probe_at: float = math.inf  # -inf: a probe has finished
    probe_slot: int = 0  # where its probe runs, 0 while there is none

    @property
    def reason(self) -> str:
        """Why it is quarantined; the time of its next probe is still to be added."""
        elsewhere = "such tasks run on other nodes" if self.confirmed else "no other node has ended them yet"
        return f"{self.why or 'task after task failed at once'}; {elsewhere}{NEXT_PROBE}"

    @property
    def is_decided(self) -> bool:
        """Whether other nodes have ended enough of its tasks."""
        return self.ran_elsewhere + self.failed_elsewhere >= max(min(DECISIVE, self.tasks), 1)

    def forget_opinions(self) -> None:
        """What other nodes have ended so far does not count any more."""
        self.tasks, self.ran_elsewhere, self.failed_elsewhere = 0, 0, 0


class Decision(NamedTuple):
    """A node is quarantined, or stays so for longer, or is used again (not ``quarantined``)."""

    node: str
    quarantined: bool
    why: str  # if quarantined, the time of its next probe is still to be added
    healthy: bool = False  # it has shown that it can run tasks


class Quarantine:
    """Decides which nodes are suspected and quarantined.

    `record_end` is told what ends, `start_probe` what is placed; `decide` says what follows, `is_closed` which nodes
    get no new tasks meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.suspicions: dict[str, Suspicion] = {}  # by node
        self.probes: dict[int, list[str]] = {}  # slot -> the nodes that it probes
        self.failing: set[str] = set()  # nodes on which something has failed at once since the tasks were last blamed
        self._changed: set[str] = set()  # quarantined nodes whose probe has failed

    # -- what is observed ------------------------------------------------------------------------------------------

    def record_end(self, node: str, end: ExecutionEnd, now: float) -> None:
        """An execution has ended whose end says more than that its node is healthy, or which may be a probe."""
        probed = self.probes.pop(end.slot, ())
        if end.health == HEALTHY and end.seconds < 0:  # nothing ran: a slot is free, or its end was reported before
            end = end._replace(health=UNKNOWN)
        if end.health >= FAILED:
            self.failing.add(node)
        if (
            end.last_suspect_node not in ("", node)
            and (other := self.suspicions.get(end.last_suspect_node)) is not None
        ):
            other.ran_elsewhere += end.health == HEALTHY
            other.confirmed |= end.health == HEALTHY
            # On a node that is suspected itself this means nothing.
            other.failed_elsewhere += end.health == FAILED and node not in self.suspicions
        for name in probed:
            self._end_probe(name, self.suspicions[name], end, now)
        if end.health == SUSPECT and node not in probed:
            suspicion = self.suspicions.setdefault(node, Suspicion(now, end.class_name))
            suspicion.why = end.why or suspicion.why
            suspicion.class_name = end.class_name
            suspicion.tasks += end.last_suspect_node != node

    def _end_probe(self, node: str, suspicion: Suspicion, end: ExecutionEnd, now: float) -> None:
        suspicion.probe_slot = 0
        if end.health == HEALTHY:
            suspicion.probe_at = -math.inf
            return
        if not suspicion.quarantined:
            suspicion.tasks += end.health == SUSPECT and end.last_suspect_node != node
            suspicion.probe_at = now if end.health == UNKNOWN else math.inf
            return
        if end.health in (FAILED, SUSPECT):
            suspicion.pause = min(2 * suspicion.pause, self._settings.probe_after_max_s)
            # This very task may be at fault: how it ends elsewhere decides when the next probe starts.
            suspicion.forget_opinions()
            self._changed.add(node)
        suspicion.probe_at = now + suspicion.pause

    def adopt(self, node: str, why: str, now: float) -> None:
        """An earlier dispatcher has quarantined it."""
        pause = self._settings.probe_after_s
        why = why.partition(NEXT_PROBE)[0]
        self.suspicions[node] = Suspicion(
            now, "", why, quarantined=True, confirmed=True, pause=pause, probe_at=now + pause
        )

    def clear(self, node: str) -> None:
        """Nothing speaks against the node any more."""
        if (suspicion := self.suspicions.pop(node, None)) is not None:
            self._drop_probe(node, suspicion)

    def _drop_probe(self, node: str, suspicion: Suspicion) -> None:
        if node in (probed := self.probes.get(suspicion.probe_slot, [])):
            probed.remove(node)
        if not probed:
            self.probes.pop(suspicion.probe_slot, None)
        suspicion.probe_slot = 0

    # -- what follows ----------------------------------------------------------------------------------------------

    def is_closed(self, node: str, now: float) -> bool:
        """Whether it gets no task now; a node that is due for a probe gets one until `start_probe`."""
        suspicion = self.suspicions.get(node)
        return suspicion is not None and (suspicion.probe_slot != 0 or now < suspicion.probe_at)

    def start_probe(self, shares: tuple[NodeShare, ...], slot: int) -> bool:
        """A task was placed on these nodes; whether it may start: only one at a time on a node that is probed."""
        probed = [share.node for share in shares if share.node in self.suspicions]
        if any(self.suspicions[node].probe_slot for node in probed):
            return False
        for node in probed:
            self.suspicions[node].probe_slot = slot
            self.probes.setdefault(slot, []).append(node)
        return True

    def decide(
        self, now: float, usable: Collection[str], slots: Mapping[int, Slot], elsewhere: Callable[[str, str], bool]
    ) -> list[Decision]:
        """What has become clear. ``usable``: nodes that are there, and that nothing else closes. ``elsewhere`` tells
        whether a class could run without a node."""
        most = 2 * sum(name in self.suspicions for name in usable) > len(usable)
        decisions = []
        for node, suspicion in list(self.suspicions.items()):
            if (
                suspicion.probe_slot and suspicion.probe_slot not in slots
            ):  # no task was left for it, or the node was lost
                self._drop_probe(node, suspicion)
            if node not in usable:
                if not suspicion.quarantined:
                    self.clear(node)
                continue
            healthy = self._is_healthy(node, suspicion, now, slots)
            cleared = healthy or self._is_not_to_blame(suspicion, now)
            if not any(name != node and not self._is_quarantined(name) for name in usable):
                cleared = cleared or "no other node can be used"
            if not suspicion.quarantined and not cleared:
                cleared = "most nodes are suspected: it is the tasks" if most else ""
                cleared = cleared or (
                    "" if elsewhere(suspicion.class_name, node) else "such tasks can run on no other node"
                )
            if cleared:
                self.clear(node)
                decisions.append(Decision(node, False, cleared, bool(healthy)))
            elif self._is_to_quarantine(node, suspicion, now):
                decisions.append(Decision(node, True, suspicion.reason))
        self._changed.clear()
        return decisions

    def _is_to_quarantine(self, node: str, suspicion: Suspicion, now: float) -> bool:
        """Whether it is quarantined now, or stays so for longer."""
        if suspicion.quarantined:
            return node in self._changed
        if suspicion.ran_elsewhere >= DECISIVE or now - suspicion.since > 2 * self._settings.quick_failure_s:
            suspicion.quarantined, suspicion.pause = True, self._settings.probe_after_s
            suspicion.probe_at = now + suspicion.pause
        elif suspicion.is_decided and not suspicion.probe_slot:
            suspicion.probe_at = min(suspicion.probe_at, now)  # one more task, to be sure
        return suspicion.quarantined

    def _is_quarantined(self, node: str) -> bool:
        suspicion = self.suspicions.get(node)
        return suspicion is not None and suspicion.quarantined

    def _is_healthy(self, node: str, suspicion: Suspicion, now: float, slots: Mapping[int, Slot]) -> str:
        """What shows that it can run tasks; empty if nothing does."""
        quick = self._settings.quick_failure_s
        if suspicion.probe_at == -math.inf:
            return "a task ran there"
        running = [slots[suspicion.probe_slot]] if suspicion.probe_slot else []
        if not suspicion.quarantined:
            own = (slot for slot in slots.values() if slot.shares and slot.shares[0].node == node)
            running = [slot for slot in own if slot.since > suspicion.since - quick]
        return "a task lives there" if any(now - slot.since > quick for slot in running) else ""

    def _is_not_to_blame(self, suspicion: Suspicion, now: float) -> str:
        """Why it is not the node; empty if that is not known."""
        if not suspicion.is_decided or suspicion.failed_elsewhere <= suspicion.ran_elsewhere:
            return ""
        if not suspicion.confirmed:
            return "its tasks failed at once on other nodes, too"
        # Its probe would have failed anywhere: that does not count, the next one does.
        suspicion.forget_opinions()
        suspicion.probe_at = min(suspicion.probe_at, now)
        return ""
