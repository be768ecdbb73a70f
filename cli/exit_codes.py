"""What the command line ends with. Errors carry their own number: see broker/errors.py."""

from __future__ import annotations

from typing import Final

from pilotq.broker.views import Counts

ALL_FINISHED: Final = 0
TASKS_FAILED: Final = 1  # some task failed, was canceled or omitted, or never ran
INVALID: Final = 2  # usage, or a description that cannot be: nothing was submitted
PILOT_FAILED: Final = 3
TIMED_OUT: Final = 4
INTERRUPTED: Final = 130


def of_counts(counts: Counts) -> int:
    """ALL_FINISHED when every one of these tasks finished, else TASKS_FAILED."""
    return ALL_FINISHED if counts.finished == counts.total else TASKS_FAILED
