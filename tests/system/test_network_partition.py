"""Out of touch: a worker in a network namespace of its own, whose network is cut in one direction, or both; and one
that is stopped. The tasks of its node end in time, others get them only then, and the newer outcome stands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pilotq.broker import Task
from tests.support.fault_rig import Rig, Work
from tests.support.network_namespace import CUT, FarNode, possible
from tests.support.waiting import wait_until

CONTACT_S = 3.0
SETTINGS = {"node_timeout_margin_s": 1.0, "connect_s": 0.5, "reply_s": 1.0, "crash_limit": 5}


@pytest.fixture(autouse=True)
def _possible() -> None:
    if not possible():
        pytest.skip("network namespaces need root, ip and nft")


@contextmanager
def apart(folder: Path, contact: float = CONTACT_S, **settings: float) -> Iterator[tuple[Rig, FarNode]]:
    """A pilot with a node n1 here and a node far there, with a core each."""
    r = Rig(folder, "n1:1", **{**SETTINGS, **settings})
    far = FarNode(r)
    try:
        r.start(bind=[far.here], contact=contact)
        far.start()
        yield r, far
    finally:
        far.remove()


def ended(r: Rig, key: str) -> bool:
    with r.broker() as broker:
        return broker.counts(key).left == 0


def begun(r: Rig, node: str) -> list[str]:
    return [line[0] for line in r.ledger() if line[2] == "begin" and line[5] == node]


def occupy_here(r: Rig) -> Work:
    """The node here, with which the pilot was started, comes first: while this runs others go to node far."""
    blocker = r.submit([r.probe(2.0)])
    wait_until(lambda: begun(r, "n1"), seconds=60, what="a task on node n1")
    return blocker


@pytest.mark.parametrize("direction", CUT)
def test_a_short_cut_costs_nothing(tmp_path: Path, direction: str) -> None:
    with apart(tmp_path, contact=60.0) as (r, far):
        work = r.submit([r.probe(2.5), r.probe(2.5)] + [r.probe() for _ in range(10)])
        wait_until(lambda: begun(r, "far"), seconds=60, what="a task on node far")
        far.cut(direction)
        # The one there ends meanwhile, and its end is not reported.
        done = begun(r, "far")[0]
        wait_until(lambda: any(w[0] == done and w[2] == "end" for w in r.ledger()), seconds=60, what="its end")
        assert not r.lines(work).get(done)
        far.reconnect()
        wait_until(lambda: ended(r, work.key), seconds=60, what="all ended")
        wait_until(lambda: len(r.lines(work)) == 12, what="all in the journal")
        assert not r.judge(work, faults=0)


@pytest.mark.parametrize("direction", CUT)
def test_a_long_cut_ends_the_tasks_there_before_others_get_them(tmp_path: Path, direction: str) -> None:
    with apart(tmp_path) as (r, far):
        work = r.submit([r.probe(9.0), r.probe(9.0)])
        wait_until(lambda: begun(r, "far"), seconds=60, what="a task on node far")
        far.cut(direction)
        wait_until(lambda: far not in far, seconds=60, what="node far is given up")
        assert far.worker is not None
        assert far.worker.wait(60) == 3
        # It was given up after its worker had ended the task: the ledger knows of no "again".
        wait_until(lambda: ended(r, work.key), seconds=60, what="all ended on node n1")
        far.reconnect()
        wait_until(lambda: all(any(x.final for x in r.lines(work).get(i, ())) for i in work.ids), what="the journal")
        assert not r.judge(work, faults=1)
        far.start()
        more = r.submit([r.probe(0.5), r.probe(0.5)])
        wait_until(lambda: ended(r, more.key), seconds=60, what="both nodes work")
        assert len(begun(r, "far")) == 2


@pytest.mark.parametrize("direction", CUT)
def test_a_worker_that_tries_to_connect_keeps_its_deadline(tmp_path: Path, direction: str) -> None:
    """An attempt may take much longer than the margin of others; it ends when this worker's time is over."""
    with apart(tmp_path, connect_s=30.0) as (r, far):
        blocker = occupy_here(r)
        work = r.submit([r.probe(20.0)])
        wait_until(lambda: begun(r, "far"), seconds=60, what="the task on node far")
        far.cut(direction)
        wait_until(lambda: len(begun(r, "n1")) == 2, seconds=60, what="it runs again, on node n1")
        assert far.worker is not None
        assert far.worker.wait(60) == 3
        assert not [line for line in r.ledger() if line[2] == "again"]
        with r.broker() as broker:
            broker.cancel(work.ids)
        wait_until(lambda: ended(r, work.key) and ended(r, blocker.key), seconds=60, what="its end")


def test_the_newer_outcome_stands_when_a_stopped_worker_goes_on(tmp_path: Path) -> None:
    """A stopped worker cannot end its task, which runs on while others run it again. Only so can executions overlap,
    and that ends as soon as the worker goes on."""
    with apart(tmp_path, contact=1.0) as (r, far):
        script = f"echo $PILOTQ_EXECUTION; exec {sys.executable} -I -S {r.probe().command[3]} {r.folder} 8"  # type: ignore[index]
        blocker = occupy_here(r)
        work = r.submit([Task(script=script, stdout=str(r.folder / "out"))])
        wait_until(lambda: begun(r, "far"), seconds=60, what="the task on node far")
        assert far.worker is not None
        os.kill(far.worker.pid, signal.SIGSTOP)
        wait_until(lambda: far not in far, seconds=60, what="node far is given up")
        wait_until(lambda: len(begun(r, "n1")) == 2, seconds=60, what="it runs again, on node n1")
        os.kill(far.worker.pid, signal.SIGCONT)
        assert far.worker.wait(60) == 3
        wait_until(lambda: ended(r, work.key) and ended(r, blocker.key), seconds=60, what="all ended")
        lines = wait_until(lambda: [x for x in r.lines(work).get(work.ids[0], ()) if x.final])
        assert [(line.execution, line.status, line.node) for line in lines] == [(2, "finished", "n1")]
        assert wait_until((r.folder / "out").read_text) == "2\n"
        assert not r.of_tasks()
