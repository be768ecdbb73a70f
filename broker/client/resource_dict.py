"""`task_of`: what executorlib's ``resource_dict`` of a call comes to for its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.model import PRIORITY_LIMIT, Request, Task

KEYS = (
    "cores", "cwd", "error_log_file", "exclusive", "gpus_per_core", "num_nodes", "priority", "restart_limit",
    "run_time_max", "threads_per_core",
)  # fmt: skip
# Of MPI, of Slurm, of executorlib's cache: what asks for nothing is taken, as it is in executorlib's own defaults.
MEANINGLESS = ("cache_key", "openmpi_oversubscribe", "pmi_mode", "slurm_cmd_args")


def task_of(base: Task, wanted: Mapping[str, Any]) -> Task:
    """``base`` with what ``wanted`` asks for: KEYS of executorlib, ``threads_per_core`` as the cores of the call.

    Raises InvalidInput for other keys, unless they are MEANINGLESS and ask for nothing, and for more than one of
    ``cores``: those are MPI ranks, and a function is one process.
    """
    empty = {key for key in MEANINGLESS if not wanted.get(key)}
    if unknown := sorted(set(map(str, wanted)) - set(KEYS) - empty):
        raise InvalidInput(
            f"resource_dict: {', '.join(unknown)} has no meaning on a pilot: leave it out; known are {', '.join(KEYS)}"
        )
    if wanted.get("cores", 1) != 1:
        raise InvalidInput(
            f"resource_dict: cores={wanted['cores']!r} would be MPI ranks, and a function is one process here: "
            "ask for cores with threads_per_core"
        )
    numbers = {}
    for name in ("threads_per_core", "gpus_per_core", "num_nodes"):
        value = wanted.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise InvalidInput(f"resource_dict: {name}={value!r} is no whole number from 0 on")
        numbers[name] = value or 0
    threads, nodes = max(numbers["threads_per_core"], 1), numbers["num_nodes"]
    whole = bool(wanted.get("exclusive"))
    request = Request(
        cores=(threads, threads),
        nodes=(max(nodes, 1),) * 2 if whole or nodes > 1 else None,
        whole=whole,
        gpus=numbers["gpus_per_core"],
    )
    changes = {
        name: wanted[key]
        for key, name in (("cwd", "cwd"), ("error_log_file", "stderr"), ("restart_limit", "retries"))
        if wanted.get(key) is not None
    }
    if wanted.get("run_time_max") is not None:
        changes["time_limit"] = float(wanted["run_time_max"])
    if wanted.get("priority") is not None:
        changes["priority"] = max(-PRIORITY_LIMIT, min(int(wanted["priority"]), PRIORITY_LIMIT))
    return msgspec.structs.replace(base, request=request, **changes)
