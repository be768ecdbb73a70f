"""Reports of executions of which something is damaged."""

from __future__ import annotations

from typing import Any

import pytest

from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.reporting import Reporter
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
