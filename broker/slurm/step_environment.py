"""The environment variables of a Slurm job step, for tasks whose programs read them. Pure.

They describe a job step on the task's nodes and cores, for programs that read the environment and do not ask Slurm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby

ENV_SCHEMA = "PILOTQ_ENVSCHEMA"  # variable of a worker; slurm: its tasks get these variables


@lru_cache(maxsize=1024)
def step_environment(nodes: tuple[str, ...], cores: tuple[int, ...]) -> dict[str, str]:
    """Variables for a task with so many ``cores`` on each of ``nodes``; not to be changed."""
    names, total, count = ",".join(nodes), str(sum(cores)), str(len(nodes))
    each = ",".join(_repeated(number, len(list(same))) for number, same in groupby(cores))
    env = {
        "SLURM_NNODES": count,
        "SLURM_NODELIST": names,
        "SLURM_NPROCS": total,
        "SLURM_NTASKS": total,
        "SLURM_JOB_NODELIST": names,
        "SLURM_JOB_NUM_NODES": count,
        "SLURM_JOB_CPUS_PER_NODE": each,
        "SLURM_STEP_NODELIST": names,
        "SLURM_STEP_NUM_NODES": count,
        "SLURM_STEP_NUM_TASKS": total,
        "SLURM_STEP_TASKS_PER_NODE": each,
        "SLURM_TASKS_PER_NODE": each,
        "SLURM_OVERLAP": "1",
    }
    if len(set(cores)) == 1:
        env["SLURM_NTASKS_PER_NODE"] = str(cores[0])
    return env


# Options of srun as variables, which are meant for the user's own steps: SRUN_CPUS_PER_TASK=1 leaves a worker one core.
# SLURM_EXPORT_ENV=NONE is what `sbatch --export=NONE` leaves. What describes the job (SLURM_MEM_PER_NODE, ...) stays.
_STEP_OPTIONS = re.compile(
    r"SRUN_.*|SLURM_(CPUS_PER_TASK|CPUS_PER_GPU|HINT|EXACT|EXCLUSIVE|TRES_PER_TASK|GPUS_PER_TASK|GPU_BIND|"
    r"THREADS_PER_CORE|CORE_SPEC|THREAD_SPEC|NTASKS_PER_(CORE|SOCKET|GPU|NODE)|CPU_BIND.*|MEM_BIND.*|DISTRIBUTION|TIMELIMIT|"
    r"LABELIO|KILL_BAD_EXIT|WAIT|IMMEDIATE|EXPORT_ENV|STDOUTMODE|STDERRMODE|STDINMODE|WORKING_DIR|PROLOG|EPILOG)"
)


def step_options(names: Iterable[str]) -> list[str]:
    """Those of these variables that change what a job step gets; steps of the pilot are started without them."""
    return [name for name in names if _STEP_OPTIONS.fullmatch(name)]


def _repeated(number: int, times: int) -> str:
    """``2(x3)``: two on each of three nodes, in Slurm's notation."""
    return f"{number}(x{times})" if times > 1 else str(number)
