"""Identifies this machine as a node of a pilot: its name, its cores, and what Slurm has granted of it.

What this process may really use decides in the end: a mask or a cgroup may be smaller than what was granted, and larger
too, where Slurm does not bind.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from pilotq.broker.errors import InvalidInput
from pilotq.broker.log import log
from pilotq.broker.slurm.allocation import job_id, read_allocation
from pilotq.broker.store.resources import NodeInfo
from pilotq.workers.machine.topology import usable_cpus, without_siblings

MIB = 1 << 20


class NodeIdentity:
    """Identifies this node by the environment of a worker; ``pilot_job`` is the Slurm job of the pilot, or empty.

    >>> NodeIdentity({"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}, pilot_job="8").name
    'n1-7'
    """

    def __init__(self, env: Mapping[str, str], pilot_job: str) -> None:
        self.job = job_id(env)
        self._env = env
        # In a step SLURMD_NODENAME names the node; HOSTNAME is the batch node's, and hosts may have other names.
        host = env.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
        # Two allocations may share a node, and each has a part of it.
        self.name = f"{host}-{self.job}" if self.job and self.job != pilot_job else host
        self._host = host
        self._withheld = 0
        self.cpus: list[int] | None = None  # all that `cores` has chosen from; None before

    def cores(self, *, physical: bool = False, grant: int | None = None) -> list[int]:
        """Numbers of the CPUs that tasks may use: those of the mask, at most as many as were granted.

        Of each core the first one where ``physical``.
        """
        cpus = usable_cpus()
        granted = grant or self._granted()
        self._withheld = max(granted - len(cpus), 0)
        if self._withheld:
            log(
                f"node {self.name}: Slurm has granted {granted} CPUs, and this worker may use {len(cpus)} of them",
                level="warning",
                node=self.name,
            )
        if granted and granted < len(cpus):
            cpus = cpus[:granted]
        self.cpus = cpus
        return without_siblings(cpus) if physical else cpus

    def complete(self, info: NodeInfo) -> NodeInfo:
        """Fill in what Slurm has granted: the job, and a limit of memory."""
        info.job = self.job
        info.withheld = self._withheld
        memory = self._memory(len(info.cores))
        if memory:
            info.memory = min(info.memory or memory, memory)
        return info

    def _granted(self) -> int:
        if not self.job:
            return 0
        try:
            return read_allocation(self._env).granted(self._host)
        except InvalidInput:
            return 0  # the mask alone counts

    def _memory(self, cores: int) -> int:
        """Bytes that the job may use here; 0 where it may use all there is."""
        for name, times in (("SLURM_MEM_PER_NODE", 1), ("SLURM_MEM_PER_CPU", self._granted() or cores)):
            text = self._env.get(name, "")
            if text.isdigit() and text != "0":
                return int(text) * times * MIB
        return 0
