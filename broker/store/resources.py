"""The resources of nodes, reservations and classes of tasks, and the text of an allocation. Pure.

>>> [(share.node, share.cores) for share in parse_allocation("n1[0:1],n2[0]")]
[('n1', (0, 1)), ('n2', (0,))]
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import msgspec

from pilotq.broker.tasks.model import Request, limit_of_label, shape_of


class GpuFacts(msgspec.Struct, omit_defaults=True):
    """What is known of a GPU: UUID (tasks get it by that), model, memory in bytes, and the ``cores`` near it."""

    uuid: str = ""
    model: str = ""
    memory: int = 0
    cores: list[int] = []


BY_CGROUP, BY_WATCHER = "cgroup", "watcher"


class NodeInfo(msgspec.Struct):
    """A node as its worker registers it. ``cores`` are core numbers as allocations name them."""

    name: str
    incarnation: int
    host: str
    pid: int
    cores: list[int]
    shared_cores: bool = False  # several virtual cores stand for one real one
    cpus: list[int] = []  # the CPU number of each of ``cores``, where they differ
    threads: dict[int, list[int]] = {}  # core -> numbers of further hardware threads that belong to it
    numa: list[list[int]] = []  # groups of ``cores``; empty: one group
    gpus: list[str] = []  # their names, by which allocations call them: numbers, or what the batch system calls them
    gpu_vendor: str = ""
    gpu_facts: dict[str, GpuFacts] = {}  # by name
    gpu_note: str = ""  # a sentence where the GPUs that were granted and those that were found differ
    memory: int = 0  # bytes, 0 = not counted
    memory_by: str = BY_WATCHER  # who holds tasks to the memory that they ask for; empty: nobody
    counters: dict[str, int] = {}
    pools: dict[str, int] = {}  # counters of the whole pilot, as its nodes were told
    job: str = ""  # the Slurm job whose allocation it is part of
    machine: str = ""  # where ``pid`` is valid, as `machine_id` has it; ``start`` is the start time of that process
    start: int = 0
    withheld: int = 0  # CPUs that Slurm has granted there, and that its worker may not use

    @property
    def address(self) -> str:
        """Names this incarnation of the node among all."""
        return f"{self.name}:{self.incarnation}"


class ClassInfo(msgspec.Struct, frozen=True):
    """What all tasks of a class have in common: the name of the class says it."""

    queue: str
    priority: int
    request: Request
    at_most: int = 0  # tasks of the class that may run at a time, 0: any number


_CLASS = re.compile(r"(.*)\.p(-?[0-9]+)\.([^.]*)", re.DOTALL)


@lru_cache(maxsize=16_384)
def class_info(name: str) -> ClassInfo | None:
    """The class with this name, the reverse of `class_name`; None for a text that is no name of a class.

    >>> class_info("default.p10.2c").priority
    10
    """
    match = _CLASS.fullmatch(name)
    if match is None:
        return None
    label, at_most = limit_of_label(match[3])
    shape = shape_of(label)
    return None if shape is None else ClassInfo(match[1], int(match[2]), shape, at_most)


class NodeShare(NamedTuple):
    """What one node gives to a reservation."""

    node: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()
    memory: int = 0  # bytes
    use: tuple[tuple[str, int], ...] = ()  # named counters, of the node and (in the first share) of the pilot


def gpu_name(gpu: str) -> str:
    """The name of the GPU that a share has all of (``0``) or a part of (``0@0.25``)."""
    return gpu.partition("@")[0]


@lru_cache(maxsize=4096)
def parse_allocation(text: str) -> tuple[NodeShare, ...]:
    """``n1[0:1],n2[0]`` -> shares; the same text QCG-PilotJob reports. GPUs follow a semicolon: ``n1[0:1;g0:g1]``."""
    shares = []
    for piece in text.split("],"):
        node, _, rest = piece.rstrip("]").partition("[")
        cores, _, gpus = rest.partition(";")
        numbers = tuple(int(c) for c in cores.split(":") if c)
        shares.append(NodeShare(node, numbers, tuple(g for g in gpus.split(":") if g)))
    return tuple(shares)


def format_allocation(shares: tuple[NodeShare, ...]) -> str:
    """The reverse of `parse_allocation`."""
    return ",".join(
        f"{s.node}[{':'.join(map(str, s.cores))}{';' + ':'.join(s.gpus) if s.gpus else ''}]" for s in shares
    )
