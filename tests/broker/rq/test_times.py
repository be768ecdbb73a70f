"""How long RQ keeps a job: each value of ttl, result_ttl, failure_ttl and timeout, here and by RQ's own worker."""

from __future__ import annotations

import base64
import pickle
import time
from typing import Any

import msgspec
import pytest
import redis
from rq import Queue, Repeat, Retry, SimpleWorker
from rq.job import Job
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry

from pilotq.broker.rq.ingest import RqIngest
from pilotq.broker.rq.job_requests import job_request_of, rq_error_text
from pilotq.broker.scheduling.reconciler import Reconciler
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.tasks.spec import Spec
from tests.support.engine import Engine, fixtures
from tests.support.rq_producer import producing, route

engine, server, node = fixtures
client, ingest = producing
VALUES = (None, -1, 0, 1000)
END = {
    "finished": ("1", base64.b64encode(pickle.dumps(1)).decode()),
    "failed": ("x", rq_error_text("ValueError\n")),
}


def clean_up(engine: Engine, client: redis.Redis) -> None:
    """Ours and RQ's, now and when the clock has gone on."""
    reconciler = Reconciler(engine.store)
    reconciler.turn(time.monotonic(), {}, [], walked=True, idle=True)
    for name in ("default", "stock"):
        FinishedJobRegistry(name, connection=client).cleanup()
        FailedJobRegistry(name, connection=client).cleanup()


def fate(job: Job, client: redis.Redis) -> dict[str, object]:
    """What is left of a job, and for how long: in classes that do not depend on the moment."""

    def kept(key: str) -> object:
        ttl = client.ttl(key)
        return {-2: "gone", -1: "for ever"}.get(ttl, round(ttl, -1))

    registries = [r(job.origin.partition(".")[0], connection=client) for r in (FinishedJobRegistry, FailedJobRegistry)]
    scores = [client.zscore(registry.key, job.id) for registry in registries]
    return {
        "status": status.decode() if (status := client.hget(job.key, "status")) else None,
        "record": kept(job.key),
        "result": kept(keys.results(job.id)),
        "finished, failed": ["no" if s is None else s if s in (-1, float("inf")) else "timed" for s in scores],
        "canceled": client.zscore(CanceledJobRegistry("default", connection=client).key, job.id) is not None
        or client.zscore(CanceledJobRegistry("stock", connection=client).key, job.id) is not None,
    }


def run_here(engine: Engine, job: Job, outcome: str) -> None:
    """Its execution ends so; also when it runs again at once."""
    class_name = field_of(engine, job, "pq_class")
    handed = engine.claim(1, class_name)
    assert [h.id for h in handed] == [job.id]
    engine.complete(handed, outcome, "exit" if outcome == "failed" else "", text=END[outcome][1])


def run_stock(engine: Engine, queue: Queue, **options: Any) -> None:
    """RQ's own worker runs what is in the queue."""
    with redis.Redis.from_url(engine.running.address.url()) as own:
        SimpleWorker([queue.name], connection=own).work(burst=True, logging_level="CRITICAL", **options)
        own.connection_pool.disconnect(inuse_connections=True)


def field_of(engine: Engine, job: Job, field: str) -> str:
    return str(engine.link.call("HGET", job.key, field).decode())


@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_what_has_ended_is_kept_as_rq_keeps_it(
    engine: Engine, client: redis.Redis, ingest: RqIngest, outcome: str
) -> None:
    engine.register()
    options: list[dict[str, Any]] = [
        {"result_ttl": result, "failure_ttl": failure} for result in VALUES for failure in VALUES
    ]
    options += [{"ttl": 1000, "result_ttl": -1, "failure_ttl": -1}, {"ttl": 1000}, {"timeout": -1}]
    here, stock = Queue("default", connection=client), Queue("stock", connection=client)
    ours = [here.enqueue_call("builtins.int", (END[outcome][0],), **dict(o)) for o in options]
    route(ingest)
    for job in ours:
        run_here(engine, job, outcome)
    theirs = [stock.enqueue_call("builtins.int", (END[outcome][0],), **dict(o)) for o in options]
    run_stock(engine, stock)
    clean_up(engine, client)
    for o, mine, rqs in zip(options, ours, theirs, strict=True):
        found, right = fate(mine, client), fate(rqs, client)
        if outcome == "failed" and o.get("failure_ttl") is None and "result" in right:
            right["result"] = found["result"]  # RQ lets the text stay when the record is gone
        assert found == right, o


@pytest.mark.parametrize("ttl", [None, 1000])
@pytest.mark.parametrize("state", ["queued", "running", "deferred", "retried", "repeated"])
def test_the_time_to_wait_begins_anew_and_what_is_canceled_stays(
    engine: Engine, client: redis.Redis, ingest: RqIngest, state: str, ttl: int | None
) -> None:
    """A worker of RQ's is followed as far as it goes: what waits again has its ttl again."""
    engine.register()
    more: dict[str, Any] = {"retried": {"retry": Retry(3)}, "repeated": {"repeat": Repeat(3)}}.get(state, {})
    outcome = "failed" if state == "retried" else "finished"
    fates = []
    for name in ("default", "stock"):
        queue = Queue(name, connection=client)
        parent = queue.enqueue_call("builtins.int", ("1",)) if state == "deferred" else None
        job = queue.enqueue_call("builtins.int", (END[outcome][0],), ttl=ttl, depends_on=parent, **more)
        if name == "default":
            route(ingest)
        if name == "default" and state in ("running", "retried", "repeated"):
            if state == "running":
                (handed,) = engine.claim(1, field_of(engine, job, "pq_class"))
            else:
                run_here(engine, job, outcome)
                route(ingest)
        elif state in ("retried", "repeated"):
            run_stock(engine, queue, max_jobs=1)
        waiting = client.ttl(job.key)
        job.refresh()
        job.cancel()
        if name == "default":
            engine.cancel(job.id)
            if state == "running":
                engine.complete([handed], "canceled", "canceled")
        clean_up(engine, client)
        found = fate(job, client)
        fates.append(
            (round(waiting, -1) if state != "running" else 0, found["status"], found["record"], found["canceled"])
        )
    if state == "running":  # RQ's worker has taken the ttl away, as ours has; nobody runs the other one here
        fates[1] = (0, "canceled", "for ever", True)
    assert fates[0] == fates[1]


def test_what_is_kept_for_ever_survives_the_bound_and_the_age(
    engine: Engine, client: redis.Redis, ingest: RqIngest
) -> None:
    engine.store.settings = Settings(keep_records=2, failed_ttl_s=0)
    queue = Queue(connection=client)
    ever = [queue.enqueue_call("builtins.int", ("1",), result_ttl=-1, failure_ttl=-1) for _ in range(6)]
    canceled = queue.enqueue_call("builtins.int")
    timed = [queue.enqueue_call("builtins.int", ("1",)) for _ in range(4)]
    route(ingest)
    canceled.cancel()
    engine.cancel(canceled.id)
    for n, job in enumerate([*ever, *timed]):
        run_here(engine, job, ("finished", "failed")[n % 2])
    clean_up(engine, client)
    assert all(client.exists(job.key) for job in [*ever, canceled])
    assert CanceledJobRegistry(connection=client).get_job_ids(cleanup=False) == [canceled.id]
    for kind, n in (("finished", 0), ("failed", 1)):
        assert set(engine.registry(kind)) >= {job.id for job in ever[n::2]}


@pytest.mark.parametrize(("timeout", "limit"), [("", 180.0), ("0", 180.0), ("-1", 0.0), ("-7", 0.0), ("90", 90.0)])
def test_timeouts(timeout: str, limit: float) -> None:
    request = job_request_of("default", timeout.encode(), b"")
    assert msgspec.msgpack.decode(request.spec, type=Spec).time_limit == limit
