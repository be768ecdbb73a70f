"""The cluster itself, which the other tests of this folder need."""

from __future__ import annotations

from tests.slurm.cluster import Cluster, run


def test_a_job_sees_all_nodes_and_has_pilotq(cluster: Cluster) -> None:
    job = cluster.submit("pilotq --version", "srun --overlap -N4 -n4 hostname | sort")
    assert job.await_end() == "COMPLETED"
    assert job.said().split()[-4:] == ["node1", "node2", "node3", "node4"]
    assert job.said().startswith("pilotq")
    assert not run("squeue", "-h").stdout
