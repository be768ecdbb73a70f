"""The MPI program of the tests, built with whatever MPI is there, and what its ranks say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ASKED = "PILOTQ_TEST_MPI"
SOURCE = Path(__file__).with_name("hello.c")
KINDS = {"openmpi": "Open MPI", "mpich": "MPICH"}
# It refuses to run as root, which tests in containers are, unless it is told twice.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
RANK = re.compile(r"^rank (\d+) of (\d+) host (\S+) node (\S+) pid (\d+) cpus (\S+)$", re.MULTILINE)


class Rank(NamedTuple):
    """What one rank says of itself."""

    rank: int
    size: int
    host: str
    node: str
    pid: int
    cpus: str


def build(kind: str, folder: Path) -> str:
    """The program for ``openmpi`` or ``mpich``; skips the test where that is not installed, unless it was asked for."""
    compiler = shutil.which(f"mpicc.{kind}")
    if compiler is None or shutil.which(f"mpirun.{kind}") is None:
        missing = f"{KINDS[kind]} is not installed"
        if os.environ.get(ASKED) == "1":
            pytest.fail(f"{ASKED}=1, but {missing}")
        pytest.skip(missing)
    program = folder / f"hello.{kind}"
    if not program.exists():
        subprocess.run([compiler, "-O2", "-o", program, SOURCE], check=True, stdin=subprocess.DEVNULL)
    return str(program)


def ranks(output: str) -> list[Rank]:
    """What was printed, in the order of ranks."""
    found = [Rank(int(r), int(s), h, n, int(p), c) for r, s, h, n, p, c in RANK.findall(output)]
    return sorted(found)
