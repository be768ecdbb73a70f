"""Decides which tasks are launched alone, because the next death of a worker or launcher under them is their last.

Tasks that were lost together cannot be told apart: one of them may have killed what they ran in. So the last attempt
before the crash limit is made alone: in a launcher of its own, and not beside another one on the same node.
"""

from __future__ import annotations

from collections.abc import Collection

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Run

SUSPECTED_S = 60.0  # what has lived so long is no longer suspected


class CrashIsolation:
    """Decides for each execution of a node whether it is isolated, and whether it must wait. ``now`` is monotonic."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.crash_limit
        self._running: dict[int, float] = {}  # key of an execution -> when it began

    def is_needed(self, run: Run) -> bool:
        return run.crashes + 1 >= self._limit > 1

    def may_start(self, run: Run, launched: Collection[int], now: float) -> bool:
        """False for an isolated launch while another one is among the ``launched`` that may still kill the worker."""
        if not self.is_needed(run):
            return True
        self._running = {key: began for key, began in self._running.items() if key in launched}
        return all(now - began > SUSPECTED_S for began in self._running.values())

    def start(self, key: int, run: Run, now: float) -> bool:
        """Record that an execution is about to be launched; returns whether it is isolated."""
        if self.is_needed(run):
            self._running[key] = now
        return self.is_needed(run)
