"""Holds back executions that a passing shortage prevents from being launched: they are tried again, within a bound."""

from __future__ import annotations

from collections.abc import Iterable

from pilotq.broker.log import log
from pilotq.workers.execution.execution import Execution, HeldBack


def hold_back(e: Execution, message: str, now: float, bound_s: float) -> bool:
    """Whether it is to be tried again; if not, its own message says for how long it was. ``now`` is monotonic.

    One that has stood in its queue for longer than the bound meets a new shortage, not the one of then.
    """
    known = e.held_back if e.held_back is not None and now - e.held_back.tried < bound_s else None
    if known is None:
        log(f"task {e.run.id} is held back: {message}", level="warning", task=e.run.id)
    since = now if known is None else known.since
    e.held_back = HeldBack(since, now, message)
    if now - since < bound_s:
        return True
    e.message = f"{message} It was tried again for {now - since:.0f} s."
    return False


def shortage_of(executions: Iterable[Execution]) -> str:
    """Why one of them is held back now, for people; empty when none is."""
    return next((e.held_back.message for e in executions if e.held_back is not None), "")
