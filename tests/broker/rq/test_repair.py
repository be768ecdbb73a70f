"""What RQ's buttons leave behind is found and put right."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import CanceledJobRegistry

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.rq import repair
from pilotq.broker.rq.ingest import RqIngest
from pilotq.broker.rq.repair import RqRepair
from pilotq.broker.scheduling.reconciler import CLOCKS_S, Reconciler
from pilotq.broker.store import keys
from pilotq.broker.store.registry import user_queues
from pilotq.broker.tasks.model import ArrayRange
from tests.support.engine import NODE, ONE, Engine, FakeNode, end_report, fixtures, pump, task
from tests.support.rq_producer import CLASS, producing, route, text_of, work
from tests.support.running_dispatcher import RunningDispatcher

engine, server, node = fixtures
client, ingest = producing
Make = Callable[..., FakeNode]


def turns(engine: Engine, number: int = 3) -> None:
    """So many rounds of the reconciler's walk, seconds apart."""
    walk = RqRepair(engine.store)
    for n in range(number):
        walk.turn(["default"], 10.0 * n)
    engine.release_dependents()


def test_dependents_of_a_deleted_task_are_omitted(engine: Engine, client: redis.Redis) -> None:
    parent, child, grandchild = engine.submit(task(name="p"), task(name="c", after=["p"]), task(after=["c"]))
    turns(engine)
    assert engine.statuses(child, grandchild) == ["deferred", "deferred"]
    Job.fetch(parent, connection=client).delete()
    turns(engine)
    assert engine.statuses(child, grandchild) == ["canceled", "canceled"]
    turns(engine)
    assert engine.link.call("SMEMBERS", keys.PARENTS) == []


def test_a_parent_that_ended_is_no_orphan_maker(engine: Engine) -> None:
    """Its record may be gone before its dependents have been released."""
    parent, child = engine.submit(task(name="p"), task(after=["p"]))
    (handed,) = engine.claim()
    engine.complete([handed])
    engine.link.call("DEL", keys.job(parent))
    turns(engine)
    assert engine.status(child) == "queued" and engine.list() == [child]


def test_arrays_that_wait_for_a_deleted_one_are_canceled(engine: Engine, client: redis.Redis) -> None:
    parent, child = engine.submit(
        task(name="p", array=ArrayRange(0, 2)), task(array=ArrayRange(0, 2), after_each=["p"])
    )
    Job.fetch(parent, connection=client).delete()
    turns(engine)
    assert engine.status(child) == "canceled"


@pytest.mark.parametrize("state", ["given back", "scheduled", "released", "running"])
def test_an_array_does_not_wait_for_a_deleted_element(engine: Engine, client: redis.Redis, state: str) -> None:
    """RQ's delete takes the record out of lists and registries: nobody meets it any more."""
    each = state == "released"
    parent, child = engine.submit(
        task(name="p", array=ArrayRange(2, 8, 2), retries=1), task(array=ArrayRange(2, 8, 2), after_each=["p"])
    )
    handed = engine.claim(4)
    engine.complete(handed[1:])
    engine.release_dependents()
    array, gone = (child, f"{child}_4") if each else (parent, f"{parent}_2")
    if state == "given back":
        engine.return_unstarted(handed[:1])
    elif state == "scheduled":
        report = end_report(handed[0], "failed", "exit")
        report.retries, report.delay = 1, 60.0
        engine.store.run("complete", *engine.store.complete_arguments(NODE, engine.next_call(), b"mail", [report]))
    elif state == "running":
        engine.report_started(handed[0])
    turns(engine)
    assert engine.status(gone) in ("queued", "scheduled", "started")
    Job.fetch(gone, connection=client).delete()
    turns(engine)
    if state == "running":
        assert engine.outcomes(parent, 4) == "0111"  # it has not ended yet
        engine.complete(handed[:1])
    turns(engine)
    assert engine.outcomes(array, 4) == ("0300" if each else "3111")
    if each:
        engine.complete(engine.claim(3))
        engine.complete(handed[:1])
        engine.release_dependents()
        engine.complete(engine.claim(3))
    assert engine.status(array) == "failed"
    assert each or engine.hash(array)["pq_left"] == "0"


def test_elements_that_wait_for_others_are_not_taken_for_deleted(engine: Engine) -> None:
    engine.submit(task(name="p", array=ArrayRange(0, 9)), task(array=ArrayRange(0, 9), after_each=["p"], priority=1))
    first = engine.claim(10)
    engine.complete(first[:3])
    turns(engine)
    engine.release_dependents()
    engine.complete(engine.claim(2, "default.p1.1c"))
    turns(engine)
    engine.complete(first[3:])
    turns(engine)
    engine.run_all("default.p1.1c")
    assert engine.counts() == {"total": 20, "finished": 20}


def test_what_waits_and_has_no_record_is_dropped(engine: Engine, client: redis.Redis) -> None:
    _, child = engine.submit(task(name="p"), task(after=["p"]))
    client.delete(keys.job(child))
    turns(engine)
    assert engine.registry("deferred") == []


def test_a_compact_that_broke_off_is_put_back(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    ids = engine.submit(task(), task())
    job = Queue(connection=client).enqueue(work)
    client.rename(keys.queue(ONE), "rq:queue:_compact:half")
    client.rename(keys.queue("default"), "rq:queue:_compact:other")
    client.rpush("rq:queue:_compact:other", "gone")
    walk = RqRepair(engine.store)
    walk.turn(["default"], 1.0)
    walk.turn(["default"], 1.0 + repair.UNCHANGED_S / 2)
    assert engine.list() == []  # it may still be at work
    walk.turn(["default"], 2.0 + repair.UNCHANGED_S)
    route(ingest)
    assert engine.list() == ids and engine.list(CLASS) == [job.id]
    assert not [key for key in engine.all_keys() if "_compact" in key]


def test_a_class_that_was_tidied_away_meanwhile_comes_back(engine: Engine, client: redis.Redis, node: Make) -> None:
    (task_id,) = engine.submit(task())
    client.rename(keys.queue(ONE), "rq:queue:_compact:now")
    assert engine.drop_classes(ONE, at=0) == 0
    client.rename("rq:queue:_compact:now", keys.queue(ONE))
    assert engine.drop_classes(ONE, at=60) == 0 and engine.link.call("HGET", keys.CLASSES, ONE) == b""
    with RunningDispatcher(engine):
        n1 = node(quick=True)
        pump([n1], lambda: engine.status(task_id) == "finished")


def test_a_requeue_that_cannot_be_is_undone(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    (task_id,) = engine.submit(task(), key="k")
    engine.complete(engine.claim(), "failed", "exit")
    client.delete(keys.submission("k"))
    job = Job.fetch(task_id, connection=client)
    job.requeue()
    route(ingest)
    assert engine.status(task_id) == "failed" and engine.registry("failed") == [task_id]
    assert "cannot run again" in text_of(client, job)
    assert engine.ttl(keys.job(task_id)) > 0 and engine.list() == engine.list("default") == []


def test_a_requeue_gives_the_retries_back(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    (task_id,) = engine.submit(task(retries=2))
    for _ in range(3):
        engine.complete(engine.claim(), "failed", "exit")
    assert engine.status(task_id) == "failed"
    Job.fetch(task_id, connection=client).requeue()
    route(ingest)
    assert engine.hash(task_id)["pq_retries"] == "2" and engine.counts() == {"total": 1}


@pytest.mark.parametrize("reason", ["canceled", "failures"])
@pytest.mark.parametrize("whose", ["ours", "RQ's"])
def test_what_was_canceled_and_is_requeued_is_counted_once(
    engine: Engine, client: redis.Redis, ingest: RqIngest, whose: str, reason: str
) -> None:
    if whose == "ours":
        (task_id,) = engine.submit(task())
    else:
        task_id = Queue(connection=client).enqueue(work).id
        route(ingest)
    engine.store.cancel([task_id], waiting=True, reason=reason)
    assert engine.counts() == {"total": 1, "canceled": 1}
    job = Job.fetch(task_id, connection=client)
    CanceledJobRegistry(connection=client).requeue(job)
    route(ingest)
    assert engine.counts() == {"total": 1} and engine.status(task_id) == "queued"


def test_all_that_waits_is_listed_and_counted(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    import datetime as dt

    from rq import RateLimit

    queue = Queue(connection=client)
    limited = [queue.enqueue(work, rate_limit=RateLimit("one", 1)) for _ in range(2)]
    later = queue.enqueue_in(dt.timedelta(hours=1), work)
    child = queue.enqueue(work, depends_on=later)
    listing = TaskQueries(engine.link, None)
    assert listing.uncounted() == 4
    assert {view.id for view in listing.tasks(None, 10)} == {later.id, child.id, *(job.id for job in limited)}
    assert [view.id for view in listing.tasks("scheduled", 10)] == [later.id]
    assert len(list(listing.tasks("rate_limited", 10))) == 1
    route(ingest)
    assert engine.counts() == {"total": 2}


def test_canceled_tasks_are_not_read_again_each_second(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler(engine.store)
    (mine, other, late) = engine.submit(task(), task(), task())
    registry, now = keys.registry("canceled", "default"), time.time()
    engine.cancel(mine)
    for clock, canceled in ((now, other), (now + 60, late), (now + 120, None)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        if canceled:  # as RQ does it, by a clock that differs
            engine.link.call("HSET", keys.job(canceled), "status", "canceled")
            engine.link.call("ZADD", registry, int(clock) - 3, canceled)
        reconciler.turn(clock, {}, [], walked=True, idle=True)
    assert engine.counts() == {"total": 3, "canceled": 3}
    since, met = reconciler.canceled["default"]
    assert since == now + 60 - CLOCKS_S and not met


def test_what_runs_and_was_deleted_by_rq_counts_once(engine: Engine, node: Make, client: redis.Redis) -> None:
    """RQ's delete takes it out of the registry of what runs: it looks as if nothing ran, until the node says more."""
    engine.reset(reconcile_s=0.02)
    runner = node()
    (victim,) = engine.submit(task())
    with RunningDispatcher(engine) as running:
        pump([runner], lambda: runner.running)
        Job.fetch(victim, connection=client).delete()
        engine.link.call("ZREM", keys.registry("wip", "default"), f"{victim}:1")
        reconciler, turns = running.dispatcher.reconciler, set[float]()
        pump([runner], lambda: turns.add(reconciler.next_turn) or len(turns) > 3)
        assert engine.counts() == {"total": 1}
        beat = msgspec.msgpack.encode([(victim, 1, time.time(), ONE)])
        assert engine.beat(beat, runner.info.incarnation, "state", "busy") == 1
        runner.finish(victim)
        pump([runner], lambda: engine.counts() == {"total": 1, "canceled": 1})
        turns.clear()
        pump([runner], lambda: turns.add(reconciler.next_turn) or len(turns) > 3)
    assert engine.counts() == {"total": 1, "canceled": 1} and engine.registry("wip") == []


def test_a_key_that_is_no_record_does_not_wait(engine: Engine) -> None:
    _, victim = engine.submit(task(name="p"), task(after=["p"]))
    engine.link.call("DEL", keys.job(victim))
    engine.link.call("SET", keys.job(victim), "junk")
    turns(engine)
    assert engine.registry("deferred") == []


def test_what_runs_and_whose_key_is_no_record_any_more_ends_alone(engine: Engine, node: Make) -> None:
    engine.reset(reconcile_s=0.02)
    runner = node()
    victim, other = engine.submit(task(), task())
    with RunningDispatcher(engine):
        pump([runner], lambda: len(runner.running) == 2)
        engine.link.call("SET", keys.job(victim), "junk")
        pump([runner], lambda: engine.counts().get("canceled") == 1)
        runner.finish(other)
        pump([runner], lambda: engine.counts() == {"total": 2, "canceled": 1, "finished": 1})


def test_a_queue_whose_name_is_no_text_is_passed_over(engine: Engine) -> None:
    engine.link.call("SADD", keys.QUEUES, keys.queue("mine"), b"rq:queue:\xff")
    assert "mine" in user_queues(engine.link) and not any("\xff" in name for name in user_queues(engine.link))
