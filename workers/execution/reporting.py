"""Makes the end report of an execution from its launcher's records, and collects reports into batches."""

from __future__ import annotations

import base64
import os
import signal
import traceback
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from pilotq.broker.log import log
from pilotq.broker.settings import Settings
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.journal_runs import pack_entry
from pilotq.broker.store.keys import executor_of
from pilotq.broker.store.messages import HEALTHY, SUSPECT, EndReport, ExecutionEnd
from pilotq.broker.tasks.functions import result_text
from pilotq.broker.tasks.retry_policy import is_retried, retry_delay
from pilotq.broker.tasks.spec import Spec, command_text, is_bundle, packed_command
from pilotq.broker.tasks.states import REASONS
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.failure_streak import FailureStreak
from pilotq.workers.execution.larger_request import larger_request
from pilotq.workers.execution.leased_ends import LeasedEnd, memory_of, plain_runs, runs_of
from pilotq.workers.execution.leased_runs import LeasedRun, PlainEnds
from pilotq.workers.execution.memory_limit import KILLED
from pilotq.workers.protocol import NO_OUTPUT, Captured, Exited, Returned, tail
from pilotq.workers.session import Session, iso

# The outcome of a task whose execution the worker has ended, by reason; every other reason is a failure.
OUTCOMES = {
    "canceled": "canceled", "failures": "canceled", "stopped": "stopped", "pilot ended": "requeue",
    "walltime": "requeue", "gave way": "requeue", "worker lost": "lost",
}  # fmt: skip
LEAVE_REASONS = ("pilot ended", "walltime")  # reasons that take nothing from a task that has not begun
CALL_MAX = 500  # ends in one script call: it stops the server for so long
CALL_BYTES = 32 << 20  # of results in it, but for a single larger one: the server takes no message of any size
VALUES_BYTES = 256 << 10  # of results without a record in it: while the memory is short, there may be room for no more
TAIL_BYTES = 2048  # of captured stderr, in the text that RQ shows of a failure


class Reporter:
    """Makes the reports of one node; ``directory`` is the pilot's, paths in journal entries are relative to it."""

    def __init__(self, node: str, directory: str) -> None:
        self._node = node
        self._directory = directory
        self._prefix = os.fsencode(directory.rstrip("/") + "/")
        self._last: tuple[Spec | None, str] = (
            None,
            "",
        )  # of the last leased end: elements without variables share theirs

    def end(self, e: Execution, ended: float) -> EndReport | LeasedEnd:
        """How an execution has ended, or why it never began, at ``ended`` (unix seconds)."""
        if e.leased and not (e.reason or e.suffix or e.message) and _leaves_lines_only(e):
            try:
                if e.spec is not self._last[0]:
                    self._last = e.spec, command_of(e)
                value = e.exited.value if isinstance(e.exited, Returned) else b""
                return LeasedEnd(e, ended, self._last[1], self._outputs(e), value, self.report)
            except Exception:  # noqa: BLE001  # the boundary of one task: its own report says what is wrong
                pass
        return self.report(e, ended)

    def report(self, e: Execution, ended: float) -> EndReport:
        """The report of an execution that has ended, or never began, at ``ended`` (unix seconds)."""
        try:
            return self._report(e, ended)
        except Exception as error:  # noqa: BLE001  # the boundary of one task: the report must not be lost
            log(
                f"what is to be reported of task {e.run.id} is damaged:\n{traceback.format_exc()}",
                level="error",
                task=e.run.id,
            )
            e.message = f"Of its report only this is left: {type(error).__name__}: {error}"
        if isinstance(e.exited, Exited):
            e.exited = msgspec.structs.replace(e.exited, stdout=NO_OUTPUT, stderr=NO_OUTPUT)
        else:
            # Without a reason it would have finished.
            e.exited, e.reason = None, e.reason if e.reason and e.reason in REASONS else "result"
        e.stdout, e.stderr, e.spec = b"", b"", None
        return self._report(e, ended)

    def _report(self, e: Execution, ended: float) -> EndReport:
        run, exited = e.run, e.exited
        code: int | None = None
        number: int | None = None
        if isinstance(exited, Exited):
            ending = os.waitstatus_to_exitcode(exited.status)
            code, number = (ending, None) if ending >= 0 else (None, -ending)
        outcome, reason, message = _outcome(e, code, number)
        if reason == "memory":
            code, number = KILLED, None
        entry = JournalEntry(
            id=run.id,
            name=run.name,
            execution=run.execution,
            node=self._node,
            cpus=e.allocation,
            queued=run.queued,
            handed=run.handed,
            started=e.started or None,
            ended=ended,
            exit_code=code,
            signal=number,
            pid=e.pid or None,
            memory=memory_of(run),
            limit=e.limit or None,
            array=run.array,
            index=run.index if run.array and not is_bundle(run.spec) else None,
            command=command_of(e),
            message=message.encode("utf-8", "backslashreplace").decode(),
            submission=run.submission,
        )
        if exited is not None:
            entry.max_rss, entry.cpu = exited.max_rss, exited.cpu
            for name, value in self._outputs(e).items():
                setattr(entry, name, value)
        retries, delay = _retry(e, outcome, reason, code)
        more = larger_request(run, e.spec, reason) if outcome == "failed" and e.spec is not None else ("", b"")
        return EndReport(
            id=run.id,
            execution=run.execution,
            outcome=outcome,
            reason=reason,
            ended=iso(ended),
            exit="" if code is None else str(code),
            started=iso(e.started) if e.started else "",
            allocation=e.allocation,
            entry=pack_entry(entry),
            text=self._text(e, outcome, reason, message, code),
            array=run.array,
            position=run.position,
            class_name=run.class_name if run.spec else "",  # of a damaged message the record knows more
            submission=run.submission,
            retries=retries,
            delay=delay,
            next_class=more[0],
            next_spec=more[1],
        )

    def _outputs(self, e: Execution) -> dict[str, Any]:
        """The fields of an entry that say what an execution has written, or where that is; nothing of what is empty."""
        if e.exited is None or (e.exited.stdout == e.exited.stderr == NO_OUTPUT and not (e.stdout or e.stderr)):
            return {}
        fields: dict[str, Any] = {}
        for name, captured, named in (
            ("stdout", e.exited.stdout, e.stdout),
            ("stderr", e.exited.stderr, e.stderr),
        ):
            data, place = self._output(captured, named)
            if data:
                fields[name] = data
            if place:
                fields[f"{name}_at"] = place
        return fields

    def _output(self, captured: Captured, named: bytes) -> tuple[str | bytes, list[str | bytes | int]]:
        if named:
            return "", [named]
        if captured.path:
            return "", [captured.path.removeprefix(self._prefix), captured.offset, captured.length]
        # What could be kept nowhere has no file, and still a length.
        place: list[str | bytes | int] = ["", 0, captured.length] if captured.length > len(captured.data) else []
        if not captured.data:
            return "", place
        try:
            return captured.data.decode(), place
        except UnicodeDecodeError:
            return captured.data, place

    def _text(self, e: Execution, outcome: str, reason: str, message: str, code: int | None) -> str:
        """What a function has returned, or what RQ's tools show of a failure, in RQ's encoding."""
        if isinstance(e.exited, Returned) and e.reason in ("", "time limit") and (e.exited.text or e.exited.value):
            return e.exited.text or result_text(e.exited.value)
        if outcome not in ("failed", "stopped"):
            return ""
        what = e.run.name or e.run.id
        lines = [f"{what} {REASONS[reason]}.", f"node {self._node}, execution {e.run.execution}"]
        if code is not None:
            lines[1] += f", exit code {code}"
        if message:
            lines.append(message)
        if e.exited is not None and (end := tail(e.exited.stderr, TAIL_BYTES)):
            lines += ["stderr ends with:", end.decode("utf-8", "replace")]
        return base64.b64encode(zlib.compress("\n".join(lines).encode("utf-8", "backslashreplace"))).decode()


def command_of(e: Execution) -> str:
    """Its command on one line, shortened."""
    return packed_command(e.run.spec) if e.spec is None else command_text(e.spec)


def _leaves_lines_only(e: Execution) -> bool:
    """Whether it has finished, and nothing of it alone is to be kept in the server: a short result goes to its
    executor, or to those of its bundle."""
    if isinstance(e.exited, Returned):
        is_kept = executor_of(e.run.submission) or is_bundle(e.run.spec)
        return e.exited.outcome == "finished" and bool(e.exited.value and is_kept)
    # A function whose interpreter ended has not returned, whatever the exit code is.
    return e.exited is not None and not e.exited.status and not e.function


def _outcome(e: Execution, code: int | None, number: int | None) -> tuple[str, str, str]:
    """Outcome, reason and message. What the worker has ended keeps that reason, whatever its exit code is."""
    if e.reason:
        return e.outcome or OUTCOMES.get(e.reason, "failed"), e.reason, e.message
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


def _retry(e: Execution, outcome: str, reason: str, code: int | None) -> tuple[int, float]:
    """Retries that are left to this failure, and the seconds before the next."""
    left, spec = e.run.retries, e.spec
    if outcome != "failed" or spec is None or not left:
        return left, 0.0
    if not is_retried(spec.retry_on, reason, code):
        return 0, 0.0
    # `pilotq retry` may have given it more than it was submitted with.
    return left, retry_delay(spec.backoff, max(spec.retries - left, 0) + 1)


def together(ends: Iterable[ExecutionEnd]) -> list[ExecutionEnd]:
    """The same ends, those in one slot that ended alike as one: they ended well, and the slot went on. In order, as
    far as that matters: none passes one that ended otherwise.

    >>> together([ExecutionEnd(1, "c", 1.0, True), ExecutionEnd(1, "c", 3.0, True)])
    [ExecutionEnd(slot=1, class_name='c', seconds=2.0, kept=True, health=0, last_suspect_node='', why='', number=2)]
    """
    found: list[ExecutionEnd] = []
    alike: dict[tuple[int, str], list[float]] = {}  # the seconds of those that may be joined by more

    def close() -> None:
        for (slot, class_name), seconds in alike.items():
            found.append(ExecutionEnd(slot, class_name, sum(seconds) / len(seconds), True, number=len(seconds)))
        alike.clear()

    for end in ends:
        if end.kept and end.seconds >= 0 and end.health == HEALTHY and not end.last_suspect_node and end.number == 1:
            alike.setdefault((end.slot, end.class_name), []).append(end.seconds)
        else:
            close()
            found.append(end)
    close()
    return found


class Outbox:
    """Collects end reports into batches and sends them when they are due.

    While slots go on by themselves a report can wait; a released slot is reported at once. At most one call is on its
    way: what ends meanwhile goes into the next one, so a busy server makes batches larger, not queues longer.
    """

    def __init__(
        self, session: Session, settings: Settings, node: str, report: Callable[[Execution, float], EndReport]
    ) -> None:
        """``report`` makes the report of one of many that ended plainly, where it needs one of its own."""
        self._session = session
        self._settings = settings
        self._node = node
        self._report = report
        self.streak = FailureStreak(settings)
        self._waiting: list[tuple[EndReport | LeasedEnd, ExecutionEnd | None]] = []
        self._plain: list[PlainEnds] = []
        self._number_plain = 0  # of elements in them
        self._since = self._plain_since = 0.0
        self.urgent = False

    def add(self, e: Execution, report: EndReport | LeasedEnd, end: ExecutionEnd | None, now: float) -> None:
        """``end`` is None when the slot stays taken."""
        if end is not None:
            end = self.streak.classify(e, report if isinstance(report, EndReport) else None, end)
            if end.health == SUSPECT:
                self._mark_suspect()
        if not self._waiting:
            self._since = now
        self._waiting.append((report, end))
        if end is None or not end.kept:
            self.urgent = True

    def open_ends(self, run: LeasedRun, now: float) -> None:
        """Elements of a run are about to end plainly: `LeasedRun.pass_plain` adds them to ``ends``."""
        ends = run.ends
        follows = ends is not None and not ends.closed and ends.number + len(ends.rows) == run.number
        if not follows or (ends is not None and ends.is_full):
            run.ends = PlainEnds(run)
            if not self._plain:
                self._plain_since = now
            self._plain.append(run.ends)

    def count_plain(self, run: LeasedRun, number: int) -> float:
        """So many were added since the last call; the seconds that they ran, on average."""
        ends = run.ends
        assert ends is not None
        self._number_plain += number
        seconds, ends.counted = ends.seconds - ends.counted, ends.seconds
        self.streak.succeeded(ends.ended - seconds / number)
        return seconds / number

    def _mark_suspect(self) -> None:
        """The node is suspect: those of the streak not yet reported are no more to blame than the last."""
        for report, _ in self._waiting:
            if isinstance(report, EndReport) and report.outcome == "failed" and report.id in self.streak.failed:
                report.outcome = "suspect"

    def due(self, now: float) -> float | None:
        """Monotonic time at which `flush` wants to be called; None: not before something else happens."""
        if not len(self) or self._session.unsent():
            return None
        settings = self._settings
        full = len(self._waiting) >= settings.report_batch_max or self._number_plain >= settings.plain_batch_max
        if self.urgent or full:
            return now
        moments = [self._since + settings.report_batch_s] if self._waiting else []
        moments += [self._plain_since + settings.plain_batch_s] if self._plain else []
        return min(moments)

    def flush(self, now: float, *, all_now: bool = False) -> bool:
        """Post what is due; with ``all_now`` everything. True if something was posted."""
        due = now if all_now and len(self) else self.due(now)
        if due is None or due > now:
            return False
        while len(self):
            call = self._waiting[: self._batch_size()]
            del self._waiting[: len(call)]
            reports = [report for report, _ in call if isinstance(report, EndReport)]
            leased = [report for report, _ in call if isinstance(report, LeasedEnd)]
            plain = self._take_plain(CALL_MAX - len(call))
            runs = [*runs_of(leased, self._node), *plain_runs(plain, self._node, self._report)]
            ends = together(end for _, end in call if end is not None)
            self._session.post_ends(reports, [*ends, *(end for one in plain for end in one.slot_ends())], runs)
            if not all_now:
                break
        self.urgent = len(self) > 0
        return True

    def _take_plain(self, most: int) -> list[PlainEnds]:
        """About so many of the elements that have ended plainly, for one call."""
        number = size = 0
        taken: list[PlainEnds] = []
        for ends in self._plain:
            size += sum(map(len, ends.values))
            if number >= most or (size > VALUES_BYTES and taken):
                break
            ends.closed = True
            number += len(ends.rows)
            taken.append(ends)
        del self._plain[: len(taken)]
        self._number_plain -= number
        return taken

    def _batch_size(self) -> int:
        """How many of those that wait go into one call."""
        size = values = 0
        for number, (report, _) in enumerate(self._waiting[:CALL_MAX]):
            if isinstance(report, EndReport):
                size += len(report.text)
            else:
                values += len(report.value)
            if (size > CALL_BYTES or values > VALUES_BYTES) and number:
                return number
        return CALL_MAX

    def __len__(self) -> int:
        return len(self._waiting) + self._number_plain
