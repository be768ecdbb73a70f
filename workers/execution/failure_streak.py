"""Counts quick failures of a node's tasks in succession: the evidence that the node itself may be at fault.

Only the count of failures is kept here, where nothing can come between an end and its report. The dispatcher compares
nodes (broker/scheduling/quarantine.py), and answers with ``ClearSuspicion`` if it was not the node.
"""

from __future__ import annotations

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import FAILED, HEALTHY, SUSPECT, UNKNOWN, EndReport, ExecutionEnd
from pilotq.broker.tasks.states import REASONS
from pilotq.workers.execution.execution import Execution
from pilotq.workers.protocol import tail

# Failures that a node may bring about: a missing library or disk, a full one, no process to be had.
OF_A_NODE = frozenset({"exit", "signal", "exception", "interpreter", "not found", "launch", "launch hangs", "output"})
KEPT_IDS = 500  # beyond so many a task that fails a second time counts as another one
MAX_FACTOR = 8  # however often it was wrong, suspicion begins after at most so many times ``quarantine_after``
LINE_MAX = 120  # characters of the last line of stderr that are reported


class FailureStreak:
    """Counts quick failures of different tasks with nothing between them that shows that the node can run tasks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._min_threshold = settings.quarantine_after  # so many failures make the node suspect ...
        self._threshold = self._min_threshold  # ... in this streak
        self._count = 0
        self._since = 0.0  # unix seconds: only what began later counts as a success
        self.failed: set[str] = set()  # ids of this streak

    def classify(self, e: Execution, report: EndReport | None, end: ExecutionEnd) -> ExecutionEnd:
        """The end of an execution as it is reported to the dispatcher. ``report`` is None of one that has finished.

        A failure that may be its node's makes the report's outcome ``suspect``.
        """
        suspect_node = e.run.last_suspect_node
        if not self._settings.quarantine_after:
            return end
        is_finished = report is None or report.outcome == "finished"
        if is_finished and not self._count and not suspect_node:
            return end
        health = self._health(e, report, end.seconds)
        why = ""
        if report is not None and health == FAILED and self._count >= self._threshold:
            health, report.outcome = SUSPECT, "suspect"
            why = self._explain(e, report)
        return end._replace(health=health, last_suspect_node=suspect_node, why=why)

    def succeeded(self, started: float) -> None:
        """Something that has no report of its own, and began then (unix seconds), has finished."""
        if self._count and started >= self._since:
            self._reset()

    def _health(self, e: Execution, report: EndReport | None, seconds: float) -> int:
        if report is not None and report.outcome not in ("finished", "failed"):
            return UNKNOWN
        if report is None or report.outcome == "finished" or seconds >= self._settings.quick_failure_s:
            if e.started >= self._since:
                self._reset()
            return HEALTHY
        # Nobody knows which of its nodes an execution over several of them has failed on.
        if report.reason not in OF_A_NODE or "]," in e.allocation:
            return UNKNOWN
        if not self._count:
            self._since = (e.started or e.run.handed) - self._settings.quick_failure_s
        if report.id not in self.failed:
            self._count += 1
            if len(self.failed) < KEPT_IDS:
                self.failed.add(report.id)
        return FAILED

    def clear_suspicion(self, *, healthy: bool) -> None:
        """It was not the node: the next streak must be twice as long, this one four times as long as it is."""
        self._min_threshold = min(2 * self._min_threshold, MAX_FACTOR * self._settings.quarantine_after)
        if healthy:
            self._reset()
        self._threshold = max(self._min_threshold, 4 * self._count)

    def _reset(self) -> None:
        self._count, self._since, self._threshold = 0, 0.0, self._min_threshold
        self.failed.clear()

    def _explain(self, e: Execution, report: EndReport) -> str:
        """A sentence for users; only once in a streak, as the output may have to be read from a file."""
        if self._count > self._threshold:
            return ""
        code = f" ({report.exit})" if report.exit else ""
        text = tail(e.exited.stderr, 2048).decode("utf-8", "replace").strip() if e.exited is not None else ""
        last = f": {text.splitlines()[-1][:LINE_MAX]}" if text else ""
        what = REASONS[report.reason]
        return f"{self._count} tasks in a row failed at once; task {report.id}: {what}{code}{last}"
