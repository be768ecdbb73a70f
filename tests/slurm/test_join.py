"""Nodes that come later, and nodes that go: a second allocation joins the queue, its nodes leave with it."""

from __future__ import annotations

import json

from pilotq.broker.store.journal import Journal
from tests.slurm.cluster import Cluster, run
from tests.support.waiting import wait_until

WORKER = "srun --overlap --cpu-bind=none --ntasks-per-node=1 pilotq worker --dir p"


def states(pilot: str) -> dict[str, str]:
    shown = run("pilotq", "nodes", "--dir", pilot, "--json")
    return {node["name"]: node["state"] for node in json.loads(shown.stdout or "[]")}


def test_a_second_allocation_joins_and_leaves(cluster: Cluster) -> None:
    first = cluster.submit("pilotq start --dir p", options="-N2 --exclusive -t5")
    first.await_text("staying until")
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
    job.await_text("staying until")
    pilot = str(cluster.folder / "p")
    first, other = sorted(states(pilot))
    assert run("pilotq", "nodes", "retire", first, "--dir", pilot).returncode == 0
    wait_until(lambda: states(pilot) == {other: "up"}, seconds=30)
    assert run("pilotq", "nodes", "resume", first, "--dir", pilot).returncode == 0
    wait_until(lambda: states(pilot) == {first: "up", other: "up"}, seconds=30)
    assert run("pilotq", "stop", "--dir", pilot).returncode == 0
    assert job.await_end() == "COMPLETED"


HOLD = "echo $PILOTQ_NODELIST >>at; until [ -e go ]; do sleep 0.1; done"


def test_a_joined_allocation_has_an_end_of_its_own(cluster: Cluster) -> None:
    """Nothing is begun there that cannot end in time, until it is extended; and it leaves before it ends."""
    first = cluster.submit("pilotq start --dir p", options="-N1 --exclusive -t30")
    first.await_text("staying until")
    pilot = str(cluster.folder / "p")
    (own,) = states(pilot)
    assert run("pilotq", "nodes", "drain", own, "--dir", pilot).returncode == 0
    task = ("pilotq", "enqueue", "--dir", pilot, "--cwd", str(cluster.folder))
    long = run(*task, "--time-request", "10m", "--", "bash", "-c", HOLD).stdout.strip()
    short = run(*task, "--time-request", "10s", "--", "true").stdout.strip()
    second = cluster.submit(
        WORKER + " --grace 50s", "echo left with $?", options="-N2 --exclusive -t5", allocation_poll_s=0.5
    )
    assert run("pilotq", "wait", "--dir", pilot, short).returncode == 0, second.said()
    assert json.loads(run("pilotq", "show", "--dir", pilot, long, "--json").stdout)[0]["status"] == "queued"
    run("scontrol", "update", f"JobId={second.number}", "TimeLimit=30")
    at = cluster.folder / "at"
    wait_until(at.exists, seconds=30, what=run("pilotq", "explain", "--dir", pilot, long).stdout)
    run("scontrol", "update", f"JobId={second.number}", "TimeLimit=1")
    assert second.await_end() == "COMPLETED"
    assert "left with 0" in second.said()
    assert run("pilotq", "nodes", "resume", own, "--dir", pilot).returncode == 0
    wait_until(lambda: len(at.read_text().split()) == 2, seconds=30)
    (cluster.folder / "go").touch()
    assert run("pilotq", "wait", "--dir", pilot, long).returncode == 0
    there, here = at.read_text().split()
    assert (there.rpartition("-")[2], here) == (second.number, own)
    assert run("pilotq", "stop", "--dir", pilot).returncode == 0
    assert first.await_end() == "COMPLETED"
    (cut,) = [line for line in Journal(str(cluster.folder / "p" / "journal.jsonl")).entries() if not line.final]
    assert (cut.id, cut.reason) == (long, "walltime")
