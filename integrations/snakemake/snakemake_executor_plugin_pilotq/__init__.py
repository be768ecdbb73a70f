"""Snakemake's executor plugin `pilotq`: each job is a task of a pilot.

Snakemake finds it by the name of the package. Jobs are submitted many at a time, and their statuses are read in one
call.
"""

from dataclasses import dataclass, field
from typing import Optional

from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase

from snakemake_executor_plugin_pilotq.executor import Executor

__all__ = ["Executor", "ExecutorSettings", "common_settings"]


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    """What ``--pilotq-...`` sets. Snakemake reads the types when it runs, and knows only these spellings."""

    dir: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Directory of the pilot that runs the jobs. Default: the one that PILOTQ_DIR or .pilotq/current "
            "names, else a private pilot that ends with the workflow."
        },
    )
    nodes: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Nodes of a private pilot, as `pilotq start --nodes` takes them ('4', '4,2,2'). "
            "Default: all cores that this process may use, or all nodes of the Slurm allocation."
        },
    )
    spawn: bool = field(
        default=False,
        metadata={
            "help": "Start a Snakemake process for every job, also for those that need nothing but their shell command."
        },
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_envvar_declarations_to_cmd=False,  # tasks get the environment of Snakemake
    auto_deploy_default_storage_provider=False,
)
