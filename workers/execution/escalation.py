"""Tracks the deadlines of launched executions, and their escalation: SIGTERM, grace, SIGKILL. Times are arguments.

`Escalation` keeps one deadline for each execution; what it means follows from the phase (see execution.py). `due` moves
those whose deadline has come to the next phase and returns the action that the caller carries out.
"""

from __future__ import annotations

import heapq

from pilotq.broker.settings import Settings
from pilotq.workers.execution.execution import Action, Execution, Phase

KILL_AGAIN_S = 1.0  # a process that was forking while it was killed is found by the next SIGKILL


class Deadlines:
    """Keeps at most one deadline for each key, in a heap; a moved or dropped one stays in it until it is the first."""

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


class Escalation:
    """Tracks launched executions and decides what is done with them when. ``now`` is monotonic seconds everywhere."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._deadlines = Deadlines()
        self.executions: dict[int, Execution] = {}

    def chained(self, e: Execution) -> None:
        """Its launcher is to start it after another one, whose runtime is not known: it has no deadline."""
        self.executions[e.key] = e

    def retract(self, e: Execution, now: float) -> Action | None:
        """Retract a chained execution; None when that is under way."""
        if self.retracting(e):
            return None
        self._deadlines.set(e.key, now + self._settings.launch_confirm_s)
        return Action.RETRACT

    def retracting(self, e: Execution) -> bool:
        return e.phase is Phase.CHAINED and self.has_deadline(e)

    def has_deadline(self, e: Execution) -> bool:
        """It has a deadline."""
        return self._deadlines.get(e.key) is not None

    def launching(self, e: Execution, now: float) -> None:
        """Its launcher is to start it now, or starts it now because it is the next of its chain."""
        e.phase = Phase.LAUNCHING
        self.executions[e.key] = e
        self._deadlines.set(e.key, now + self._settings.launch_confirm_s)

    def started(self, e: Execution, at: float, now: float) -> Action | None:
        """It started at ``at`` (unix seconds), which is ``now``. TERM when it was asked to end meanwhile."""
        e.phase = Phase.RUNNING
        e.started, e.began = at, now
        if e.reason:
            return self._end(e, now + e.grace)
        if e.limit:
            e.limit_at = now + e.limit
        announce_at = now + self._settings.started_after_s
        self._deadlines.set(e.key, min(announce_at, e.limit_at) if e.limit else announce_at)
        return None

    def stop(self, e: Execution, reason: str, grace: float, now: float, *, notice: bool = False) -> Action | None:
        """End an execution that a launcher knows of; the first reason stands, and the shortest grace.

        With ``notice`` one that runs gets the notice signal first, and SIGTERM when only the usual grace is left.
        """
        if e.phase is Phase.RUNNING and notice:
            e.reason = reason
            e.phase = Phase.NOTICED
            self._deadlines.set(e.key, now + max(grace - self._settings.kill_grace_s, 0.0))
            return Action.NOTICE
        if e.phase is Phase.RUNNING or e.phase is Phase.NOTICED:
            e.reason = e.reason or reason
            return self._end(e, now + grace) if not notice else None
        if e.phase is Phase.LAUNCHING or e.phase is Phase.CHAINED:
            # Its deadline stays the one of the launch: `started` goes on from here.
            e.grace = min(grace, e.grace) if e.reason else grace
            e.reason = e.reason or reason
            return self.retract(e, now) if e.phase is Phase.CHAINED else None
        if e.phase is Phase.ENDING:
            # After the main process has ended its outcome stands: only its leftovers are hurried.
            self._deadlines.set(e.key, min(now + grace, self._deadlines.get(e.key) or now))
        return None

    def kill(self, e: Execution, reason: str, now: float) -> Action | None:
        """End an execution that runs, or what is left of it, without any grace."""
        if e.phase not in (Phase.RUNNING, Phase.NOTICED, Phase.ENDING):
            return None
        if e.exited is None:  # else its outcome stands
            e.reason = e.reason or reason
        e.phase = Phase.ENDING
        return self._advance(e, now)

    def exited(self, e: Execution, now: float) -> Action | None:
        """The main process ended and left others behind: they are given the usual grace."""
        alive = e.phase is Phase.RUNNING or e.phase is Phase.NOTICED
        return self._end(e, now + self._settings.kill_grace_s) if alive else None

    def mark_lost(self, launcher: int, starting_key: int) -> None:
        """A launcher hangs while it starts ``starting_key``: that launch fails, and its other executions are lost."""
        culprit = self.executions.get(starting_key)
        if culprit is not None and culprit.phase is Phase.LAUNCHING:
            culprit.reason = culprit.reason or "launch hangs"
        for e in self.executions.values():
            if e.launcher == launcher and not e.reason:
                # They are lost because of another one: their crash limit is not charged.
                e.reason, e.outcome = "worker lost", "requeue"

    def ended(self, e: Execution) -> None:
        """Nothing of it lives, or nobody will ever know: it is forgotten."""
        del self.executions[e.key]
        self._deadlines.drop(e.key)

    def next(self) -> float | None:
        return self._deadlines.next()

    def due(self, now: float) -> list[tuple[Execution, Action]]:
        """Executions whose deadline has come, each with the action that follows: the caller carries it out."""
        return [
            (e, action) for key in self._deadlines.due(now) if (action := self._advance(e := self.executions[key], now))
        ]

    def _end(self, e: Execution, kill_at: float) -> Action:
        e.phase = Phase.ENDING
        self._deadlines.set(e.key, kill_at)
        return Action.TERM

    def _advance(self, e: Execution, now: float) -> Action | None:
        if e.phase is Phase.LAUNCHING or e.phase is Phase.CHAINED:
            return Action.HANGS
        if e.phase is Phase.RUNNING:
            if e.limit and now >= e.limit_at:
                e.reason = "time limit"
                return self._end(e, now + self._settings.kill_grace_s)
            if e.limit:
                self._deadlines.set(e.key, e.limit_at)
            return Action.ANNOUNCE
        if e.phase is Phase.NOTICED:
            return self._end(e, now + self._settings.kill_grace_s)
        if e.phase is Phase.ENDING:
            e.phase = Phase.KILLED
            e.unkillable_at = now + self._settings.unkillable_s
        elif now >= e.unkillable_at:
            return Action.UNKILLABLE
        self._deadlines.set(e.key, min(now + KILL_AGAIN_S, e.unkillable_at))
        return Action.KILL
