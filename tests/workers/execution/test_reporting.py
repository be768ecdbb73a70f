"""Reports of executions of which something is damaged, and of those that end alike."""

from __future__ import annotations

from typing import Any

import pytest

from pilotq.broker.store.messages import FAILED, ExecutionEnd
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.reporting import Reporter, together
from pilotq.workers.protocol import NO_OUTPUT, Returned
from tests.workers.execution.test_slots import run_message


@pytest.mark.parametrize("outcome", ["failed", "finished"])
def test_a_call_whose_report_cannot_be_made_has_not_finished(outcome: str, capfd: Any) -> None:
    e = Execution(1, run_message("a"))
    e.function = True
    e.exited = Returned(1, 7, outcome, "exception", "", "", 1.0, 2.0, 1.0, 0.0, 0, 0, NO_OUTPUT, NO_OUTPUT)
    spec: Any = object()
    e.spec = spec
    report = Reporter("n1", "/d").report(e, 2.0)
    assert (report.outcome, report.reason) == ("failed", "result")
    assert "what is to be reported of task a is damaged" in capfd.readouterr().err


def ended(slot: int, seconds: float = 1.0, *, kept: bool = True, name: str = "c", **more: Any) -> ExecutionEnd:
    return ExecutionEnd(slot, name, seconds, kept, **more)


def test_ends_that_are_alike_are_told_as_one() -> None:
    ends = [ended(1, 1.0), ended(2, 5.0), ended(1, 2.0), ended(1, 9.0, name="d"), ended(1, 3.0)]
    assert together(ends) == [ended(1, 2.0, number=3), ended(2, 5.0), ended(1, 9.0, name="d")]


@pytest.mark.parametrize(
    "other",
    [
        ended(1, kept=False),
        ended(1, -1.0),
        ended(1, health=FAILED),
        ended(1, last_suspect_node="n2"),
        ended(1, number=5),
    ],
)
def test_no_end_passes_one_of_another_kind(other: ExecutionEnd) -> None:
    ends = [ended(1), ended(2), ended(1), other, ended(2), ended(2)]
    assert together(ends) == [ended(1, number=2), ended(2), other, ended(2, number=2)]
