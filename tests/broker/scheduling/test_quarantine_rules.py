"""The rules of the quarantine alone: what a worker reports of its node, what the dispatcher decides from it, and what
the script does with the tasks."""

from __future__ import annotations

import pytest

from pilotq.broker.scheduling.quarantine import Decision, Quarantine
from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.messages import FAILED, HEALTHY, SUSPECT, UNKNOWN, EndReport, ExecutionEnd, Run
from pilotq.broker.store.requeue import requeue
from pilotq.broker.store.resources import NodeShare
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.failure_streak import FailureStreak
from tests.support.engine import Engine, array, fixtures, ids, task

engine, server, node = fixtures
SETTINGS = Settings(quarantine_after=3, quick_failure_s=5.0, probe_after_s=30.0, probe_after_max_s=100.0)


# -- the worker: failure streaks ------------------------------------------------------------------------------------


class Worker:
    """One node's failure streak; ``end`` brings it an execution and returns what the report and the dispatcher are
    told."""

    def __init__(self) -> None:
        self.streak = FailureStreak(SETTINGS)
        self.clock = 1000.0

    def end(
        self, task_id: str, wish: str = "failed", reason: str = "exit", *, seconds: float = 0.1, began: float = 0.0,
        cpus: str = "n1[0]", last_suspect: str = "",
    ) -> tuple[str, int]:  # fmt: skip
        self.clock += 10.0
        run = Run(task_id, 1, 1, cpus, "c", "", 0, self.clock, "", "", -1, 0, 0, "", b"", 0, last_suspect)  # type: ignore[arg-type]
        e = Execution(1, run)
        e.started = began or self.clock
        report = EndReport(task_id, 1, wish, reason, "", "1", "", cpus, b"")
        end = self.streak.classify(e, report, ExecutionEnd(1, "c", seconds, False))
        assert end.last_suspect_node == last_suspect or not end.health
        return report.outcome, end.health


def test_the_third_task_in_a_row_is_suspect_and_so_are_those_after_it() -> None:
    w = Worker()
    assert [w.end(i) for i in "abcd"] == [("failed", FAILED)] * 2 + [("suspect", SUSPECT)] * 2
    assert w.streak.failed == set("abcd")


def test_one_task_that_is_tried_again_and_again_is_no_row() -> None:
    w = Worker()
    assert {w.end("a") for _ in range(20)} == {("failed", FAILED)}


@pytest.mark.parametrize("between", [{"wish": "finished", "reason": ""}, {"seconds": 6.0}])
def test_what_runs_ends_the_row(between: dict[str, object]) -> None:
    w = Worker()
    for _ in range(5):
        assert [w.end(i)[1] for i in "ab"] == [FAILED, FAILED]
        assert w.end("x", **between)[1] == HEALTHY  # type: ignore[arg-type]


def test_what_began_long_before_the_row_shows_nothing() -> None:
    w = Worker()
    w.end("a")
    w.end("b")
    w.end("old", "finished", "", began=500.0)
    assert w.end("c") == ("suspect", SUSPECT)


@pytest.mark.parametrize(
    ("wish", "reason", "cpus"),
    [("canceled", "canceled", "n1[0]"), ("requeue", "walltime", "n1[0]"), ("lost", "worker lost", "n1[0]"),
     ("failed", "time limit", "n1[0]"), ("failed", "result", "n1[0]"), ("failed", "exit", "n1[0],n2[0]")],
)  # fmt: skip
def test_what_says_nothing_of_its_node(wish: str, reason: str, cpus: str) -> None:
    w = Worker()
    assert [w.end(str(i), wish, reason, cpus=cpus)[0] for i in range(9)] == [wish] * 9
    w.end("a")
    assert w.end("b", wish, reason, cpus=cpus)[1] == UNKNOWN
    w.end("c")
    assert w.end("d") == ("suspect", SUSPECT), "nor does it end the row"


def test_a_cleared_suspicion_makes_it_slower_but_not_for_ever() -> None:
    def suspected_at(w: Worker) -> int:
        w.end("healthy", "finished", "")
        return next(n for n in range(1, 1000) if w.end(f"t{n}")[1] == SUSPECT)

    w = Worker()
    found = []
    for _ in range(7):
        found.append(suspected_at(w))
        w.streak.clear_suspicion(healthy=False)
    assert found == [3, 6, 12, 24, 24, 24, 24]
    assert next(n for n in range(1, 1000) if w.end(f"more{n}")[1] == SUSPECT) == 3 * 24, "in the same row: four times"
    w.streak.clear_suspicion(healthy=True)
    assert w.end("x") == ("failed", FAILED)


# -- the dispatcher: whose fault it was -------------------------------------------------------------------------------


class Bench:
    """A quarantine of nodes n1 to nN, with what the dispatcher would tell it."""

    def __init__(self, nodes: int = 4) -> None:
        self.quarantine = Quarantine(SETTINGS)
        self.usable = [f"n{n}" for n in range(1, nodes + 1)]
        self.slots: dict[int, Slot] = {}
        self.elsewhere = True

    def say(self, node: str, *said: int, last_suspect: str = "", slot: int = 0, now: float = 0.0) -> None:
        for word in said:
            self.quarantine.record_end(
                node, ExecutionEnd(slot, "c", 0.1, False, word, last_suspect, "why" if word == SUSPECT else ""), now
            )

    def decide(self, now: float = 0.0) -> list[Decision]:
        return self.quarantine.decide(now, self.usable, self.slots, lambda *_: self.elsewhere)

    def slot(self, number: int, node: str, since: float) -> None:
        self.slots[number] = Slot(number, "c", (NodeShare(node, (0,)),), 0.0, since)

    def probe(self, number: int, node: str, now: float) -> None:
        """The node gets the one task that it may have."""
        assert not self.quarantine.is_closed(node, now)
        assert self.quarantine.start_probe((NodeShare(node, (0,)),), number)
        assert not self.quarantine.start_probe((NodeShare(node, (1,)),), number + 1), "only one"
        assert self.quarantine.is_closed(node, now)
        self.slot(number, node, now)

    def quarantine_n1(self) -> None:
        self.say("n1", SUSPECT, SUSPECT, SUSPECT)
        self.say("n2", HEALTHY, HEALTHY, HEALTHY, last_suspect="n1")
        (decision,) = self.decide()
        assert decision.quarantined


def test_a_suspected_node_is_closed_and_quarantined_when_its_tasks_run_elsewhere() -> None:
    b = Bench()
    b.say("n1", SUSPECT, SUSPECT, SUSPECT, SUSPECT)
    assert b.decide() == [] and b.quarantine.is_closed("n1", 0.0) and not b.quarantine.is_closed("n2", 0.0)
    b.say("n2", HEALTHY, HEALTHY, last_suspect="n1")
    assert b.decide() == []
    b.say("n3", HEALTHY, last_suspect="n1")
    (decision,) = b.decide()
    assert decision.quarantined and decision.node == "n1"
    assert decision.why == "why; such tasks run on other nodes; it gets one task to try after "


def test_it_is_used_again_when_its_tasks_fail_elsewhere() -> None:
    b = Bench()
    b.say("n1", SUSPECT, SUSPECT)
    b.say("n2", FAILED, last_suspect="n1")
    assert b.decide() == []
    b.say("n3", FAILED, last_suspect="n1")
    assert b.decide() == [Decision("n1", False, "its tasks failed at once on other nodes, too")]
    assert not b.quarantine.is_closed("n1", 0.0) and b.quarantine.failing >= {"n1", "n2", "n3"}


def test_what_a_suspected_node_reports_of_another_ones_tasks_counts_for_nothing() -> None:
    b = Bench(8)
    b.say("n1", SUSPECT)
    b.say("n2", SUSPECT)
    b.say("n2", FAILED, SUSPECT, last_suspect="n1")
    assert b.decide() == []


def test_few_tasks_give_one_more_to_be_sure() -> None:
    b = Bench()
    b.say("n1", SUSPECT)
    b.say("n2", HEALTHY, last_suspect="n1")
    assert b.decide() == []
    b.probe(7, "n1", 1.0)
    b.say("n1", SUSPECT, slot=7, now=1.0)
    assert b.decide(1.0) == [] and b.quarantine.is_closed("n1", 1.0)
    b.say("n2", HEALTHY, last_suspect="n1")
    assert b.decide(1.0) == []
    b.probe(9, "n1", 1.0)
    b.say("n1", HEALTHY, slot=9, now=1.0)
    assert b.decide(1.0) == [Decision("n1", False, "a task ran there", healthy=True)]


def test_a_task_that_lives_on_it_speaks_for_it() -> None:
    b = Bench()
    b.slot(1, "n1", 99.0)
    b.slot(2, "n1", 10.0)  # it began long before: the node may have broken since
    b.say("n1", SUSPECT, now=100.0)
    assert b.decide(103.0) == []
    assert b.decide(104.5) == [Decision("n1", False, "a task lives there", healthy=True)]


def test_it_is_quarantined_until_another_node_has_ended_a_task() -> None:
    b = Bench()
    b.say("n1", SUSPECT, SUSPECT)
    assert b.decide(9.0) == []
    (decision,) = b.decide(10.5)
    assert decision.quarantined and "no other node has ended them yet" in decision.why
    b.say("n2", FAILED, FAILED, last_suspect="n1")
    (decision,) = b.decide(12.0)
    assert not decision.quarantined


@pytest.mark.parametrize(
    ("nodes", "suspect", "closed"), [(1, 1, 0), (2, 1, 1), (2, 2, 0), (3, 2, 0), (4, 2, 2), (4, 3, 0)]
)
def test_the_tasks_are_blamed_where_most_nodes_fail(nodes: int, suspect: int, closed: int) -> None:
    b = Bench(nodes)
    for number in range(suspect):
        b.say(f"n{number + 1}", SUSPECT)
    b.decide()
    b.decide()
    assert len(b.quarantine.suspicions) <= closed
    assert sum(not b.quarantine.is_closed(name, 0.0) for name in b.usable) >= 1


def test_the_last_node_that_can_be_used_is_taken_back() -> None:
    b = Bench(2)
    b.quarantine_n1()
    b.say("n2", SUSPECT)
    assert [v.node for v in b.decide()] == ["n2"], "the one that is quarantined stays so"
    b.usable.remove("n2")  # drained, lost, or its allocation ends
    assert b.decide() == [Decision("n1", False, "no other node can be used")]


def test_what_could_run_nowhere_else_closes_no_node() -> None:
    b = Bench()
    b.elsewhere = False
    b.say("n1", SUSPECT)
    assert b.decide() == [Decision("n1", False, "such tasks can run on no other node")]


def test_pauses_double_up_to_a_bound_and_a_task_that_runs_brings_it_back() -> None:
    b, now, pauses = Bench(), 0.0, []
    b.quarantine_n1()
    for number in range(1, 5):
        pauses.append(b.quarantine.suspicions["n1"].pause)
        assert b.quarantine.is_closed("n1", now + pauses[-1] - 0.1)
        now += pauses[-1]
        b.probe(number * 10, "n1", now)
        b.say("n1", SUSPECT, slot=number * 10, now=now)
        assert [v.quarantined for v in b.decide(now)] == [True]
    assert pauses == [30.0, 60.0, 100.0, 100.0]
    now += 100.0
    b.probe(100, "n1", now)
    assert b.decide(now + 5.1) == [Decision("n1", False, "a task lives there", healthy=True)]
    assert not b.quarantine.suspicions and not b.quarantine.probes


def test_a_probe_with_a_task_that_fails_anywhere_does_not_count() -> None:
    b = Bench()
    b.quarantine_n1()
    b.probe(5, "n1", 30.0)
    b.say("n1", SUSPECT, slot=5, now=30.0)
    b.decide(30.0)
    assert b.quarantine.is_closed("n1", 31.0)
    b.say("n2", FAILED, last_suspect="n1")
    assert b.decide(31.0) == [] and not b.quarantine.is_closed("n1", 31.0)


def test_a_probe_that_came_to_nothing_is_made_again() -> None:
    b = Bench()
    b.quarantine_n1()
    b.probe(5, "n1", 30.0)
    del b.slots[5]  # nothing was left to be claimed
    assert b.decide(30.0) == [] and not b.quarantine.is_closed("n1", 30.0)
    b.probe(6, "n1", 30.0)
    # Canceled, or what could not be killed has ended.
    b.quarantine.record_end("n1", ExecutionEnd(6, "c", -1.0, False), 30.0)
    b.decide(30.0)
    assert b.quarantine.is_closed("n1", 59.0) and not b.quarantine.is_closed("n1", 60.0)


def test_a_node_that_goes_is_suspected_no_more() -> None:
    b = Bench()
    b.say("n1", SUSPECT)
    b.usable.remove("n1")
    assert b.decide() == [] and not b.quarantine.suspicions


# -- the script: whose failures are not counted -----------------------------------------------------------------------


def fail_suspect(engine: Engine, node: str = "n1:1", count: int = 1) -> tuple[list[str], list[str]]:
    handed = engine.claim(count, node=node)
    return ids(handed), engine.complete(handed, "suspect", "exit", node=node)


def test_a_suspect_failure_is_not_counted_and_the_task_waits_in_front(engine: Engine) -> None:
    engine.register("n1")
    engine.register("n2", 2)
    a, b = engine.submit(*[task(retries=1)] * 2)
    assert fail_suspect(engine) == ([a], ["retry"])
    assert (engine.status(a), engine.list(), engine.counts()) == ("queued", [a, b], {"total": 2})
    record = engine.hash(a)
    assert (record["pq_suspect_node"], record["pq_retries"], record["pq_exec"]) == ("n1", "1", "1")
    assert [(x["reason"], x["final"]) for x in engine.journal()] == [("node", False)]
    (handed,) = engine.claim(node="n2:2")
    assert (handed.id, handed.execution, handed.last_suspect_node) == (a, 2, "n1")
    assert engine.complete([handed], "failed", "exit", node="n2:2") == ["retry"], "its own retry"
    assert engine.hash(a)["pq_retries"] == "0"


@pytest.mark.parametrize(("nodes", "times"), [(("n1:1", "n2:2"), 3), (("n1:1",), 9)])
def test_it_is_not_asked_again_for_ever(engine: Engine, nodes: tuple[str, ...], times: int) -> None:
    """Where no other node takes it, it is what a quarantined node is probed with, again and again."""
    engine.register("n1")
    engine.register("n2", 2)
    (a,) = engine.submit(task())
    verdicts = [fail_suspect(engine, nodes[n % len(nodes)])[1] for n in range(times + 1)]
    assert verdicts == [["retry"]] * times + [["ok"]]
    assert (engine.status(a), engine.hash(a)["pq_reason"]) == ("failed", "exit")
    assert engine.counts() == {"total": 1, "failed": 1} and engine.nothing_left()
    assert requeue(engine.store, [a]) == {a: "queued"}
    assert fail_suspect(engine)[1] == ["retry"], "what its user retries begins anew"


@pytest.mark.parametrize("closed", [(), (keys.DRAINED,), (keys.QUARANTINE,)])
def test_without_another_node_it_counts(engine: Engine, closed: tuple[str, ...]) -> None:
    engine.register("n1")
    for key in closed:
        engine.register("n2", 2)
        engine.link.call("HSET", key, "n2", "drained")
    (a,) = engine.submit(task())
    assert fail_suspect(engine)[1] == ["ok"]
    assert engine.status(a) == "failed"


def test_one_that_was_canceled_is_canceled(engine: Engine) -> None:
    engine.register("n1")
    engine.register("n2", 2)
    (a,) = engine.submit(task())
    handed = engine.claim()
    engine.cancel(a)
    engine.complete(handed, "suspect", "exit")
    assert engine.status(a) == "canceled" and engine.nothing_left()


def test_elements_are_excused_as_well_and_a_late_report_changes_nothing(engine: Engine) -> None:
    engine.register("n1")
    engine.register("n2", 2)
    (a,) = engine.submit(array(3))
    first = engine.claim(2)
    assert engine.complete(first, "suspect", "exit") == ["retry", "retry"]
    assert engine.list() == [f"{a}_0", f"{a}_1", a]
    second = engine.claim(3, node="n2:2")
    assert [(h.id, h.execution, h.last_suspect_node) for h in second] == [
        (f"{a}_0", 2, "n1"),
        (f"{a}_1", 2, "n1"),
        (f"{a}_2", 1, ""),
    ]
    assert engine.complete(second, node="n2:2") == ["ok"] * 3
    assert engine.complete(first, "suspect", "exit") == ["ok", "ok"], "it was counted: nothing is overwritten"
    assert engine.outcomes(a, 3) == "111" and engine.counts() == {"total": 3, "finished": 3} and engine.nothing_left()
