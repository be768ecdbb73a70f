"""Commands of RQ's tools to workers, and what they see of running tasks, on a real pilot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Worker
from rq.command import (
    send_kill_horse_command,
    send_shutdown_command,
    send_stop_execution_command,
    send_stop_job_command,
)
from rq.exceptions import InvalidJobOperation
from rq.job import Job

from pilotq.broker.store import keys
from pilotq.broker.tasks.model import Request, Task
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LivePilot]:
    with live_pilot(tmp_path, nodes="n1:2") as found:
        yield found


@pytest.fixture
def client(live: LivePilot) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(live.broker.url) as found:
        yield found


def sleeper(live: LivePilot) -> str:
    task_id = live.enqueue("sleep", "1000")
    wait_until(lambda: live.broker.task(task_id).reason == "running", what="running")
    return task_id


def shown(client: redis.Redis, task_id: str) -> bool:
    return bool(client.hget(keys.job(task_id), "pq_shown"))


def test_stop_job(live: LivePilot, client: redis.Redis) -> None:
    first, second = sleeper(live), sleeper(live)
    send_stop_job_command(client, first)
    assert live.ended(first).status == "stopped"
    job = Job.fetch(first, connection=client)
    assert job.is_stopped and job in job.failed_job_registry
    assert live.broker.task(second).status == "started"
    with pytest.raises(InvalidJobOperation):
        send_stop_job_command(client, live.enqueue("sleep", "1000", request=Request(cores=(2, 2))))
    live.broker.cancel(live.broker.open_ids())
    live.broker.wait(timeout=60)


def test_a_stopped_task_that_is_requeued_runs(live: LivePilot, client: redis.Redis, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    (task_id,) = live.broker.enqueue_many([Task(script=f"[ -e {gate} ] || sleep 1000")])
    wait_until(lambda: live.broker.task(task_id).reason == "running", what="running")
    send_stop_job_command(client, task_id)
    assert live.ended(task_id).status == "stopped"
    gate.touch()
    Job.fetch(task_id, connection=client).requeue()
    wait_until(lambda: live.broker.task(task_id).status == "finished", what="its second run")
    assert live.broker.counts().left == 0


def test_what_runs_longer_is_shown(live: LivePilot, client: redis.Redis) -> None:
    first, second = sleeper(live), sleeper(live)
    wait_until(lambda: shown(client, first) and shown(client, second), what="executions")
    (worker,) = Worker.all(connection=client)
    assert {e.job_id for e in worker.get_current_executions()} == {first, second}
    job = worker.get_current_job()
    assert job is not None and job.description == "sleep 1000"
    (execution,) = Job.fetch(first, connection=client).get_executions()
    send_stop_execution_command(client, first, execution.id)
    assert live.ended(first).status == "stopped"
    assert [e.job_id for e in worker.get_current_executions(refresh=True)] == [second]
    Job.fetch(second, connection=client).delete()
    wait_until(lambda: not live.of_tasks(), what="no process of it")
    live.broker.wait(timeout=60)
    assert not list(client.scan_iter("rq:*execution*"))


def test_cancel_of_what_is_shown(live: LivePilot, client: redis.Redis) -> None:
    """RQ takes what it sees running out of its registry of started jobs."""
    task_id = sleeper(live)
    wait_until(lambda: shown(client, task_id), what="its execution")
    Job.fetch(task_id, connection=client).cancel()
    assert live.ended(task_id).status == "canceled"
    wait_until(lambda: not live.of_tasks(), what="no process of it")
    assert live.broker.counts().canceled == 1
    live.assert_calm()


def test_kill_horse(live: LivePilot, client: redis.Redis) -> None:
    running = [sleeper(live), sleeper(live)]
    send_kill_horse_command(client, "n1")
    assert {live.ended(task_id).status for task_id in running} == {"stopped"}


def test_shutdown(live: LivePilot, client: redis.Redis, tmp_path: Path) -> None:
    """The worker goes, and comes again; its task runs again."""
    gate = tmp_path / "gate"
    (task_id,) = live.broker.enqueue_many([Task(script=f"[ -e {gate} ] || sleep 1000")])
    wait_until(lambda: live.broker.task(task_id).reason == "running", what="running")
    gate.touch()
    send_shutdown_command(client, "n1")
    assert live.ended(task_id).status == "finished"
    assert live.broker.task(task_id).execution >= 2


def test_nonsense_is_ignored(live: LivePilot, client: redis.Redis) -> None:
    for text in ("", "[", "[]", '{"command": 3}', '{"command": "stop-execution", "execution_id": "x"}', "\xff"):
        client.publish(keys.command_channel("n1"), text)
    task_id = sleeper(live)
    send_stop_job_command(client, task_id)
    assert live.ended(task_id).status == "stopped"
