"""The wait that tests use: for a condition, with a deadline. No test sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SHARED: set[str] = set()  # numbers of processes that outlive the test which started them, for others of its module


def wait_until(condition: Callable[[], T], *, seconds: float = 20.0, what: str = "") -> T:
    """Return the first true value of ``condition``; after ``seconds`` fail and say what was seen last."""
    deadline = time.monotonic() + seconds
    while True:
        seen = condition()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}; last seen: {seen!r}")
        time.sleep(0.01)
