"""MPI programs over virtual nodes of a real pilot, without Slurm and ssh: what each rank sees is what was reserved."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker import Request
from pilotq.broker.store.resources import NodeShare, parse_allocation
from pilotq.workers.machine.topology import usable_cpus, virtual_nodes
from pilotq.workers.multinode.launch_models import linked_with
from tests.mpi.programs import AS_ROOT, KINDS, Rank, build, ranks
from tests.support.live_pilot import LivePilot, live_pilot, worker_of
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

NODES = "n1:2,n2:2,n3:1,n4:1"
REAL = {plan.name: plan.real for plan in virtual_nodes(NODES, usable_cpus(), "here")}


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("mpi"), nodes=NODES) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


def placed_ranks(pilot: LivePilot, task: str) -> tuple[list[Rank], tuple[NodeShare, ...]]:
    """The ranks of a task that finished, as they have reported themselves, and its reservation by the journal."""
    ended = pilot.ended(task)
    output = pilot.output(task).decode()
    assert ended.status == "finished", f"{ended}\n{output}\n{pilot.output(task, 'stderr').decode()}"
    return ranks(output), parse_allocation(pilot.lines(task)[0].cpus)


def assert_placed(found: list[Rank], parts: tuple[NodeShare, ...]) -> None:
    """One rank for each core of the reservation, in its order, alone on that core."""
    expected = [(part.node, str(REAL[part.node][core])) for part in parts for core in part.cores]
    assert [(r.node, r.cpus) for r in found] == expected
    assert [r.rank for r in found] == list(range(len(expected)))
    assert {r.size for r in found} == {len(expected)}


@pytest.mark.parametrize(("nodes", "cores"), [(2, 1), (2, 2), (4, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_on_its_core(pilot: LivePilot, folder: Path, kind: str, nodes: int, cores: int) -> None:
    request = Request(nodes=(nodes, nodes), cores=(cores, cores))
    task = pilot.enqueue(build(kind, folder), model=kind, request=request, env=AS_ROOT)
    found, parts = placed_ranks(pilot, task)
    assert len(parts) == nodes
    if nodes == 1:  # then nobody asks what the node is called
        found = [r._replace(node=parts[0].node) for r in found]
    assert_placed(found, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_reservations(pilot: LivePilot, folder: Path, kind: str) -> None:
    request = Request(cores=(5, 5), spread=True)
    found, parts = placed_ranks(pilot, pilot.enqueue(build(kind, folder), model=kind, request=request, env=AS_ROOT))
    assert len({len(part.cores) for part in parts}) == 2
    assert_placed(found, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_one_core_is_the_program_itself(pilot: LivePilot, folder: Path, kind: str) -> None:
    (only,), (part,) = placed_ranks(pilot, pilot.enqueue(build(kind, folder), model=kind, env=AS_ROOT))
    assert (only.size, only.cpus) == (1, str(REAL[part.node][part.cores[0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_starts_its_own_mpirun(pilot: LivePilot, folder: Path, kind: str) -> None:
    """In the model default any launcher finds the nodes of the task, and no others; ranks stay on the task's cores."""
    script = f"mpirun.{kind} -n 3 {shlex.quote(build(kind, folder))}"
    request = Request(nodes=(3, 3), cores=(1, 1))
    found, parts = placed_ranks(pilot, pilot.enqueue(script=script, request=request, env=AS_ROOT))
    assert [(r.rank, r.size) for r in found] == [(0, 3), (1, 3), (2, 3)]
    places = [(p.node, str(REAL[p.node][p.cores[0]])) for p in parts]
    assert sorted((r.node, r.cpus) for r in found) == sorted(places)


@pytest.mark.parametrize("kind", KINDS)
def test_two_launchers_on_one_node_do_not_share_cores(
    pilot: LivePilot, folder: Path, kind: str, tmp_path: Path
) -> None:
    """Each binds from core 0 up by itself."""
    program = build(kind, folder)
    # Both wait for each other, so that they run side by side.
    script = f"touch here$PILOTQ_TASK_ID; until [ $(ls here* | wc -l) = 2 ]; do :; done; mpirun.{kind} -n 1 {program}"
    tasks = [pilot.enqueue(script=script, cwd=str(tmp_path), env=AS_ROOT) for _ in range(2)]
    for task in tasks:
        (rank,), (part,) = placed_ranks(pilot, task)
        assert rank.cpus == str(REAL[part.node][part.cores[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_cancel_ends_every_rank(pilot: LivePilot, folder: Path, kind: str) -> None:
    request = Request(nodes=(4, 4), cores=(1, 1))
    task = pilot.enqueue(build(kind, folder), "1000", model=kind, request=request, env=AS_ROOT)
    wait_until(lambda: len(pilot.of_tasks()) >= 8, what="ranks and their launchers")
    pilot.broker.cancel([task])
    assert pilot.ended(task).status == "canceled"
    assert pilot.of_tasks() == []
    pilot.assert_calm()


@pytest.mark.parametrize("kind", KINDS)
def test_qcg_requests_with_models(pilot: LivePilot, folder: Path, kind: str, tmp_path: Path) -> None:
    """A job of a request file: numNodes and numCores, model and model_opts, with what is set up for the launcher."""
    (folder / "v/bin").mkdir(parents=True, exist_ok=True)
    (folder / "v/bin/activate").write_text("export SET_UP=yes\n")
    option = {"openmpi": ["-x", "SET_UP"], "mpich": ["-env", "SET_UP", "yes"]}[kind]
    job = {
        "name": f"with-{kind}",
        "execution": {
            "exec": build(kind, folder), "model": kind, "venv": str(folder / "v"), "env": AS_ROOT,
            "model_opts": {"mpirun": f"mpirun.{kind}", "mpirun_args": option},
        },
        "resources": {"numNodes": {"exact": 2}, "numCores": {"exact": 2}},
    }  # fmt: skip
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([{"request": "submit", "jobs": [job]}]))
    done = pilot.cli("submit", str(path))
    assert done.returncode == 0, done.stderr
    found, parts = placed_ranks(pilot, done.stdout.decode().split()[0])
    assert_placed(found, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_node_is_no_failure_of_the_program(folder: Path, kind: str, tmp_path: Path) -> None:
    """The launcher sees the loss before anybody else, and fails of it."""
    with live_pilot(tmp_path, nodes="n1:1,n2:1") as pilot:
        request = Request(nodes=(2, 2), cores=(1, 1))
        out = tmp_path / "out"
        program = build(kind, folder)
        task = pilot.enqueue(program, "3", model=kind, request=request, env=AS_ROOT, stdout=str(out))
        wait_until(lambda: out.exists() and len(ranks(out.read_text())) == 2, what="both ranks")
        os.kill(worker_of(pilot, "n2"), signal.SIGKILL)
        assert pilot.ended(task).status == "finished"
        assert [r.size for r in ranks(out.read_text())] == [2, 2]
        _, first = pilot.lines(task)
        assert (first.reason, first.final) == ("worker lost", False)


@pytest.mark.parametrize(("kind", "option"), [("openmpi", "pmix"), ("mpich", "pmi2")])
def test_the_mpi_option_of_srun_follows_from_the_program(folder: Path, kind: str, option: str) -> None:
    """Under any other --mpi MPICH silently starts so many programs of one rank."""
    assert linked_with(build(kind, folder)) == option
    assert linked_with("/bin/sh") == ""
    assert linked_with(__file__) == ""
    assert linked_with("/no/such/file") == ""


def test_what_cannot_run_here_says_so(pilot: LivePilot, tmp_path: Path) -> None:
    pair = Request(cores=(2, 2))
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    task = pilot.enqueue("true", model="srunmpi", request=pair, env={"PATH": str(tmp_path)})
    assert pilot.ended(task).reason == "launch"
    assert "needs an allocation of Slurm, and this worker is in none" in pilot.lines(task)[0].message
    task = pilot.enqueue("true", model="srunmpi", request=pair, env={"PATH": "/nonexistent"})
    assert pilot.ended(task).reason == "not found"
    assert "model srunmpi needs srun, and none" in pilot.lines(task)[0].message
    task = pilot.enqueue("true", model="openmpi", request=pair, env={"PATH": "/nonexistent"})
    assert pilot.ended(task).reason == "not found"
    assert "needs mpirun or mpirun.openmpi" in pilot.lines(task)[0].message
    task = pilot.enqueue("true", model="mpich", request=pair, model_opts={"mpirun": "no-such-mpirun"})
    assert pilot.ended(task).reason == "not found"


DOC = ROOT / "docs/mpi.md"
SHOWN = [line for line in DOC.read_text().splitlines() if line.startswith("pilotq enqueue ")]


@pytest.mark.parametrize("line", SHOWN)
def test_shown_commands_run(pilot: LivePilot, folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "mpich" if "mpich" in line else "openmpi"
    (folder / "hello").unlink(missing_ok=True)
    (folder / "hello").symlink_to(build(kind, folder))
    for name, value in AS_ROOT.items():
        monkeypatch.setenv(name, value)
    words = [f"mpirun.{kind}" if word == "mpirun" else word for word in shlex.split(line)[1:]]
    done = pilot.cli(words[0], "--cwd", str(folder), *words[1:])
    assert done.returncode == 0, done.stderr
    found, _ = placed_ranks(pilot, done.stdout.decode().strip())
    assert [(r.rank, r.size) for r in found] == [(n, 4) for n in range(4)]
