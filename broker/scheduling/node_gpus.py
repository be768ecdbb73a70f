"""The GPUs of one node: which of them a request gets, and what of each is free. Pure.

A GPU is counted in GPU_PARTS parts, so that shares add up exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from pilotq.broker.scheduling.core_masks import mask_of
from pilotq.broker.store.resources import NodeInfo, gpu_name
from pilotq.broker.tasks.model import GPU_PARTS, Request

WORD = re.compile(r"[a-z0-9]+")


@lru_cache(maxsize=4096)
def parts_of(gpu: str) -> int:
    """How much of a GPU a share has, by its name in an allocation: ``0@0.25`` -> 2500, ``0`` -> 10000."""
    _, _, part = gpu.partition("@")
    return round(float(part) * GPU_PARTS) if part else GPU_PARTS


class NodeGpus:
    """The GPUs of a node, by name, in the order in which they were found."""

    __slots__ = ("free", "names", "near", "words")

    def __init__(self, info: NodeInfo) -> None:
        self.names = tuple(info.gpus)
        self.free = dict.fromkeys(self.names, GPU_PARTS)
        facts = {name: info.gpu_facts.get(name) for name in self.names}
        # Of each the words of its model, and the cores that are near it as a mask, 0 where all are.
        self.words = {n: frozenset(WORD.findall(f.model.lower())) for n, f in facts.items() if f is not None}
        self.near = {n: mask_of(tuple(f.cores)) for n, f in facts.items() if f is not None}

    def copy(self) -> NodeGpus:
        other = NodeGpus.__new__(NodeGpus)
        other.names, other.near, other.words = self.names, self.near, self.words
        other.free = dict(self.free)
        return other

    def room(self, request: Request, *, now: bool) -> int:
        """How many GPUs of its kind there are, or are free ``now``; for a share how many parts of one."""
        free = [self.free[name] if now else GPU_PARTS for name in self._of_kind(request)]
        return max(free, default=0) if request.gpu_share else free.count(GPU_PARTS)

    def has(self, request: Request, *, now: bool) -> bool:
        """Whether it has what a request asks for, or has it free ``now``."""
        return self.room(request, now=now) >= wanted(request)

    def choose(self, request: Request, cores: int, size: int) -> tuple[str, ...]:
        """The GPUs for a request that `has` says it has, as an allocation names them.

        Whole ones lie near each other if they can, and near enough of the free ``cores`` for ``size`` of them. A share
        is one of the device that has the least free of those that suffice.
        """
        parts = request.gpu_share
        if parts:
            name = min((n for n in self._of_kind(request) if self.free[n] >= parts), key=self.free.__getitem__)
            return (f"{name}@{parts / GPU_PARTS:g}",)
        count = int(request.gpus)
        groups: dict[int, list[str]] = {}
        for name in self._of_kind(request):
            if self.free[name] == GPU_PARTS:
                groups.setdefault(self.near.get(name, 0), []).append(name)
        fitting = [(near, names) for near, names in groups.items() if len(names) >= count]
        if fitting:
            _, names = min(fitting, key=lambda g: (bool(g[0]) and (g[0] & cores).bit_count() < size, len(g[1])))
            return tuple(names[:count])
        chosen: list[str] = []
        for names in sorted(groups.values(), key=len, reverse=True):
            chosen += names[: count - len(chosen)]
        return tuple(sorted(chosen, key=self.names.index))

    def near_cores(self, gpus: Iterable[str]) -> int:
        """The cores near any of these GPUs, as a mask; 0 where that is not known, or all are."""
        mask = 0
        for gpu in gpus:
            mask |= self.near.get(gpu_name(gpu), 0)
        return mask

    def has_free(self, gpus: Iterable[str]) -> bool:
        """Whether the GPUs of a share are free."""
        return all(self.free.get(gpu_name(gpu), 0) >= parts_of(gpu) for gpu in gpus)

    def add(self, gpus: Iterable[str], sign: int) -> None:
        """Give those of a share back (1), or take them (-1)."""
        for gpu in gpus:
            self.free[gpu_name(gpu)] += sign * parts_of(gpu)

    def _of_kind(self, request: Request) -> Iterable[str]:
        if not request.gpu_kind:
            return self.names
        kind = frozenset(request.gpu_kind.split("_"))
        return [name for name in self.names if kind <= self.words.get(name, frozenset())]


def wanted(request: Request) -> int:
    """What `NodeGpus.room` must be for a request: a number of GPUs, or of parts of one."""
    return request.gpu_share or int(request.gpus)
