"""Nodes and workers that die: nothing is lost, the wait is bounded, and it is said what happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from pilotq.broker.journal import Journal
from tests.slurm.cluster import Cluster, run
from tests.waiting import wait_until

# Two long tasks on each node; then each says where it was, and ends when it may.
HOLD = "echo $$ >$PILOTQ_NODELIST.{index}.$PILOTQ_EXECUTION; until [ -e go ]; do sleep 0.1; done"
START = "exec pilotq run --dir p --array 0-7 -- bash -c '" + HOLD + "'"


def begun(folder: Path) -> list[Path]:
    return [path for path in folder.glob("node*.*.*") if path.read_text()]


def on(folder: Path, node: str) -> list[Path]:
    return [path for path in begun(folder) if path.name.startswith(f"{node}.")]


def log(folder: Path, part: str) -> str:
    return (folder / "p" / "logs" / f"{part}.log").read_text()


def processes_of(node: str, folder: Path, word: str) -> list[int]:
    """On one machine all nodes' processes are seen: those of a node are in its network namespace."""
    there = set(run("ip", "netns", "pids", f"stb-{node}").stdout.split())
    return [int(pid) for pid in run("pgrep", "-f", f"{word}.*{folder}").stdout.split() if pid in there]


def all_end_once(folder: Path) -> None:
    last: dict[int, str] = {}
    for line in Journal(str(folder / "p" / "journal.jsonl")).lines():
        if line.array and line.final:
            assert line.index is not None and line.index not in last, f"element {line.index} ended twice"
            last[line.index] = line.status
    assert last == dict.fromkeys(range(8), "finished")


def test_a_killed_worker_is_replaced_and_its_tasks_run_again(cluster: Cluster) -> None:
    """First the worker: whoever keeps it starts the next one. Then the whole step task: srun says that it is dead."""
    job = cluster.submit(START)
    wait_until(lambda: len(begun(cluster.folder)) == 8, seconds=60, what=job.said())
    (keeper, worker) = sorted(processes_of("node2", cluster.folder, "pilotq worker"))
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(on(cluster.folder, "node2")) == 4, seconds=30, what=log(cluster.folder, "step-1"))
    assert "node node2 is lost (its worker was killed by signal 9)" in log(cluster.folder, "dispatcher")
    os.kill(keeper, signal.SIGKILL)
    begin = time.monotonic()
    wait_until(lambda: "node node2 is lost (srun: Killed)" in log(cluster.folder, "dispatcher"), seconds=30)
    assert time.monotonic() - begin < 15  # the aim is 5 s on a quiet machine
    # Tasks under which two workers have died are tried one after the other.
    wait_until(lambda: len(on(cluster.folder, "node2")) >= 5, seconds=60, what=log(cluster.folder, "supervisor"))
    (cluster.folder / "go").touch()
    assert job.await_end() == "COMPLETED", job.said()
    all_end_once(cluster.folder)


def test_a_crashed_node_is_given_up_when_slurm_says_so(cluster: Cluster) -> None:
    """The job goes on with the others (--no-kill); the node's tasks run elsewhere."""
    job = cluster.submit(START, options="-N4 --exclusive -t5 --no-kill --no-requeue")
    wait_until(lambda: len(begun(cluster.folder)) == 8, seconds=60, what=job.said())
    lost = {path.name.split(".")[1] for path in on(cluster.folder, "node4")}
    cluster.node("node4", "crash")
    wait_until(lambda: "node node4 is lost" in log(cluster.folder, "dispatcher"), seconds=100)
    assert "Node failure" in log(cluster.folder, "step-1")
    (cluster.folder / "go").touch()
    assert job.await_end() == "COMPLETED", job.said()
    all_end_once(cluster.folder)
    again = {path.name.split(".")[1] for path in begun(cluster.folder) if path.name.endswith(".2")}
    assert again == lost


def test_a_node_whose_slurmd_died_goes_on(cluster: Cluster) -> None:
    job = cluster.submit(START, options="-N4 --exclusive -t5 --no-kill --no-requeue")
    wait_until(lambda: len(begun(cluster.folder)) == 8, seconds=60, what=job.said())
    cluster.node("node3", "kill")
    cluster.node("node3", "start")
    (cluster.folder / "go").touch()
    assert job.await_end() == "COMPLETED", job.said()
    all_end_once(cluster.folder)
    assert len(begun(cluster.folder)) == 8
    assert json.dumps(job.said()).count("8 finished") == 1


def test_a_node_that_is_cut_off_is_given_up_and_its_late_word_does_not_count(cluster: Cluster) -> None:
    """Its tasks go on there for a while, and again elsewhere: each counts once."""
    job = cluster.submit(START, options="-N4 --exclusive -t5 --no-kill --no-requeue")
    wait_until(lambda: len(begun(cluster.folder)) == 8, seconds=60, what=job.said())
    cluster.node("node4", "disconnect")
    wait_until(lambda: "node node4 is lost" in log(cluster.folder, "dispatcher"), seconds=100)
    cluster.node("node4", "reconnect")
    (cluster.folder / "go").touch()
    assert job.await_end() == "COMPLETED", job.said()
    all_end_once(cluster.folder)
