"""A producer of RQ gives a job the id of a task of ours: RQ writes it over our record. Both run, each once."""

from __future__ import annotations

import time

import pytest
import redis
from rq import Queue
from rq.job import Job

from pilotq.broker.rq.ingest import RqIngest
from pilotq.broker.store import keys
from pilotq.broker.store.store import iso
from tests.support.engine import ONE, Engine, array, fixtures, ids, task
from tests.support.rq_producer import CLASS, producing, route, work

engine, server, node = fixtures
client, ingest = producing


def enqueue(client: redis.Redis, task_id: str) -> None:
    Queue(connection=client).enqueue(work, 7, job_id=task_id, result_ttl=77, meta={"x": 1})


def run_job(engine: Engine, client: redis.Redis) -> str:
    """The producer's job runs under the id that it was given; returns that."""
    (handed,) = engine.claim(5, CLASS)
    job = Job.fetch(handed.id, connection=client)
    assert (job.args, job.meta, job.result_ttl) == ((7,), {"x": 1}, 77)
    engine.complete([handed])
    assert Job.fetch(handed.id, connection=client).is_finished
    return handed.id


@pytest.mark.parametrize(
    "place", ["waits", "deferred", "handed", "runs", "ended while it was hidden", "finished", "failed", "canceled"]
)
def test_a_task_stays_what_it_is(engine: Engine, client: redis.Redis, ingest: RqIngest, place: str) -> None:
    parent, victim = engine.submit(task(name="p"), task("echo", "1", after=["p"] if place == "deferred" else []))
    handed = engine.claim(2) if place not in ("waits", "deferred", "canceled") else []
    if place in ("finished", "failed"):
        engine.complete(handed, place, "" if place == "finished" else "exit")
    if place == "canceled":
        engine.cancel(victim)
    if place == "runs":
        assert engine.store.run("report_started", victim, 1, "n1[0]", iso(time.time()), b"", b"") == 1
    before = engine.hash(victim)
    if place == "handed":  # from then on its record says what its lease did
        before |= {"status": "started", "pq_exec": "1", "worker_name": "n1"}
    enqueue(client, victim)
    if place == "ended while it was hidden":
        assert engine.complete(handed) == ["ok", "ok"]
        before = engine.hash(victim)
    route(ingest)
    route(ingest)
    after = engine.hash(victim)
    fields = ("status", "pq_exec", "pq_reason", "description", "timeout", "worker_name", "pq_spec", "pq_sub", "meta")
    for name in fields:
        assert place == "ended while it was hidden" or after.get(name) == before.get(name), name
    assert after["description"] == "echo 1" and engine.list("default") == []
    assert run_job(engine, client) != victim
    if place == "deferred":
        assert ids(engine.claim(5)) == [parent]
        engine.link.call("DEL", keys.queue(ONE))
        return
    if place == "waits":
        handed = engine.claim(5)
        assert ids(handed) == [parent, victim]
    if place in ("handed", "runs", "waits"):
        assert engine.complete(handed) == ["ok", "ok"]
    assert engine.claim(5) == [] or place == "canceled"
    lines = [line for line in engine.journal() if line["id"] == victim]
    assert len(lines) == 1 and engine.status(victim) == (place if place in ("failed", "canceled") else "finished")
    if place != "canceled":
        assert engine.nothing_left()


def test_a_parent_ends_while_its_dependent_is_hidden(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    _, victim = engine.submit(task(name="p"), task(after=["p"]))
    enqueue(client, victim)
    engine.complete(engine.claim(1))
    engine.release_dependents()
    for _ in range(2):
        route(ingest)
    assert ids(engine.claim(5)) == [victim]
    run_job(engine, client)


def test_an_element_and_a_job_for_later(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    (a,) = engine.submit(array(2))
    handed = engine.claim(2)
    enqueue(client, f"{a}_1")
    (later,) = engine.submit(task())
    fields = {"meta": {"x": 1}, "result_ttl": 77, "timeout": 180, "origin": "default"}
    job = Job.create(work, (7,), id=later, connection=client, **fields)  # type: ignore[arg-type]
    job.set_status("scheduled")  # type: ignore[arg-type]
    job.save()
    client.zadd(keys.registry("scheduled", "default"), {later: time.time() - 1})
    for _ in range(4):
        route(ingest)
    both = engine.claim(5, CLASS)
    assert len(both) == 2 and not {later, f"{a}_1"} & set(ids(both))
    engine.complete(both)
    assert engine.complete(handed) == ["ok", "ok"] and engine.status(a) == "finished"
    assert ids(engine.claim(5)) == [later]


def test_a_task_gets_no_id_that_a_job_has(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    """The dispatcher has not seen the job yet."""
    enqueue(client, "2")
    first, second = engine.submit(task(), task())
    assert "2" not in (first, second)
    route(ingest)
    assert run_job(engine, client) == "2" and ids(engine.claim(5)) == [first, second]
