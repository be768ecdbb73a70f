"""One execution on a node, from being handed to its end, as pure book-keeping: times are arguments, nothing is done.

    AHEAD ──► WAITING ──► LAUNCHING ──► RUNNING ──► (NOTICED) ──► ENDING ──► KILLED
    (no lane) (a lane)        ▲            │      (own signal) (SIGTERM sent) (SIGKILL sent)
      ◄─────► LINED ──────────┘            └── ends by itself
         (behind another)

An execution leaves the book when nothing of it lives any more. `Ladder` keeps one deadline for each; what it means
follows from the phase. `due` moves those whose deadline has come one step on and says what must be done to them.
"""

from __future__ import annotations

import heapq
from enum import Enum

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Handed, parse_allocation
from pilotq.broker.tasks.model import Spec
from pilotq.workers.protocol import Exited, Returned

KILL_AGAIN_S = 1.0  # a process that was forking while it was killed is found by the next SIGKILL


class Phase(Enum):
    AHEAD = "ahead"  # handed without a lane
    LINED = "lined"  # the launcher starts it when the one before it on its lane has ended
    WAITING = "waiting"  # has a lane, is not launched yet
    LAUNCHING = "launching"  # the launcher was told
    RUNNING = "running"
    NOTICED = "noticed"  # was told by a signal of the user's choice that it will be ended
    ENDING = "ending"
    KILLED = "killed"
    SWEPT = "swept"  # nothing of it lives here: other nodes are to confirm the same


class Step(Enum):
    ANNOUNCE = "announce"  # it lives longer than a moment: report its start
    WITHDRAW = "withdraw"  # take it from its line, unless it has been started
    NOTICE = "notice"
    TERM = "term"
    KILL = "kill"
    HANGS = "hangs"  # its launch, or its withdrawal, was not confirmed in time
    UNKILLABLE = "unkillable"


class Execution:
    """What the worker knows of one execution. ``key`` names it here, ``lane`` 0 means none."""

    __slots__ = (
        "key", "handed", "phase", "lane", "allocation", "launcher", "limit", "limit_at", "grace", "gone_by", "reason",
        "wish", "message", "pid", "started", "exited", "stdout", "stderr", "suffix", "live", "begun", "recalled",
        "spec", "function",
    )  # fmt: skip

    def __init__(self, key: int, handed: Handed) -> None:
        self.key = key
        self.handed = handed
        self.phase = Phase.WAITING if handed.lane else Phase.AHEAD
        self.lane = handed.lane
        self.allocation = handed.allocation
        self.launcher = 0  # number of the launcher that was told
        self.limit = 0.0  # seconds it may run, 0 = no limit
        self.limit_at = 0.0  # monotonic
        self.grace = 0.0  # seconds, of what is to be ended as soon as it has started
        self.gone_by = 0.0  # monotonic: when it counts as unkillable
        self.reason = ""  # why it is ended by us; of states.REASONS
        self.wish = ""  # where the reason alone does not decide what becomes of the task
        self.message = ""
        self.pid = 0  # of its main process, once it has started
        self.started = 0.0  # unix seconds, 0 = never
        self.exited: Exited | Returned | None = None
        self.function = False  # a call: interpreters run it
        self.stdout = ""  # files named by the user
        self.stderr = ""
        self.suffix = ""  # of these files until the execution counts
        self.live = ("", "")  # where both outputs can be read while it runs
        self.begun = False  # the launcher has come to it
        self.recalled = False  # it is to be given back as soon as it is withdrawn
        self.spec: Spec | None = None  # what it is, once it was prepared

    @property
    def first_core(self) -> int:
        return parse_allocation(self.allocation)[0].cores[0]

    @property
    def launched(self) -> bool:
        """A launcher knows of it."""
        return self.phase is not Phase.AHEAD and self.phase is not Phase.WAITING


class Deadlines:
    """At most one deadline for each key, in a heap; what was moved or dropped stays in it until it shows up."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def set(self, key: int, when: float) -> None:
        self._at[key] = when
        heapq.heappush(self._heap, (when, key))
        # Tasks shorter than their deadlines leave entries behind, by the million with a limit of an hour.
        if len(self._heap) > 2 * len(self._at) + 1000:
            self._heap = [(at, k) for k, at in self._at.items()]
            heapq.heapify(self._heap)

    def drop(self, key: int) -> None:
        self._at.pop(key, None)

    def get(self, key: int) -> float | None:
        return self._at.get(key)

    def next(self) -> float | None:
        """The earliest deadline."""
        heap = self._heap
        while heap and self._at.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> list[int]:
        """Keys whose deadline has come, earliest first; they have none any more."""
        found = []
        while (when := self.next()) is not None and when <= now:
            key = heapq.heappop(self._heap)[1]
            del self._at[key]
            found.append(key)
        return found


class Ladder:
    """The executions that are launched, and their deadlines. ``now`` is monotonic seconds everywhere."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._deadlines = Deadlines()
        self.executions: dict[int, Execution] = {}

    def lined(self, e: Execution) -> None:
        """The launcher was told to start it after another one; that takes as long as it takes."""
        self.executions[e.key] = e

    def withdraw(self, e: Execution, now: float) -> Step | None:
        """Take a lined-up execution back; None when that is under way."""
        if self.withdrawing(e):
            return None
        self._deadlines.set(e.key, now + self._settings.launch_confirm_s)
        return Step.WITHDRAW

    def withdrawing(self, e: Execution) -> bool:
        return e.phase is Phase.LINED and self.waits(e)

    def waits(self, e: Execution) -> bool:
        """It has a deadline."""
        return self._deadlines.get(e.key) is not None

    def launching(self, e: Execution, now: float) -> None:
        """The launcher was told to start it now, or will have seen by now that it is its turn."""
        e.phase = Phase.LAUNCHING
        self.executions[e.key] = e
        self._deadlines.set(e.key, now + self._settings.launch_confirm_s)

    def started(self, e: Execution, at: float, now: float) -> Step | None:
        """It started at ``at`` (unix seconds), which is ``now``. TERM when it was asked to end meanwhile."""
        e.phase = Phase.RUNNING
        e.started = at
        if e.reason:
            return self._end(e, now + e.grace)
        if e.limit:
            e.limit_at = now + e.limit
        announce_at = now + self._settings.started_after_s
        self._deadlines.set(e.key, min(announce_at, e.limit_at) if e.limit else announce_at)
        return None

    def stop(self, e: Execution, reason: str, grace: float, now: float, *, notice: bool = False) -> Step | None:
        """End an execution that a launcher knows of; the first reason stands, and the shortest grace.

        With ``notice`` one that runs is told first, and gets SIGTERM when only the usual grace is left.
        """
        if e.phase is Phase.RUNNING and notice:
            e.reason = reason
            e.phase = Phase.NOTICED
            self._deadlines.set(e.key, now + max(grace - self._settings.kill_grace_s, 0.0))
            return Step.NOTICE
        if e.phase is Phase.RUNNING or e.phase is Phase.NOTICED:
            e.reason = e.reason or reason
            return self._end(e, now + grace) if not notice else None
        if e.phase is Phase.LAUNCHING or e.phase is Phase.LINED:
            # Its deadline stays the one of the launch: `started` goes on from here.
            e.grace = min(grace, e.grace) if e.reason else grace
            e.reason = e.reason or reason
            return self.withdraw(e, now) if e.phase is Phase.LINED else None
        if e.phase is Phase.ENDING:
            # After the main process has ended its outcome stands: only its leftovers are hurried.
            self._deadlines.set(e.key, min(now + grace, self._deadlines.get(e.key) or now))
        return None

    def exited(self, e: Execution, now: float) -> Step | None:
        """The main process ended and left others behind: they are given the usual grace."""
        alive = e.phase is Phase.RUNNING or e.phase is Phase.NOTICED
        return self._end(e, now + self._settings.kill_grace_s) if alive else None

    def blame(self, launcher: int, trying: int) -> None:
        """A launcher hangs, ``trying`` to start this: that is lost because of it, and so are its others."""
        culprit = self.executions.get(trying)
        if culprit is not None and culprit.phase is Phase.LAUNCHING:
            culprit.reason = culprit.reason or "launch hangs"
        for e in self.executions.values():
            if e.launcher == launcher and not e.reason:
                # It is known why they are lost, and that it is not their doing: their crash limit is not charged.
                e.reason, e.wish = "worker lost", "free"

    def ended(self, e: Execution) -> None:
        """Nothing of it lives, or nobody will ever know: out of the book."""
        del self.executions[e.key]
        self._deadlines.drop(e.key)

    def next(self) -> float | None:
        return self._deadlines.next()

    def due(self, now: float) -> list[tuple[Execution, Step]]:
        """Executions whose deadline has come, each with the step that was taken: the caller carries it out."""
        return [(e, step) for key in self._deadlines.due(now) if (step := self._step(e := self.executions[key], now))]

    def _end(self, e: Execution, kill_at: float) -> Step:
        e.phase = Phase.ENDING
        self._deadlines.set(e.key, kill_at)
        return Step.TERM

    def _step(self, e: Execution, now: float) -> Step | None:
        if e.phase is Phase.LAUNCHING or e.phase is Phase.LINED:
            return Step.HANGS
        if e.phase is Phase.RUNNING:
            if e.limit and now >= e.limit_at:
                e.reason = "time limit"
                return self._end(e, now + self._settings.kill_grace_s)
            if e.limit:
                self._deadlines.set(e.key, e.limit_at)
            return Step.ANNOUNCE
        if e.phase is Phase.NOTICED:
            return self._end(e, now + self._settings.kill_grace_s)
        if e.phase is Phase.ENDING:
            e.phase = Phase.KILLED
            e.gone_by = now + self._settings.unkillable_s
        elif now >= e.gone_by:
            return Step.UNKILLABLE
        self._deadlines.set(e.key, min(now + KILL_AGAIN_S, e.gone_by))
        return Step.KILL
