"""What RQ 3 owes to jobs of its own producers when they have ended, or wait for something, on our scripts."""

from __future__ import annotations

import base64
import datetime as dt
import pickle
import time
from typing import Any

import pytest
import redis
from rq import Queue, RateLimit, Repeat, Retry
from rq.job import Dependency, Job
from rq.rate_limit import RateLimitRegistry
from rq.registry import ScheduledJobRegistry

from pilotq.broker.rq.ingest import RqIngest
from pilotq.broker.rq.job_requests import rq_error_text
from pilotq.broker.store import keys
from tests.support.engine import ONE, Engine, fixtures, task
from tests.support.rq_producer import CLASS, producing, route, text_of, work

engine, server, node = fixtures
client, ingest = producing
RESULT = base64.b64encode(pickle.dumps(42)).decode()
TEXT = rq_error_text("Traceback: it broke\n")


class Producer:
    """A script of a user, and the pilot around it."""

    def __init__(self, engine: Engine, client: redis.Redis, ingest: RqIngest) -> None:
        self.engine, self.client, self.ingest = engine, client, ingest
        self.queue = Queue(connection=client)

    def enqueue(self, **options: Any) -> Job:
        job = self.queue.enqueue(work, **options)
        route(self.ingest)
        return job

    def run(self, job: Job, outcome: str = "finished", text: str | None = None) -> Job:
        """Its execution ends so; returns what RQ knows of it then."""
        (handed,) = self.engine.claim(1, CLASS)
        assert handed.id == job.id
        given = text if text is not None else {"finished": RESULT, "failed": TEXT}.get(outcome, "")
        self.engine.complete([handed], outcome, {"failed": "exit", "finished": ""}.get(outcome, outcome), text=given)
        self.engine.release_dependents()
        route(self.ingest)
        return self.of(job)

    def of(self, job: Job) -> Job:
        return Job.fetch(job.id, connection=self.client)

    def waits(self) -> list[str]:
        return self.engine.list(CLASS)

    def pass_time(self, job: Job) -> None:
        """What is scheduled is due."""
        assert self.of(job).is_scheduled
        self.client.zadd(keys.registry("scheduled", "default"), {job.id: 1})
        route(self.ingest)


@pytest.fixture
def producer(engine: Engine, client: redis.Redis, ingest: RqIngest) -> Producer:
    return Producer(engine, client, ingest)


# -- results and times ------------------------------------------------------------------------------------------------


def test_a_result_and_its_time(engine: Engine, producer: Producer) -> None:
    job = producer.run(producer.enqueue())
    assert job.is_finished and job.return_value() == 42
    assert 0 < engine.ttl(job.key) <= 500 and 0 < engine.ttl(keys.results(job.id)) <= 500
    job = producer.run(producer.enqueue(result_ttl=-1))
    assert (job.return_value(), engine.ttl(job.key), engine.ttl(keys.results(job.id))) == (42, -1, -1)
    job = producer.enqueue(result_ttl=0)
    (handed,) = engine.claim(1, CLASS)
    engine.complete([handed], text=RESULT)
    assert engine.status(job.id) is None and job.id not in engine.registry("finished")
    assert engine.counts() == {"total": 3, "finished": 3}


def test_a_failure_and_its_time(engine: Engine, producer: Producer) -> None:
    job = producer.run(producer.enqueue(), "failed")
    assert job.is_failed and "it broke" in text_of(producer.client, job)
    assert engine.ttl(job.key) > 31_000_000
    job = producer.run(producer.enqueue(failure_ttl=-1), "failed")
    assert engine.ttl(job.key) == -1
    assert producer.client.zscore(keys.registry("failed", "default"), job.id) == -1


def test_stopped_and_canceled(engine: Engine, producer: Producer) -> None:
    stopped = producer.run(producer.enqueue(retry=Retry(3)), "stopped")
    assert stopped.is_stopped and stopped.id in engine.registry("failed")  # never tried again
    job = producer.enqueue(retry=Retry(3))
    (handed,) = engine.claim(1, CLASS)
    job.cancel()
    assert engine.cancel(job.id) == ["stopping"]
    engine.complete([handed], "failed", "signal", text=TEXT)
    assert producer.of(job).is_canceled and producer.waits() == []
    assert engine.counts() == {"total": 2, "failed": 1, "canceled": 1}


def test_ttl_is_for_the_time_it_waits(engine: Engine, producer: Producer) -> None:
    job = producer.enqueue(ttl=1000)
    assert 0 < engine.ttl(job.key) <= 1000
    engine.claim(1, CLASS)
    assert engine.ttl(job.key) == -1


def test_numbers_of_a_stranger_break_nothing(engine: Engine, producer: Producer) -> None:
    good = producer.enqueue()
    bad = producer.enqueue()
    wrong = (
        "result_ttl",
        "1e300",
        "retries_left",
        "many",
        "retry_intervals",
        "{",
        "repeats_left",
        "nan",
        "repeat_intervals",
        "7",
    )
    engine.link.call("HSET", bad.key, *wrong)
    engine.complete(engine.claim(2, CLASS), text=RESULT)
    assert engine.statuses(good.id, bad.id) == ["finished", "finished"]


# -- tried again ------------------------------------------------------------------------------------------------------


def test_retries_at_once(producer: Producer, engine: Engine) -> None:
    job = producer.enqueue(retry=Retry(2))
    for left in (1, 0):
        assert producer.run(job, "failed").retries_left == left
        assert producer.waits() == [job.id] and producer.of(job).latest_result() is None
    assert producer.run(job, "failed").is_failed
    assert engine.counts() == {"total": 1, "failed": 1}
    assert [line["final"] for line in engine.journal()] == [False, False, True]


def test_retries_at_the_front(producer: Producer) -> None:
    job = producer.enqueue(retry=Retry(1, enqueue_at_front=True))
    other = producer.enqueue()
    producer.run(job, "failed")
    assert producer.waits() == [job.id, other.id]


def test_retries_with_intervals(producer: Producer, engine: Engine) -> None:
    job = producer.enqueue(retry=Retry(3, interval=[10, 60]))
    # RQ takes the first interval for all retries that the list is too short for.
    for interval in (10, 10, 60):
        before = time.time()
        producer.run(job, "failed")
        due = producer.client.zscore(keys.registry("scheduled", "default"), job.id)
        assert due is not None and before + interval - 2 <= due <= time.time() + interval
        assert engine.store.count_vanished(["default"]) == 0
        producer.pass_time(job)
        assert producer.waits() == [job.id]
    assert producer.run(job, "failed").is_failed
    assert engine.counts() == {"total": 1, "failed": 1}


def test_a_function_returns_retry(producer: Producer, engine: Engine) -> None:
    job = producer.enqueue()
    assert producer.run(job, "retried", "2:0").number_of_retries == 1
    producer.run(job, "retried", "2:0,30")
    producer.pass_time(job)
    ended = producer.run(job, "retried", "2:0")
    assert ended.is_failed and engine.hash(job.id)["pq_reason"] == "retries"
    assert [r.type.value for r in ended.results()] == [5, 4, 4]


@pytest.mark.parametrize("interval", [0, 30])
def test_a_function_returns_retry_and_goes_first(producer: Producer, interval: int) -> None:
    job = producer.enqueue()
    other = producer.enqueue()
    producer.run(job, "retried", f"2:{interval}:front")
    if interval:
        producer.pass_time(job)
    assert producer.waits() == [job.id, other.id]
    assert producer.of(job).enqueue_at_front_on_retry


def test_repeat(producer: Producer, engine: Engine) -> None:
    job = producer.enqueue(repeat=Repeat(times=2, interval=[0, 60]))
    assert producer.run(job).repeats_left == 1 and producer.waits() == [job.id]
    producer.run(job)
    producer.pass_time(job)
    last = producer.run(job)
    assert last.is_finished and last.repeats_left == 0 and len(last.results()) == 3
    assert engine.counts() == {"total": 1, "finished": 1}


# -- later ------------------------------------------------------------------------------------------------------------


def test_enqueue_in_and_at(producer: Producer, engine: Engine) -> None:
    soon = producer.queue.enqueue_in(dt.timedelta(seconds=-1), work)
    later = producer.queue.enqueue_at(dt.datetime(2099, 1, 1, tzinfo=dt.timezone.utc), work)
    route(producer.ingest)
    assert producer.waits() == [soon.id] and producer.of(later).is_scheduled
    assert ScheduledJobRegistry(connection=producer.client).get_job_ids() == [later.id]
    assert engine.cancel(later.id) == ["canceled"]
    assert engine.registry("scheduled") == [] and engine.counts() == {"total": 2, "canceled": 1}


def test_a_scheduler_of_rqs_own_is_left_alone(producer: Producer, engine: Engine) -> None:
    producer.client.set("rq:scheduler-lock:default", "somebody", ex=60)
    job = producer.queue.enqueue_in(dt.timedelta(seconds=-1), work)
    route(producer.ingest)
    assert producer.of(job).is_scheduled and producer.waits() == []


def test_what_rq_left_between_two_steps(producer: Producer, engine: Engine) -> None:
    job = producer.queue.enqueue(work, depends_on=producer.enqueue())
    producer.client.zrem(keys.registry("deferred", "default"), job.id)
    producer.client.hset(job.key, "status", "ready_to_enqueue")
    producer.client.zadd("rq:ready:default", {job.id: int(time.time()) - 60, "gone": 1})
    route(producer.ingest)
    assert job.id in producer.waits() and engine.registry("ready") == []


# -- depends_on -------------------------------------------------------------------------------------------------------


def test_dependents_run_after_their_parents(producer: Producer, engine: Engine) -> None:
    parents = [producer.enqueue() for _ in range(2)]
    child = producer.enqueue(depends_on=parents)
    front = producer.enqueue(depends_on=Dependency(parents, enqueue_at_front=True))
    assert engine.hash(child.id)["pq_open_parents"] == "2"
    producer.run(parents[0])
    assert producer.waits() == [parents[1].id]
    producer.run(parents[1])
    assert producer.waits() == [front.id, child.id] and engine.registry("deferred") == []
    assert not [k for k in engine.all_keys() if k.endswith((":dependencies", ":dependents"))]
    producer.run(front), producer.run(child)
    assert engine.counts() == {"total": 4, "finished": 4}


@pytest.mark.parametrize("how", ["failed", "stopped", "canceled", "allowed"])
def test_a_parent_that_does_not_finish(producer: Producer, engine: Engine, how: str) -> None:
    parent = producer.enqueue()
    child = producer.enqueue(depends_on=Dependency([parent], allow_failure=how == "allowed"))
    grandchild = producer.enqueue(depends_on=child)
    if how == "canceled":
        engine.cancel(parent.id)
        engine.release_dependents()
    else:
        producer.run(parent, "failed" if how == "allowed" else how)
    if how == "allowed":
        assert producer.waits() == [child.id]
        producer.run(child), producer.run(grandchild)
        assert engine.counts() == {"total": 3, "failed": 1, "finished": 2}
    else:
        engine.release_dependents()
        assert engine.statuses(child.id, grandchild.id) == ["canceled", "canceled"]
        assert engine.hash(child.id)["pq_reason"] == "dependency"


@pytest.mark.parametrize("how", ["finished", "failed", "gone"])
def test_parents_that_ended_before_we_saw_the_child(producer: Producer, engine: Engine, how: str) -> None:
    parent = producer.enqueue()
    child = producer.queue.enqueue(work, depends_on=parent)  # deferred, and not seen yet
    (handed,) = engine.claim(1, CLASS)
    engine.complete([handed], "failed" if how == "failed" else "finished", text="")
    if how == "gone":
        producer.client.delete(parent.key)
    route(producer.ingest)
    engine.release_dependents()
    assert engine.status(child.id) == ("canceled" if how == "failed" else "queued")


def test_jobs_and_tasks_wait_for_each_other(producer: Producer, engine: Engine) -> None:
    (ours,) = engine.submit(task())
    child = producer.enqueue(depends_on=ours)
    (grandchild,) = engine.submit(task(after=[f"={child.id}"]))
    assert producer.waits() == [] and engine.registry("deferred") == [child.id, grandchild]
    engine.complete(engine.claim())
    engine.release_dependents()
    producer.run(child)
    assert engine.list(ONE) == [grandchild]


def test_bad_meta_of_a_job_that_waits(producer: Producer, engine: Engine) -> None:
    parent = producer.enqueue()
    child = producer.enqueue(depends_on=parent, meta={"cores": 0})
    assert engine.status(child.id) == "failed" and engine.registry("deferred") == []


# -- rate limits ------------------------------------------------------------------------------------------------------


def test_rate_limits(producer: Producer, engine: Engine) -> None:
    jobs = [producer.enqueue(rate_limit=RateLimit("api", 1)) for _ in range(3)]
    assert producer.waits() == [jobs[0].id] and producer.of(jobs[1]).get_status() == "rate_limited"
    producer.run(jobs[0])
    # RQ's order among those of one second is that of their ids.
    second, third = sorted(jobs[1:], key=lambda job: job.id not in producer.waits())
    assert producer.waits() == [second.id]
    producer.run(second, "failed")
    assert engine.cancel(third.id) == ["canceled"]
    engine.store.run("free_rate_slots", engine.store.term, 1, "x", 0)
    assert RateLimitRegistry.all(producer.client) == []
    assert engine.counts() == {"total": 3, "finished": 1, "failed": 1, "canceled": 1}


def test_a_slot_is_held_while_its_job_dies(producer: Producer, engine: Engine) -> None:
    first, second = (producer.enqueue(rate_limit=RateLimit("api", 1)) for _ in range(2))
    (handed,) = engine.claim(1, CLASS)
    producer.of(first).cancel()
    route(producer.ingest)
    assert producer.waits() == []
    engine.cancel(first.id)
    engine.complete([handed], "canceled", "canceled")
    route(producer.ingest)
    assert producer.waits() == [second.id]


def test_a_lost_slot_is_found(producer: Producer, engine: Engine) -> None:
    first, second = (producer.enqueue(rate_limit=RateLimit("api", 1)) for _ in range(2))
    producer.client.delete(first.key)
    engine.store.run("free_rate_slots", engine.store.term, f"{time.time()}", "2026-01-31T12:00:00.000000Z", 0)
    route(producer.ingest)
    assert second.id in producer.waits()


# -- requeued ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["failed", "stopped"])
def test_requeue(producer: Producer, engine: Engine, how: str) -> None:
    job = producer.run(producer.enqueue(), how)
    job.requeue()
    route(producer.ingest)
    assert producer.waits() == [job.id] and engine.counts() == {"total": 1}
    assert engine.ttl(job.key) == -1 and "pq_reason" not in engine.hash(job.id)
    assert producer.run(job).is_finished and engine.counts() == {"total": 1, "finished": 1}


def test_requeue_of_what_was_refused(producer: Producer, engine: Engine) -> None:
    job = producer.enqueue(meta={"cores": 0})
    found = producer.of(job)
    found.meta = {"cores": 1}
    found.save_meta()
    found.requeue()
    route(producer.ingest)
    assert producer.waits() == [job.id]
