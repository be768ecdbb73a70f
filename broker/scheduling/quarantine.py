"""Is it the node, or is it the tasks? Pure: time is an argument.

A worker *doubts* its node when several different tasks in a row have failed there at once
(workers/execution/failure_streak.py). Then the
node is *held*: it gets nothing new, and what it goes on failing is queued again for other nodes to try. These give a
second opinion on each such task:

    it runs elsewhere                        -> one more task for the node; after three of these it is put *aside*
    it fails at once there, too              -> it was the task: the node is used again, and doubts itself more slowly
    nobody has tried it for some seconds     -> aside, until somebody has
    a task lives on the node that began with the others -> it can run tasks: as above

A node that was put aside is tried with one task after a pause, again after twice as long, and so on; it comes back when
one finishes, or does not fail at once. Where more than half of the nodes are in doubt the tasks are to blame; the last
node that can be used is never held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import msgspec

from pilotq.broker.scheduling.inventory import Lane
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import DOUBTED, FAILED, FINE, MUTE, End, Part

AGAIN = "; it gets one task to try after "
OPINIONS = 3  # so many decide


class Case(msgspec.Struct):
    """What is known against one node, and for it. Times are monotonic."""

    since: float
    class_name: str  # of the task that it failed last
    why: str = ""
    tasks: int = 0  # that others are to try
    ran: int = 0  # ... and that ran there
    failed: int = 0  # ... and that failed there, too
    aside: bool = False
    proven: bool = False  # one of its tasks ran elsewhere
    pause: float = 0.0
    again_at: float = math.inf
    lane: int = 0  # where it is tried
    trials: int = 0  # that have failed

    @property
    def words(self) -> str:
        elsewhere = "such tasks run on other nodes" if self.proven else "no other node has ended them yet"
        return f"{self.why or 'task after task failed at once'}; {elsewhere}{AGAIN}"

    @property
    def judged(self) -> bool:
        return self.ran + self.failed >= max(min(OPINIONS, self.tasks), 1)


class Verdict(NamedTuple):
    """A node is put aside, or stays so for longer, or is used again (not ``aside``). ``fine``: it can run tasks."""

    node: str
    aside: bool
    why: str  # if aside, the time of its trial is still to be added
    fine: bool = False


class Judge:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.cases: dict[str, Case] = {}
        self.trials: dict[int, list[str]] = {}  # lane -> the nodes that are tried there
        self.failing: set[str] = set()  # nodes on which something has failed at once since the tasks were last blamed
        self._changed: set[str] = set()  # nodes aside whose trial has failed

    # -- what is seen ----------------------------------------------------------------------------------------------

    def heard(self, node: str, end: End, now: float) -> None:
        """An end that says more than that its node is fine, or any end while a node is tried."""
        tried = self.trials.pop(end.lane, ())
        if end.said == FINE and end.seconds < 0:  # nothing ran: a lane is free, or its end was told before
            end = end._replace(said=MUTE)
        if end.said >= FAILED:
            self.failing.add(node)
        if end.spared not in ("", node) and (case := self.cases.get(end.spared)) is not None:
            case.ran += end.said == FINE
            case.proven |= end.said == FINE
            # Of a node that is doubted itself this means nothing.
            case.failed += end.said == FAILED and node not in self.cases
        for name in tried:
            self._tried(name, self.cases[name], end, now)
        if end.said == DOUBTED and node not in tried:
            case = self.cases.setdefault(node, Case(now, end.class_name))
            case.why = end.why or case.why
            case.class_name = end.class_name
            case.tasks += end.spared != node

    def _tried(self, node: str, case: Case, end: End, now: float) -> None:
        case.lane = 0
        if end.said == FINE:
            case.again_at = -math.inf
            return
        if not case.aside:
            case.tasks += end.said == DOUBTED and end.spared != node
            case.again_at = now if end.said == MUTE else math.inf
            return
        if end.said in (FAILED, DOUBTED):
            case.pause = min(2 * case.pause, self._settings.aside_pause_max_s)
            case.trials += 1
            # This very task may be at fault: what is heard of it next decides when the node is tried again.
            case.tasks, case.ran, case.failed = 0, 0, 0
            self._changed.add(node)
        case.again_at = now + case.pause

    def adopt(self, node: str, why: str, now: float) -> None:
        """An earlier dispatcher has put it aside."""
        pause = self._settings.aside_pause_s
        why = why.partition(AGAIN)[0]
        self.cases[node] = Case(now, "", why, aside=True, proven=True, pause=pause, again_at=now + pause)

    def forget(self, node: str) -> None:
        if (case := self.cases.pop(node, None)) is not None:
            self._untry(node, case)

    def _untry(self, node: str, case: Case) -> None:
        if node in (there := self.trials.get(case.lane, [])):
            there.remove(node)
        if not there:
            self.trials.pop(case.lane, None)
        case.lane = 0

    # -- what follows ----------------------------------------------------------------------------------------------

    def shut(self, node: str, now: float) -> bool:
        """Whether it gets nothing now; a node that is to be tried gets something until `begin`."""
        case = self.cases.get(node)
        return case is not None and (case.lane != 0 or now < case.again_at)

    def begin(self, parts: tuple[Part, ...], lane: int) -> bool:
        """Something was placed on these nodes; whether it may go there: of a node that is tried only one."""
        tried = [part.node for part in parts if part.node in self.cases]
        if any(self.cases[node].lane for node in tried):
            return False
        for node in tried:
            self.cases[node].lane = lane
            self.trials.setdefault(lane, []).append(node)
        return True

    def turn(
        self, now: float, usable: Collection[str], lanes: Mapping[int, Lane], elsewhere: Callable[[str, str], bool]
    ) -> list[Verdict]:
        """What has become clear. ``usable``: nodes that are there, and that nobody else has closed. ``elsewhere`` tells
        whether a class could run without a node."""
        most = 2 * sum(name in self.cases for name in usable) > len(usable)
        verdicts = []
        for node, case in list(self.cases.items()):
            if case.lane and case.lane not in lanes:  # nothing was there to be handed out, or the node was lost
                self._untry(node, case)
            if node not in usable:
                if not case.aside:
                    self.forget(node)
                continue
            fine = self._fine(node, case, now, lanes)
            cleared = fine or self._pardoned(case, now)
            if not any(name != node and not self._is_aside(name) for name in usable):
                cleared = cleared or "no other node can be used"
            if not case.aside and not cleared:
                cleared = "most nodes are in doubt: it is the tasks" if most else ""
                cleared = cleared or ("" if elsewhere(case.class_name, node) else "such tasks can run on no other node")
            if cleared:
                self.forget(node)
                verdicts.append(Verdict(node, False, cleared, bool(fine)))
            elif self._worse(node, case, now):
                verdicts.append(Verdict(node, True, case.words))
        self._changed.clear()
        return verdicts

    def _worse(self, node: str, case: Case, now: float) -> bool:
        """Whether it is put aside now, or stays so for longer."""
        if case.aside:
            return node in self._changed
        if case.ran >= OPINIONS or now - case.since > 2 * self._settings.aside_quick_s:
            case.aside, case.pause = True, self._settings.aside_pause_s
            case.again_at = now + case.pause
        elif case.judged and not case.lane:
            case.again_at = min(case.again_at, now)  # one more task, to be sure
        return case.aside

    def _is_aside(self, node: str) -> bool:
        case = self.cases.get(node)
        return case is not None and case.aside

    def _fine(self, node: str, case: Case, now: float, lanes: Mapping[int, Lane]) -> str:
        """What shows that it can run tasks; empty if nothing does."""
        quick = self._settings.aside_quick_s
        if case.again_at == -math.inf:
            return "a task ran there"
        lives = [lanes[case.lane]] if case.lane else []
        if not case.aside:
            mine = (lane for lane in lanes.values() if lane.parts and lane.parts[0].node == node)
            lives = [lane for lane in mine if lane.since > case.since - quick]
        return "a task lives there" if any(now - lane.since > quick for lane in lives) else ""

    def _pardoned(self, case: Case, now: float) -> str:
        """Why it is not the node; empty if that is not known."""
        if not case.judged or case.failed <= case.ran:
            return ""
        if not case.proven:
            return "its tasks failed at once on other nodes, too"
        # What it was tried with would have failed anywhere: that does not count, the next one does.
        case.tasks, case.ran, case.failed = 0, 0, 0
        case.again_at = min(case.again_at, now)
        return ""
