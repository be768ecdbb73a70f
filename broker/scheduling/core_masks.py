"""Sets of cores of one node: bits of a number (bit n is core n), so that nothing here loops over all cores. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache


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


def scatter(free: int, groups: tuple[int, ...], count: int) -> int:
    """``count`` of the free cores, as evenly over the NUMA groups as these have free ones."""
    shares = sorted((free & group for group in groups), key=int.bit_count)
    mask = 0
    for number, share in enumerate(shares):  # the smallest first: what it lacks the others give
        size = min(share.bit_count(), (count - mask.bit_count()) // (len(shares) - number))
        if size:
            mask |= lowest(share, size)
    return mask
