"""A cluster that confines jobs to their cores and memory: a node has what its worker may really use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CPUS, NODES, PROGRAM, Cluster, run
from tests.support.waiting import wait_until

WHERE = 'sed -n "s/^Cpus_allowed_list:\\t*//p" /proc/self/status'
MB = 1 << 20
GRANTED = 600  # MB


@pytest.fixture(scope="module")
def confining(slurm: None) -> Iterator[None]:
    """One node of two CPUs; afterwards the usual cluster is there again."""
    if not os.access("/sys/fs/cgroup/cpuset/tasks", os.W_OK):
        pytest.skip("Slurm cannot confine jobs to cores here: there are no cpusets of cgroup v1")
    up = run(
        str(PROGRAM), "up", "--nodes", "1", "--cpus", "2", "--task", "cgroup", "--select", "CR_Core_Memory", seconds=120
    )
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield
    finally:
        again = run(str(PROGRAM), "up", "--nodes", str(NODES), "--cpus", str(CPUS), seconds=120)
        assert again.returncode == 0, again.stdout + again.stderr


@pytest.fixture
def confined(confining: None, tmp_path: Path) -> Iterator[Cluster]:
    tmp_path.chmod(0o755)
    yield Cluster(tmp_path)
    run("scancel", "--quiet", "--user", str(os.geteuid()))
    wait_until(lambda: not run("squeue", "-h").stdout, seconds=60, what="no job left")


def test_two_pilots_on_one_node_have_different_cores(confined: Cluster) -> None:
    """Both are there at one time, and none of their tasks leaves the core that its job has."""
    jobs = []
    for me, other in (("a", "b"), ("b", "a")):
        task = f"{WHERE} >>on.{me}; until [ -e on.{other} ]; do sleep 0.1; done"
        (confined.folder / f"task.{me}").write_text(task)
        line = f"pilotq run --dir {me} --array 0-19 -- bash task.{me}; echo code $?"
        jobs.append(confined.submit(line, options=f"-N1 -n1 -c1 -t5 --mem {GRANTED}"))
    for job in jobs:
        assert job.await_end() == "COMPLETED", job.said()
        assert "code 0" in job.said(), job.said()
    masks = [set((confined.folder / f"on.{me}").read_text().split()) for me in "ab"]
    assert [len(mask) for mask in masks] == [1, 1] and masks[0] != masks[1]


def test_memory_is_what_the_job_was_granted(confined: Cluster) -> None:
    """Nothing more can be asked for; what uses more than all of it is killed by the kernel, and told so."""
    job = confined.submit("pilotq start --dir p", options=f"-N1 -n1 -c1 -t5 --mem {GRANTED}")
    job.await_text("staying until")

    def cli(command: str, *args: str) -> str:
        done = run("pilotq", command, "--dir", str(confined.folder / "p"), *args)
        return done.stdout + done.stderr

    (node,) = json.loads(cli("nodes", "--json"))
    assert node["memory"] == GRANTED * MB
    use = ("--", "python3", "-c", f"x = bytearray({3 * GRANTED} << 20); x[::4096] = x[1::4096]")
    assert "can never run here" in cli("enqueue", "--memory", f"{GRANTED + 50}M", "--", "true")
    # More than it asks for, and less than what the kernel grants: the worker has to end it.
    some = ("--", "python3", "-c", "import time; x = bytearray(150 << 20); x[::4096] = x[1::4096]; time.sleep(60)")
    tasks = [cli("enqueue", *command).strip() for command in (("--memory", "100M", *some), use, ("--", "true"))]
    cli("wait", "--timeout", "60s")
    said = cli("explain", *tasks)
    cli("stop")
    assert "of 100 MiB on node1: its worker has killed it" in said
    assert "killed by the kernel for memory, probably: a process of its worker's cgroup was, on node1" in said
    assert f"task {tasks[2]} finished" in said
    assert job.await_end() == "COMPLETED", job.said()
