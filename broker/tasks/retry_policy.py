"""Which failures are tried again, and when. Pure.

``retry_on`` is a list with commas of exit codes (``75``), ranges of them (``100-110``), and the words ``signal`` (a
signal killed it) and ``limit`` (it ran longer than its time limit). Empty: every failure.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

WORDS = {"signal": "signal", "limit": "time limit"}  # the word -> the reason of states.REASONS
LONGEST_S = 3600.0  # no pause between two executions grows beyond this, unless the first one is longer


class Chosen(NamedTuple):
    codes: frozenset[int]
    reasons: frozenset[str]


@lru_cache(maxsize=256)
def parse(retry_on: str) -> Chosen:
    """Raises ValueError, whose text says which piece is none."""
    codes: set[int] = set()
    reasons: set[str] = set()
    for piece in (p.strip() for p in retry_on.split(",")):
        first, dash, last = piece.partition("-")
        end = last if dash else first
        if piece in WORDS:
            reasons.add(WORDS[piece])
        elif not (first.isdecimal() and end.isdecimal() and 1 <= int(first) <= int(end) <= 255):
            raise ValueError(f"{piece!r} is no exit code (1 to 255), no range such as 100-110, and not signal or limit")
        else:
            codes.update(range(int(first), int(end) + 1))
    return Chosen(frozenset(codes), frozenset(reasons))


def chosen(retry_on: str, reason: str, code: int | None) -> bool:
    """Whether a failure with this reason and exit code is one to try again."""
    if not retry_on:
        return True
    found = parse(retry_on)
    return reason in found.reasons or (reason == "exit" and code in found.codes)


def pause(backoff: float, number: int) -> float:
    """Seconds before the retry of this number (1 is the first): ``backoff``, then twice as long each time."""
    return min(backoff * 2.0 ** min(number - 1, 60), max(LONGEST_S, backoff))
