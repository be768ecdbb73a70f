"""`FailureStop`: no more tasks are started when more have failed than may."""

from __future__ import annotations

from collections.abc import Sequence

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.views import Counts
from pilotq.broker.tasks.failure_limit import failures_allowed


class FailureStop:
    """The limit of one command. ``limit`` is as `failures_allowed` reads it, or empty: then nothing is done."""

    def __init__(self, limit: str, before: int = 0) -> None:
        self.limit = limit
        self.before = before  # failures that do not count
        self.exceeded = False
        self.total = 0  # the most there were: records go, and an array without one counts as one task

    def enforce(self, broker: Broker, counts: Counts, ids: Sequence[str] | None = None) -> str:
        """Cancel what waits of these tasks (default: all), whose ``counts`` these are, once, when too many have failed:
        returns a sentence then."""
        if not self.limit or self.exceeded:
            return ""
        failed, self.total = counts.failed - self.before, max(self.total, counts.total)
        if failed <= failures_allowed(self.limit, self.total):
            return ""
        broker.cancel(broker.open_ids() if ids is None else ids, failures=True)
        self.exceeded = True
        return f"{failed:,} of {self.total:,} tasks have failed, more than {self.limit}: what waited is canceled"
