"""Every process is killed, stopped, delayed, or misses a reply at every failpoint; nothing is wrong afterwards.

`make test` kills at each point, `make sweep` does everything (docs/guarantees.md has its result).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from rq import Queue

from pilotq.broker import ArrayRange, Task
from pilotq.broker.failpoints import POINTS
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.tasks.states import EVENT_SCRIPTS
from tests.support.fault_rig import Rig, Work, rig
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

WHOLE = os.environ.get("PILOTQ_SWEEP") == "whole"
LOST = (":after", "inbox read", "events taken", "journal read", "journal trimmed")  # points behind a read
OFTEN_LOST = ("claim", "complete", "commit", "events", "inbox")  # ... of them `make test` goes through these
BOOT = ("part started", "server ready", "connection written")
SERVER = ("claim", "complete", "report_started", "release_dependents", "commit")
Cell = tuple[str, str, str]


def cells() -> Iterator[Cell]:
    for role, points in POINTS.items():
        for point in points:
            kinds = ["kill", "stop", "delay"] if WHOLE else ["kill"]
            lost = point.endswith(LOST) and (WHOLE or point.startswith(OFTEN_LOST))
            for kind in [*kinds, *(["lose"] if lost else [])]:
                yield role, point, kind
    for script in SERVER if WHOLE else ("claim", "complete"):
        for moment in ("before", "after"):
            for kind in ("kill", "stop") if WHOLE else ("kill",):
                yield "server", f"{script}:{moment}", kind


# -- what must happen for a point to be reached ------------------------------------------------------------------------


def kill(part: str) -> Callable[[Rig, Work], None]:
    return lambda r, _: os.kill(r.process(part), signal.SIGKILL)


def leave(r: Rig, _: Work) -> None:
    """Send SIGTERM to a registered worker: before that it may die of the signal like any process."""

    def there() -> bool:
        with r.broker() as broker:
            return "n1" in {node.name for node in broker.nodes()}

    wait_until(there, seconds=60, what="node n1")
    os.kill(r.process("n1"), signal.SIGTERM)


def retract(r: Rig, _: Work) -> None:
    """What was prefetched is retracted."""
    more = r.submit([r.probe(array=ArrayRange(0, 100))])
    with r.broker() as broker:
        while not r.ended(more):
            broker.pause(True)
            broker.pause(False)


def cancel_by_rq(r: Rig, work: Work) -> None:
    """Cancel as RQ does, which sets the status and notifies nobody. The job has ended already: nothing changes."""
    with r.broker() as broker:
        assert broker.pilot is not None
        link = Connection(broker.pilot.connection().address)
        name = os.urandom(4).hex()
        link.call("HSET", keys.job(name), "status", "canceled", "pq_cancel", "canceled", "origin", "default")
        link.call("EXPIRE", keys.job(name), 60)
        link.call("ZADD", keys.registry("canceled", "default"), int(time.time()), name)
        link.close()


def enqueue_by_rq(r: Rig, _: Work) -> None:
    with r.broker() as broker:
        Queue(connection=broker.redis).enqueue("time.time")


def enqueue_under_our_id(r: Rig, _: Work) -> None:
    with r.broker() as broker:
        (task_id,) = broker.enqueue_many([Task(command=["true"])])
        Queue(connection=broker.redis).enqueue("time.time", job_id=task_id)


def only_work(_: Rig, __: Work) -> None:
    """The work of the cell reaches the point by itself, though maybe only once: when all had ended before the poll."""


TRIGGERS: dict[str, Callable[[Rig, Work], None]] = {
    "supervisor.part ended": kill("dispatcher"),
    "supervisor.worker swept": kill("n1"),
    "supervisor.loss announced": kill("n1"),
    "dispatcher.free_rate_slots": kill("dispatcher"),
    "dispatcher.route_rq": enqueue_by_rq,
    "dispatcher.part_rq": enqueue_under_our_id,
    "dispatcher.term taken": kill("dispatcher"),
    "dispatcher.nodes asked": kill("dispatcher"),
    "dispatcher.complete": kill("n1"),
    "dispatcher.deregister": kill("n1"),
    "dispatcher.cancel": cancel_by_rq,
    "dispatcher.trim": only_work,
    "worker.register": kill("n1"),
    "worker.deregister": leave,
    "worker.return_unstarted": retract,
    "worker.guarded_write": kill("dispatcher"),
}
CLIENT = """
import sys
from pilotq.broker import Broker, Task
with Broker.connect(sys.argv[1]) as broker:
    # 500 tasks with records of their own, and a bundle of 100.
    tasks = [Task(command=["true"], priority=n // 50) for n in range(500)]
    tasks += [Task(command=["true", str(n)], priority=-1) for n in range(100)]
    ids = broker.enqueue_many(tasks, key=sys.argv[2])
    broker.cancel(ids[:1] if sys.argv[3:] == ["cancel"] else [])
    broker.retry(sys.argv[4:])
    print(len(ids), len(set(ids)))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rig]]:
    """The rig that cells have in common, one at a time: a cell that fails leaves it broken."""
    held: list[Rig] = []
    yield held
    for r in held:
        r.stop()


@pytest.fixture
def common(shared: list[Rig], tmp_path_factory: pytest.TempPathFactory) -> Rig:
    if shared and shared[0].broken:
        shared.pop().stop()
    if not shared:
        shared.append(Rig(tmp_path_factory.mktemp("sweep"), bundle_above=6))
        shared[0].start()
    shared[0].broken = True
    return shared[0]


def strike(r: Rig, role: str, point: str, kind: str) -> None:
    """One cell: work, a fault in the middle of it, and the judgement."""
    server = role == "server"
    callers = {"commit": "client", "claim": "dispatcher", "release_dependents": "dispatcher"}
    actor = callers.get(point.partition(":")[0], "worker")
    fired = r.arm(
        actor if server else role, point, kind, pid=r.process("server") if server else 0, nth=1 if server else 2,
        seconds=0.5,
    )  # fmt: skip
    work = r.submit(r.mixed())
    name = f"{role}.{point}"
    trigger = TRIGGERS.get(name) or TRIGGERS.get(name.partition(":")[0])
    if trigger is not None:
        r.arm(role, point, kind, seconds=0.5)  # it may have been reached only once
        trigger(r, work)
    elif not server and not fired():
        more = [r.submit(r.mixed(4))]
        wait_until(lambda: fired() or r.ended(more[0]), seconds=60)
    wait_until(fired, seconds=60, what=f"{name} was reached")
    r.settle(work)
    assert not r.judge(work, faults=1 + (trigger is not None))


@pytest.mark.parametrize(("role", "point", "kind"), list(cells()), ids=lambda word: word.replace(" ", "_"))
def test_a_fault_at_a_point(role: str, point: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if role == "server" and point.startswith("commit"):
        server_commit_cell(request.getfixturevalue("common"), point, kind)
    elif role == "client":
        client_cell(request.getfixturevalue("common"), point, kind)
    elif role == "supervisor":
        with rig(tmp_path, bundle_above=6) as r:
            supervisor_cell(r, point, kind)
        return
    else:
        strike(request.getfixturevalue("common"), role, point, kind)
    request.getfixturevalue("common").broken = False


def supervisor_cell(r: Rig, point: str, kind: str) -> None:
    if point not in BOOT:
        strike(r, "supervisor", point, kind)
        return
    work = r.submit(r.mixed())
    assert r.pilot is not None
    fired = r.arm("supervisor", point, kind, seconds=0.5)
    r.pilot.process.kill()
    r.pilot.process.wait()
    wait_until(lambda: r.ended(work), seconds=60, what="all ended")
    assert fired()
    r.settle(work)
    assert not r.judge(work, faults=2)


def server_commit_cell(r: Rig, point: str, kind: str) -> None:
    """The server goes while a client submits; the same key submits what is missing."""
    assert r.pilot is not None
    key = os.urandom(8).hex()
    fired = r.arm("client", point, kind, pid=r.process("server"))
    command = [sys.executable, "-c", CLIENT, r.pilot.directory, key, "submit"]
    settings = {**os.environ, "PILOTQ_SETTINGS": '{"bundle_above": 60}'}
    env = {**settings, "PILOTQ_FAILPOINTS": str(r.points)}
    subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert fired()

    def again() -> bool:
        done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        return done.stdout.split() == [b"600", b"600"]

    wait_until(again, seconds=60, what="the server accepts it")
    wait_until(lambda: r.all_finished(key, 600), seconds=60, what="all finished")


def client_cell(r: Rig, point: str, kind: str) -> None:
    """The client dies or fails; the same key submits the rest of it, or finds that it was whole."""
    assert r.pilot is not None
    key, verb = os.urandom(8).hex(), point.partition(":")[0]
    with r.broker() as broker:
        bad = broker.enqueue(Task(command=["false"]))
        broker.wait([bad], timeout=60)
    fired = r.arm("client", point, kind, seconds=0.5)
    command = [sys.executable, "-c", CLIENT, r.pilot.directory, key, verb, *([bad] if verb == "requeue" else [])]
    settings = {**os.environ, "PILOTQ_SETTINGS": '{"bundle_above": 60}'}
    env = {**settings, "PILOTQ_FAILPOINTS": str(r.points)}
    first = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert fired()
    assert (first.returncode == 0) == (kind in ("stop", "delay")), first.stderr
    again = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert again.stdout.split() == [b"600", b"600"], again.stderr
    with r.broker() as broker:
        wait_until(lambda: broker.counts(key).left == 0, seconds=60)
        counts = broker.counts(key)
        assert (counts.total, counts.finished + counts.canceled) == (600, 600)
        assert counts.canceled <= (verb == "cancel")
        broker.wait([bad], timeout=60)
        assert broker.task(bad).execution in ((2, 3) if verb == "requeue" else (1,))


def test_every_transition_has_points() -> None:
    """A script, or an event of the table, without points around it would have no fault."""
    swept = {point.partition(":")[0] for points in POINTS.values() for point in points if ":" in point}
    code = "".join(path.read_text() for path in (ROOT / "broker").rglob("*.py"))
    there = {
        path.name.removesuffix(".lua") for path in files("pilotq.broker.store.scripts").iterdir() if ".lua" in path.name
    }
    there = {name for name in there - {"lib", "lib_leases", "lib_rq", "lib_joins", "lib_commit"} if f'"{name}"' in code}
    assert set(EVENT_SCRIPTS.values()) <= swept
    assert there == swept - {"inbox trim"}
    named = {word for room in ("broker", "workers") for word in _named(room)}
    assert named == {point for points in POINTS.values() for point in points if ":" not in point}


def _named(room: str) -> Iterator[str]:
    """Points that the code names."""
    for path in (ROOT / room).rglob("*.py"):
        for piece in path.read_text().split('failpoints.hit("')[1:]:
            yield piece.partition('"')[0]


def test_failpoints_cost_nothing_where_nobody_asked_for_them() -> None:
    code = "from pilotq.broker import failpoints; print(failpoints.hit('x'), type(failpoints.hit).__name__)"
    env = {k: v for k, v in os.environ.items() if k != "PILOTQ_FAILPOINTS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "None function\n"
