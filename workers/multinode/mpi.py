"""Makes the command lines, files and variables by which MPI launchers place ranks, for each model. Pure.

A rank is one core of the reservation; ranks are numbered node by node, in the order of the allocation. CPU numbers are
those of each node's own machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Host(NamedTuple):
    """A node as a launcher knows it, the CPU of each of its ranks, and the variables of the task's GPUs there."""

    name: str
    cpus: tuple[int | str, ...]  # several with commas between, where a core is several hardware threads
    gpus: tuple[tuple[str, str], ...] = ()


class LauncherFiles(NamedTuple):
    """Paths of the files that launchers read; ``content_of`` makes their content."""

    hosts: str  # a line for each rank
    slots: str  # Open MPI's form: a line for each node
    machines: str  # that of Hydra, so of MPICH and Intel MPI
    ranks: str  # Open MPI's rank file
    gpus: str  # a shell script that sets the variables of GPUs, for ranks that have the environment of the first node


class LaunchPrefix(NamedTuple):
    """What goes in front of the task's command, and variables."""

    argv: list[str]
    env: dict[str, str]


# Pins a rank, by its number: the launcher's own ways of binding take one list for all nodes. `cut` counts from 1.
_PIN = 'exec taskset -c "$(printf %s "$PILOTQ_RANK_CPUS" | cut -d: -f$((${VARIABLE} + 1)))" "$@"'
RANK_CPUS = "PILOTQ_RANK_CPUS"


def files_in(folder: str) -> LauncherFiles:
    return LauncherFiles(*(f"{folder}/{name}" for name in LauncherFiles._fields))


def file_contents(files: LauncherFiles, hosts: tuple[Host, ...]) -> dict[str, str]:
    """The text of each file, by path."""
    ranks = [(host.name, cpu) for host in hosts for cpu in host.cpus]
    found = {
        files.hosts: "".join(f"{name}\n" for name, _ in ranks),
        files.slots: "".join(f"{host.name} slots={len(host.cpus)}\n" for host in hosts),
        files.machines: "".join(f"{host.name}:{len(host.cpus)}\n" for host in hosts),
        files.ranks: "".join(f"rank {number}={name} slot={cpu}\n" for number, (name, cpu) in enumerate(ranks)),
    }
    if _gpus_differ(hosts):
        cases = "".join(f"{host.name}) export {shlex.join(map('='.join, host.gpus))};;\n" for host in hosts)
        found[files.gpus] = f'case "$SLURMD_NODENAME" in\n{cases}esac\n'
    return found


def _gpus_differ(hosts: tuple[Host, ...]) -> bool:
    return len({host.gpus for host in hosts}) > 1


def variables(files: LauncherFiles, agent: str) -> dict[str, str]:
    """What lets any launcher that the task itself calls reach the task's nodes, and nothing but them.

    Slurm's own start of daemons would not be a part of this execution, so it is switched off.
    """
    env = {
        "PILOTQ_HOSTFILE": files.hosts,
        "OMPI_MCA_plm": "rsh",
        "OMPI_MCA_ras": "^slurm,tm,alps,gridengine,lsf",
        "OMPI_MCA_orte_default_hostfile": files.slots,
        "HYDRA_ENV": "none",  # ranks have the environment of their node's daemon, not that of the first node
        "HYDRA_RMK": "user",
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_HOST_FILE": files.machines,
        "I_MPI_HYDRA_RMK": "user",
        "I_MPI_HYDRA_BOOTSTRAP": "ssh",
        "I_MPI_HYDRA_HOST_FILE": files.machines,
    }
    if agent:
        env |= {
            "OMPI_MCA_plm_rsh_agent": agent,
            # All daemons are asked for on the first node, and stay children of whoever started them.
            "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
            "OMPI_MCA_orte_leave_session_attached": "1",
            "HYDRA_LAUNCHER_EXEC": agent,
            "I_MPI_HYDRA_BOOTSTRAP_EXEC": agent,
        }
    return env


def openmpi(mpirun: str, opts: Mapping[str, str], hosts: tuple[Host, ...], files: LauncherFiles) -> LaunchPrefix:
    argv = [mpirun, "-np", str(_size(hosts)), "--hostfile", files.slots, "--rankfile", files.ranks]
    env = {"OMPI_MCA_rmaps_rank_file_physical": "1", "OMPI_MCA_hwloc_base_binding_policy": "hwthread"}
    return LaunchPrefix([*argv, *shlex.split(opts.get("mpirun_args", ""))], env)


def mpich(mpirun: str, opts: Mapping[str, str], hosts: tuple[Host, ...], files: LauncherFiles) -> LaunchPrefix:
    argv = [mpirun, "-f", files.machines, "-n", str(_size(hosts))]
    return LaunchPrefix([*argv, *shlex.split(opts.get("mpirun_args", "")), *_pin_ranks("PMI_RANK")], _rank_cpus(hosts))


def intelmpi(mpirun: str, opts: Mapping[str, str], hosts: tuple[Host, ...], files: LauncherFiles) -> LaunchPrefix:
    argv = [mpirun, "-machinefile", files.machines, "-n", str(_size(hosts))]
    argv += shlex.split(opts.get("mpirun_args", ""))
    if len({host.cpus for host in hosts}) == 1 and all(isinstance(cpu, int) for cpu in hosts[0].cpus):
        pins = ",".join(map(str, hosts[0].cpus))
        return LaunchPrefix(argv, {"I_MPI_PIN": "1", "I_MPI_PIN_PROCESSOR_LIST": pins})
    return LaunchPrefix([*argv, *_pin_ranks("PMI_RANK")], {"I_MPI_PIN": "0", **_rank_cpus(hosts)})


def srunmpi(srun: str, opts: Mapping[str, str], hosts: tuple[Host, ...], files: LauncherFiles) -> LaunchPrefix:
    """``mpi`` of the options becomes ``--mpi``, unless ``srun_args`` has one."""
    argv = [
        srun, "-N", str(len(hosts)), "-n", str(_size(hosts)), "-m", "arbitrary", "--overlap", "--overcommit",
        "--mem-per-cpu=0", "--cpu-bind=none",
    ]  # fmt: skip
    args = shlex.split(opts.get("srun_args", ""))
    if opts.get("mpi") and not any(word.startswith("--mpi") for word in args):
        argv.append(f"--mpi={opts['mpi']}")
    env = {"SLURM_HOSTFILE": files.hosts, **_rank_cpus(hosts)}
    before = 'export PILOTQ_NODE="$SLURMD_NODENAME"; '
    if _gpus_differ(hosts):
        before += f". {shlex.quote(files.gpus)}; "
    return LaunchPrefix([*argv, *args, *_pin_ranks("SLURM_PROCID", before)], env)


PREFIXES: dict[str, Callable[[str, Mapping[str, str], tuple[Host, ...], LauncherFiles], LaunchPrefix]] = {
    "openmpi": openmpi, "mpich": mpich, "intelmpi": intelmpi, "srunmpi": srunmpi,
}  # fmt: skip


def _size(hosts: tuple[Host, ...]) -> int:
    return sum(len(host.cpus) for host in hosts)


def _rank_cpus(hosts: tuple[Host, ...]) -> dict[str, str]:
    return {RANK_CPUS: ":".join(str(cpu) for host in hosts for cpu in host.cpus)}


def _pin_ranks(variable: str, before: str = "") -> list[str]:
    return ["sh", "-c", before + _PIN.replace("VARIABLE", variable), "pilotq-rank"]
