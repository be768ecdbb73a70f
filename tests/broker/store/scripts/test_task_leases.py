"""Leases of tasks by themselves: a place in wip says what a claim handed out, the record only when that is needed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis
from rq.job import Job

from pilotq.broker.client.overview_reader import OverviewReader
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.scheduling.reconciler import Reconciler
from pilotq.broker.store import keys
from pilotq.broker.store.leases import read_holders
from pilotq.broker.store.messages import Stop
from pilotq.broker.store.store import iso
from tests.support.engine import NODE, ONE, Engine, fixtures, ids, task
from tests.support.rq_producer import producing

engine, server, node = fixtures
client, ingest = producing
WIP = keys.registry("wip", "default")


def queries(engine: Engine) -> TaskQueries:
    return TaskQueries(engine.link, None)


def test_a_claim_writes_nothing_into_the_record(engine: Engine) -> None:
    a, b = engine.submit(task(name="one"), task())
    before = engine.hash(a), engine.hash(b)
    assert ids(engine.claim(2)) == [a, b]
    assert (engine.hash(a), engine.hash(b)) == before
    assert engine.registry("wip") == [f"{a}:1", f"{b}:1"] and engine.list() == []


def test_what_finishes_gets_all_of_its_record_with_its_end(engine: Engine) -> None:
    (a,) = engine.submit(task())
    engine.complete(engine.claim())
    (view,) = queries(engine).views([a])
    assert view is not None
    assert (view.status, view.node, view.cores, view.execution, view.exit_code, view.queue) == (
        "finished", "n1", "n1[0]", 1, 0, "default",
    )  # fmt: skip
    assert "pq_exec" not in engine.hash(a) and "pq_node" not in engine.hash(a)
    assert engine.nothing_left() and engine.registry("finished") == [a]


def test_the_end_of_what_finished_is_acknowledged_again(engine: Engine) -> None:
    engine.submit(task())
    (handed,) = engine.claim()
    assert engine.complete([handed], call=7) == engine.complete([handed], call=7) == ["ok"]
    assert engine.counts() == {"total": 1, "finished": 1} and len(engine.journal()) == 1


def test_those_who_look_see_what_a_lease_says(engine: Engine) -> None:
    engine.register()
    slot, prefetched, waiting = engine.submit(task(), task(), task())
    engine.claim()
    engine.claim(slot=0)
    views = queries(engine).views([slot, prefetched, waiting])
    assert [view and (view.status, view.reason, view.node, view.execution) for view in views] == [
        ("started", "handed", "n1", 1), ("started", "handed", "n1", 1), ("queued", "", "", 0),
    ]  # fmt: skip
    assert queries(engine).statuses([slot, waiting]) == {slot: "started", waiting: "queued"}
    assert {view.id for view in queries(engine).tasks("started", 10)} == {slot, prefetched}
    overview = OverviewReader(engine.link, queries(engine), "/nowhere").update(1.0)
    assert {(one.id, one.node) for one in overview.executions} == {(slot, "n1"), (prefetched, "n1")}
    assert (overview.running, overview.prefetched, overview.waiting) == (1, 1, 1)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_lost_node_gives_back_what_its_leases_hold(engine: Engine, slot: int) -> None:
    engine.reset(crash_limit=1)
    (a,) = engine.submit(task())
    engine.claim(slot=slot)
    assert Reconciler(engine.store).requeue_orphans({"n2:2"}) == 1
    # What had a slot may have run, and is charged.
    assert engine.status(a) == ("failed" if slot else "queued")
    assert read_holders(engine.link) == {} and engine.registry("wip") == []
    if not slot:
        (again,) = engine.claim(node="n2:2")
        assert again.execution == 2
        engine.complete([again], node="n2:2")
        assert engine.hash(a)["pq_exec"] == "2" and engine.nothing_left()


def test_an_id_that_is_in_its_list_twice_is_handed_out_once(engine: Engine) -> None:
    a, b = engine.submit(task(), task())
    engine.link.call("LPUSH", keys.queue(ONE), a, a)
    assert ids(engine.claim(1)) == [a]
    assert ids(engine.claim(4)) == [b]


def test_an_id_that_is_in_its_list_twice_after_it_came_back_is_handed_out_once(engine: Engine) -> None:
    (a,) = engine.submit(task(retries=1))
    engine.complete(engine.claim(), "failed", "exit")
    engine.link.call("RPUSH", keys.queue(ONE), a)
    (handed,) = engine.claim(2)
    engine.link.call("RPUSH", keys.queue(ONE), a)
    assert (handed.execution, engine.claim(2)) == (2, [])


def test_an_earlier_execution_ends_and_gives_back_nothing_of_a_lease(engine: Engine) -> None:
    (a,) = engine.submit(task())
    (first,) = engine.claim()
    assert engine.return_unstarted([first]) == 1
    (second,) = engine.claim(node="n2:2")
    before = engine.dump(without=(keys.EVENTS, keys.worker("")))
    assert engine.complete([first]) == engine.complete([first], "failed", "exit") == ["stale"]
    assert engine.return_unstarted([first]) == 0
    assert engine.store.run("report_started", a, 1, "n1[0]", iso(time.time()), b"", b"") == 0
    assert engine.dump(without=(keys.EVENTS, keys.worker(""))) == before
    assert engine.complete([second], node="n2:2") == ["ok"]


def test_a_cancel_reaches_the_node_of_a_lease(engine: Engine) -> None:
    (a,) = engine.submit(task())
    (handed,) = engine.claim()
    assert engine.cancel(a) == ["stopping"]
    assert engine.inbox() == [Stop(a, 1, "canceled")]
    assert engine.complete([handed], "canceled", "canceled") == ["ok"]
    assert engine.status(a) == "canceled" and engine.nothing_left()


@pytest.mark.parametrize("act", ["cancel", "delete"])
def test_rqs_buttons_of_what_a_lease_holds(engine: Engine, client: redis.Redis, act: str) -> None:
    (a,) = engine.submit(task())
    (handed,) = engine.claim()
    job = Job.fetch(a, connection=client)
    getattr(job, act)()
    engine.register()
    assert engine.registry("wip") == [f"{a}:1"]
    if act == "cancel":
        assert engine.cancel(a) == ["stopping"]
        assert engine.inbox() == [Stop(a, 1, "canceled")]
    assert engine.complete([handed]) == (["ok"] if act == "cancel" else ["stale"])
    assert engine.counts() == {"total": 1, "canceled": 1} and engine.registry("wip") == []


def test_rqs_cancel_of_what_finished_counts_nothing_again(engine: Engine, client: redis.Redis) -> None:
    (a,) = engine.submit(task())
    engine.complete(engine.claim())
    Job.fetch(a, connection=client).cancel()
    assert engine.cancel(a) == ["canceled"]
    assert engine.counts() == {"total": 1, "finished": 1}
    (child,) = engine.submit(task(after=[a]))
    assert engine.status(child) == "canceled"  # and does not wait for an end


@pytest.mark.parametrize("place", ["complete", "return", "report"])
def test_what_needs_a_record_gets_it(engine: Engine, place: str) -> None:
    (a,) = engine.submit(task())
    (handed,) = engine.claim()
    step: dict[str, Callable[[], object]] = {
        "complete": lambda: engine.complete([handed], "failed", "exit"),
        "return": lambda: engine.return_unstarted([handed]),
        "report": lambda: engine.store.run("report_started", a, 1, "n1[0]", iso(time.time()), b"", b""),
    }
    step[place]()
    record = engine.hash(a)
    assert record["pq_exec"] == "1" and engine.link.call("ZSCORE", WIP, f"{a}:1") in (None, b"inf")
    assert record.get("pq_node") == (None if place == "return" else NODE)
    assert engine.status(a) == {"complete": "failed", "return": "queued", "report": "started"}[place]
