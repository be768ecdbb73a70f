"""QCG-PilotJob's words for what became of a task: states, histories, exit codes, all as the text it uses. Pure."""

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


class Ended(msgspec.Struct):
    """The part of a line of the journal that is shown; field by field as in records.Line."""

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
    """The state of a task, or of an element, from RQ's word and the reason that views show."""
    if status == "canceled":
        return OMITTED if reason == "dependency" else CANCELED
    if status == "started":
        return EXECUTING if reason == "running" else SCHEDULED
    return _STATES.get(status, QUEUED)


def whole(states: set[str], *, canceled: bool, each: bool = False) -> str:
    """The state of a job whose elements have ended so; ``canceled``: its user has canceled all of it.

    An iteration is OMITTED when it waits for another job; where its elements wait one by one (``each``) it has FAILED.
    """
    if canceled and states != {SUCCEED}:
        return CANCELED
    if each and states == {OMITTED}:
        return FAILED
    return next(iter(states)) if len(states) == 1 else FAILED


def exit_code(line: Ended) -> str:
    """``0``, ``3``, ``-9`` for a signal, ``-1`` for what could not be launched."""
    if line.signal is not None:
        return str(-line.signal)
    return NOT_STARTED if line.exit_code is None else str(line.exit_code)


def message_of(line: Ended) -> str:
    """Why it ended so, where its exit code does not say it."""
    if line.status not in ("failed", "stopped") or line.reason in ("", "exit", "signal", "elements"):
        return ""
    return line.message or REASONS.get(line.reason, line.reason)


def history_of(line: Ended, *, element: bool = False) -> list[tuple[str, float]]:
    """States and when they began (unix seconds); an element's begins when it was handed out."""
    state = state_of(line.status, line.reason)
    # What could not be launched has passed through EXECUTING there.
    began = line.started or (line.ended if line.handed and state == FAILED else None)
    steps = [(QUEUED, None if element else line.queued), (SCHEDULED, line.handed), (EXECUTING, began)]
    return [(word, at) for word, at in [*steps, (state, line.ended)] if at is not None]


def runtime_of(line: Ended, directory: str, program: str) -> dict[str, str]:
    """Where it ran and how it ended; nothing for what never had cores."""
    if not line.cpus:
        return {}
    seconds = max(line.ended - line.started, 0.0) if line.ended and line.started else 0.0
    return {
        "allocation": line.cpus,
        "wd": directory,
        "rtime": duration(seconds),
        "exit_code": exit_code(line),
        "pid": str(line.pid) if line.pid else NOT_STARTED,
        "pname": program,
    }


def duration(seconds: float) -> str:
    """``0:00:01.500000``: always with microseconds, which QCG-PilotJob's own reader needs."""
    text = str(timedelta(seconds=round(seconds, 6)))
    return text if "." in text else f"{text}.000000"


def moment(seconds: float) -> datetime:
    """Local time without its zone, as QCG-PilotJob shows times."""
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().replace(tzinfo=None)


def stamp(seconds: float) -> str:
    """``2026-01-31 12:00:00.000000``"""
    return moment(seconds).isoformat(" ", "microseconds")
