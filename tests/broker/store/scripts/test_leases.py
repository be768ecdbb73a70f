"""Leases of runs of elements: what has no record is where it should be, and counts once, on a real server."""

from __future__ import annotations

import time

import msgspec
import pytest

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.scheduling.reconciler import Reconciler
from pilotq.broker.store import keys
from pilotq.broker.store.messages import Stop
from pilotq.broker.store.registry import read_nodes
from pilotq.broker.tasks.model import ArrayRange
from tests.support.engine import NODE, ONE, Engine, array, end_report, fixtures, ids, task

engine, server, node = fixtures


def records(engine: Engine) -> list[str]:
    """The ids of elements that have a record."""
    return [key.removeprefix("rq:job:") for key in engine.all_keys() if key.startswith("rq:job:") and "_" in key]


def test_elements_that_finish_have_no_record_and_are_in_the_journal(engine: Engine) -> None:
    (a,) = engine.submit(task(array=ArrayRange(10, 28, 2), name="steps"))
    handed = engine.claim(4) + engine.claim(6, slot=0)
    assert records(engine) == []
    assert engine.leased() == [f"{h.id}:1" for h in handed]
    assert engine.complete_runs(handed[1:9]) == ["ok"] * 8
    assert engine.outcomes(a, 10) == "0111111110"
    assert engine.leased() == [f"{a}_10:1", f"{a}_28:1"]
    assert engine.complete_runs([handed[0], handed[9]]) == ["ok"] * 2
    lines = [line for line in engine.journal() if line["id"] != a]
    assert sorted(line["id"] for line in lines) == sorted(ids(handed))
    assert {(line["name"], line["status"], line["final"]) for line in lines} == {("steps", "finished", True)}
    assert engine.counts() == {"total": 10, "finished": 10}
    assert engine.status(a) == "finished" and records(engine) == []
    assert engine.nothing_left()


def test_a_run_that_is_reported_again_counts_once(engine: Engine) -> None:
    (a,) = engine.submit(array(5))
    handed = engine.claim(5)
    assert engine.complete_runs(handed[:3]) == ["ok"] * 3
    before = engine.dump(without=(keys.EVENTS, keys.WAKEUP, "rq:worker:"))
    assert engine.complete_runs(handed[:3]) == ["ok"] * 3
    assert engine.dump(without=(keys.EVENTS, keys.WAKEUP, "rq:worker:")) == before
    assert engine.complete_runs(handed[1:]) == ["ok"] * 4  # some of them again
    assert (engine.status(a), engine.counts()) == ("finished", {"total": 5, "finished": 5})


def test_another_node_cannot_end_what_a_lease_holds(engine: Engine) -> None:
    """A late report of a node that was lost: what runs elsewhere now is not ended by it."""
    engine.register("n2", 2)
    (a,) = engine.submit(array(3))
    lost = engine.claim(3)
    assert Reconciler(engine.store).requeue_node(NODE, "lost") == 3
    handed = engine.claim(3, node="n2:2")
    assert [(h.id, h.execution) for h in handed] == [(f"{a}_{n}", 2) for n in range(3)]
    assert engine.complete_runs(lost) == ["stale"] * 3
    assert engine.outcomes(a, 3) == "000"
    assert engine.complete(handed, node="n2:2") == ["ok"] * 3
    assert engine.nothing_left()


@pytest.mark.parametrize("slot", [0, 1])
def test_a_lost_node_gives_back_what_its_leases_had_not_ended(engine: Engine, slot: int) -> None:
    """In their order; and only those are charged that may have begun."""
    (a,) = engine.submit(array(6))
    handed = engine.claim(5, slot=slot)
    engine.complete_runs(handed[1:3])
    engine.report_started(handed[3])
    assert Reconciler(engine.store).requeue_node(NODE, "lost") == 3
    assert engine.outcomes(a, 6) == "011000" and engine.leased() == []
    assert sorted(engine.list()) == sorted([f"{a}_0", f"{a}_3", f"{a}_4", a])
    charged = {i for i in records(engine) if engine.hash(i).get("pq_crashes") == "1"}
    assert charged == ({f"{a}_0", f"{a}_3", f"{a}_4"} if slot else {f"{a}_3"})
    engine.run_all()
    assert engine.counts() == {"total": 6, "finished": 6} and engine.nothing_left()


def test_what_needs_a_record_gets_it(engine: Engine) -> None:
    (a,) = engine.submit(array(6, retries=1))
    runs, fails, back, stops, lives, _ = engine.claim(6)
    engine.report_started(runs)
    assert engine.complete([fails], "failed", "exit") == ["retry"]
    assert engine.return_unstarted([back]) == 1
    assert engine.cancel(stops.id) == ["stopping"]
    assert Stop(stops.id, 1, "canceled") in engine.inbox()
    assert set(records(engine)) == {runs.id, fails.id, back.id, stops.id}
    assert {i: engine.status(i) for i in records(engine)} == {
        runs.id: "started", fails.id: "queued", back.id: "queued", stops.id: "started",
    }  # fmt: skip
    assert engine.hash(runs.id)["pq_retries"] == "1" and engine.hash(fails.id)["pq_retries"] == "0"
    assert sorted(engine.leased()) == sorted([f"{lives.id}:1", f"{a}_5:1"])
    assert engine.complete_runs([runs, stops, lives]) == ["ok"] * 3
    assert engine.outcomes(a, 6) == "100110"


def test_a_canceled_array_is_stopped_by_one_message_to_each_node(engine: Engine) -> None:
    engine.register("n2", 2)
    (a,) = engine.submit(array(9))
    here, there = engine.claim(3), engine.claim(2, node="n2:2")
    assert engine.cancel(a) == ["stopping"]
    assert engine.inbox() == engine.inbox("n2:2") == [Stop(a, 0, "canceled")]
    engine.release_dependents()
    assert engine.outcomes(a, 9) == "000003333"
    assert engine.complete_runs(here[:1]) == ["ok"]  # it was faster
    assert engine.complete(here[1:2], "canceled", "canceled") == ["ok"]
    assert engine.return_unstarted(here[2:]) == 0  # it was on its way back
    assert engine.report_lost(there) == ["ok"] * 2
    assert engine.outcomes(a, 9) == "133333333" and engine.status(a) == "canceled"
    assert engine.claim(1) == []
    assert engine.counts() == {"total": 9, "finished": 1, "canceled": 8} and engine.nothing_left()


def test_elements_of_an_array_that_was_deleted_are_stopped_and_count(engine: Engine) -> None:
    (a,) = engine.submit(array(4))
    engine.register()
    good, bad, back, late = engine.claim(4)
    engine.inbox()
    engine.link.call("DEL", keys.job(a))
    nodes = {info.address: info for info in read_nodes(engine.link)}
    Reconciler(engine.store).turn(time.monotonic(), nodes, [], walked=True, idle=False)
    assert engine.inbox() == [Stop(a, 0, "canceled")]
    assert engine.complete_runs([good]) == ["ok"]
    assert engine.complete([bad], "failed", "exit") == ["ok"]
    assert engine.return_unstarted([back]) == 0
    assert engine.complete([late], "canceled", "canceled") == ["ok"]
    assert engine.counts() == {"total": 4, "finished": 1, "failed": 1, "canceled": 2}
    assert engine.nothing_left() and not [k for k in engine.all_keys() if k.startswith("pilotq:outcomes")]


def test_list_and_show_know_what_leases_hold(engine: Engine) -> None:
    (a,) = engine.submit(array(3, name="many"))
    engine.claim(2)
    queries = TaskQueries(engine.link, None)
    views = [view for view in queries.tasks("started", 10) if view.array]
    assert [(v.id, v.node, v.reason, v.execution, v.name) for v in views] == [
        (f"{a}_{n}", "n1", "handed", 1, "many") for n in (0, 1)
    ]
    view = queries.task(f"{a}_1")
    assert view is not None and (view.status, view.node, view.ended) == ("started", "n1", False)
    waiting = queries.task(f"{a}_2")
    assert waiting is not None and (waiting.status, waiting.node) == ("queued", "")


def test_a_damaged_array_costs_no_element_that_a_lease_holds(engine: Engine) -> None:
    (a, other) = engine.submit(array(3), task())
    first, second, third = engine.claim(3)
    engine.link.call("HSET", keys.job(a), "pq_array", "nonsense")
    assert engine.complete_runs([first]) == ["ok"]
    assert engine.return_unstarted([second]) == 0
    assert engine.complete([third], "failed", "exit") == ["ok"]
    engine.complete(engine.claim(1, ONE))
    assert engine.status(a) == "failed" and engine.status(other) == "finished"
    assert sum(engine.counts().values()) == 2 * engine.counts()["total"]
    assert engine.leased() == []


@pytest.mark.parametrize("how", ["deleted", "nonsense", "too short", "no hash", "99999999999999999999"])
def test_a_lost_node_gives_back_the_leases_of_an_array_that_is_gone_or_damaged(engine: Engine, how: str) -> None:
    """Nobody waits for them for ever, and they end no dispatcher."""
    (a, other) = engine.submit(array(40), task())
    engine.claim(30, slot=0)
    key = keys.job(a)
    if how in ("deleted", "no hash"):
        engine.link.call("DEL", key)
    if how == "no hash":
        engine.link.call("SET", key, "x")
    elif how != "deleted":
        text = {"nonsense": "nonsense", "too short": "0:1:9"}.get(how, f"0:1:{how}")
        engine.link.call("HSET", key, "pq_array", text)
    assert len(list(TaskQueries(engine.link, None).tasks("started", 99))) <= 9
    assert Reconciler(engine.store).requeue_node(NODE, "lost") == 30
    assert engine.leased() == [] and not engine.link.call("EXISTS", keys.LEASES)
    engine.run_all()
    assert engine.status(other) == "finished"
    if how != "too short":
        engine.store.count_vanished(["default"])
        assert sum(engine.counts().values()) == 2 * engine.counts()["total"]


@pytest.mark.parametrize("outcome", ["finished", "failed", "canceled"])
def test_an_element_whose_id_a_job_has_taken_counts(engine: Engine, outcome: str) -> None:
    """A job of RQ's producers under the id of an element that has no record."""
    a, child = engine.submit(array(3, name="a"), task(after=["a:1"]))
    handed = engine.claim(3)
    engine.link.call("HSET", keys.job(f"{a}_1"), "status", "queued", "origin", "default", "data", "theirs")
    engine.complete_runs([handed[0]])
    assert engine.complete([handed[1]], outcome, "" if outcome == "finished" else outcome) == ["ok"]
    engine.complete_runs([handed[2]])
    engine.release_dependents()
    assert engine.status(a) == ("finished" if outcome == "finished" else "failed")
    assert engine.outcomes(a, 3) == {"finished": "111", "failed": "121", "canceled": "131"}[outcome]
    assert engine.status(child) == ("queued" if outcome == "finished" else "canceled")


def test_a_deleted_record_is_not_made_again(engine: Engine) -> None:
    """RQ's delete of what it sees running takes it out of the registry, too."""
    engine.register()
    (a,) = engine.submit(array(3))
    long, *others = engine.claim(3)
    engine.report_started(long)
    engine.link.call("DEL", keys.job(long.id))
    engine.link.call("ZREM", keys.registry("wip", "default"), f"{long.id}:1")
    shown = msgspec.msgpack.encode([(long.id, 1, time.time(), ONE)])
    assert engine.store.run("heartbeat", "n1", 1, 480, shown, "", "state", "busy") == 2
    assert engine.status(long.id) is None and f"{long.id}:1" in engine.registry("wip")
    assert engine.leased() == [f"{h.id}:1" for h in others]
    assert engine.complete_runs(others) == ["ok", "ok"]
    assert engine.complete([long]) == ["stale"]
    assert engine.outcomes(a, 3) == "311" and engine.nothing_left()


def test_a_task_whose_record_was_deleted_counts_once(engine: Engine) -> None:
    """Its worker shows it as running until the message to stop it has come."""
    engine.register()
    engine.submit(task())
    (run,) = engine.claim(1)
    engine.report_started(run)
    engine.link.call("DEL", keys.job(run.id))
    began = time.time() - 1
    shown = msgspec.msgpack.encode([(run.id, 1, began, ONE)])
    report = end_report(run, "canceled", "canceled")
    assert engine.store.report_lost([report]) == ["stale"]
    assert engine.counts() == {"total": 1, "canceled": 1}
    assert engine.store.run("heartbeat", "n1", 1, 480, shown, "", "state", "busy") == 2
    assert engine.registry("wip") == []
    assert engine.complete([run], "canceled", "canceled") == ["stale"]
    assert engine.counts() == {"total": 1, "canceled": 1} and engine.nothing_left()
    # RQ's producers may use an id again, and its executions are counted from 1.
    later = msgspec.msgpack.encode([(run.id, 1, time.time() + 1, ONE)])
    engine.store.run("heartbeat", "n1", 1, 480, later, "", "state", "busy")
    assert engine.registry("wip") == [f"{run.id}:1"]


def test_runs_of_two_leases_are_reported_apart_from_each_other(engine: Engine) -> None:
    (a,) = engine.submit(task(array=ArrayRange.parse("0-9,20-29")))
    handed = engine.claim(20)
    assert engine.complete_runs(handed[5:15]) == ["ok"] * 10
    assert records(engine) == [] and engine.outcomes(a, 20) == "00000" + "1" * 10 + "00000"
