"""A pilot on the nodes of an allocation: it starts with one line of a batch script, and its tasks are where it says."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

from pilotq.broker.store.journal import Journal
from pilotq.broker.store.resources import parse_allocation
from tests.slurm.cluster import CPUS, Cluster, run

NODES = ["node1", "node2", "node3", "node4"]
# Where it runs, and on which CPUs it may.
WHERE = 'echo $(hostname) $(sed -n "s/^Cpus_allowed_list:\\t*//p" /proc/self/status)'


def results(folder: Path) -> dict[str, Any]:
    """What `pilotq run --json` has printed there."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def cpus(text: str) -> set[int]:
    found: set[int] = set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_a_thousand_tasks_run_where_the_journal_says(cluster: Cluster) -> None:
    job = cluster.submit(
        f"pilotq run --dir p --json --array 0-999 -- bash -c '{WHERE}' >result.json", "echo code $?", f"{WHERE} >mask"
    )
    assert job.await_end() == "COMPLETED", job.said()
    assert "code 0" in job.said()
    assert results(cluster.folder)["tasks"]["finished"] == 1000
    usable = cpus((cluster.folder / "mask").read_text().split()[1])
    hosts: Counter[str] = Counter()
    indices = set()
    for line in Journal(str(cluster.folder / "p" / "journal.jsonl")).entries():
        if line.array:
            host, mask = str(line.stdout).split()
            (part,) = parse_allocation(line.cpus)
            assert (line.node, part.node) == (host, host)
            assert set(part.cores) == cpus(mask) and len(part.cores) == 1 and cpus(mask) <= usable
            hosts[host] += 1
            indices.add(line.index)
    assert indices == set(range(1000))
    assert sorted(hosts) == NODES and min(hosts.values()) > 50


def test_nothing_of_a_pilot_is_left_on_the_nodes(cluster: Cluster) -> None:
    job = cluster.submit("pilotq run --dir p -- true", "sleep 600")
    job.await_text("1 task: 1 finished")
    left = run("pgrep", "-f", str(cluster.folder / "p")).stdout.split()
    assert left == []
    assert not (cluster.folder / "p" / "connection.json").exists()


def test_a_pilot_in_the_last_line_of_a_script_stays_and_is_used_from_outside(cluster: Cluster) -> None:
    job = cluster.submit("pilotq start --dir p")
    said = job.await_text("staying until")
    assert "ready, with" in said
    pilot = str(cluster.folder / "p")
    assert (cluster.folder / "p" / "connection.json").stat().st_mode & 0o777 == 0o600
    shown = run("pilotq", "nodes", "--dir", pilot, "--json")
    assert [(n["name"], n["host"], n["state"]) for n in json.loads(shown.stdout)] == [(n, n, "up") for n in NODES]
    # No process of it shows its password.
    secret = json.loads((cluster.folder / "p" / "connection.json").read_text())["address"]["password"]
    assert secret not in run("ps", "-eo", "args", "-ww").stdout
    assert run("pilotq", "stop", "--dir", pilot).returncode == 0
    assert job.await_end() == "COMPLETED"


def test_nodes_chooses_among_those_of_the_allocation(cluster: Cluster) -> None:
    job = cluster.submit(
        "for n in 1 2-3 node[3-4]; do",
        "  pilotq run --nodes $n --array 0-39 -- bash -c 'hostname >>hosts.'$n",
        "  echo $n: $(sort -u hosts.$n)",
        "done",
        "pilotq run --nodes n1:4 -- true; echo code $?",
    )
    assert job.await_end() == "COMPLETED"
    said = job.said()
    assert "1: node1\n" in said
    assert "2-3: node2 node3\n" in said
    assert "node[3-4]: node3 node4\n" in said
    assert "--nodes chooses nodes" in said and "code 2" in said


def test_uneven_nodes_and_parts_of_nodes(cluster: Cluster) -> None:
    """2 tasks of 2 CPUs need not be spread evenly; what each node gives is at most what was granted there."""
    job = cluster.submit("env | grep CPUS_PER_NODE", "pilotq start --dir p", options="-N2 -n3 -t5 -m plane=2")
    job.await_text("staying until")
    nodes = json.loads(run("pilotq", "nodes", "--dir", str(cluster.folder / "p"), "--json").stdout)
    assert "SLURM_JOB_CPUS_PER_NODE=2,1" in job.said()
    assert [node["cores"] for node in nodes] == [2, 1]
    job.cancel()
    job.await_end()


def test_a_core_is_left_to_the_pilot_itself(cluster: Cluster) -> None:
    """On the first node only, on which it runs; the other nodes have all of theirs."""
    job = cluster.submit(
        f"pilotq run --dir p --system-core --array 0-39 -- bash -c '{WHERE} >>on.$PILOTQ_NODELIST'",
        f"{WHERE} >mask",
        options="-N2 --exclusive -t5",
    )
    assert job.await_end() == "COMPLETED", job.said()
    first, *others = sorted(cpus((cluster.folder / "mask").read_text().split()[1]))
    masks = {n: {w.split()[1] for w in (cluster.folder / f"on.{n}").read_text().splitlines()} for n in NODES[:2]}
    assert str(first) not in masks["node1"] and str(first) in masks["node2"]
    assert masks["node1"] == {str(cpu) for cpu in others}


def test_a_pilot_of_salloc_runs_on_none_of_its_nodes(cluster: Cluster) -> None:
    """The server listens where the nodes reach it, and nothing of it is left when the allocation is given back."""
    where = ("--dir", str(cluster.folder / "p"), "--cwd", str(cluster.folder))
    task = ("--array", "0-7", "--", "sh", "-c", "hostname >>hosts; sleep 0.5")
    done = run("salloc", "-N2", "--exclusive", "-t5", "pilotq", "run", *where, *task, seconds=100, cwd=cluster.folder)
    assert done.returncode == 0, done.stderr
    assert "8 tasks: 8 finished" in done.stdout
    assert sorted(set((cluster.folder / "hosts").read_text().split())) == NODES[:2]
    assert run("pgrep", "-f", str(cluster.folder / "p")).stdout == ""


# As the manual of QCG-PilotJob has it, with the cores of this cluster.
MANUAL = """\
#!/bin/bash
#SBATCH --job-name=qcgpilotjob-ex
#SBATCH --nodes=2
#SBATCH --tasks-per-node={cpus}
#SBATCH --time=60

module load python/3.7.3
source $HOME/qcgpj-venv/bin/activate

python -m qcg.pilotjob.service --file-path jobs.json
"""


def test_the_batch_script_of_qcg_pilotjobs_manual(cluster: Cluster) -> None:
    folder = cluster.folder
    cores = min(CPUS, len(os.sched_getaffinity(0)))  # Slurm grants more than this machine may have
    venv = folder / "qcgpj-venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", str(venv)).returncode == 0
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "here.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    assert run(str(venv / "bin" / "python"), "-m", "pilotq", "qcg", "install").returncode == 0
    jobs = [
        {
            "name": "example", "iteration": {"stop": 4},
            "execution": {"script": "echo \"job ${it} executed at `date` @ `hostname`\"", "stdout": "job.out.${it}"},
        },
        {
            "name": "both", "execution": {"script": "echo ${nlist} ${ncores}", "stdout": "both.out"},
            "resources": {"numNodes": 2, "numCores": cores},
        },
    ]  # fmt: skip
    requests = [{"request": "submit", "jobs": jobs}, {"request": "control", "command": "finishAfterAllTasksDone"}]
    (folder / "jobs.json").write_text(json.dumps(requests))
    job = cluster.submit_script(
        MANUAL.format(cpus=CPUS), HOME=str(folder), **{"BASH_FUNC_module%%": '() { echo module "$@"; }'}
    )
    assert job.await_end() == "COMPLETED", job.said()
    assert "module load python/3.7.3" in job.said()
    for index in range(4):
        assert (folder / f"job.out.{index}").read_text().startswith(f"job {index} executed at ")
    names, number = (folder / "both.out").read_text().split()
    assert (len(names.split(",")), number) == (2, str(2 * cores))
