"""MPI programs on the nodes of an allocation, by srun and by the launchers of Open MPI and MPICH."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.resources import parse_allocation
from tests.mpi.programs import AS_ROOT, KINDS, build, ranks
from tests.slurm.cluster import Cluster

ENV = " ".join(f"--env {name}={value}" for name, value in AS_ROOT.items())


def lines_of(folder: Path) -> dict[str, JournalEntry]:
    """The last line of each task, by its name."""
    return {line.name: line for line in Journal(str(folder / "p" / "journal.jsonl")).entries() if line.final}


def assert_placed(line: JournalEntry, nodes: int) -> None:
    """One rank for each core of the reservation, in its order, on that node and alone on that CPU."""
    assert line.status == "finished", line
    parts = parse_allocation(line.cpus)
    assert len(parts) == nodes
    found = ranks(str(line.stdout))
    assert [(r.host, r.cpus) for r in found] == [(p.node, str(core)) for p in parts for core in p.cores]
    assert [(r.rank, r.size) for r in found] == [(number, 2 * nodes) for number in range(2 * nodes)]


def tasks_of(program: str, models: list[tuple[str, int]]) -> str:
    """A file of tasks: the program over so many nodes in each of these models, and one that is ended by its limit."""
    head = f"[defaults]\ncores = 2\nenv = {{{', '.join(f'{n} = {v!r}' for n, v in AS_ROOT.items())}}}\n"
    task = '[[tasks]]\nname = "{}-{}"\nmodel = "{}"\nnodes = {}\ncommand = {}\n'
    tasks = [task.format(model, nodes, model, nodes, json.dumps([program])) for model, nodes in models]
    late = task.format("late", 4, "srunmpi", 4, json.dumps([program, "1000"])) + "time_limit = 6\n"
    return "".join([head, *tasks, late])


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_on_its_node_and_core(cluster: Cluster, kind: str) -> None:
    program = build(kind, cluster.folder)
    models = [(model, nodes) for nodes in (2, 4) for model in (kind, "srunmpi")]
    (cluster.folder / "tasks.toml").write_text(tasks_of(program, models))
    job = cluster.submit(
        "pilotq run --dir p tasks.toml; echo code $?",
        "srun --overlap -N4 -n4 pgrep -af '[h]ello.* 1000' && echo ranks live; true",
    )
    assert job.await_end() == "COMPLETED", job.said()
    assert "code 1" in job.said() and "ranks live" not in job.said()
    found = lines_of(cluster.folder)
    for model, nodes in models:
        assert_placed(found[f"{model}-{nodes}"], nodes)
    late = found["late-4"]
    assert (late.status, late.reason, len(ranks(str(late.stdout)))) == ("failed", "time limit", 8)


# Prints that it got the signal, takes its time to save its state, and ends.
NOTICED = "trap 'sleep 1; echo saved $SLURM_PROCID >>notes; exit 3' USR1; echo up >>notes; while :; do sleep 0.1; done"


def test_ranks_have_their_time_at_the_end_of_the_allocation(cluster: Cluster) -> None:
    """Workers of nodes on which only Slurm has started something leave at once: that must not end the others."""
    task = {"name": "long", "script": NOTICED, "model": "srunmpi", "nodes": 2, "cores": 1}
    (cluster.folder / "tasks.json").write_text(json.dumps({"tasks": [task]}))
    job = cluster.submit(
        "pilotq run --dir p --grace 45s --notice-signal USR1 tasks.json; echo code $?", options="-N2 --exclusive -t1"
    )
    assert job.await_end() == "COMPLETED", job.said()
    notes = (cluster.folder / "notes").read_text().split("\n")
    assert sorted(notes) == ["", "saved 0", "saved 1", "up", "up"]
    assert "code 0" in job.said()
    (cut,) = [line for line in Journal(str(cluster.folder / "p" / "journal.jsonl")).entries() if line.name == "long"]
    assert (cut.reason, cut.final) == ("walltime", False)


def test_requests_of_qcg_pilotjob_over_two_nodes(cluster: Cluster) -> None:
    """One process that gets all nodes where no launcher is named; a rank for each core where one is."""
    say = "echo $(hostname) $QCG_PM_NODELIST $QCG_PM_TASKS_PER_NODE"

    def job(name: str, **execution: object) -> dict[str, object]:
        resources = {"numNodes": {"exact": 2}, "numCores": {"exact": 2}}
        return {"name": name, "execution": {**execution, "env": AS_ROOT}, "resources": resources}

    jobs = [
        job("plain", exec="/bin/bash", args=["-c", say], model="default"),
        job("ranks", exec=build("openmpi", cluster.folder), model="openmpi"),
    ]
    (cluster.folder / "requests.json").write_text(json.dumps([{"request": "submit", "jobs": jobs}]))
    batch = cluster.submit("pilotq run --dir p --format qcg requests.json; echo code $?", options="-N2 --exclusive -t5")
    assert batch.await_end() == "COMPLETED", batch.said()
    assert "code 0" in batch.said(), batch.said()
    found = lines_of(cluster.folder)
    assert str(found["plain"].stdout).split() == ["node1", "node1,node2", "2,2"]
    assert_placed(found["ranks"], 2)
