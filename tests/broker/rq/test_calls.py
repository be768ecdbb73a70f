"""Jobs of RQ's own producers in a worker: what they return, raise and want, and their callbacks. Without a server."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq.job import Callback, Job, Retry

from pilotq.broker.pilot.directory import ConnectionInfo, Pilot
from pilotq.broker.store.connection import Address
from pilotq.broker.tasks.spec import FLAG_RQ_JOB
from tests.support import functions
from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from tests.support.worker_host import Host

GRACE_S = 1.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "server").mkdir()
    # Nobody listens there: a job connects only when it wants to.
    nowhere = ConnectionInfo(
        address=Address(path=str(tmp_path / "nowhere")), queue_id="", pilot="", host="", pid=0, version="",
        directory=str(tmp_path), started=0.0,
    )  # fmt: skip
    Pilot(str(tmp_path)).write_connection(nowhere)
    with Host(tmp_path, kill_grace_s=GRACE_S) as running:
        running.shared("base", PYTHONPATH=str(ROOT))
        yield running


def hand(host: Host, number: int, function: Any, *args: Any, serializer: str = "pickle", **options: Any) -> str:
    """A job as RQ's `enqueue` writes it, handed to the worker."""
    name, limit, slot = f"job-{number}", options.pop("limit", 0.0), options.pop("slot", number)
    job = Job.create(function, args, id=name, connection=Redis(), serializer=serializer, **options)
    fields = {key: text if isinstance(text, (str, bytes)) else str(text) for key, text in job.to_dict().items()}
    fields = {key: text.encode() if isinstance(text, str) else text for key, text in fields.items()}
    host.to_session("job", name, {key.encode(): value for key, value in fields.items()})
    host.run(name, slot=slot, flags=FLAG_RQ_JOB, time_limit=limit)
    return name


def trace(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()


def test_records_of_jobs_that_are_chained_are_read_together(host: Host) -> None:
    names = [hand(host, number, functions.product, number, 2, slot=int(number == 1)) for number in range(1, 41)]
    results = [pickle.loads(base64.b64decode(host.end_of(name).report.text)) for name in names]
    assert results == [2 * number for number in range(1, 41)]
    read = [call[1] for call in host.calls if call[0] == "read jobs"]
    assert read and max(map(len, read)) > 1
    assert all(set(some) <= set(names) for some in read)


def test_a_job_returns_its_value_in_the_producers_format(host: Host) -> None:
    report = host.end_of(hand(host, 1, functions.product, 6, 7)).report
    assert (report.outcome, pickle.loads(base64.b64decode(report.text))) == ("finished", 42)
    report = host.end_of(hand(host, 2, functions.product, 6, 7, serializer="json")).report
    assert (report.outcome, json.loads(base64.b64decode(report.text))) == ("finished", 42)
    assert host.end_of(hand(host, 3, functions.later, 5)).report.outcome == "finished"
    report = host.end_of(hand(host, 4, "threading.Lock")).report
    assert (report.outcome, pickle.loads(base64.b64decode(report.text))) == ("finished", "Unserializable return value")


def test_a_job_that_raises_or_cannot_be_read_fails_with_rqs_text(host: Host) -> None:
    report = host.end_of(hand(host, 1, functions.throw, ValueError("bad"))).report
    assert (report.outcome, report.reason) == ("failed", "exception")
    assert trace(report.text).startswith("Traceback") and trace(report.text).endswith("ValueError: bad\n")
    report = host.end_of(hand(host, 2, "nowhere.at_all")).report
    assert "nowhere" in trace(report.text)


def test_a_job_can_ask_to_be_run_again(host: Host) -> None:
    report = host.end_of(hand(host, 1, functions.give_back, Retry(max=3, interval=[5, 9]))).report
    assert (report.outcome, report.text) == ("retried", "3:5")
    report = host.end_of(hand(host, 2, functions.give_back, Retry(max=3, enqueue_at_front=True))).report
    assert (report.outcome, report.text) == ("retried", "3:0:front")


@pytest.mark.parametrize(("error", "said", "outcome"), [
    (None, "success 8", "finished"), (ValueError("bad"), "failure ValueError bad", "failed"),
])  # fmt: skip
def test_callbacks_run_before_the_end_is_reported(
    host: Host, tmp_path: Path, error: Exception | None, said: str, outcome: str
) -> None:
    mark = tmp_path / "said"
    name = hand(
        host, 1, functions.throw_or_give, error, 8, meta={"mark": str(mark)}, on_success=Callback(functions.on_success),
        on_failure=Callback(functions.on_failure), on_stopped=Callback(functions.on_stopped),
    )  # fmt: skip
    assert host.end_of(name).report.outcome == outcome
    assert mark.read_text() == said


def test_a_success_callback_that_raises_fails_the_job(host: Host, tmp_path: Path) -> None:
    mark = tmp_path / "said"
    name = hand(
        host, 1, functions.product, 2, meta={"mark": str(mark)}, on_success=Callback(functions.on_nothing),
        on_failure=Callback(functions.on_failure),
    )  # fmt: skip
    report = host.end_of(name).report
    assert report.outcome == "failed" and trace(report.text).endswith("RuntimeError: a callback\n")
    assert mark.read_text() == "failure RuntimeError a callback"


def test_at_its_timeout_a_job_sees_rqs_own_exception(host: Host, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    report = host.end_of(hand(host, 1, functions.wait_for_ever, str(mark), limit=3.0)).report
    assert (report.outcome, report.reason) == ("failed", "time limit")
    assert "JobTimeoutException" in trace(report.text)
    assert mark.read_text() == "JobTimeoutException"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_stopped_job_has_its_callback_though_it_had_to_be_killed(host: Host, tmp_path: Path, stubborn: bool) -> None:
    mark, said = tmp_path / "mark", tmp_path / "said"
    name = hand(
        host, 1, functions.wait_for_ever, str(mark), stubborn, meta={"mark": str(said)},
        on_failure=Callback(functions.on_failure), on_stopped=Callback(functions.on_stopped),
    )  # fmt: skip
    wait_until(lambda: mark.exists() and mark.read_text().isdigit(), what="start of the job")
    host.stop(name, "stopped")
    report = host.end_of(name).report
    assert (report.outcome, report.reason) == ("stopped", "stopped")
    assert said.read_text() == "stopped"
