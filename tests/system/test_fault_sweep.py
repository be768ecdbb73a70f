"""Every process dies, stops, dawdles, or misses a reply, at every step of every transition; then nothing is wrong.

`make test` strikes with a kill at each step, `make sweep` with everything (docs/guarantees.md has its result).
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
from pilotq.broker.store.connection import Link
from pilotq.broker.tasks.states import EVENT_SCRIPTS
from tests.support.fault_rig import Rig, Work, rig
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

WHOLE = os.environ.get("PILOTQ_SWEEP") == "whole"
LOST = (":after", "inbox read", "mail taken", "journal read", "journal trimmed")  # steps at which a reply was awaited
BOOT = ("part started", "server ready", "connection written")
SERVER = ("claim", "end", "launched", "release", "commit")
Cell = tuple[str, str, str]


def cells() -> Iterator[Cell]:
    for role, steps in POINTS.items():
        for step in steps:
            kinds = ["kill", "stop", "delay"] if WHOLE else ["kill"]
            lost = step.endswith(LOST) and (WHOLE or step.startswith(("claim", "end", "commit", "mail", "inbox")))
            for kind in [*kinds, *(["lose"] if lost else [])]:
                yield role, step, kind
    for script in SERVER if WHOLE else ("claim", "end"):
        for moment in ("before", "after"):
            for kind in ("kill", "stop") if WHOLE else ("kill",):
                yield "server", f"{script}:{moment}", kind


# -- what must happen for a step to be come to ------------------------------------------------------------------------


def kill(part: str) -> Callable[[Rig, Work], None]:
    return lambda r, _: os.kill(r.process(part), signal.SIGKILL)


def leave(r: Rig, _: Work) -> None:
    """The signal, to a worker that hears it: before it has registered it may die of it like any process."""

    def there() -> bool:
        with r.broker() as broker:
            return "n1" in {node.name for node in broker.nodes()}

    wait_until(there, seconds=60, what="node n1")
    os.kill(r.process("n1"), signal.SIGTERM)


def recall(r: Rig, _: Work) -> None:
    """What was handed ahead is recalled."""
    more = r.submit([r.probe(array=ArrayRange(0, 100))])
    with r.broker() as broker:
        while not r.ended(more):
            broker.pause(True)
            broker.pause(False)


def cancel_by_rq(r: Rig, work: Work) -> None:
    """RQ's way to cancel sets the status and tells nobody. What is canceled has ended already: it changes nothing."""
    with r.broker() as broker:
        assert broker.pilot is not None
        link = Link(broker.pilot.connection().address)
        name = os.urandom(4).hex()
        link.call("HSET", keys.job(name), "status", "canceled", "pq_cancel", "canceled", "origin", "default")
        link.call("EXPIRE", keys.job(name), 60)
        link.call("ZADD", keys.registry("canceled", "default"), int(time.time()), name)
        link.close()


def enqueue_by_rq(r: Rig, _: Work) -> None:
    with r.broker() as broker:
        Queue(connection=broker.redis).enqueue("time.time")


def only_work(_: Rig, __: Work) -> None:
    """What the work of the cell brings about by itself, though maybe only once: when all had ended before the look."""


TRIGGERS: dict[str, Callable[[Rig, Work], None]] = {
    "supervisor.part ended": kill("dispatcher"),
    "supervisor.worker swept": kill("n1"),
    "supervisor.loss announced": kill("n1"),
    "dispatcher.limits": kill("dispatcher"),
    "dispatcher.route": enqueue_by_rq,
    "dispatcher.term taken": kill("dispatcher"),
    "dispatcher.nodes asked": kill("dispatcher"),
    "dispatcher.end": kill("n1"),
    "dispatcher.leave": kill("n1"),
    "dispatcher.cancel": cancel_by_rq,
    "dispatcher.trim": only_work,
    "worker.register": kill("n1"),
    "worker.leave": leave,
    "worker.give_back": recall,
    "worker.write": kill("dispatcher"),
}
CLIENT = """
import sys
from pilotq.broker import Broker, Task
from tests.support.paths import ROOT
with Broker.connect(sys.argv[1]) as broker:
    ids = broker.enqueue_many([Task(command=["true"]) for _ in range(600)], key=sys.argv[2])
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
        shared.append(Rig(tmp_path_factory.mktemp("sweep")))
        shared[0].start()
    shared[0].broken = True
    return shared[0]


def strike(r: Rig, role: str, step: str, kind: str) -> None:
    """One cell: work, a fault in the middle of it, and the judgement."""
    server = role == "server"
    actor = {"commit": "client", "claim": "dispatcher", "release": "dispatcher"}.get(step.partition(":")[0], "worker")
    fired = r.arm(
        actor if server else role, step, kind, pid=r.process("server") if server else 0, nth=1 if server else 2,
        seconds=0.5,
    )  # fmt: skip
    work = r.submit(r.mixed())
    name = f"{role}.{step}"
    trigger = TRIGGERS.get(name) or TRIGGERS.get(name.partition(":")[0])
    if trigger is not None:
        r.arm(role, step, kind, seconds=0.5)  # it may have been come to only once
        trigger(r, work)
    elif not server and not fired():
        more = [r.submit(r.mixed(4))]
        wait_until(lambda: fired() or r.ended(more[0]), seconds=60)
    wait_until(fired, seconds=60, what=f"{name} was come to")
    r.settle(work)
    assert not r.judge(work, faults=1 + (trigger is not None))


@pytest.mark.parametrize(("role", "step", "kind"), list(cells()), ids=lambda word: word.replace(" ", "_"))
def test_a_fault_at_a_step(role: str, step: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if role == "server" and step.startswith("commit"):
        server_commit_cell(request.getfixturevalue("common"), step, kind)
    elif role == "client":
        client_cell(request.getfixturevalue("common"), step, kind)
    elif role == "supervisor":
        with rig(tmp_path) as r:
            supervisor_cell(r, step, kind)
        return
    else:
        strike(request.getfixturevalue("common"), role, step, kind)
    request.getfixturevalue("common").broken = False


def supervisor_cell(r: Rig, step: str, kind: str) -> None:
    if step not in BOOT:
        strike(r, "supervisor", step, kind)
        return
    work = r.submit(r.mixed())
    assert r.pilot is not None
    fired = r.arm("supervisor", step, kind, seconds=0.5)
    r.pilot.process.kill()
    r.pilot.process.wait()
    wait_until(lambda: r.ended(work), seconds=60, what="all ended")
    assert fired()
    r.settle(work)
    assert not r.judge(work, faults=2)


def server_commit_cell(r: Rig, step: str, kind: str) -> None:
    """The server goes while a client submits; the same key submits what is missing."""
    assert r.pilot is not None
    key = os.urandom(8).hex()
    fired = r.arm("client", step, kind, pid=r.process("server"))
    command = [sys.executable, "-c", CLIENT, r.pilot.directory, key, "submit"]
    env = {**os.environ, "PILOTQ_POINTS": str(r.steps)}
    subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert fired()

    def again() -> bool:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        return done.stdout.split() == [b"600", b"600"]

    wait_until(again, seconds=60, what="the server accepts it")
    wait_until(lambda: r.all_finished(key, 600), seconds=60, what="all finished")


def client_cell(r: Rig, step: str, kind: str) -> None:
    """The client dies or fails; the same key submits the rest of it, or finds that it was whole."""
    assert r.pilot is not None
    key, verb = os.urandom(8).hex(), step.partition(":")[0]
    with r.broker() as broker:
        bad = broker.enqueue(Task(command=["false"]))
        broker.wait([bad], timeout=60)
    fired = r.arm("client", step, kind, seconds=0.5)
    command = [sys.executable, "-c", CLIENT, r.pilot.directory, key, verb, *([bad] if verb == "retry" else [])]
    env = {**os.environ, "PILOTQ_POINTS": str(r.steps)}
    first = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert fired()
    assert (first.returncode == 0) == (kind in ("stop", "delay")), first.stderr
    again = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert again.stdout.split() == [b"600", b"600"], again.stderr
    with r.broker() as broker:
        wait_until(lambda: broker.counts(key).left == 0, seconds=60)
        counts = broker.counts(key)
        assert (counts.total, counts.finished + counts.canceled) == (600, 600)
        assert counts.canceled <= (verb == "cancel")
        broker.wait([bad], timeout=60)
        assert broker.task(bad).execution in ((2, 3) if verb == "retry" else (1,))


def test_every_transition_has_steps() -> None:
    """A script, or an event of the table, that no step stands around would be swept by nobody."""
    swept = {step.partition(":")[0] for steps in POINTS.values() for step in steps if ":" in step}
    code = "".join(path.read_text() for path in (ROOT / "broker").rglob("*.py"))
    there = {
        path.name.removesuffix(".lua") for path in files("pilotq.broker.store.scripts").iterdir() if ".lua" in path.name
    }
    there = {name for name in there - {"lib", "lib_rq"} if f'"{name}"' in code}
    assert set(EVENT_SCRIPTS.values()) <= swept
    assert there == swept - {"inbox trim"}
    named = {word for room in ("broker", "workers") for word in _named(room)}
    assert named == {step for steps in POINTS.values() for step in steps if ":" not in step}


def _named(room: str) -> Iterator[str]:
    """Steps that the code names."""
    for path in (ROOT / room).rglob("*.py"):
        for piece in path.read_text().split('failpoints.at("')[1:]:
            yield piece.partition('"')[0]


def test_steps_cost_nothing_where_nobody_asked_for_them() -> None:
    code = "from pilotq.broker import failpoints; print(failpoints.at('x'), type(failpoints.at).__name__)"
    env = {k: v for k, v in os.environ.items() if k != "PILOTQ_POINTS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "None function\n"
