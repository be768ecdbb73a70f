"""States, histories, exit codes and times of tasks, in the forms that QCG-PilotJob uses. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Final

import msgspec

from pilotq.broker.tasks.states import REASONS

QUEUED: Final = "QUEUED"
SCHEDULED: Final = "SCHEDULED"
EXECUTING: Final = "EXECUTING"
SUCCEED: Final = "SUCCEED"
FAILED: Final = "FAILED"
CANCELED: Final = "CANCELED"
OMITTED: Final = "OMITTED"
FINAL: Final = frozenset({SUCCEED, FAILED, CANCELED, OMITTED})

REPORT_FORMATS: Final = ("json", "text", "none")

# The groups that `status` counts; their names are QCG-PilotJob's, a canceled job is a finished one there.
GROUPS: Final[Mapping[str, str]] = {
    QUEUED: "InSchedule", SCHEDULED: "InSchedule", EXECUTING: "Executing", SUCCEED: "Finished", CANCELED: "Finished",
    FAILED: "Failed", OMITTED: "Failed",
}  # fmt: skip
_STATES: Final[Mapping[str, str]] = {"finished": SUCCEED, "failed": FAILED, "stopped": CANCELED}
NOT_STARTED: Final = "-1"  # exit code, and process, of what could not be launched


class TaskRecord(msgspec.Struct):
    """What is shown of a task: the part of an entry of the journal with the same fields as `JournalEntry`."""

    id: str
    status: str = ""
    reason: str = ""
    final: bool = True
    cpus: str = ""
    queued: float | None = None
    handed: float | None = None
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    pid: int | None = None
    array: str = ""
    index: int | None = None
    message: str = ""
    elements: dict[str, str] = {}


def state_of(status: str, reason: str) -> str:
    """The state of a task, or of an element, from its status in RQ and the reason that views show."""
    if status == "canceled":
        return OMITTED if reason == "dependency" else CANCELED
    if status == "started":
        return EXECUTING if reason == "running" else SCHEDULED
    return _STATES.get(status, QUEUED)


def job_state(states: set[str], *, canceled: bool, elementwise: bool = False) -> str:
    """The state of a job whose elements have ended so; ``canceled``: its user has canceled all of it.

    An iteration is OMITTED when it waits for another job; where its elements wait one by one (``each``) it has FAILED.
    """
    if canceled and states != {SUCCEED}:
        return CANCELED
    if elementwise and states == {OMITTED}:
        return FAILED
    return next(iter(states)) if len(states) == 1 else FAILED


def exit_code(task: TaskRecord) -> str:
    """``0``, ``3``, ``-9`` for a signal, ``-1`` for what could not be launched."""
    if task.signal is not None:
        return str(-task.signal)
    return NOT_STARTED if task.exit_code is None else str(task.exit_code)


def message_of(task: TaskRecord) -> str:
    """Why it ended so, where its exit code does not say it."""
    if task.status not in ("failed", "stopped") or task.reason in ("", "exit", "signal", "elements"):
        return ""
    return task.message or REASONS.get(task.reason, task.reason)


def history_of(task: TaskRecord, *, element: bool = False) -> list[tuple[str, float]]:
    """States and when they began (unix seconds); an element's begins when it was assigned."""
    state = state_of(task.status, task.reason)
    # In QCG-PilotJob what could not be launched has passed through EXECUTING.
    began = task.started or (task.ended if task.handed and state == FAILED else None)
    steps = [(QUEUED, None if element else task.queued), (SCHEDULED, task.handed), (EXECUTING, began)]
    return [(step, at) for step, at in [*steps, (state, task.ended)] if at is not None]


def runtime_of(task: TaskRecord, directory: str, program: str) -> dict[str, str]:
    """Where it ran and how it ended; nothing for what never had cores."""
    if not task.cpus:
        return {}
    seconds = max(task.ended - task.started, 0.0) if task.ended and task.started else 0.0
    return {
        "allocation": task.cpus,
        "wd": directory,
        "rtime": duration(seconds),
        "exit_code": exit_code(task),
        "pid": str(task.pid) if task.pid else NOT_STARTED,
        "pname": program,
    }


def duration(seconds: float) -> str:
    """``0:00:01.500000``: always with microseconds, which QCG-PilotJob's own reader needs."""
    text = str(timedelta(seconds=round(seconds, 6)))
    return text if "." in text else f"{text}.000000"


def local_time(seconds: float) -> datetime:
    """Local time without its zone, as QCG-PilotJob shows times."""
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().replace(tzinfo=None)


def timestamp(seconds: float) -> str:
    """``2026-01-31 12:00:00.000000``"""
    return local_time(seconds).isoformat(" ", "microseconds")
