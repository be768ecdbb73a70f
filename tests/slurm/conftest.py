"""Tests on a real Slurm cluster. With PILOTQ_TEST_SLURM=1, as `.ci/run` has it, a missing cluster is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CPUS, NODES, PROGRAM, Cluster, run

ASKED = "PILOTQ_TEST_SLURM"


@pytest.fixture(scope="session")
def slurm() -> None:
    """The cluster runs: it is started, and its packages are installed, where need be. It is left for the next run."""
    if os.environ.get(ASKED) != "1":
        pytest.skip(f"{ASKED}=1 is not set: these tests start a Slurm cluster, as root")
    if os.geteuid() != 0:
        pytest.fail(f"{ASKED}=1, but only root can start a cluster")
    done = run(str(PROGRAM), "up", "--nodes", str(NODES), "--cpus", str(CPUS), seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def cluster(slurm: None, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster for one test, whose jobs have ended and whose nodes are back afterwards."""
    tmp_path.chmod(0o755)
    one = Cluster(tmp_path)
    yield one
    one.mended()
