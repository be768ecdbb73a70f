"""Physical cores as the cores of a node (``--smt no``), and how OpenMP's threads lie on a task's cores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.command_line import in_background, prompt
from tests.support.machines import write

SHOW = "grep Cpus_allowed_list /proc/self/status; echo $PILOTQ_CPUS $OMP_NUM_THREADS ${OMP_PLACES-} ${OMP_PROC_BIND-}"


def machine(folder: Path) -> tuple[str, list[int]]:
    """A tree in which the CPUs that this process may use are hardware threads of one physical core."""
    cpus = sorted(os.sched_getaffinity(0))
    text = ",".join(map(str, cpus))
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return write(folder, {topology.format(cpu): text for cpu in cpus}), cpus


@pytest.mark.parametrize(("option", "most"), [(("--smt", "no"), None), (("--no-smt", "--threads-per-core", "1"), 1)])
def test_all_threads_of_a_core_are_its_tasks(tmp_path: Path, option: tuple[str, ...], most: int | None) -> None:
    root, cpus = machine(tmp_path / "root")
    with in_background(tmp_path, *option, PILOTQ_MACHINE_ROOT=root) as cli:
        (node,) = json.loads(cli("nodes", "--json").stdout)
        assert node["cores"] == 1
        task = cli("enqueue", "--", "sh", "-c", SHOW).stdout.strip()
        assert cli("wait", task, "--timeout", "60s").returncode == 0
        allowed, rest = cli("logs", task).stdout.splitlines()
    seen = [range(int(a), int(b or a) + 1) for a, _, b in (p.partition("-") for p in allowed.split()[1].split(","))]
    assert [cpu for span in seen for cpu in span] == cpus[:most] and rest.split() == [str(cpus[0]), "1"]


def test_threads_of_openmp_lie_as_the_cores_do(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "2") as cli:
        said = []
        for options in ((), ("--spread",), ("--pack",)):
            task = cli("enqueue", "--cores", "2", *options, "--", "sh", "-c", SHOW).stdout.strip()
            assert cli("wait", task, "--timeout", "60s").returncode == 0
            said.append(cli("logs", task).stdout.splitlines()[1])
        bound = cli("enqueue", "--spread", "--", "printenv", "OMP_PROC_BIND", OMP_PROC_BIND="false").stdout.strip()
        cli("wait", bound, "--timeout", "60s")
        assert cli("logs", bound).stdout == "false\n"
    assert [line.split() for line in said] == [
        ["0,1", "2"],
        ["0,1", "2", "threads", "spread"],
        ["0,1", "2", "threads", "close"],
    ]


def test_a_wrong_use_is_a_sentence(tmp_path: Path) -> None:
    refused = prompt(tmp_path)("start", "--threads-per-core", "1")
    assert refused.returncode == 2 and "--threads-per-core is for --smt no" in refused.stderr
