"""The cores of one node, and an index that finds nodes by their number of free cores. Pure.

Cores of a node are bits of one number (bit n is core n), nodes are bits of another (bit i is the node with index i), so
that nothing here loops over all cores or all nodes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import lru_cache

from pilotq.broker.store.resources import NodeInfo, NodeShare
from pilotq.broker.tasks.model import Request


@lru_cache(maxsize=4096)
def mask_of(cores: tuple[int, ...]) -> int:
    mask = 0
    for core in cores:
        mask |= 1 << core
    return mask


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def lowest(mask: int, count: int) -> int:
    """The ``count`` lowest bits of a mask that has at least so many."""
    low = mask & -mask
    run = (low << count) - low
    if mask & run == run:  # mostly they lie side by side
        return run
    rest = mask
    for _ in range(count):
        rest &= rest - 1
    return mask ^ rest


def compact(free: int, groups: tuple[int, ...], count: int) -> int:
    """``count`` of the free cores, of as few NUMA groups as can be; of one group the one that has least to spare."""
    if not groups:
        return lowest(free, count)
    shares = [free & group for group in groups]
    fitting = [share for share in shares if share.bit_count() >= count]
    if fitting:
        return lowest(min(fitting, key=int.bit_count), count)
    largest = max(shares, key=int.bit_count)
    return largest | compact(free ^ largest, groups, count - largest.bit_count())


@lru_cache(maxsize=1024)
def carve(free: int, groups: tuple[int, ...], size: int, count: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """``count`` pieces of ``size`` cores: the mask of all of them, and the cores of each."""
    # Cached, because equal nodes are filled in equal ways.
    left = free
    pieces = []
    for _ in range(count):
        piece = compact(left, groups, size)
        left ^= piece
        pieces.append(tuple(bits(piece)))
    return free ^ left, tuple(pieces)


class NodeCores:
    """One node: what it has and what of it is free now."""

    __slots__ = (
        "all", "counters", "counters_free", "free", "gpus", "gpus_free", "groups", "held", "memory", "memory_free",
        "name", "open", "end", "size", "index",
    )  # fmt: skip

    def __init__(self, info: NodeInfo) -> None:
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
        self.gpus = self.gpus_free = tuple(info.gpus)
        self.memory = self.memory_free = info.memory
        self.counters = info.counters
        self.counters_free = dict(info.counters)

    def copy(self) -> NodeCores:
        other = copy.copy(self)
        other.counters_free = dict(self.counters_free)
        return other

    def has_free_extras(self, request: Request) -> bool:
        """Whether it has free now what the request wants besides cores."""
        if len(self.gpus_free) < request.gpus or (self.memory and self.memory_free < request.memory):
            return False
        return all(self.counters_free.get(name, 0) >= count for name, count in request.use)

    def take(self, share: NodeShare) -> None:
        mask = mask_of(share.cores)
        if mask & ~self.free or not set(share.gpus) <= set(self.gpus_free):
            raise ValueError(f"{share.node} does not have all of cores {share.cores} and GPUs {share.gpus} free")
        self.free ^= mask
        self._add(share, -1)
        if share.gpus:
            self.gpus_free = tuple(g for g in self.gpus_free if g not in share.gpus)

    def release(self, share: NodeShare) -> None:
        mask = mask_of(share.cores)
        if mask & self.free or mask & ~self.all:
            raise ValueError(f"of cores {share.cores} of {share.node} some are not reserved: they cannot be released")
        self.free |= mask
        self._add(share, 1)
        if share.gpus:
            self.gpus_free = tuple(g for g in self.gpus if g in self.gpus_free or g in share.gpus)

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
