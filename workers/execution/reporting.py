"""From what a launcher saw of an execution to what the broker is told of it, and how reports are collected."""

from __future__ import annotations

import base64
import os
import signal
import zlib

import msgspec

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import DOUBTED, End, EndReport, Line
from pilotq.broker.tasks.retry_policy import chosen, pause
from pilotq.broker.tasks.states import REASONS
from pilotq.workers.execution.escalation import Execution
from pilotq.workers.execution.failure_streak import Doubts
from pilotq.workers.protocol import Captured, Exited, Returned, tail
from pilotq.workers.session import NodeLink, iso

# What ends an execution from our side, as a wish for its task; every other reason is a failure.
WISHES = {
    "canceled": "canceled", "stopped": "stopped", "pilot ended": "free", "walltime": "free", "worker lost": "lost",
}  # fmt: skip
LEAVING = ("pilot ended", "walltime")  # reasons that take nothing from a task that has not begun
STATUSES = {"finished": "finished", "canceled": "canceled", "stopped": "stopped"}
CALL_MAX = 500  # ends in one script call: it stops the server for so long
CALL_BYTES = 32 << 20  # of results in it, but for a single larger one: the server takes no message of any size
TAIL_BYTES = 2048  # of captured stderr, in the text that RQ shows of a failure

_pack = msgspec.msgpack.Encoder().encode


class Reporter:
    """Makes the reports of one node; ``directory`` is the pilot's, paths in lines are relative to it."""

    def __init__(self, node: str, directory: str) -> None:
        self._node = node
        self._directory = directory
        self._prefix = directory.rstrip("/") + "/"

    def report(self, e: Execution, ended: float) -> EndReport:
        """The report of an execution that has ended, or never began, at ``ended`` (unix seconds)."""
        handed, exited = e.handed, e.exited
        code: int | None = None
        number: int | None = None
        if isinstance(exited, Exited):
            ending = os.waitstatus_to_exitcode(exited.status)
            code, number = (ending, None) if ending >= 0 else (None, -ending)
        wish, reason, message = _judge(e, code, number)
        line = Line(
            id=handed.id,
            name=handed.name,
            status=STATUSES.get(wish, "failed"),
            reason=reason,
            execution=handed.execution,
            node=self._node,
            cpus=e.allocation,
            queued=handed.queued,
            handed=handed.handed,
            started=e.started or None,
            ended=ended,
            exit_code=code,
            signal=number,
            pid=e.pid or None,
            array=handed.array,
            index=handed.index if handed.array else None,
            message=message,
            submission=handed.submission,
        )
        if exited is not None:
            line.max_rss, line.cpu = exited.max_rss, exited.cpu
            line.stdout, line.stdout_at = self._output(exited.stdout, e.stdout)
            line.stderr, line.stderr_at = self._output(exited.stderr, e.stderr)
        retries, delay = _again(e, wish, reason, code)
        return EndReport(
            id=handed.id,
            execution=handed.execution,
            wish=wish,
            reason=reason,
            ended=iso(ended),
            exit="" if code is None else str(code),
            started=iso(e.started) if e.started else "",
            allocation=e.allocation,
            line=_pack(line),
            text=self._text(e, wish, reason, message, code),
            array=handed.array,
            position=handed.position,
            class_name=handed.class_name,
            submission=handed.submission,
            retries=retries,
            delay=delay,
        )

    def _output(self, captured: Captured, named: str) -> tuple[str | bytes, list[str | int]]:
        if named:
            return "", [named]
        if captured.path:
            return "", [captured.path.removeprefix(self._prefix), captured.offset, captured.length]
        if not captured.data:
            return "", []
        try:
            return captured.data.decode(), []
        except UnicodeDecodeError:
            return captured.data, []

    def _text(self, e: Execution, wish: str, reason: str, message: str, code: int | None) -> str:
        """What a function has returned, or what RQ's tools show of a failure, in RQ's encoding."""
        if isinstance(e.exited, Returned) and e.exited.text and e.reason in ("", "time limit"):
            return e.exited.text
        if wish not in ("failed", "stopped"):
            return ""
        what = e.handed.name or e.handed.id
        lines = [f"{what} {REASONS[reason]}.", f"node {self._node}, execution {e.handed.execution}"]
        if code is not None:
            lines[1] += f", exit code {code}"
        if message:
            lines.append(message)
        if e.exited is not None and (end := tail(e.exited.stderr, TAIL_BYTES)):
            lines += ["stderr ends with:", end.decode("utf-8", "replace")]
        return base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()


def _judge(e: Execution, code: int | None, number: int | None) -> tuple[str, str, str]:
    """Wish, reason and message. What we ended keeps our reason, whatever its exit code says."""
    if e.reason:
        return e.wish or WISHES.get(e.reason, "failed"), e.reason, e.message
    if isinstance(e.exited, Returned):
        return e.exited.outcome, e.exited.reason, e.exited.message
    if number is not None:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "a real-time signal"
        return "failed", "signal", f"Signal {number} ({name}) killed it. {e.message}".strip()
    if e.function and code is not None:
        return "failed", "interpreter", f"The exit code of its interpreter was {code}."
    if code:
        return "failed", "exit", f"Its exit code was {code}. {e.message}".strip()
    return "finished", "", e.message


def _again(e: Execution, wish: str, reason: str, code: int | None) -> tuple[int, float]:
    """Retries that are left to this failure, and the seconds before the next."""
    left, spec = e.handed.retries, e.spec
    if wish != "failed" or spec is None or not left:
        return left, 0.0
    if not chosen(spec.retry_on, reason, code):
        return 0, 0.0
    # It may have been given more than it was submitted with: `pilotq retry`.
    return left, pause(spec.backoff, max(spec.retries - left, 0) + 1)


class Outbox:
    """Ends that wait for company before they are reported.

    While lanes go on by themselves nobody is in a hurry; a released lane is reported at once. At most one call is on
    its way: what ends meanwhile rides in the next one, so a busy server makes batches larger, not queues longer.
    """

    def __init__(self, link: NodeLink, settings: Settings) -> None:
        self._link = link
        self._settings = settings
        self.doubts = Doubts(settings)
        self._waiting: list[tuple[EndReport, End | None]] = []
        self._since = 0.0
        self._urgent = False

    def add(self, e: Execution, report: EndReport, end: End | None, now: float) -> None:
        """``end`` is None when the lane stays taken."""
        if end is not None:
            end = self.doubts.weigh(e, report, end)
            if end.said == DOUBTED:
                self._doubt()
        if not self._waiting:
            self._since = now
        self._waiting.append((report, end))
        if end is None or not end.kept:
            self._urgent = True

    def _doubt(self) -> None:
        """The node is doubted: those of the row that have not been reported yet are no more to blame than the last."""
        for report, _ in self._waiting:
            if report.wish == "failed" and report.id in self.doubts.failed:
                report.wish = "doubted"

    def due(self, now: float) -> float | None:
        """Monotonic time at which `flush` wants to be called; None: not before something else happens."""
        if not self._waiting or self._link.unsent():
            return None
        if self._urgent or len(self._waiting) >= self._settings.report_max:
            return now
        return self._since + self._settings.report_s

    def flush(self, now: float, *, all_now: bool = False) -> bool:
        """Post what is due; with ``all_now`` everything. True if something was posted."""
        due = now if all_now and self._waiting else self.due(now)
        if due is None or due > now:
            return False
        while self._waiting:
            call = self._waiting[: self._fitting()]
            del self._waiting[: len(call)]
            self._link.post_ends([report for report, _ in call], [end for _, end in call if end is not None])
            if not all_now:
                break
        self._urgent = bool(self._waiting)
        return True

    def _fitting(self) -> int:
        """How many of those that wait go into one call."""
        size = 0
        for number, (report, _) in enumerate(self._waiting[:CALL_MAX]):
            size += len(report.text)
            if size > CALL_BYTES and number:
                return number
        return CALL_MAX

    def __len__(self) -> int:
        return len(self._waiting)
