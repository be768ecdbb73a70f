"""The retry policy of a task: which failures are retried, and after which delay. Pure.

``retry_on`` is a list with commas of exit codes (``75``), ranges of them (``100-110``), and the words ``signal`` (a
signal killed the task) and ``limit`` (it ran longer than its time limit). Empty: every failure is retried.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

REASONS_BY_WORD = {
    "signal": "signal",
    "limit": "time limit",
    "memory": "memory",
}  # the word -> the reason of states.REASONS
MAX_DELAY_S = 3600.0  # no delay between two executions grows beyond this, unless the first one is longer


class RetryOn(NamedTuple):
    """The failures that are retried: exit codes, and reasons of states.REASONS."""

    codes: frozenset[int]
    reasons: frozenset[str]


@lru_cache(maxsize=256)
def parse_retry_on(retry_on: str) -> RetryOn:
    """Read the text of ``retry_on``; raises ValueError, whose text names the piece that is wrong."""
    codes: set[int] = set()
    reasons: set[str] = set()
    for piece in (p.strip() for p in retry_on.split(",")):
        first, dash, last = piece.partition("-")
        end = last if dash else first
        if piece in REASONS_BY_WORD:
            reasons.add(REASONS_BY_WORD[piece])
        elif not (first.isdecimal() and end.isdecimal() and 1 <= int(first) <= int(end) <= 255):
            raise ValueError(
                f"{piece!r} is no exit code (1 to 255), no range such as 100-110, and not signal, limit or memory"
            )
        else:
            codes.update(range(int(first), int(end) + 1))
    return RetryOn(frozenset(codes), frozenset(reasons))


def is_retried(retry_on: str, reason: str, code: int | None) -> bool:
    """Whether a failure with this reason and exit code is retried: ``is_retried("75,signal", "exit", 75)``."""
    if not retry_on:
        return True
    found = parse_retry_on(retry_on)
    return reason in found.reasons or (reason == "exit" and code in found.codes)


def retry_delay(backoff: float, number: int) -> float:
    """Seconds before the retry of this number (1 is the first): ``backoff``, then twice as long each time."""
    return min(backoff * 2.0 ** min(number - 1, 60), max(MAX_DELAY_S, backoff))
