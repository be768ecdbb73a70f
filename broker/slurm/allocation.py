"""The Slurm allocation that this process is in: its nodes, the CPUs granted there, and its end.

They are read from the variables of the job (``SLURM_JOB_*``): a step has overwritten the others with its own. What is
missing there is asked from `scontrol`, which may hang and so has a timeout of SCONTROL_S.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

import msgspec

from pilotq.broker.errors import InvalidInput, PilotFailed

SCONTROL_S = 10.0
READ_LINES = ("StartTime=", "NodeList=")  # lines of a job's record; the end stands in the first of these


class Grant(msgspec.Struct, frozen=True):
    """One node of an allocation, and how many of its CPUs were granted (0: unknown)."""

    name: str
    cpus: int


class Allocation(msgspec.Struct, frozen=True):
    """The id of a job, and its nodes in Slurm's order: ``read_allocation(os.environ).names``."""

    job: str
    nodes: tuple[Grant, ...]

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]

    def granted(self, name: str) -> int:
        """CPUs granted on this node; 0 when it is not in the allocation, or when the number is unknown."""
        return next((node.cpus for node in self.nodes if node.name == name), 0)


def job_id(env: Mapping[str, str]) -> str:
    """The job this process belongs to; empty outside any allocation."""
    return env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID") or ""


def read_allocation(env: Mapping[str, str]) -> Allocation:
    """The allocation of this process. Raises InvalidInput when there is none, or Slurm does not say what it has."""
    job = job_id(env)
    if not job:
        raise InvalidInput(
            "--resources slurm: this is no Slurm allocation (SLURM_JOB_ID is not set): start it in a job, by sbatch "
            "or salloc, or use --resources local"
        )
    names = env.get("SLURM_JOB_NODELIST") or show_job(job).get("NodeList", "")
    if not names:
        raise InvalidInput(f"Slurm does not tell which nodes job {job} has: neither SLURM_JOB_NODELIST nor scontrol")
    nodes = expand_nodes(names)
    counts = expand_counts(env.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if len(counts) != len(nodes):
        counts = [0] * len(nodes)  # each worker finds out what it may use
    return Allocation(job, tuple(map(Grant, nodes, counts)))


def unused_components(env: Mapping[str, str]) -> str:
    """A sentence about the components of a heterogeneous job that a pilot leaves unused; empty for other jobs."""
    size = env.get("SLURM_HET_SIZE", "")
    if not size.isdigit() or int(size) < 2:
        return ""
    lists = (env.get(f"SLURM_JOB_NODELIST_HET_GROUP_{number}", "") for number in range(1, int(size)))
    others = ", ".join(names for names in lists if names) or "those of the others"
    return (
        f"this is a heterogeneous job of {size} components: only the nodes of the first one are used, and not "
        f"{others}; "
        "`srun --het-group=1 --overlap --cpu-bind=none pilotq worker --dir DIR` adds those of the next"
    )


def expand_nodes(names: str) -> list[str]:
    """``n[1-3,7],login`` -> n1 n2 n3 n7 login, in Slurm's order. Raises InvalidInput."""
    from hostlist import BadHostlist, expand_hostlist

    try:
        return [str(name) for name in expand_hostlist(names)]
    except BadHostlist as error:
        raise InvalidInput(f"{names!r} is no list of nodes: {error}") from None


def expand_counts(text: str) -> list[int]:
    """``4(x2),2`` -> 4 4 2; empty when it is something else."""
    counts: list[int] = []
    for count in text.split(",") if text else ():
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", count.strip())
        if found is None:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def choose_nodes(allocation: Allocation, spec: str) -> Allocation:
    """The part of an allocation that ``--nodes`` names. Raises InvalidInput.

    ``3``: the first three; ``2-4``: the second to the fourth; ``n[1-2],n7``: these.
    """
    nodes = allocation.nodes
    number = re.fullmatch(r"(\d+)(?:-(\d+))?", spec.strip())
    if number is not None:
        first, last = (int(number[1]), int(number[2])) if number[2] else (1, int(number[1]))
        if not 1 <= first <= last <= len(nodes):
            raise InvalidInput(f"--nodes {spec}: the allocation has {len(nodes)} nodes: name some of 1 to {len(nodes)}")
        return Allocation(allocation.job, nodes[first - 1 : last])
    if ":" in spec:
        raise InvalidInput(
            f"--nodes {spec}: inside an allocation --nodes chooses nodes, as in 2 or 1-3 or n[1-2]; --resources local "
            "makes nodes of chosen sizes on this machine"
        )
    wanted = expand_nodes(spec)
    unknown = ", ".join(name for name in wanted if name not in allocation.names)
    if unknown:
        raise InvalidInput(f"--nodes {spec}: {unknown} not in the allocation ({', '.join(allocation.names)})")
    return Allocation(allocation.job, tuple(node for node in nodes if node.name in wanted))


def show_job(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty when it cannot be run, or does not answer in time."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", job], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            errors="replace", env=scontrol_environment(), timeout=SCONTROL_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return job_record(done.stdout, job) if done.returncode == 0 else {}


def scontrol_environment() -> dict[str, str]:
    """The environment of `scontrol`: its user may have chosen another format of times, such as "relative"."""
    return {**os.environ, "SLURM_TIME_FORMAT": "standard"}


def job_record(text: str, job: str) -> dict[str, str]:
    """The fields of one job in what `scontrol show job` prints; empty when it is not there.

    It prints all elements of an array, and all components of a heterogeneous job. The user's own words in it (name,
    command, comment) may look like fields: the lines that hold what we read come first, and the first one counts.
    """
    for record in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in record.splitlines()]
        first = next((line.partition(" ")[0] for line in lines if line.startswith("JobId=")), f"JobId={job}")
        if first == f"JobId={job}":
            found: dict[str, str] = {}
            for line in sorted(lines, key=lambda line: not line.startswith(READ_LINES)):
                found = dict(re.findall(r"(\w+)=(\S*)", line)) | found
            return found
    return {}


def end_from_job(facts: Mapping[str, str]) -> float | None:
    """When a job ends (unix seconds), from the fields of `show_job`; None when it has no end, or none is known.

    Slurm writes local time, without naming the zone.
    """
    try:
        return time.mktime(time.strptime(facts.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None  # "Unknown", or no such field


def end_from_env(env: Mapping[str, str]) -> float | None:
    """The end from the job's variables (Slurm 23 and later), in unix seconds; it may have been extended since."""
    text = env.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() and text != "0" else None


def address_for(others: Sequence[str], env: Mapping[str, str]) -> str:
    """The address of this machine as these hosts reach it: the source of packets to them. Raises PilotFailed.

    Without other hosts it is the source of packets to Slurm's controller. Loopback does not count: a name that resolves
    to it, as that of this machine often does, is skipped.
    """
    controller = env.get("SLURM_WORKING_CLUSTER", "").split(":")
    targets = [*others, *controller[1:2], socket.gethostname()]
    for target in targets:
        try:
            for family, kind, _, _, where in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
                with socket.socket(family, kind) as probe:
                    probe.connect(where)  # sends nothing: it only chooses the route
                    found = str(probe.getsockname()[0])
                if not found.startswith("127.") and found != "::1":
                    return found
        except OSError:
            continue
    raise PilotFailed(
        f"no address of this machine was found that the nodes could reach (tried the routes to {', '.join(targets)}): "
        "name one with --bind"
    )
