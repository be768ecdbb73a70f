"""The environment variables that pilotq sets and reads, with their meaning. `pilotq help environment`, `pilotq doctor`
and docs/concepts.md show them from here."""

from __future__ import annotations

from typing import Final

# variable, or variables that belong together -> what it is
OF_TASKS: Final[dict[str, str]] = {
    "PILOTQ_TASK_ID, PILOTQ_EXECUTION": "its id, and the number of this execution",
    "PILOTQ_DIR": "the pilot's directory: `pilotq enqueue` inside a task goes to its own pilot",
    "PILOTQ_CORES, PILOTQ_NODES": "how many cores it has on all nodes, and how many nodes",
    "PILOTQ_NODELIST": "the names of these nodes, with commas between",
    "PILOTQ_NODE, PILOTQ_CPUS": "the node that it is on (of several nodes the first), and the core numbers there",
    "PILOTQ_HOSTFILE": "on several nodes: a file with the name of its node for each core, one a line",
    "PILOTQ_ARRAY_ID, PILOTQ_INDEX": "in an element of an array: the array's id, the element's index",
    "PILOTQ_VALUE": "in an element of an array of programs: its value, or its index where there are no values",
    "OMP_NUM_THREADS": "the number of cores on its first node, unless the submitter has set it",
    "OMP_PLACES, OMP_PROC_BIND": "with `--spread` or `--pack`: a place for each core, and how threads lie on them",
    "CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES, ZE_AFFINITY_MASK":
        "its GPUs, in the variable of their vendor; none where it asked for none",
    "QCG_PM_NNODES, QCG_PM_NODELIST, QCG_PM_NPROCS, QCG_PM_NTASKS, QCG_PM_TASKS_PER_NODE, QCG_PM_STEP_ID":
        "the same, as QCG-PilotJob says it",
    "QCG_PM_ZMQ_ADDRESS":
        "in jobs of a QCG-PilotJob service that takes requests of programs: its address, for `Manager()`",
    "SLURM_NNODES, SLURM_NTASKS, SLURM_JOB_NODELIST, ...":
        "with `--envschema slurm`, and by default in an allocation: what a job step of this size would have",
}  # fmt: skip

OF_COMMANDS: Final[dict[str, str]] = {
    "PILOTQ_DIR": "the pilot that commands mean where --dir does not name one",
    "PILOTQ_SERVER": "the server's executable, as --server",
    "PILOTQ_REDIS_URL": "a server that exists, as --redis; it may hold a password",
    "PILOTQ_PASSWORD_FILE": "the file with that server's password",
    "PILOTQ_COUNTERS": "NAME=N, with spaces between: counters of every node, as --counter",
    "PILOTQ_MEMORY_POLICY": "as --memory-policy, also of workers that are started by hand",
    "PILOTQ_POOLS": "NAME=N, with spaces between: counters of the whole pilot, as --pool",
    "PILOTQ_GPUS": "how many GPUs each machine has (its first node), as --gpus of `pilotq start`",
    "PILOTQ_LAUNCHER": "native or python: the launcher that starts tasks; `pilotq doctor` names the one that does",
    "PILOTQ_LOG": "json: the logs of the pilot's processes are JSON, one object a line; text, or unset: they are text",
    "PILOTQ_SETTINGS": "intervals and bounds as a JSON object, for tests: see broker/settings.py",
    "NO_COLOR": "no colours, if it is set to anything",
}

# Variables that processes of a pilot, or tests, set for each other; nobody else need set them.
OF_PARTS: Final = frozenset(
    {
        "PILOTQ_GPU_NODE",
        "PILOTQ_MACHINE_ROOT",
        "PILOTQ_THREADS",
        "PILOTQ_ENVSCHEMA",
        "PILOTQ_PATH",
        "PILOTQ_FAILPOINTS",
        "PILOTQ_AGENT",
        "PILOTQ_HOST",
        "PILOTQ_RANK_CPUS",
    }
)

# Every name above.
KNOWN: Final = OF_PARTS | {name.strip() for names in (*OF_TASKS, *OF_COMMANDS) for name in names.split(",")}
