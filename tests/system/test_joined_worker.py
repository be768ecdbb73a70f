"""A worker that was started by hand on the pilot's machine, beside the pilot's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pilotq.broker import Task
from tests.support.fault_rig import Rig
from tests.support.waiting import wait_until


@contextmanager
def joined(rig: Rig, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    assert rig.pilot is not None
    words = ["worker", "--dir", rig.pilot.directory, "--node", "own", "--cores", "0", "--real", "0:0", "--shared"]
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "pilotq", *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def test_it_ends_when_its_pilot_goes_on_elsewhere_and_its_task_starts_again(tmp_path: Path) -> None:
    """Nobody counts a node of the pilot's own machine as lost while its process lives: it must end by itself."""
    rig = Rig(tmp_path, "n1:1")
    rig.start()
    try:
        with joined(rig, tmp_path / "own.log") as worker, rig.broker() as broker:
            wait_until(lambda: len(broker.nodes()) == 2, what="the worker")
            ids = broker.enqueue_many([Task(script="sleep 60"), Task(script="sleep 60")])
            wait_until(lambda: {broker.task(i).reason for i in ids} == {"running"}, what="both to run")
            rig.kill_supervisor()
            rig.restart()
            assert worker.wait(30) != 0
        assert "the pilot was started again, with its server at another address" in (tmp_path / "own.log").read_text()
        with joined(rig, tmp_path / "again.log"), rig.broker() as broker:
            again = {("running", 2)}
            wait_until(
                lambda: {(v.reason, v.execution) for v in map(broker.task, ids)} == again, what="both to run again"
            )
    finally:
        rig.stop()
