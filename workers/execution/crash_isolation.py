"""Last trials: of tasks under which a worker or launcher has died so often that the next time is charged for good.

Tasks that were lost together cannot be told apart: one of them may have killed what they ran in. So the last trial
before the crash limit is made alone: in a launcher of its own, and not beside another one on the same node.
"""

from __future__ import annotations

from collections.abc import Collection

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Handed

ALONE_S = 60.0  # what has lived so long is no longer suspected


class Trials:
    """``now`` is monotonic."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.crash_limit
        self._running: dict[int, float] = {}  # key of an execution -> when it began

    def needed(self, handed: Handed) -> bool:
        return handed.crashes + 1 >= self._limit > 1

    def may_begin(self, handed: Handed, launched: Collection[int], now: float) -> bool:
        """False for a trial while another one is among the ``launched`` that may still kill the worker."""
        if not self.needed(handed):
            return True
        self._running = {key: began for key, began in self._running.items() if key in launched}
        return all(now - began > ALONE_S for began in self._running.values())

    def begin(self, key: int, handed: Handed, now: float) -> bool:
        """It is about to be launched; whether that is a trial."""
        if self.needed(handed):
            self._running[key] = now
        return self.needed(handed)
