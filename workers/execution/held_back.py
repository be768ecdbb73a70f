"""Holds back executions that a passing shortage prevents from being launched: they are tried again, within a bound."""

from __future__ import annotations

from collections.abc import Iterable

from pilotq.broker.log import log
from pilotq.workers.execution.execution import Execution


def hold_back(e: Execution, message: str, now: float, bound_s: float) -> bool:
    """Whether it is to be tried again; if not, its own message says for how long it was. ``now`` is monotonic."""
    if e.held_back is None:
        log(f"task {e.run.id} is held back: {message}")
    since = e.held_back[0] if e.held_back is not None else now
    e.held_back = since, message
    if now - since < bound_s:
        return True
    e.message = f"{message} It was tried again for {now - since:.0f} s."
    return False


def shortage_of(executions: Iterable[Execution]) -> str:
    """Why one of them is held back now, for people; empty when none is."""
    return next((e.held_back[1] for e in executions if e.held_back is not None), "")
