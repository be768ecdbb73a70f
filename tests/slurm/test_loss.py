"""Nodes and workers that die: nothing is lost, the wait is bounded, and messages say what happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from pilotq.broker.store.journal import Journal
from tests.slurm.cluster import Cluster, supervisor_and_worker
from tests.support.waiting import wait_until

# Two long tasks on each node; then each says where it was, and ends when it may.
HOLD = "echo $$ >$PILOTQ_NODELIST.{index}.$PILOTQ_EXECUTION; until [ -e go ]; do sleep 0.1; done"
START = "exec pilotq run --dir p --array 0-7 -- bash -c '" + HOLD + "'"


def begun(folder: Path) -> list[Path]:
    return [path for path in folder.glob("node*.*.*") if path.read_text()]


def on(folder: Path, node: str) -> list[Path]:
    return [path for path in begun(folder) if path.name.startswith(f"{node}.")]


def log(folder: Path, part: str) -> str:
    return (folder / "p" / "logs" / f"{part}.log").read_text()


def all_end_once(folder: Path) -> None:
    last: dict[int, str] = {}
    for line in Journal(str(folder / "p" / "journal.jsonl")).entries():
        if line.array and line.final:
            assert line.index is not None and line.index not in last, f"element {line.index} ended twice"
            last[line.index] = line.status
    assert last == dict.fromkeys(range(8), "finished")


def test_a_killed_worker_is_replaced_and_its_tasks_run_again(cluster: Cluster) -> None:
    """First the worker: its supervisor starts the next one. Then the whole step task: srun says that it is dead."""
    job = cluster.submit(START)
    wait_until(lambda: len(begun(cluster.folder)) == 8, seconds=60, what=job.said())
    supervisor, worker = wait_until(lambda: supervisor_and_worker("node2", cluster.folder))
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(on(cluster.folder, "node2")) == 4, seconds=30, what=log(cluster.folder, "step-1"))
    assert "node node2 is lost (its worker was killed by signal 9)" in log(cluster.folder, "dispatcher")
    os.kill(supervisor, signal.SIGKILL)
    begin = time.monotonic()
    wait_until(lambda: "node node2 is lost (srun: Killed)" in log(cluster.folder, "dispatcher"), seconds=30)
    assert time.monotonic() - begin < 15  # the aim is 5 s on a quiet machine
    # Tasks under which two workers have died are tried one after the other.
    wait_until(lambda: len(on(cluster.folder, "node2")) >= 5, seconds=60, what=log(cluster.folder, "supervisor"))
    (cluster.folder / "go").touch()
    assert job.await_end() == "COMPLETED", job.said()
    all_end_once(cluster.folder)


def test_what_slurm_gives_up_and_what_is_lost(cluster: Cluster) -> None:
    """A node that crashed and one that is cut off are lost when they are out of touch; the tasks of the second have
    ended by then. One whose slurmd died is given up by Slurm, and goes on: its tasks run once."""
    line = START.replace("--dir p", "--dir p --contact 10")
    job = cluster.submit(line, options="-N4 --exclusive -t5 --no-kill --no-requeue")
    wait_until(lambda: len(begun(cluster.folder)) == 8, seconds=60, what=job.said())
    lost = {path.name.split(".")[1] for node in ("node2", "node4") for path in on(cluster.folder, node)}
    cut_off = [int(path.read_text()) for path in on(cluster.folder, "node2")]
    cluster.node("node4", "crash")
    cluster.node("node2", "disconnect")
    cluster.node("node3", "kill")
    for node in ("node2", "node4"):
        why = f"node {node} is lost (it was out of touch for too long)"
        wait_until(lambda why=why: why in log(cluster.folder, "dispatcher"), seconds=60)
    assert not [pid for pid in cut_off if Path(f"/proc/{pid}").exists()]
    wait_until(lambda: "Slurm has given up node node3" in log(cluster.folder, "supervisor"), seconds=100)
    cluster.node("node2", "reconnect")
    (cluster.folder / "go").touch()
    assert job.await_end() == "COMPLETED", job.said()
    all_end_once(cluster.folder)
    assert {path.name.split(".")[1] for path in begun(cluster.folder) if path.name.endswith(".2")} == lost
    assert json.dumps(job.said()).count("8 finished") == 1
