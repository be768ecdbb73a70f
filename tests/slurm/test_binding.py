"""A cluster that confines jobs to their cores: a node has the cores that its worker may really use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CPUS, NODES, PROGRAM, Cluster, run

WHERE = 'sed -n "s/^Cpus_allowed_list:\\t*//p" /proc/self/status'


@pytest.fixture
def confined(slurm: None, tmp_path: Path) -> Iterator[Cluster]:
    """One node of two CPUs, each of which is given to one job; afterwards the usual cluster is there again."""
    if not os.access("/sys/fs/cgroup/cpuset/tasks", os.W_OK):
        pytest.skip("Slurm cannot confine jobs to cores here: there are no cpusets of cgroup v1")
    tmp_path.chmod(0o755)
    up = run(str(PROGRAM), "up", "--nodes", "1", "--cpus", "2", "--task", "cgroup", seconds=120)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Cluster(tmp_path)
    finally:
        again = run(str(PROGRAM), "up", "--nodes", str(NODES), "--cpus", str(CPUS), seconds=120)
        assert again.returncode == 0, again.stdout + again.stderr


def test_two_pilots_on_one_node_have_different_cores(confined: Cluster) -> None:
    """Both are there at one time, and none of their tasks leaves the core that its job has."""
    jobs = []
    for me, other in (("a", "b"), ("b", "a")):
        task = f"{WHERE} >>on.{me}; until [ -e on.{other} ]; do sleep 0.1; done"
        (confined.folder / f"task.{me}").write_text(task)
        line = f"pilotq run --dir {me} --array 0-19 -- bash task.{me}; echo code $?"
        jobs.append(confined.submit(line, options="-N1 -n1 -c1 -t5"))
    for job in jobs:
        assert job.await_end() == "COMPLETED", job.said()
        assert "code 0" in job.said(), job.said()
    masks = [set((confined.folder / f"on.{me}").read_text().split()) for me in "ab"]
    assert [len(mask) for mask in masks] == [1, 1] and masks[0] != masks[1]
