"""The task of a job: what it asks for, and its command.

A job that is nothing but a shell command runs as that command. Every other one runs as Snakemake's remote executors
have it: by a Snakemake process of its own, which takes a second or more to start.
"""

from __future__ import annotations

import shlex
from typing import Any

from snakemake_interface_executor_plugins.settings import DeploymentMethod, SharedFSUsage

from pilotq.broker import Request, Task
from pilotq.broker.tasks.model import PRIORITY_LIMIT

ARGUMENT_MAX = 120_000  # bytes: the kernel takes one argument of 128 KiB
LATENCY_STEP_S = 1
# What snakemake.shell sets for the number of threads.
THREADS = (
    "OMP_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)  # fmt: skip
TEMPORARY = ("TMPDIR", "TMP", "TEMPDIR", "TEMP")


def request_of(job: Any) -> Request:
    """threads, mem_mb and gpu (or gpus) of a job; of one over several nodes (``nodes``) threads and memory of each.

    Memory is reserved, and a limit.
    """
    threads = max(int(job.threads), 1)
    nodes = _whole(job, "nodes")
    return Request(
        cores=(threads, threads),
        nodes=(nodes, nodes) if nodes > 1 else None,
        memory=_whole(job, "mem_mb") * 1_000_000,
        gpus=_whole(job, "gpu") or _whole(job, "gpus"),
    )


def _whole(job: Any, name: str) -> int:
    value = job.resources.get(name, 0)
    return value if isinstance(value, int) and value > 0 else 0


def task_of(job: Any, command: list[str], env: dict[str, str], *, queue: str) -> Task:
    """A task with the job's request, time limit (``runtime``, in minutes) and priority."""
    text = command[-1]
    long = len(text.encode()) > ARGUMENT_MAX
    runtime = _whole(job, "runtime")
    return Task(
        command=None if long else command,
        script=f"#!{command[0]}\n{text}\n" if long else None,
        name=str(job.name),
        request=request_of(job),
        time_limit=runtime * 60.0 if runtime else None,
        priority=max(-PRIORITY_LIMIT, min(int(job.priority), PRIORITY_LIMIT)),
        env=env,
        queue=queue,
    )


def is_plain(job: Any, workflow: Any) -> bool:
    """Whether a job needs nothing but its shell command: this Snakemake does the rest, before and after it."""
    if job.is_group() or not job.is_shell or job.is_shadow or job.benchmark or job.is_template_engine:
        return False
    methods = workflow.deployment_settings.deployment_method
    remote = workflow.remote_execution_settings
    deployed = (
        (DeploymentMethod.CONDA in methods and job.conda_env)
        or (DeploymentMethod.APPTAINER in methods and job.container_img)
        or (DeploymentMethod.ENV_MODULES in methods and job.env_modules)
    )
    files = [*job.input, *job.output, *job.log]
    odd = any(f.is_storage for f in files) or any("update" in f.flags for f in job.output if hasattr(f, "flags"))
    cached = workflow.workflow_settings.cache is not None and job.rule.cache
    shared = SharedFSUsage.INPUT_OUTPUT in workflow.storage_settings.shared_fs_usage
    own_ways = remote.precommand or remote.immediate_submit or cached
    return shared and not (deployed or odd or own_ways)


def plain_command(job: Any, *, elsewhere: bool, latency: int) -> tuple[list[str], dict[str, str]] | None:
    """The command of a plain job and its variables, as `snakemake.shell.shell` makes them.

    ``elsewhere``: it may run on another host, where files can appear ``latency`` seconds late. None where something in
    the command is known only when the job runs.
    """
    from snakemake.common.tbdstring import TBDString
    from snakemake.shell import shell

    # Snakemake leaves the directory for temporary files open for a job that runs elsewhere.
    resources = job.rule.expand_resources(job.wildcards_dict, job.input, job.attempt)
    command = job.format_wildcards(job.rule.shellcmd, resources=resources)
    if str(TBDString()) in command:
        return None
    executable = resources.get("shell_exec") or shell.get_executable() or "/bin/sh"
    prefix = shell._get_process_prefix(resources.get("shell_exec"))
    text = f"{prefix} {command} {shell._process_suffix}".strip()
    text = clean_outputs([str(f) for f in job.output]) + text
    if elsewhere:
        text = await_inputs([str(f) for f in job.input], latency) + text
    env = dict.fromkeys(THREADS, str(job.threads))
    if tmpdir := resources.get("tmpdir"):
        env.update(dict.fromkeys(TEMPORARY, str(tmpdir)))
    return [str(executable), "-c", text], env


def clean_outputs(paths: list[str]) -> str:
    """Code that removes what an earlier execution has left, if its worker has died under it."""
    if not paths:
        return ""
    return f'[ "$PILOTQ_EXECUTION" = 1 ] || rm -rf -- {shlex.join(paths)}\n'


def await_inputs(paths: list[str], latency: int) -> str:
    """Code that waits until the inputs are there, ``latency`` seconds for all at most; the command says what is not."""
    if not paths:
        return ""
    return (
        f"pilotq_left={latency}\nfor pilotq_file in {shlex.join(paths)}; do\n"
        f'while [ ! -e "$pilotq_file" ] && [ $pilotq_left -gt 0 ]; do '
        f"sleep {LATENCY_STEP_S}; pilotq_left=$((pilotq_left - {LATENCY_STEP_S})); done\ndone\n"
    )
