"""One node, what of it is free, and an index that finds nodes by their number of free cores. Pure.

Nodes are bits of one number (bit i is the node with index i), so that nothing here loops over all nodes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

from pilotq.broker.scheduling.core_masks import bits, carve, compact, mask_of, scatter
from pilotq.broker.scheduling.node_gpus import NodeGpus
from pilotq.broker.store.resources import NodeInfo, NodeShare
from pilotq.broker.tasks.model import SPREAD, Request


class NodeCores:
    """One node: what it has and what of it is free now."""

    __slots__ = (
        "all", "counters", "counters_free", "free", "gpus", "groups", "held", "memory", "memory_free",
        "name", "open", "end", "size", "index", "pools",
    )  # fmt: skip

    def __init__(self, info: NodeInfo) -> None:
        self.pools: Mapping[str, int] = {}  # counters of the whole pilot, which are none of the node's
        self.name = info.name
        self.index = 0
        self.open = True
        self.end = math.inf  # when it gets nothing new, by the clock of placement
        self.all = self.free = mask_of(tuple(info.cores))
        self.size = self.all.bit_count()
        self.held = 0  # cores that are being drained for one waiting task, free or not
        groups = [mask_of(tuple(group)) & self.all for group in info.numa]
        groups.append(self.all & ~mask_of(tuple(core for group in info.numa for core in group)))
        self.groups = tuple(g for g in groups if g) if len(info.numa) > 1 else ()
        self.gpus = NodeGpus(info)
        self.memory = self.memory_free = info.memory
        self.counters = info.counters
        self.counters_free = dict(info.counters)

    def copy(self) -> NodeCores:
        other = copy.copy(self)
        other.counters_free = dict(self.counters_free)
        other.gpus = self.gpus.copy()
        return other

    def could_give_extras(self, request: Request) -> bool:
        """Whether it has, free or not, what the request wants besides cores."""
        if (request.gpus and not self.gpus.has(request, now=False)) or (self.memory and self.memory < request.memory):
            return False
        return all(self.counters.get(name, 0) >= count or name in self.pools for name, count in request.use)

    def has_free_extras(self, request: Request) -> bool:
        """Whether it has free now what the request wants besides cores."""
        if self.memory and self.memory_free < request.memory:
            return False
        if request.gpus and not self.gpus.has(request, now=True):
            return False
        return all(self.counters_free.get(name, 0) >= count or name in self.pools for name, count in request.use)

    def choose(self, size: int, request: Request, free: int) -> NodeShare:
        """``size`` of the ``free`` cores, and what else the request wants of a node that is known to have it."""
        gpus: tuple[str, ...] = ()
        near = 0
        if request.whole:
            gpus = self.gpus.names
        elif request.gpus:
            gpus = self.gpus.choose(request, free, size)
            near = self.gpus.near_cores(gpus) & free
        if request.numa == SPREAD and self.groups:
            mask = scatter(free, self.groups, size)
        elif near.bit_count() >= size:
            mask = compact(near, self.groups, size)
        elif near:
            mask = near | compact(free & ~near, self.groups, size - near.bit_count())
        else:
            return NodeShare(self.name, carve(free, self.groups, size, 1)[1][0], gpus, request.memory, request.use)
        return NodeShare(self.name, tuple(bits(mask)), gpus, request.memory, request.use)

    def take(self, share: NodeShare) -> None:
        mask = mask_of(share.cores)
        if mask & ~self.free or not self.gpus.has_free(share.gpus):
            raise ValueError(f"{share.node} does not have all of cores {share.cores} and GPUs {share.gpus} free")
        self.free ^= mask
        self._add(share, -1)
        self.gpus.add(share.gpus, -1)

    def release(self, share: NodeShare) -> None:
        mask = mask_of(share.cores)
        if mask & self.free or mask & ~self.all:
            raise ValueError(f"of cores {share.cores} of {share.node} some are not reserved: they cannot be released")
        self.free |= mask
        self._add(share, 1)
        self.gpus.add(share.gpus, 1)

    def _add(self, share: NodeShare, sign: int) -> None:
        self.memory_free += sign * share.memory
        for name, count in share.use:
            self.counters_free[name] = self.counters_free.get(name, 0) + sign * count


class FreeCoreIndex:
    """Nodes by their number of free cores: bit i of ``rows[k]`` says that the node with index i has exactly k.

    Bit k of ``levels`` says that ``rows[k]`` is not empty; ``total`` is the sum of free cores.
    """

    __slots__ = ("counts", "levels", "rows", "total")

    def __init__(self, counts: list[int], most: int) -> None:
        self.counts = counts
        self.rows = [0] * (most + 1)
        for index, count in enumerate(counts):
            self.rows[count] |= 1 << index
        self.levels = sum(1 << count for count, row in enumerate(self.rows) if row)
        self.total = sum(counts)

    def set(self, index: int, count: int) -> None:
        old = self.counts[index]
        if old == count:
            return
        self.counts[index] = count
        self.total += count - old
        rows, bit = self.rows, 1 << index
        rows[old] ^= bit
        if not rows[old]:
            self.levels ^= 1 << old
        if not rows[count]:
            self.levels |= 1 << count
        rows[count] |= bit

    def best(self, low: int, high: int, usable: int) -> int:
        """The index of the first usable node with the fewest cores from ``high`` up, else with the most from ``low``
        up; else -1."""
        levels = self.levels >> high << high
        while levels:
            bit = levels & -levels
            row = self.rows[bit.bit_length() - 1] & usable
            if row:
                return (row & -row).bit_length() - 1
            levels ^= bit
        levels = self.levels & ((1 << high) - 1)
        while levels >> low:
            level = levels.bit_length() - 1
            row = self.rows[level] & usable
            if row:
                return (row & -row).bit_length() - 1
            levels ^= 1 << level
        return -1

    def indexes(self, low: int, high: int) -> Iterator[int]:
        """The indexes of all nodes that `best` would find, one after the other."""
        for level in bits(self.levels >> high << high):
            yield from bits(self.rows[level])
        for level in range(min(high, len(self.rows)) - 1, low - 1, -1):
            yield from bits(self.rows[level])
