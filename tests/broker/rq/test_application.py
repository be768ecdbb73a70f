"""A script that imports only rq, on a real pilot: its functions run, and all that RQ promises it comes true."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Callback, Queue, Repeat, Retry
from rq.command import send_stop_job_command
from rq.job import Job
from rq.registry import StartedJobRegistry

from pilotq.broker.client.broker import Broker
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

EXAMPLE = ROOT / "examples" / "rq_application"
FUNCTIONS = """
import os, time
from rq import Retry, get_current_job

def add(a, b): return a + b
def boom(): raise ValueError("it broke")
def sleep(seconds): time.sleep(seconds)
def again(): return Retry(max=1)
def cwd(): return os.getcwd()
def mark(path): open(path, "a").write("x")
def noted(job, connection, result): connection.set("noted:" + job.id, str(result), ex=600)
def failed(job, connection, kind, value, trace): connection.set("failed:" + job.id, str(value), ex=600)
"""


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LivePilot]:
    """Started where the functions are."""
    folder = tmp_path / "application"
    folder.mkdir()
    (folder / "functions.py").write_text(FUNCTIONS)
    for name in ("app.py", "jobs.py"):
        shutil.copy(EXAMPLE / name, folder)
    monkeypatch.chdir(folder)
    with live_pilot(tmp_path, nodes="n1:2") as found:
        yield found


@pytest.fixture
def client(live: LivePilot) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(live.broker.url) as found:
        yield found


def ended(client: redis.Redis, *jobs: Job) -> list[str]:
    def statuses() -> list[str]:
        return [Job.fetch(job.id, connection=client).get_status().value for job in jobs]

    wait_until(lambda: set(statuses()) <= {"finished", "failed", "stopped", "canceled"}, seconds=60, what="their ends")
    return statuses()


def text_of(client: redis.Redis, job: Job) -> str:
    result = Job.fetch(job.id, connection=client).latest_result()
    assert result is not None and result.exc_string is not None
    return result.exc_string


def test_the_example(live: LivePilot) -> None:
    command = [sys.executable, "-m", "pilotq", "exec", "--dir", live.pilot.directory, "--", sys.executable, "app.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "pi is about 3.14",
        "a job with two cores saw 2",
        "a job that broke was tried 2 times",
        "the callback noted a result",
    ]
    assert live.cli("wait", "--timeout", "30").returncode == 0
    live.assert_calm()


def test_results_exceptions_callbacks(live: LivePilot, client: redis.Redis) -> None:
    queue = Queue(connection=client)
    good = queue.enqueue("functions.add", 1, 2, on_success=Callback("functions.noted"))
    bad = queue.enqueue("functions.boom", on_failure=Callback("functions.failed"))
    missing = queue.enqueue("functions.missing")
    here = queue.enqueue("functions.cwd")
    assert ended(client, good, bad, missing, here) == ["finished", "failed", "failed", "finished"]
    assert good.return_value() == 3 and client.get(f"noted:{good.id}") == b"3"
    assert "it broke" in text_of(client, bad) and client.get(f"failed:{bad.id}") == b"it broke"
    assert "missing" in text_of(client, missing)
    assert here.return_value() == str(Path.cwd())


def test_what_comes_again(live: LivePilot, client: redis.Redis, tmp_path: Path) -> None:
    queue, mark = Queue(connection=client), tmp_path / "mark"
    retried = queue.enqueue("functions.boom", retry=Retry(2, interval=1))
    returned = queue.enqueue("functions.again")
    repeated = queue.enqueue("functions.mark", str(mark), repeat=Repeat(times=2))
    later = queue.enqueue_in(dt.timedelta(seconds=1), "functions.add", 1, 1)
    assert live.broker.wait(timeout=60).left == 0  # it counts what is scheduled
    assert ended(client, retried, returned, repeated, later) == ["failed", "failed", "finished", "finished"]
    assert Job.fetch(retried.id, connection=client).retries_left == 0
    assert mark.read_text() == "xxx"


def test_dependents_of_both_kinds(live: LivePilot, client: redis.Redis) -> None:
    queue = Queue(connection=client)
    ours = live.enqueue("true")
    first = queue.enqueue("functions.add", 1, 1, depends_on=ours)
    chain = [first]
    for _ in range(5):
        chain.append(queue.enqueue("functions.add", 1, 1, depends_on=chain[-1]))
    last = live.enqueue("true", after=[chain[-1].id])
    named = queue.enqueue("functions.add", 1, 1, job_id="named-by-its-producer")
    done = live.cli("enqueue", "--after", named.id, "--after", first.id, "--", "true")
    assert done.returncode == 0, done.stderr
    assert live.ended(last).status == "finished"
    assert live.ended(done.stdout.decode().strip()).status == "finished"
    assert set(ended(client, *chain)) == {"finished"}


def test_a_time_limit_and_a_stop(live: LivePilot, client: redis.Redis) -> None:
    queue = Queue(connection=client)
    slow = queue.enqueue("functions.sleep", 1000, job_timeout=1)
    stopped = queue.enqueue("functions.sleep", 1000)
    wait_until(lambda: live.broker.task(stopped.id).reason == "running", what="running")
    send_stop_job_command(client, stopped.id)
    assert ended(client, slow, stopped) == ["failed", "stopped"]
    live.assert_calm()


def test_those_who_look_and_clean_up_harm_nothing(live: LivePilot, client: redis.Redis) -> None:
    """Over and over while jobs and tasks run: `rq info`, and what it triggers."""
    queue = Queue(connection=client)
    jobs = queue.enqueue_many([Queue.prepare_data("functions.add", (n, 1)) for n in range(200)])
    tasks = [live.enqueue("true") for _ in range(50)]
    looks = 0
    with Broker.connect(live.pilot.directory) as broker:
        while broker.counts().left or looks < 2:
            assert live_info(live).returncode == 0
            StartedJobRegistry("default", connection=client).cleanup()
            looks += 1
    live.broker.wait(tasks, timeout=60)
    assert ended(client, *jobs) == ["finished"] * 200
    assert [job.return_value() for job in jobs] == [n + 1 for n in range(200)]


def live_info(live: LivePilot) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "rq.cli", "info", "--url", live.broker.url]
    return subprocess.run(command, capture_output=True, timeout=60)
