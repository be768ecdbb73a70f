"""Is it the node, or is it the tasks? The rules alone: what a worker says of its node, what the dispatcher makes of it,
and what the script does with the tasks."""

from __future__ import annotations

import pytest

from pilotq.broker.scheduling.inventory import Lane
from pilotq.broker.scheduling.quarantine import Judge, Verdict
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.messages import DOUBTED, FAILED, FINE, MUTE, End, EndReport, Handed, Part
from pilotq.broker.store.requeue import retry
from pilotq.workers.execution.escalation import Execution
from pilotq.workers.execution.failure_streak import Doubts
from tests.support.engine import Engine, array, fixtures, ids, task

engine, server, node = fixtures
SETTINGS = Settings(aside_after=3, aside_quick_s=5.0, aside_pause_s=30.0, aside_pause_max_s=100.0)


# -- the worker: rows of failures ------------------------------------------------------------------------------------


class Worker:
    """One node's doubts; ``end`` brings it an execution and returns what the report and the dispatcher are told."""

    def __init__(self) -> None:
        self.doubts = Doubts(SETTINGS)
        self.clock = 1000.0

    def end(
        self, task_id: str, wish: str = "failed", reason: str = "exit", *, seconds: float = 0.1, began: float = 0.0,
        cpus: str = "n1[0]", spared: str = "",
    ) -> tuple[str, int]:  # fmt: skip
        self.clock += 10.0
        e = Execution(1, Handed(task_id, 1, 1, cpus, "c", "", 0, self.clock, "", "", -1, 0, 0, "", b"", 0, spared))  # type: ignore[arg-type]
        e.started = began or self.clock
        report = EndReport(task_id, 1, wish, reason, "", "1", "", cpus, b"")
        end = self.doubts.weigh(e, report, End(1, "c", seconds, False))
        assert end.spared == spared or not end.said
        return report.wish, end.said


def test_the_third_task_in_a_row_is_doubted_and_so_are_those_after_it() -> None:
    w = Worker()
    assert [w.end(i) for i in "abcd"] == [("failed", FAILED)] * 2 + [("doubted", DOUBTED)] * 2
    assert w.doubts.failed == set("abcd")


def test_one_task_that_is_tried_again_and_again_is_no_row() -> None:
    w = Worker()
    assert {w.end("a") for _ in range(20)} == {("failed", FAILED)}


@pytest.mark.parametrize("between", [{"wish": "finished", "reason": ""}, {"seconds": 6.0}])
def test_what_runs_ends_the_row(between: dict[str, object]) -> None:
    w = Worker()
    for _ in range(5):
        assert [w.end(i)[1] for i in "ab"] == [FAILED, FAILED]
        assert w.end("x", **between)[1] == FINE  # type: ignore[arg-type]


def test_what_began_long_before_the_row_shows_nothing() -> None:
    w = Worker()
    w.end("a")
    w.end("b")
    w.end("old", "finished", "", began=500.0)
    assert w.end("c") == ("doubted", DOUBTED)


@pytest.mark.parametrize(
    ("wish", "reason", "cpus"),
    [("canceled", "canceled", "n1[0]"), ("free", "walltime", "n1[0]"), ("lost", "worker lost", "n1[0]"),
     ("failed", "time limit", "n1[0]"), ("failed", "result", "n1[0]"), ("failed", "exit", "n1[0],n2[0]")],
)  # fmt: skip
def test_what_says_nothing_of_its_node(wish: str, reason: str, cpus: str) -> None:
    w = Worker()
    assert [w.end(str(i), wish, reason, cpus=cpus)[0] for i in range(9)] == [wish] * 9
    w.end("a")
    assert w.end("b", wish, reason, cpus=cpus)[1] == MUTE
    w.end("c")
    assert w.end("d") == ("doubted", DOUBTED), "nor does it end the row"


def test_a_pardon_makes_it_slower_but_not_for_ever() -> None:
    def doubted_at(w: Worker) -> int:
        w.end("fine", "finished", "")
        return next(n for n in range(1, 1000) if w.end(f"t{n}")[1] == DOUBTED)

    w = Worker()
    found = []
    for _ in range(7):
        found.append(doubted_at(w))
        w.doubts.pardon(fine=False)
    assert found == [3, 6, 12, 24, 24, 24, 24]
    assert next(n for n in range(1, 1000) if w.end(f"more{n}")[1] == DOUBTED) == 3 * 24, "in the same row: four times"
    w.doubts.pardon(fine=True)
    assert w.end("x") == ("failed", FAILED)


# -- the dispatcher: whose fault it was -------------------------------------------------------------------------------


class Bench:
    """A judge of nodes n1 to nN, with what the dispatcher would tell it."""

    def __init__(self, nodes: int = 4) -> None:
        self.judge = Judge(SETTINGS)
        self.usable = [f"n{n}" for n in range(1, nodes + 1)]
        self.lanes: dict[int, Lane] = {}
        self.elsewhere = True

    def say(self, node: str, *said: int, spared: str = "", lane: int = 0, now: float = 0.0) -> None:
        for word in said:
            self.judge.heard(node, End(lane, "c", 0.1, False, word, spared, "why" if word == DOUBTED else ""), now)

    def turn(self, now: float = 0.0) -> list[Verdict]:
        return self.judge.turn(now, self.usable, self.lanes, lambda *_: self.elsewhere)

    def lane(self, number: int, node: str, since: float) -> None:
        self.lanes[number] = Lane(number, "c", (Part(node, (0,)),), 0.0, since)

    def trial(self, number: int, node: str, now: float) -> None:
        """The node gets the one task that it may have."""
        assert not self.judge.shut(node, now)
        assert self.judge.begin((Part(node, (0,)),), number)
        assert not self.judge.begin((Part(node, (1,)),), number + 1), "only one"
        assert self.judge.shut(node, now)
        self.lane(number, node, now)

    def put_aside(self) -> None:
        self.say("n1", DOUBTED, DOUBTED, DOUBTED)
        self.say("n2", FINE, FINE, FINE, spared="n1")
        (verdict,) = self.turn()
        assert verdict.aside


def test_a_doubted_node_is_held_and_aside_when_its_tasks_run_elsewhere() -> None:
    b = Bench()
    b.say("n1", DOUBTED, DOUBTED, DOUBTED, DOUBTED)
    assert b.turn() == [] and b.judge.shut("n1", 0.0) and not b.judge.shut("n2", 0.0)
    b.say("n2", FINE, FINE, spared="n1")
    assert b.turn() == []
    b.say("n3", FINE, spared="n1")
    (verdict,) = b.turn()
    assert verdict.aside and verdict.node == "n1"
    assert verdict.why == "why; such tasks run on other nodes; it gets one task to try after "


def test_it_is_used_again_when_its_tasks_fail_elsewhere() -> None:
    b = Bench()
    b.say("n1", DOUBTED, DOUBTED)
    b.say("n2", FAILED, spared="n1")
    assert b.turn() == []
    b.say("n3", FAILED, spared="n1")
    assert b.turn() == [Verdict("n1", False, "its tasks failed at once on other nodes, too")]
    assert not b.judge.shut("n1", 0.0) and b.judge.failing >= {"n1", "n2", "n3"}


def test_what_a_doubted_node_says_of_another_ones_tasks_counts_for_nothing() -> None:
    b = Bench(8)
    b.say("n1", DOUBTED)
    b.say("n2", DOUBTED)
    b.say("n2", FAILED, DOUBTED, spared="n1")
    assert b.turn() == []


def test_few_tasks_give_one_more_to_be_sure() -> None:
    b = Bench()
    b.say("n1", DOUBTED)
    b.say("n2", FINE, spared="n1")
    assert b.turn() == []
    b.trial(7, "n1", 1.0)
    b.say("n1", DOUBTED, lane=7, now=1.0)
    assert b.turn(1.0) == [] and b.judge.shut("n1", 1.0)
    b.say("n2", FINE, spared="n1")
    assert b.turn(1.0) == []
    b.trial(9, "n1", 1.0)
    b.say("n1", FINE, lane=9, now=1.0)
    assert b.turn(1.0) == [Verdict("n1", False, "a task ran there", fine=True)]


def test_a_task_that_lives_on_it_speaks_for_it() -> None:
    b = Bench()
    b.lane(1, "n1", 99.0)
    b.lane(2, "n1", 10.0)  # it began long before: the node may have broken since
    b.say("n1", DOUBTED, now=100.0)
    assert b.turn(103.0) == []
    assert b.turn(104.5) == [Verdict("n1", False, "a task lives there", fine=True)]


def test_without_an_opinion_it_is_put_aside_until_there_is_one() -> None:
    b = Bench()
    b.say("n1", DOUBTED, DOUBTED)
    assert b.turn(9.0) == []
    (verdict,) = b.turn(10.5)
    assert verdict.aside and "no other node has ended them yet" in verdict.why
    b.say("n2", FAILED, FAILED, spared="n1")
    (verdict,) = b.turn(12.0)
    assert not verdict.aside


@pytest.mark.parametrize(
    ("nodes", "doubted", "held"), [(1, 1, 0), (2, 1, 1), (2, 2, 0), (3, 2, 0), (4, 2, 2), (4, 3, 0)]
)
def test_the_tasks_are_blamed_where_most_nodes_fail(nodes: int, doubted: int, held: int) -> None:
    b = Bench(nodes)
    for number in range(doubted):
        b.say(f"n{number + 1}", DOUBTED)
    b.turn()
    b.turn()
    assert len(b.judge.cases) <= held
    assert sum(not b.judge.shut(name, 0.0) for name in b.usable) >= 1


def test_the_last_node_that_can_be_used_is_taken_back() -> None:
    b = Bench(2)
    b.put_aside()
    b.say("n2", DOUBTED)
    assert [v.node for v in b.turn()] == ["n2"], "the one that is aside stays so"
    b.usable.remove("n2")  # drained, lost, or its allocation ends
    assert b.turn() == [Verdict("n1", False, "no other node can be used")]


def test_what_could_run_nowhere_else_holds_no_node() -> None:
    b = Bench()
    b.elsewhere = False
    b.say("n1", DOUBTED)
    assert b.turn() == [Verdict("n1", False, "such tasks can run on no other node")]


def test_pauses_double_up_to_a_bound_and_a_task_that_runs_brings_it_back() -> None:
    b, now, pauses = Bench(), 0.0, []
    b.put_aside()
    for number in range(1, 5):
        pauses.append(b.judge.cases["n1"].pause)
        assert b.judge.shut("n1", now + pauses[-1] - 0.1)
        now += pauses[-1]
        b.trial(number * 10, "n1", now)
        b.say("n1", DOUBTED, lane=number * 10, now=now)
        assert [v.aside for v in b.turn(now)] == [True]
    assert pauses == [30.0, 60.0, 100.0, 100.0]
    now += 100.0
    b.trial(100, "n1", now)
    assert b.turn(now + 5.1) == [Verdict("n1", False, "a task lives there", fine=True)]
    assert not b.judge.cases and not b.judge.trials


def test_a_trial_with_a_task_that_fails_anywhere_does_not_count() -> None:
    b = Bench()
    b.put_aside()
    b.trial(5, "n1", 30.0)
    b.say("n1", DOUBTED, lane=5, now=30.0)
    b.turn(30.0)
    assert b.judge.shut("n1", 31.0)
    b.say("n2", FAILED, spared="n1")
    assert b.turn(31.0) == [] and not b.judge.shut("n1", 31.0)


def test_a_trial_that_came_to_nothing_is_made_again() -> None:
    b = Bench()
    b.put_aside()
    b.trial(5, "n1", 30.0)
    del b.lanes[5]  # nothing was left to be handed out
    assert b.turn(30.0) == [] and not b.judge.shut("n1", 30.0)
    b.trial(6, "n1", 30.0)
    b.judge.heard("n1", End(6, "c", -1.0, False), 30.0)  # canceled, or what could not be killed has ended
    b.turn(30.0)
    assert b.judge.shut("n1", 59.0) and not b.judge.shut("n1", 60.0)


def test_a_node_that_goes_takes_its_doubt_along() -> None:
    b = Bench()
    b.say("n1", DOUBTED)
    b.usable.remove("n1")
    assert b.turn() == [] and not b.judge.cases


# -- the script: whose failures are not counted -----------------------------------------------------------------------


def doubted(engine: Engine, node: str = "n1:1", count: int = 1) -> tuple[list[str], list[str]]:
    handed = engine.claim(count, node=node)
    return ids(handed), engine.end(handed, "doubted", "exit", node=node)


def test_a_doubted_failure_is_not_counted_and_the_task_waits_in_front(engine: Engine) -> None:
    engine.register("n1")
    engine.register("n2", 2)
    a, b = engine.submit(*[task(retries=1)] * 2)
    assert doubted(engine) == ([a], ["retry"])
    assert (engine.status(a), engine.list(), engine.counts()) == ("queued", [a, b], {"total": 2})
    record = engine.hash(a)
    assert (record["pq_spared"], record["pq_retries"], record["pq_exec"]) == ("n1", "1", "1")
    assert [(x["reason"], x["final"]) for x in engine.journal()] == [("node", False)]
    (handed,) = engine.claim(node="n2:2")
    assert (handed.id, handed.execution, handed.spared) == (a, 2, "n1")
    assert engine.end([handed], "failed", "exit", node="n2:2") == ["retry"], "its own retry"
    assert engine.hash(a)["pq_retries"] == "0"


@pytest.mark.parametrize(("nodes", "times"), [(("n1:1", "n2:2"), 3), (("n1:1",), 9)])
def test_it_is_not_asked_again_for_ever(engine: Engine, nodes: tuple[str, ...], times: int) -> None:
    """Where no other node takes it, it is the one that a node aside is tried with, again and again."""
    engine.register("n1")
    engine.register("n2", 2)
    (a,) = engine.submit(task())
    verdicts = [doubted(engine, nodes[n % len(nodes)])[1] for n in range(times + 1)]
    assert verdicts == [["retry"]] * times + [["ok"]]
    assert (engine.status(a), engine.hash(a)["pq_reason"]) == ("failed", "exit")
    assert engine.counts() == {"total": 1, "failed": 1} and engine.nothing_left()
    assert retry(engine.store, [a]) == {a: "queued"}
    assert doubted(engine)[1] == ["retry"], "what its user retries begins anew"


@pytest.mark.parametrize("closed", [(), (keys.CLOSED,), (keys.ASIDE,)])
def test_without_another_node_it_counts(engine: Engine, closed: tuple[str, ...]) -> None:
    engine.register("n1")
    for key in closed:
        engine.register("n2", 2)
        engine.link.call("HSET", key, "n2", "drained")
    (a,) = engine.submit(task())
    assert doubted(engine)[1] == ["ok"]
    assert engine.status(a) == "failed"


def test_one_that_was_canceled_is_canceled(engine: Engine) -> None:
    engine.register("n1")
    engine.register("n2", 2)
    (a,) = engine.submit(task())
    handed = engine.claim()
    engine.cancel(a)
    engine.end(handed, "doubted", "exit")
    assert engine.status(a) == "canceled" and engine.nothing_left()


def test_elements_are_spared_as_well_and_a_late_report_changes_nothing(engine: Engine) -> None:
    engine.register("n1")
    engine.register("n2", 2)
    (a,) = engine.submit(array(3))
    first = engine.claim(2)
    assert engine.end(first, "doubted", "exit") == ["retry", "retry"]
    assert engine.list() == [f"{a}_0", f"{a}_1", a]
    second = engine.claim(3, node="n2:2")
    assert [(h.id, h.execution, h.spared) for h in second] == [
        (f"{a}_0", 2, "n1"),
        (f"{a}_1", 2, "n1"),
        (f"{a}_2", 1, ""),
    ]
    assert engine.end(second, node="n2:2") == ["ok"] * 3
    assert engine.end(first, "doubted", "exit") == ["ok", "ok"], "it was counted: nothing is overwritten"
    assert engine.bits(a, 3) == "111" and engine.counts() == {"total": 3, "finished": 3} and engine.nothing_left()
