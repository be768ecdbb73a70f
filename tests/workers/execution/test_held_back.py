"""How long a shortage is waited out."""

from __future__ import annotations

from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.held_back import hold_back, shortage_of
from tests.workers.execution.test_slots import run_message


def test_the_bound_is_of_one_shortage() -> None:
    e = Execution(1, run_message("a"))
    assert [hold_back(e, "No process.", now, 60.0) for now in (1000.0, 1030.0, 1059.0)] == [True, True, True]
    assert shortage_of([e]) == "No process."
    # It has stood behind another task, which ran for an hour.
    assert [hold_back(e, "No memory.", now, 60.0) for now in (4700.0, 4730.0, 4760.0)] == [True, True, False]
    assert e.message == "No memory. It was tried again for 60 s."
