"""rq-exporter on a pilot: what a Prometheus server would read."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from pilotq.broker import Broker, Task
from tests.support.command_line import command, environment, in_background
from tests.support.waiting import wait_until

METRIC = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def metrics(url: str) -> dict[tuple[str, str], float]:
    """(name, labels) -> value"""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        text = answer.read().decode()
    return {(name, labels): float(value) for name, labels, value in METRIC.findall(text)}


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_counts_tasks_and_workers(tmp_path: Path) -> None:
    if find_spec("rq_exporter") is None:
        (pytest.fail if os.environ.get("PILOTQ_TEST_TOOLS") == "1" else pytest.skip)("rq-exporter is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        in_background(tmp_path, "--nodes", "n1:1", PILOTQ_SETTINGS='{"prefetch_after": 1000000}'),
        Broker.connect(str(tmp_path / ".pilotq" / "current")) as broker,
    ):
        good = broker.enqueue_many([Task(command=["true"]) for _ in range(3)])
        bad = broker.enqueue(Task(command=["false"]))
        broker.wait([*good, bad], timeout=60)
        held = broker.enqueue(Task(command=["sleep", "1000"]))
        broker.enqueue_many([Task(command=["true"]) for _ in range(4)])
        wait_until(lambda: broker.task(held).status == "started", seconds=60)
        # The worker says so with its next beat.
        wait_until(lambda: broker.redis.hget("rq:worker:n1", "state") == b"busy", seconds=60)
        # The URL, with its password, reaches the exporter by the environment that `pilotq exec` makes.
        with open(tmp_path / "exporter.log", "wb") as log:
            exporter = subprocess.Popen(
                command("exec", "--", sys.executable, "-m", "rq_exporter", "--host", "127.0.0.1", "--port", str(port)),
                cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            wait_until(lambda: listening(port) or exporter.poll() is not None, seconds=60)
            assert exporter.poll() is None, (tmp_path / "exporter.log").read_text()
            found = metrics(f"http://127.0.0.1:{port}/metrics")
        finally:
            exporter.send_signal(signal.SIGTERM)
            exporter.wait(60)
        jobs = {labels: value for (name, labels), value in found.items() if name == "rq_jobs"}
        assert jobs['queue="default",status="finished"'] == 3
        assert jobs['queue="default",status="failed"'] == 1
        assert jobs['queue="default",status="started"'] == 1
        assert jobs['queue="default.p0.1c",status="queued"'] == 4
        (worker,) = [labels for name, labels in found if name == "rq_workers"]
        assert 'name="n1"' in worker and 'state="busy"' in worker
        assert [value for (name, _), value in found.items() if name == "rq_workers_success_total"] == [3]
        assert [value for (name, _), value in found.items() if name == "rq_workers_failed_total"] == [1]
