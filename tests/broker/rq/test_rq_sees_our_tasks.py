"""What RQ 3 sees of our tasks: its own classes and its command line, on a real server."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
import zlib
from collections.abc import Callable

import pytest
import redis
from rq import Queue, Worker
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.registry import (
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    StartedJobRegistry,
    clean_registries,
)

from pilotq.broker.rq.jobs import run
from pilotq.broker.store.messages import EndReport
from pilotq.broker.store.store import iso
from tests.support.engine import NODE, ONE, Engine, FakeNode, array, end_entry, fixtures, pump, task
from tests.support.rq_producer import producing

engine, server, node = fixtures
client, _ = producing


def test_a_task_through_its_life(engine: Engine, client: redis.Redis) -> None:
    (task_id,) = engine.submit(task("echo", "hello", "world"))
    job = Job.fetch(task_id, connection=client)
    assert (job.get_status(), job.origin, job.description, job.timeout) == (
        JobStatus.QUEUED,
        ONE,
        "echo hello world",
        None,  # the limits of a task are its node's
    )
    assert job.func is run and job.args == () and job.kwargs == {} and job.meta == {}
    assert job.get_position() == 0
    assert abs(job.created_at.timestamp() - time.time()) < 60 and job.enqueued_at == job.created_at
    (handed,) = engine.claim()
    started = StartedJobRegistry("default", connection=client)
    assert started.get_job_ids(cleanup=True) == [task_id]
    assert Job.fetch(task_id, connection=client).get_status() == JobStatus.QUEUED  # until it has run for a moment
    engine.store.run("report_started", task_id, 1, "n1[0]", iso(time.time()), b"", b"")
    assert started.get_job_ids(cleanup=True) == [task_id]
    job = Job.fetch(task_id, connection=client)
    assert (job.get_status(), job.origin, job.worker_name) == (JobStatus.STARTED, "default", "n1")
    assert job.started_at is not None and job.ended_at is None
    engine.complete([handed])
    job = Job.fetch(task_id, connection=client)
    assert job.is_finished and job.return_value() is None and job.latest_result() is None
    assert job.started_at is not None and job.ended_at is not None and job.ended_at >= job.created_at
    assert job.get_status(refresh=True) == JobStatus.FINISHED


def test_a_failed_task_has_a_text(engine: Engine, client: redis.Redis) -> None:
    (task_id,) = engine.submit(task())
    text = base64.b64encode(zlib.compress(b"its exit code was 3")).decode()
    engine.complete(engine.claim(), "failed", "exit", text=text)
    job = Job.fetch(task_id, connection=client)
    assert job.is_failed
    result = job.latest_result()
    assert result is not None
    assert (result.type, result.exc_string, result.worker_name) == (result.Type.FAILED, "its exit code was 3", "n1")
    assert FailedJobRegistry("default", connection=client).get_job_ids() == [task_id]


def test_an_execution_that_never_began(engine: Engine, client: redis.Redis) -> None:
    """No start, and times in a form that RQ reads."""
    (task_id,) = engine.submit(task())
    (handed,) = engine.claim()
    report = EndReport(task_id, 1, "failed", "not found", "2026-01-31T12:00:00.000000Z", "", "", "", end_entry(handed))
    engine.store.run("complete", *engine.store.complete_arguments(NODE, 1, b"mail", [report]))
    job = Job.fetch(handed.id, connection=client)
    assert job.is_failed and job.started_at is None
    assert job.ended_at is not None and job.ended_at.isoformat().startswith("2026-01-31T12:00:00")


def test_arrays_and_elements(engine: Engine, client: redis.Redis) -> None:
    (a,) = engine.submit(array(3, name="many"))
    assert Job.fetch(a, connection=client).get_status() == JobStatus.QUEUED
    good, bad = engine.claim(2)
    engine.report_started(good)
    assert Job.fetch(good.id, connection=client).is_started
    engine.complete([good])
    engine.complete([bad], "failed", "exit")
    with pytest.raises(NoSuchJobError):
        Job.fetch(good.id, connection=client)
    assert Job.fetch(bad.id, connection=client).is_failed
    (last,) = engine.claim()
    assert Job.fetch(a, connection=client).is_started
    engine.complete([last])
    job = Job.fetch(a, connection=client)
    assert job.is_failed and job.started_at is not None and job.ended_at is not None
    engine.submit(array(2, name="other"))
    engine.cancel("2")
    job = Job.fetch("2", connection=client)
    assert job.is_canceled and job.ended_at is not None


@pytest.mark.parametrize("how", ["canceled", "omitted", "array omitted", "lost"])
def test_every_way_to_end_leaves_times_that_rq_reads(engine: Engine, client: redis.Redis, how: str) -> None:
    parent, child = engine.submit(
        task(name="p"), (array(2, after=["p"]) if how == "array omitted" else task(after=["p"]))
    )
    if how == "lost":
        for _ in range(3):
            engine.complete(engine.claim(), "lost")
        found = parent
    else:
        if how == "canceled":
            engine.cancel(child)
        engine.complete(engine.claim(), "failed", "exit")
        engine.release_dependents()
        found = child
    job = Job.fetch(found, connection=client)
    assert job.get_status() == (JobStatus.FAILED if how == "lost" else JobStatus.CANCELED)
    assert job.ended_at is not None and abs(job.ended_at.timestamp() - time.time()) < 60


def test_registries_and_queues_count(engine: Engine, client: redis.Redis) -> None:
    engine.submit(*[task()] * 9, task(name="p", priority=1), task(after=["p"]))
    handed = engine.claim(7)
    engine.complete(handed[:2])
    engine.complete(handed[2:4], "failed", "exit")
    engine.complete(handed[4:5], "stopped", "stopped")
    engine.cancel(engine.list()[0])
    kinds = (FinishedJobRegistry, FailedJobRegistry, StartedJobRegistry, DeferredJobRegistry, CanceledJobRegistry)
    assert [kind("default", connection=client).count for kind in kinds] == [2, 3, 2, 1, 1]
    queues = {q.name: q.count for q in Queue.all(connection=client)}
    assert queues == {"default": 0, ONE: 2, "default.p1.1c": 1}  # a canceled id stays in its list until claim drops it
    assert Queue(ONE, connection=client).get_job_ids() == engine.list()


def test_workers(engine: Engine, client: redis.Redis, node: Callable[..., FakeNode]) -> None:
    n1 = node(cores=3)
    (worker,) = Worker.all(connection=client)
    assert (worker.name, worker.hostname, worker.get_state()) == ("n1", "here", "idle")
    assert Worker.all(queue=Queue("default", connection=client)) == [worker]
    n1.link.post_heartbeat({"last_heartbeat": "2026-01-31T12:00:00.000000Z", "state": "busy"})
    pump([n1], lambda: not n1.link.unsent())
    (worker,) = Worker.all(connection=client)
    assert (worker.get_state(), worker.successful_job_count) == ("busy", 0)
    engine.submit(*[task()] * 4)
    engine.complete(engine.claim(3))
    engine.complete(engine.claim(1), "failed", "exit")
    (worker,) = Worker.all(connection=client)
    assert (worker.successful_job_count, worker.failed_job_count) == (3, 1)
    n1.link.deregister()
    assert Worker.all(connection=client) == []


def test_cleaning_up_harms_nothing(engine: Engine, client: redis.Redis) -> None:
    """Mere reading triggers it: what runs is not judged by RQ's clock."""
    a, b = engine.submit(task(), array(2))
    running = engine.claim(3)
    for handed in running:
        engine.report_started(handed)
    before = engine.dump(without=("rq:clean_registries",))
    StartedJobRegistry("default", connection=client).cleanup()
    for name in ("default", ONE):
        clean_registries(Queue(name, connection=client))
    assert StartedJobRegistry("default", connection=client).count == 4
    assert engine.dump(without=("rq:clean_registries",)) == before
    engine.complete(running)
    assert engine.statuses(a, b) == ["finished", "finished"]


@pytest.mark.parametrize("status", ["queued", "deferred"])
def test_rqs_cancel_and_delete_of_what_waits(engine: Engine, client: redis.Redis, status: str) -> None:
    engine.submit(task(name="p", priority=1), *[task(after=["p"] if status == "deferred" else [])] * 3)
    first, second, third = engine.list() if status == "queued" else sorted(engine.registry("deferred"))
    Job.fetch(first, connection=client).cancel()
    Job.fetch(second, connection=client).delete()
    assert engine.cancel(first, second) == ["canceled", "unknown"]
    engine.run_all("default.p1.1c")
    assert engine.run_all() == [third]
    assert engine.counts() == {"total": 4, "finished": 2, "canceled": 1}
    assert engine.store.count_vanished(["default"]) == 1
    assert engine.counts()["canceled"] == 2


def test_rq_info(engine: Engine, node: Callable[..., FakeNode]) -> None:
    node()
    engine.submit(*[task()] * 3, array(5))
    engine.claim(1)
    command = [sys.executable, "-m", "rq.cli", "info", "--url", engine.running.address.url()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ONE in done.stdout and "n1 (here" in done.stdout and "1 workers, 2 queues" in done.stdout
    assert engine.registry("wip")
