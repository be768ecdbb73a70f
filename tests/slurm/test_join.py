"""Nodes that come later, and nodes that go: a second allocation joins the queue, its nodes leave with it."""

from __future__ import annotations

import json

from tests.slurm.cluster import Cluster, run
from tests.waiting import wait_until

WORKER = "srun --overlap --cpu-bind=none --ntasks-per-node=1 pilotq worker --dir p"


def states(pilot: str) -> dict[str, str]:
    shown = run("pilotq", "nodes", "--dir", pilot, "--json")
    return {node["name"]: node["state"] for node in json.loads(shown.stdout or "[]")}


def test_a_second_allocation_joins_and_leaves(cluster: Cluster) -> None:
    first = cluster.submit("pilotq start --dir p", options="-N2 --exclusive -t5")
    first.await_text("it stays until")
    pilot = str(cluster.folder / "p")
    own = list(states(pilot))
    second = cluster.submit(WORKER, "echo left with $?", options="-N2 --exclusive -t5")
    wait_until(lambda: len(states(pilot)) == 4, seconds=60, what=second.said())
    joined = sorted(set(states(pilot)) - set(own))
    assert [name.rpartition("-")[2] for name in joined] == [second.number] * 2
    done = run("pilotq", "enqueue", "--dir", pilot, "--nodes", "4", "--", "sh", "-c", "echo $PILOTQ_NODELIST")
    assert run("pilotq", "wait", "--dir", pilot).returncode == 0
    ran = run("pilotq", "logs", "--dir", pilot, done.stdout.strip()).stdout.strip().split(",")
    assert sorted(ran) == sorted(own + joined)
    # One of its nodes is retired: it leaves, and the other one of the same step stays.
    assert run("pilotq", "nodes", "retire", joined[0], "--dir", pilot).returncode == 0
    wait_until(lambda: joined[0] not in states(pilot), seconds=30)
    assert states(pilot)[joined[1]] == "up"
    assert run("pilotq", "stop", "--dir", pilot).returncode == 0
    assert (first.await_end(), second.await_end()) == ("COMPLETED", "COMPLETED")
    assert "left with 0" in second.said()


def test_a_node_of_the_allocation_is_retired_and_comes_back(cluster: Cluster) -> None:
    job = cluster.submit("pilotq start --dir p", options="-N2 --exclusive -t5")
    job.await_text("it stays until")
    pilot = str(cluster.folder / "p")
    first, other = sorted(states(pilot))
    assert run("pilotq", "nodes", "retire", first, "--dir", pilot).returncode == 0
    wait_until(lambda: states(pilot) == {other: "up"}, seconds=30)
    assert run("pilotq", "nodes", "resume", first, "--dir", pilot).returncode == 0
    wait_until(lambda: states(pilot) == {first: "up", other: "up"}, seconds=30)
    assert run("pilotq", "stop", "--dir", pilot).returncode == 0
    assert job.await_end() == "COMPLETED"
