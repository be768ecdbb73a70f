"""Finds the CPUs and memory that this process may use under affinity masks and cgroup limits, and makes nodes of them.

``root`` is the directory that contains /proc and /sys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pilotq.broker.errors import InvalidInput

NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")  # it becomes part of file names and of arguments
CORES_MAX = 4096


class NodePlan(NamedTuple):
    """A node of a pilot on this machine.

    ``cores`` are the numbers that allocations name, ``real`` maps each to a CPU number. ``shared`` is True when
    virtual cores outnumber the CPUs, so that several stand for the same one.
    """

    name: str
    cores: list[int]
    real: dict[int, int]
    shared: bool


def usable_cpus(root: str = "/") -> list[int]:
    """Numbers of the CPUs that tasks may keep busy: the affinity mask, as many of it as a CPU quota allows.

    The quota is rounded down, but one CPU is always left.
    """
    cpus = sorted(os.sched_getaffinity(0))
    quotas = [quota for folder in _cgroups("cpu", root) if (quota := _quota(folder)) is not None]
    return cpus[: max(1, int(min(quotas, default=len(cpus))))]


def without_siblings(cpus: Sequence[int], root: str = "/") -> list[int]:
    """Of each physical core the first of ``cpus`` that stands for it: no two hardware threads of one core."""
    taken: set[int] = set()
    found = []
    for cpu in cpus:
        if cpu not in taken:
            found.append(cpu)
        taken |= {cpu, *_threads(cpu, root)}
    return found


def siblings(cpu: int, usable: Sequence[int], root: str = "/") -> list[int]:
    """The other hardware threads of this one's physical core, as far as they are among the ``usable``."""
    return [other for other in _threads(cpu, root) if other != cpu and other in usable]


def _threads(cpu: int, root: str) -> Iterator[int]:
    path = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return cpu_list(read_text(os.path.join(root, path)))


def memory_bytes(root: str = "/") -> int:
    """Bytes of memory: the machine's, or the smallest cgroup limit over this process."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _cgroups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = read_text(os.path.join(folder, name))
            if text.isdigit():  # else there is no such file, or the text is "max"
                sizes.append(int(text))
    return min(sizes)


def numa_groups(cpus: Sequence[int], root: str = "/") -> list[list[int]]:
    """``cpus`` by NUMA node, in the nodes' order; one group where the kernel lists no nodes."""
    folder = os.path.join(root, "sys/devices/system/node")
    try:
        nodes = sorted(int(name[4:]) for name in os.listdir(folder) if re.fullmatch(r"node\d+", name))
    except OSError:
        nodes = []
    groups = []
    left = list(cpus)
    for node in nodes:
        members = set(cpu_list(read_text(os.path.join(folder, f"node{node}/cpulist"))))
        groups.append([cpu for cpu in left if cpu in members])
        left = [cpu for cpu in left if cpu not in members]
    return [group for group in [*groups, left] if group]


def check_node_name(name: str, where: str) -> None:
    """Raises InvalidInput, with the place, unless the name is fit for file names and arguments of programs."""
    if not NODE_NAME.fullmatch(name):
        raise InvalidInput(f"{where}: node name {name!r} must be 1 to 63 of A-Z a-z 0-9 . _ -, no . or - first")


def parse_nodes(spec: str) -> list[tuple[str, int]]:
    """Names and cores of ``--nodes``: ``4``, ``4,2,2`` (n0, n1, n2), ``n1:2``, ``n1:4,n2:4``. Raises InvalidInput.

    >>> parse_nodes("4,2")
    [('n0', 4), ('n1', 2)]
    """
    nodes: dict[str, int] = {}
    for position, item in enumerate(spec.split(",")):
        name, colon, count = item.strip().rpartition(":")
        if not colon:
            name = f"n{position}"
        check_node_name(name, f"--nodes {spec}")
        if not re.fullmatch(r"[0-9]{1,4}", count) or not 1 <= int(count) <= CORES_MAX:
            raise InvalidInput(
                f"--nodes {spec}: {count!r} is no number of cores, give 1 to {CORES_MAX} as in 4 or 4,2,2 or n1:4,n2:4"
            )
        if name in nodes:
            raise InvalidInput(f"--nodes {spec}: node {name} is named twice")
        nodes[name] = int(count)
    return list(nodes.items())


def virtual_nodes(spec: str | None, cpus: Sequence[int], hostname: str) -> list[NodePlan]:
    """The nodes of ``spec`` on this machine's ``cpus``, or without it one node of them all, with the host's name.

    The cores of a node of ``spec`` are numbered from 0 and take CPUs in turn, over again when these run out.
    """
    if spec is None:
        return [NodePlan(hostname.partition(".")[0] or "localhost", list(cpus), {cpu: cpu for cpu in cpus}, False)]
    nodes = parse_nodes(spec)
    shared = sum(count for _, count in nodes) > len(cpus)
    plans = []
    taken = 0
    for name, count in nodes:
        real = {core: cpus[(taken + core) % len(cpus)] for core in range(count)}
        plans.append(NodePlan(name, list(range(count)), real, shared))
        taken += count
    return plans


def _cgroups(controller: str, root: str) -> Iterator[str]:
    """Folders whose limits of this controller count for this process: its own cgroup's and those above, v1 and v2."""
    paths: dict[str, str] = {}  # controller -> path in its hierarchy; "" is v2
    for line in read_text(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in read_text(os.path.join(root, "proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        inside, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            name = ""
        elif kind == "cgroup" and controller in options.split(","):
            name = controller
        else:
            continue
        if name not in paths:
            continue
        path = paths[name]
        # In a container the mount shows a part of the hierarchy, and paths may be those of the whole.
        inside = inside.rstrip("/")
        rest = path[len(inside) :].strip("/") if f"{path}/".startswith(f"{inside}/") else ""
        top = os.path.join(root, mount.lstrip("/"))
        parts = rest.split("/") if rest else []
        for depth in range(len(parts), -1, -1):
            yield os.path.join(top, *parts[:depth])


def _quota(folder: str) -> float | None:
    """CPUs that the cgroup may keep busy; None without a limit."""
    fields = read_text(os.path.join(folder, "cpu.max")).split()
    if not fields:
        fields = [read_text(os.path.join(folder, f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
    if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit() and int(fields[1]):
        return int(fields[0]) / int(fields[1])
    return None  # "max" or -1


def cpu_list(text: str) -> Iterator[int]:
    """``0-3,8`` -> 0 1 2 3 8"""
    for part in text.split(","):
        if part:
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)


def read_text(path: str) -> str:
    """The text of a file of the kernel, without the newline; empty if there is no such file here."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
