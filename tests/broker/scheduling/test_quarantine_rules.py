"""The rules of the quarantine alone: what a worker reports of its node, what the dispatcher decides from it, and what
the script does with the tasks."""

from __future__ import annotations

import pytest

from pilotq.broker.scheduling.availability import Availability
from pilotq.broker.scheduling.inventory import Inventory
from pilotq.broker.scheduling.quarantine import Decision, Quarantine
from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.messages import FAILED, HEALTHY, SUSPECT, UNKNOWN, EndReport, ExecutionEnd, Run, StateReport
from pilotq.broker.store.requeue import requeue
from pilotq.broker.store.resources import NodeInfo, NodeShare
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

TRY = "; it gets one task to try after "


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

    def blocked(self, now: float = 0.0) -> bool:
        return self.quarantine.is_blocked("n1", now)

    def slot(self, number: int, node: str, since: float) -> None:
        self.slots[number] = Slot(number, "c", (NodeShare(node, (0,)),), 0.0, since)

    def probe(self, number: int, now: float, *said: int) -> list[Decision]:
        """n1 gets the one task that it may have, which ends so; what is decided then."""
        assert not self.blocked(now)
        assert self.quarantine.start_probe((NodeShare("n1", (0,)),), number)
        assert not self.quarantine.start_probe((NodeShare("n1", (1,)),), number + 1), "only one"
        assert self.blocked(now)
        self.slot(number, "n1", now)
        self.say("n1", *said, slot=number, now=now)
        return self.decide(now)

    def quarantine_n1(self) -> None:
        self.say("n1", SUSPECT, SUSPECT, SUSPECT)
        self.say("n2", HEALTHY, HEALTHY, HEALTHY, last_suspect="n1")
        (decision,) = self.decide()
        assert decision.quarantined


@pytest.mark.parametrize(
    ("excused", "elsewhere", "blocked", "decision"),
    [
        (4, [HEALTHY] * 2, True, None),
        (4, [HEALTHY] * 3, True, Decision("n1", True, f"why; such tasks run on other nodes{TRY}")),
        (2, [FAILED], True, None),
        (2, [FAILED] * 2, False, Decision("n1", False, "its tasks failed at once on other nodes, too")),
        (1, [HEALTHY], False, Decision("n1", True, f"why; such tasks run on other nodes{TRY}")),
        (3, [HEALTHY, FAILED, FAILED], False, Decision("n1", False, "its tasks failed at once on other nodes, too")),
    ],
)
def test_how_the_tasks_of_a_suspected_node_end_elsewhere_decides(
    excused: int, elsewhere: list[int], blocked: bool, decision: Decision | None
) -> None:
    b = Bench()
    b.say("n1", *[SUSPECT] * excused)
    assert b.decide() == [] and b.blocked() and not b.quarantine.is_blocked("n2", 0.0)
    for number, health in enumerate(elsewhere):
        b.say(f"n{2 + number % 2}", health, last_suspect="n1")
    assert b.decide() == ([decision] if decision else [])
    assert b.blocked() is blocked
    assert b.quarantine.failing == {"n1"} | {f"n{2 + n % 2}" for n, health in enumerate(elsewhere) if health == FAILED}


def test_what_a_suspected_node_reports_of_another_ones_tasks_counts_for_nothing() -> None:
    b = Bench(8)
    b.say("n1", SUSPECT)
    b.say("n2", SUSPECT)
    b.say("n2", FAILED, SUSPECT, last_suspect="n1")
    assert b.decide() == []


@pytest.mark.parametrize("health", [HEALTHY, SUSPECT])
def test_few_tasks_give_one_more_at_once_to_be_sure(health: int) -> None:
    b = Bench()
    b.say("n1", SUSPECT)
    b.say("n2", HEALTHY, last_suspect="n1")
    assert [d.quarantined for d in b.decide()] == [True]
    (decision,) = b.probe(7, 1.0, health)
    if health == HEALTHY:
        assert decision == Decision("n1", False, "a task ran there", healthy=True) and not b.blocked(1.0)
    else:
        assert decision.quarantined and b.blocked(30.9) and not b.blocked(31.0)


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
    ("nodes", "suspect", "elsewhere", "blocked"),
    [(1, 1, True, 0), (2, 1, True, 1), (2, 2, True, 0), (3, 2, True, 0), (4, 2, True, 2), (4, 3, True, 0),
     (4, 1, False, 0)],
)  # fmt: skip
def test_the_tasks_are_blamed_where_most_nodes_fail_or_no_other_could_run_them(
    nodes: int, suspect: int, elsewhere: bool, blocked: int
) -> None:
    b = Bench(nodes)
    b.elsewhere = elsewhere
    for number in range(suspect):
        b.say(f"n{number + 1}", SUSPECT)
    assert {d.quarantined for d in b.decide()} <= {False}
    b.decide()
    assert sum(b.quarantine.is_blocked(name, 0.0) for name in b.usable) == len(b.quarantine.breakers) == blocked


def test_the_last_node_that_can_be_used_is_taken_back() -> None:
    b = Bench(2)
    b.quarantine_n1()
    b.say("n2", SUSPECT)
    assert [v.node for v in b.decide()] == ["n2"], "the one that is quarantined stays so"
    b.usable.remove("n2")  # drained, lost, or its allocation ends
    assert b.decide() == [Decision("n1", False, "no other node can be used")]


def test_pauses_double_up_to_a_bound_and_a_task_that_lives_brings_it_back() -> None:
    b, now = Bench(), 0.0
    b.quarantine_n1()
    for number, pause in enumerate([30.0, 60.0, 100.0, 100.0]):
        assert b.blocked(now + pause - 0.1)
        now += pause
        assert [v.quarantined for v in b.probe(10 * number + 10, now, SUSPECT)] == [True]
    now += 100.0
    assert b.probe(100, now) == []
    assert b.decide(now + 5.1) == [Decision("n1", False, "a task lives there", healthy=True)]
    assert not b.quarantine.breakers


def test_a_probe_with_a_task_that_fails_anywhere_does_not_count() -> None:
    b = Bench()
    b.quarantine_n1()
    b.probe(5, 30.0, SUSPECT)
    assert b.blocked(31.0)
    b.say("n2", FAILED, last_suspect="n1")
    assert b.decide(31.0) == [] and not b.blocked(31.0)


def test_a_probe_that_came_to_nothing_is_made_again() -> None:
    b = Bench()
    b.quarantine_n1()
    b.probe(5, 30.0)
    del b.slots[5]  # nothing was left to be claimed
    assert b.decide(30.0) == [] and not b.blocked(30.0)
    b.probe(6, 30.0)
    # Canceled, or what could not be killed has ended.
    b.quarantine.record_end("n1", ExecutionEnd(6, "c", -1.0, False), 30.0)
    b.decide(30.0)
    assert b.blocked(59.0) and not b.blocked(60.0)


def test_a_node_that_goes_is_suspected_no_more() -> None:
    b = Bench()
    b.say("n1", SUSPECT)
    b.usable.remove("n1")
    assert b.decide() == [] and not b.quarantine.breakers


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


# -- the dispatcher: which nodes it asks before it judges ------------------------------------------------------------


def test_a_new_dispatcher_judges_when_all_registered_nodes_have_reported(engine: Engine) -> None:
    """They report one after the other: the first one is not the only one, so that its failures are the tasks' own."""
    inventory = Inventory(engine.settings)
    availability = Availability(engine.store, inventory)
    availability.read()
    infos = [NodeInfo(name, 1, "here", 1, [0, 1]) for name in ("n1", "n2", "n3")]
    names = {info.name for info in infos}

    def report(info: NodeInfo) -> None:
        inventory.add_node(info, StateReport(info.name, 1, 1, [], {}), 0.0)

    report(infos[0])
    for slot in (1, 2):
        availability.record_end("n1", ExecutionEnd(slot, "default.p0.1c", 0.1, False, SUSPECT, why="it failed"), 1.0)
    late = 1.0 + 3 * engine.settings.quick_failure_s
    assert availability.update(names, late) == [] and availability.suspected == 1
    report(infos[1])
    assert availability.update(names, late) == [] and availability.suspected == 1
    assert engine.link.call("HGETALL", keys.QUARANTINE) == []
    report(infos[2])
    availability.update(names, late)
    assert engine.link.call("HKEYS", keys.QUARANTINE) == [b"n1"]
