"""What the ends of executions say of their node: is it the tasks, or is it the node, on which they fail at once?

Only the count of failures is kept here, where nothing can come between an end and its report. The dispatcher compares
nodes (broker/scheduling/quarantine.py), and answers with a ``Pardon`` if it was not the node.
"""

from __future__ import annotations

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import DOUBTED, FAILED, FINE, MUTE, End, EndReport
from pilotq.broker.tasks.states import REASONS
from pilotq.workers.execution.escalation import Execution
from pilotq.workers.protocol import tail

# Failures that a node may bring about: a missing library or disk, a full one, no process to be had.
OF_A_NODE = frozenset({"exit", "signal", "exception", "interpreter", "not found", "launch", "launch hangs", "output"})
KEPT_IDS = 500  # beyond so many a task that fails a second time counts as another one
SLOWEST = 8  # however often it was wrong, a doubt begins after at most so many times ``aside_after``
LINE_MAX = 120  # characters of the last line of stderr that are told


class Doubts:
    """Failures at once of different tasks in a row: nothing between them shows that the node can run tasks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._least = settings.aside_after  # so many begin a doubt ...
        self._at = self._least  # ... in this row
        self._count = 0
        self._since = 0.0  # unix seconds: what began later shows something
        self.failed: set[str] = set()  # ids of this row

    def weigh(self, e: Execution, report: EndReport, end: End) -> End:
        """What the dispatcher is to be told of an execution that has ended. A failure that may be its node's makes the
        report's wish ``doubted``."""
        spared = e.handed.spared
        if not self._settings.aside_after:
            return end
        if report.wish == "finished" and not self._count and not spared:
            return end
        said = self._said(e, report, end.seconds)
        why = ""
        if said == FAILED and self._count >= self._at:
            said, report.wish = DOUBTED, "doubted"
            why = self._why(e, report)
        return end._replace(said=said, spared=spared, why=why)

    def _said(self, e: Execution, report: EndReport, seconds: float) -> int:
        wish = report.wish
        if wish not in ("finished", "failed"):
            return MUTE
        if wish == "finished" or seconds >= self._settings.aside_quick_s:
            if e.started >= self._since:
                self._reset()
            return FINE
        # Nobody knows which of its nodes an execution over several of them has failed on.
        if report.reason not in OF_A_NODE or "]," in e.allocation:
            return MUTE
        if not self._count:
            self._since = (e.started or e.handed.handed) - self._settings.aside_quick_s
        if report.id not in self.failed:
            self._count += 1
            if len(self.failed) < KEPT_IDS:
                self.failed.add(report.id)
        return FAILED

    def pardon(self, *, fine: bool) -> None:
        """It was not the node: the next row must be twice as long for a doubt, this one four times as long as it is."""
        self._least = min(2 * self._least, SLOWEST * self._settings.aside_after)
        if fine:
            self._reset()
        self._at = max(self._least, 4 * self._count)

    def _reset(self) -> None:
        self._count, self._since, self._at = 0, 0.0, self._least
        self.failed.clear()

    def _why(self, e: Execution, report: EndReport) -> str:
        """In words; only once in a row, as it may have to be read from a file."""
        if self._count > self._at:
            return ""
        code = f" ({report.exit})" if report.exit else ""
        said = tail(e.exited.stderr, 2048).decode("utf-8", "replace").strip() if e.exited is not None else ""
        last = f": {said.splitlines()[-1][:LINE_MAX]}" if said else ""
        what = REASONS[report.reason]
        return f"{self._count} tasks in a row failed at once; task {report.id}: {what}{code}{last}"
