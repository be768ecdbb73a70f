"""Command lines, files and variables for the launchers of MPI, of every model."""

from __future__ import annotations

import subprocess

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.model import MODELS, ONE_PROCESS_MODELS, Task
from pilotq.broker.tasks.validation import validate
from pilotq.workers.multinode import mpi
from pilotq.workers.multinode.mpi import Host

EVEN = (Host("n1", (0, 1)), Host("n2", (0, 1)))
UNEVEN = (Host("n1", (2, 5)), Host("n2", (0,)))
FILES = mpi.files_in("/d")
PIN = 'exec taskset -c "$(printf %s "$PILOTQ_RANK_CPUS" | cut -d: -f$((${PMI_RANK} + 1)))" "$@"'


def test_files() -> None:
    assert mpi.file_contents(FILES, UNEVEN) == {
        "/d/hosts": "n1\nn1\nn2\n",
        "/d/slots": "n1 slots=2\nn2 slots=1\n",
        "/d/machines": "n1:2\nn2:1\n",
        "/d/ranks": "rank 0=n1 slot=2\nrank 1=n1 slot=5\nrank 2=n2 slot=0\n",
    }


def test_openmpi() -> None:
    argv, env = mpi.openmpi("mpirun", {"mpirun_args": "--mca pml 'a b'"}, UNEVEN, FILES)
    assert argv == [
        "mpirun", "-np", "3", "--hostfile", "/d/slots", "--rankfile", "/d/ranks", "--mca", "pml", "a b",
    ]  # fmt: skip
    assert env == {"OMPI_MCA_rmaps_rank_file_physical": "1", "OMPI_MCA_hwloc_base_binding_policy": "hwthread"}


def test_mpich() -> None:
    argv, env = mpi.mpich("/x/mpirun", {"mpirun_args": "-l"}, UNEVEN, FILES)
    assert argv == [
        "/x/mpirun", "-f", "/d/machines", "-n", "3", "-l", "sh", "-c", PIN, "pilotq-rank",
    ]  # fmt: skip
    assert env == {"PILOTQ_RANK_CPUS": "2:5:0"}


def test_intelmpi() -> None:
    argv, env = mpi.intelmpi("mpirun", {}, EVEN, FILES)
    assert argv == ["mpirun", "-machinefile", "/d/machines", "-n", "4"]
    assert env == {"I_MPI_PIN": "1", "I_MPI_PIN_PROCESSOR_LIST": "0,1"}
    # One list holds for all nodes: where they differ each rank pins itself.
    argv, env = mpi.intelmpi("mpirun", {"mpirun_args": "-l"}, UNEVEN, FILES)
    assert argv == ["mpirun", "-machinefile", "/d/machines", "-n", "3", "-l", "sh", "-c", PIN, "pilotq-rank"]
    assert env == {"I_MPI_PIN": "0", "PILOTQ_RANK_CPUS": "2:5:0"}


def test_srunmpi() -> None:
    plain = [
        "srun", "-N", "2", "-n", "3", "-m", "arbitrary", "--overlap", "--overcommit", "--mem-per-cpu=0",
        "--cpu-bind=none",
    ]  # fmt: skip
    pin = ["sh", "-c", PIN.replace("PMI_RANK", "SLURM_PROCID"), "pilotq-rank"]
    pin[2] = 'export PILOTQ_NODE="$SLURMD_NODENAME"; ' + pin[2]
    argv, env = mpi.srunmpi("srun", {}, UNEVEN, FILES)
    assert argv == [*plain, *pin]
    assert env == {"SLURM_HOSTFILE": "/d/hosts", "PILOTQ_RANK_CPUS": "2:5:0"}
    gpus = tuple(Host(host.name, host.cpus, (("CUDA_VISIBLE_DEVICES", f"GPU-{host.name}"),)) for host in UNEVEN)
    argv, _ = mpi.srunmpi("srun", {}, gpus, FILES)
    assert argv[-2].startswith('export PILOTQ_NODE="$SLURMD_NODENAME"; . /d/gpus; exec taskset')
    text = mpi.file_contents(FILES, gpus)["/d/gpus"]
    for name in ("n1", "n2"):
        shown = f"{text} echo $CUDA_VISIBLE_DEVICES"
        env = {"SLURMD_NODENAME": name}
        assert subprocess.run(["sh", "-c", shown], env=env, capture_output=True).stdout == f"GPU-{name}\n".encode()
    assert mpi.srunmpi("srun", {"mpi": "pmix"}, UNEVEN, FILES).argv == [*plain, "--mpi=pmix", *pin]
    options = {"mpi": "pmix", "srun_args": "--mpi=pmi2 -l"}
    assert mpi.srunmpi("srun", options, UNEVEN, FILES).argv == [*plain, "--mpi=pmi2", "-l", *pin]


def test_every_model_but_the_plain_ones_has_a_starter() -> None:
    assert set(mpi.PREFIXES) == MODELS - ONE_PROCESS_MODELS


def test_variables_of_launchers() -> None:
    alone, several = mpi.variables(FILES, ""), mpi.variables(FILES, "/bin/pilotq-agent")
    assert alone["HYDRA_HOST_FILE"] == "/d/machines" and alone["PILOTQ_HOSTFILE"] == "/d/hosts"
    agents = {name for name, value in several.items() if value == "/bin/pilotq-agent"}
    assert agents == {"OMPI_MCA_plm_rsh_agent", "HYDRA_LAUNCHER_EXEC", "I_MPI_HYDRA_BOOTSTRAP_EXEC"}
    assert not agents & alone.keys()


def test_unknown_models_and_options_are_refused() -> None:
    with pytest.raises(InvalidInput, match="model 'mpi' is unknown"):
        validate(Task(command=["x"], model="mpi"), "t")
    with pytest.raises(InvalidInput, match="srun_args unknown for model 'openmpi' \\(known: mpirun, mpirun_args\\)"):
        validate(Task(command=["x"], model="openmpi", model_opts={"srun_args": "-l"}), "t")
    # A request file of QCG-PilotJob may have options of other models.
    validate(Task(command=["x"], model_opts={"srun_args": "-l"}, qcg=True), "t")
