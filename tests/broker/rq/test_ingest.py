"""Jobs that a script enqueues which imports only rq: they become tasks, in the right order, or fail with a sentence."""

from __future__ import annotations

import datetime as dt
import json
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from pilotq.broker.rq.ingest import RqIngest
from pilotq.broker.rq.job_requests import read_meta
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.messages import Run
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.spec import FLAG_RQ_JOB, Spec
from tests.support.engine import QUEUE_ID, SHARED, Engine, FakeNode, fixtures, pump, task
from tests.support.rq_producer import CLASS, producing, route, text_of, work
from tests.support.running_dispatcher import RunningDispatcher
from tests.support.waiting import wait_until

engine, server, node = fixtures
Make = Callable[..., FakeNode]
client, ingest = producing


# -- what a job becomes -----------------------------------------------------------------------------------------------


def test_a_job_becomes_a_task(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    job = Queue(connection=client).enqueue(work, 1, ttl=1000)
    other = Queue("mail.high", connection=client).enqueue(
        work, meta={"cores": 2, "priority": 7, "mine": dt.date(2026, 1, 1)}, job_timeout=-1
    )
    assert route(ingest) == 2 and route(ingest) == 0
    assert engine.list("default.p0.1c-t300") == [job.id] and engine.list("mail.high.p7.2c") == [other.id]
    assert engine.list("default") == engine.list("mail.high") == []
    (handed,) = engine.claim(1, "mail.high.p7.2c")
    spec = pickle_free(handed)
    assert (spec.flags, spec.time_limit, spec.cores, handed.shared) == (FLAG_RQ_JOB, 0.0, 2, SHARED.key())
    found = Job.fetch(other.id, connection=client)
    assert (found.is_started, found.origin, found.worker_name) == (True, "mail.high", "n1")
    assert engine.registry("wip", "mail.high") == [f"{other.id}:1"]
    assert engine.counts() == {"total": 2}
    engine.complete([handed], text="")
    assert Job.fetch(other.id, connection=client).is_finished
    assert engine.registry("finished", "mail.high") == [other.id]


def pickle_free(handed: Run) -> Spec:
    return msgspec.msgpack.decode(handed.spec, type=Spec)


def test_order_among_lists(engine: Engine, client: redis.Redis, ingest: RqIngest, node: Make) -> None:
    """Jobs of RQ's producers and tasks of ours start in the order in which they came, whatever their ids."""
    queue = Queue(connection=client)
    wanted = []
    for number in range(6):
        wanted += engine.submit(task(time_limit=60 * number + 1))
        wanted.append(queue.enqueue(work, job_timeout=3600, job_id=f"{'zz' if number % 2 else '0-'}{number}").id)
        route(ingest)
    ingest.close()
    with RunningDispatcher(engine):
        n1 = node(cores=1, quick=True)
        pump([n1], lambda: len(n1.started) == len(wanted))
    assert n1.started == wanted


def test_at_front(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    queue = Queue(connection=client)
    first = [queue.enqueue(work).id for _ in range(3)]
    route(ingest)
    alone = queue.enqueue(work, at_front=True).id
    route(ingest)
    last = queue.enqueue(work).id
    front = [queue.enqueue(work, at_front=True).id for _ in range(2)]
    route(ingest)
    assert engine.list(CLASS) == [front[1], front[0], alone, *first, last]


def test_ids_that_look_like_ours(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    queue = Queue(connection=client)
    queue.enqueue(work, job_id="1")
    queue.enqueue(work, job_id="abc")
    queue.enqueue(work, job_id="9e107d9d372bb6826bd81d3542a419d6")
    route(ingest)
    (mine,) = engine.submit(task())
    assert int(mine, 32) > int("abc", 32)
    assert engine.store.heads([CLASS])[0].places[:2] == ["1", "abc"]


def test_ghosts_and_canceled_jobs_are_dropped(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    queue = Queue(connection=client)
    missing, canceled, good = (queue.enqueue(work) for _ in range(3))
    client.delete(missing.key)
    client.hset(canceled.key, "status", "canceled")
    client.rpush(queue.key, "stranger")
    client.set("rq:job:stranger", "no hash at all")
    assert route(ingest) == 1
    assert engine.list(CLASS) == [good.id] and engine.list("default") == []


def test_many_at_once(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    queue = Queue(connection=client)
    jobs = queue.enqueue_many([Queue.prepare_data(work, (n,)) for n in range(1200)])
    assert route(ingest) == 1200
    assert engine.list(CLASS) == [job.id for job in jobs]


# -- what is refused --------------------------------------------------------------------------------------------------

BAD = [
    ({"cores": 0}, "no number or range"),
    ({"cores": "many"}, "no number or range"),
    ({"cores": [1]}, "meta['cores'] must be a number or a text"),
    ({"cores": True}, "meta['cores'] must be a number"),
    ({"gpus": -1}, "cannot be negative"),
    ({"memory": "much"}, "is no size"),
    ({"priority": 5000}, "outside -1000 to 1000"),
    ({"use": {"a b": 1}}, "no name of a counter"),
    ({"use": {"a": "1"}}, "whole numbers"),
]


@pytest.mark.parametrize(("meta", "text"), BAD, ids=[str(m) for m, _ in BAD])
def test_bad_meta_fails_only_its_job(
    engine: Engine, client: redis.Redis, ingest: RqIngest, meta: dict[str, Any], text: str
) -> None:
    queue = Queue(connection=client)
    bad, good = queue.enqueue(work, meta=meta), queue.enqueue(work)
    assert route(ingest) == 2
    assert engine.list(CLASS) == [good.id]
    assert Job.fetch(bad.id, connection=client).is_failed and text in text_of(client, bad)
    assert engine.registry("failed") == [bad.id]
    assert engine.counts() == {"total": 2, "failed": 1}
    assert engine.final_entry(bad.id)["reason"] == "refused"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('it ran')",)


def test_nothing_of_a_pickle_runs() -> None:
    assert read_meta(pickle.dumps({"cores": 2, "x": Bomb(), "y": [dt.date(2026, 1, 1), {1, 2}]}))["cores"] == 2
    assert read_meta(json.dumps({"cores": 2}).encode()) == {"cores": 2}
    assert read_meta(b"") == {}


@pytest.mark.parametrize("data", [b"\x80\x05oops", b"{", b"\x80", b"garbage", pickle.dumps([1]), b"\x00" * 2_000_000])
def test_meta_that_cannot_be_read(engine: Engine, client: redis.Redis, ingest: RqIngest, data: bytes) -> None:
    job = Queue(connection=client).enqueue(work)
    client.hset(job.key, "meta", data)
    route(ingest)
    assert engine.status(job.id) == "failed" and engine.hash(job.id)["pq_reason"] == "refused"


def test_json_producers(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    Queue(connection=client, serializer=JSONSerializer).enqueue(work, meta={"cores": 3})
    route(ingest)
    assert engine.store.heads(["default.p0.3c-t300"])[0].length == 1


def test_webhooks_and_what_no_node_holds(engine: Engine, client: redis.Redis, node: Make) -> None:
    from rq import Webhook

    queue = Queue(connection=client)
    with RunningDispatcher(engine) as running:
        node(cores=2)
        wait_until(lambda: running.dispatcher.inventory.nodes)
        hooked = queue.enqueue(work, webhooks=[Webhook("http://nowhere.example/", "finished")])
        large = queue.enqueue(work, meta={"cores": 3})
        wait_until(lambda: engine.statuses(hooked.id, large.id) == ["failed", "failed"])
    assert "webhooks" in text_of(client, hooked)
    assert "can never run here: needs 3 cores" in text_of(client, large)


# -- a running dispatcher ---------------------------------------------------------------------------------------------


def test_jobs_are_seen_without_a_bell(engine: Engine, client: redis.Redis, node: Make) -> None:
    """Also of a queue that did not exist: RQ's producers do not wake the dispatcher."""
    with RunningDispatcher(engine):
        n1 = node(quick=True)
        for name in ("default", "other", "a.b", "x.p1.2c"):
            job = Queue(name, connection=client).enqueue(work)
            pump([n1], lambda job=job: engine.status(job.id) == "finished")  # type: ignore[misc]
            assert engine.registry("finished", name) == [job.id]


def test_a_server_that_tells_nothing(engine: Engine, client: redis.Redis, node: Make) -> None:
    """A server of the user's own need not be configured to notify of changes to its keys."""
    engine.admin.call("CONFIG", "SET", "notify-keyspace-events", "")
    try:
        with RunningDispatcher(engine):
            n1 = node(quick=True)
            job = Queue("new", connection=client).enqueue(work)
            pump([n1], lambda: engine.status(job.id) == "finished")
    finally:
        engine.admin.call("CONFIG", "SET", "notify-keyspace-events", "Kls")


def test_a_user_who_may_not_listen(engine: Engine, client: redis.Redis) -> None:
    """Also on such a server jobs are found, by looking."""
    engine.admin.call("ACL", "SETUSER", "mute", "on", ">secret", "~*", "resetchannels", "+@all")
    address = msgspec.structs.replace(engine.running.address, user="mute", password="secret")
    found = RqIngest(address, Store(Connection(address), QUEUE_ID, engine.settings, term=engine.store.term), SHARED)
    try:
        found.start(engine.store.term)
        jobs = [Queue(connection=client).enqueue(work) for _ in range(3)]
        assert route(found) == 3
        assert engine.list(CLASS) == [job.id for job in jobs]
    finally:
        found.close()
        engine.admin.call("ACL", "DELUSER", "mute")


def test_an_older_dispatcher_routes_nothing(engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
    from pilotq.broker.errors import Superseded

    Queue(connection=client).enqueue(work)
    engine.store.take_term()
    with pytest.raises(Superseded):
        route(ingest)
    assert engine.list("default") and engine.link.call("GET", keys.QUEUE_ID) == QUEUE_ID.encode()
