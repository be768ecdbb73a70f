"""Exit codes of the commands. Errors carry their own number: see broker/errors.py."""

from __future__ import annotations

from typing import Final

from pilotq.broker.client.views import Counts

ALL_FINISHED: Final = 0
TASKS_FAILED: Final = 1
INVALID: Final = 2
PILOT_FAILED: Final = 3
TIMED_OUT: Final = 4
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

MEANINGS: Final[dict[int, str]] = {
    ALL_FINISHED: "all tasks finished (`run`, `wait`); the command succeeded (the others)",
    TASKS_FAILED: "some task failed, was canceled or omitted, or never ran; of `retry`: something could not run again",
    INVALID: "wrong usage, an impossible request, or no such pilot or task: nothing was submitted; of "
    "`run --resume`: what is left can never run on these nodes",
    PILOT_FAILED: "the pilot or its server failed; of `doctor`: something would keep a pilot from working",
    TIMED_OUT: "the time to wait ran out",
    INTERRUPTED: "interrupted",
    BROKEN_PIPE: "nobody reads the output of the command of `run` any more: it was ended",
}


def of_counts(counts: Counts) -> int:
    """ALL_FINISHED when every one of these tasks finished, else TASKS_FAILED."""
    return ALL_FINISHED if counts.finished == counts.total else TASKS_FAILED
