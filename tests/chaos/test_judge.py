"""The judge of the fault tests, on histories with one planted lie each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pilotq.broker.store.journal import JournalEntry
from tests.chaos.judge import Expected, History, judge


def fine() -> dict[str, Any]:
    """One task ran well, one was lost and ran again, one failed and was retried, one hostile one failed."""
    return {
        "accepted": {
            "a": Expected(), "b": Expected(), "c": Expected(most=2),
            "d": Expected(endings=frozenset({("failed", "time limit")}), writes=False),
        },
        "lines": {
            "a": [JournalEntry("a", status="finished", execution=1)],
            "b": [
                JournalEntry("b", status="failed", reason="worker lost", execution=1, final=False),
                JournalEntry("b", status="finished", execution=2),
            ],
            "c": [
                JournalEntry("c", status="failed", reason="exit", execution=1, final=False),
                JournalEntry("c", status="finished", execution=2),
            ],
            "d": [JournalEntry("d", status="failed", reason="time limit", execution=1)],
        },
        "ledger": [
            "a 1 begin 1.0 10 n1 0", "a 1 end 2.0 0", "b 1 begin 1.0 11 n1 1", "b 2 begin 3.0 12 n1 1", "b 2 end 4.0 0",
            "c 1 begin 5.0 13 n1 0", "c 1 end 6.0 7", "c 2 begin 7.0 14 n1 0", "c 2 end 8.0 0",
        ],
        "faults": 1, "cores": 2, "left": [],
    }  # fmt: skip


def history(parts: dict[str, Any]) -> History:
    return History(**{**parts, "ledger": [line.split() for line in parts["ledger"]]})


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "lost": (lambda h: h["lines"].pop("a"), "a: lost"),
    "never final": (lambda h: setattr(h["lines"]["a"][0], "final", False), "a: lost"),
    "counted twice": (
        lambda h: h["lines"]["a"].append(JournalEntry("a", status="finished", execution=2)),
        "a: counted 2 times",
    ),
    "ended, and went on": (lambda h: h["lines"]["b"].reverse(), "b: counted 1 times"),
    "one line twice": (lambda h: h["lines"]["b"].insert(0, h["lines"]["b"][0]), "b: executions counted"),
    "another ending": (lambda h: setattr(h["lines"]["a"][0], "status", "canceled"), "a: it is canceled"),
    "another reason": (lambda h: setattr(h["lines"]["d"][0], "reason", "exit"), "d: it is failed (exit)"),
    "finished without an end": (lambda h: h["ledger"].remove("a 1 end 2.0 0"), "a: finished by execution 1"),
    "finished without a beginning": (lambda h: h["ledger"].remove("a 1 begin 1.0 10 n1 0"), "a: it began 0 times"),
    "another's outcome": (lambda h: setattr(h["lines"]["b"][1], "execution", 3), "b: finished by execution 3"),
    "began too often": (lambda h: h["ledger"].extend(["b 3 begin 9.0 1 n1 0"]), "b: it began 3 times"),
    "one number twice": (lambda h: h["ledger"].append("b 2 begin 3.5 13 n1 1"), "b.2: it began 2 times"),
    "a stranger in the journal": (lambda h: h["lines"].update(x=[JournalEntry("x", status="finished")]), "x: nobody"),
    "a stranger's ledger": (lambda h: h["ledger"].append("x 1 begin 9.0 1 n1 0"), "x: nobody has submitted it"),
    "a core used twice": (lambda h: h["ledger"].append("a 1 core 1.5 n1.0 b.1"), "a.1: core used twice"),
    "two at one time": (lambda h: h["ledger"].append("b 2 again 3.1 b b.1"), "b.2: two executions at one time"),
    "a process that is left": (lambda h: h["left"].append(99), "process 99 of a task lives on"),
}


def test_a_history_as_promised_is_not_blamed() -> None:
    assert judge(history(fine())) == []


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_is_found(lie: str) -> None:
    case = fine()
    LIES[lie][0](case)
    wrong = judge(history(case))
    assert any(text.startswith(LIES[lie][1]) for text in wrong), wrong


def test_executions_that_no_fault_explains_are_found() -> None:
    case = fine()
    case["faults"] = 0
    assert judge(history(case)) == [
        "b: it began 2 times, with 0 faults", "1 executions more than tasks, with 0 faults on 2 cores",
    ]  # fmt: skip
