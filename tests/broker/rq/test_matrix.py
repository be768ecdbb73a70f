"""Every button of RQ's tools on a task in every state, by RQ's own API, on a real pilot: docs/rq_matrix.toml."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.exceptions import InvalidJobOperation
from rq.job import Job

from pilotq.broker.errors import UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.tasks.model import ArrayRange, Task
from tests.support.engine import ONE
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MATRIX = tomllib.loads((ROOT / "docs" / "rq_matrix.toml").read_text())
STATES = ("queued", "handed", "running", "parent", "array")
CELLS = [(action, state) for action in MATRIX for state in STATES]
SOON_S = 30.0  # 5 s are promised; a busy machine may take longer


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LivePilot]:
    with live_pilot(tmp_path, nodes="n1:1") as found:
        yield found


@pytest.fixture
def client(live: LivePilot) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(live.broker.url) as found:
        yield found


class Scene:
    """One core, and tasks that run until the gate is open; what has failed once finishes then."""

    def __init__(self, live: LivePilot, folder: Path) -> None:
        self.live = live
        self.gate = folder / "gate"
        self.child = ""

    def gated(self, **fields: object) -> Task:
        script = f"while [ ! -e {self.gate} ]; do sleep 0.05; done"
        return Task(script=script, **fields)  # type: ignore[arg-type]

    def enqueue(self, *tasks: Task) -> list[str]:
        return self.live.broker.enqueue_many(tasks)

    def started(self, task_id: str) -> str:
        wait_until(lambda: self.live.broker.task(task_id).reason == "running", what=f"{task_id} running")
        return task_id

    def queued(self) -> str:
        self.started(self.enqueue(self.gated())[0])
        return self.enqueue(self.gated())[0]

    def handed(self) -> str:
        """Behind one that runs, on the same node: short tasks before it let the node prefetch it."""
        self.live.broker.wait(self.enqueue(*[Task(command=["true"])] * 20), timeout=60)
        first, second = self.enqueue(self.gated(), self.gated())
        self.started(first)
        wait_until(lambda: self.live.broker.task(second).reason == "handed", what="prefetched")
        return second

    def running(self) -> str:
        return self.started(self.enqueue(self.gated())[0])

    def parent(self) -> str:
        self.started(self.enqueue(self.gated())[0])
        parent, self.child = self.enqueue(self.gated(name="p"), Task(command=["true"], after=["p"]))
        return parent

    def array(self) -> str:
        (array,) = self.enqueue(self.gated(array=ArrayRange(0, 3)))
        self.started(f"{array}_0")
        return array

    def failed(self, state: str) -> str:
        """One that failed, as it does whenever the gate is shut."""
        script = f"[ -e {self.gate} ]"
        if state == "array":
            (task_id,) = self.enqueue(Task(script=script, array=ArrayRange(0, 3)))
        else:
            task_id, self.child = self.enqueue(Task(script=script, name="p"), Task(command=["true"], after=["p"]))
        self.live.broker.wait(timeout=60)
        assert self.live.broker.task(task_id).status == "failed"
        return task_id


@pytest.fixture
def scene(live: LivePilot, tmp_path: Path) -> Scene:
    return Scene(live, tmp_path)


def do(action: str, task_id: str, client: redis.Redis) -> None:
    """Press the button."""
    job = Job.fetch(task_id, connection=client)
    # What waits stands in a class list; so would the dashboard show it.
    queue = Queue(job.origin if job.origin != "default" else ONE, connection=client)
    if action == "empty":
        queue.empty()
    elif action == "compact":
        if client.exists(queue.key):  # RQ fails on an empty one
            queue.compact()
    elif action == "requeue":
        job.requeue()
    else:
        getattr(job, action)()


@pytest.mark.parametrize(("action", "state"), CELLS)
def test_every_button_in_every_state(
    live: LivePilot, scene: Scene, client: redis.Redis, action: str, state: str
) -> None:
    outcome = MATRIX[action][state][0]
    make: Callable[[], str] = getattr(scene, state)
    task_id = scene.failed(state) if outcome == "again" else make()
    if outcome == "again":
        scene.gate.touch()
        do(action, task_id, client)
        wait_until(lambda: live.broker.task(task_id).status == "finished", seconds=SOON_S, what="it runs again")
    elif outcome == "refused":
        with pytest.raises(InvalidJobOperation):
            do(action, task_id, client)
    else:
        do(action, task_id, client)
    if outcome == "ends":
        wait_until(lambda: status(live, task_id) in ("canceled", None), seconds=SOON_S, what="its end")
        if scene.child:
            wait_until(lambda: status(live, scene.child) == "canceled", seconds=SOON_S, what="the dependent's end")
        if state in ("running", "array"):
            wait_until(lambda: not live.of_tasks(), seconds=SOON_S, what="no process of it")
    scene.gate.touch()
    counts = live.broker.wait(timeout=SOON_S)
    assert counts.left == 0
    if outcome in ("goes on", "refused"):
        assert status(live, task_id) == "finished"
        assert not scene.child or status(live, scene.child) == "finished"
    assert not client.exists(keys.registry("wip", "default"), keys.registry("deferred", "default"))
    live.assert_calm()


def status(live: LivePilot, task_id: str) -> str | None:
    try:
        return live.broker.task(task_id).status
    except UnknownTask:
        return None  # its record was deleted while it waited


def test_the_table_is_whole() -> None:
    assert set(MATRIX) == {"cancel", "delete", "empty", "requeue", "compact"}
    assert all(set(row) == {"button", *STATES} for row in MATRIX.values())
    assert {row[state][0] for row in MATRIX.values() for state in STATES} == {"ends", "goes on", "refused", "again"}
