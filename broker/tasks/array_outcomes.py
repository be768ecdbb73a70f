"""What became of the elements of an array: two bits each, by position, and compact ranges of indices. Pure.

Ranges are text as people write it: ``0-3,7``; with a step ``0-8:2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

WORDS = ("waiting", "finished", "failed", "canceled")  # by the two bits of an element
_SHIFTS = (6, 4, 2, 0)  # of a byte, for its four elements
_OPEN = re.compile(b"[%s]" % re.escape(bytes(b for b in range(256) if any(not b >> s & 3 for s in _SHIFTS))))
_SAME = re.compile(rb"(.)\1*", re.DOTALL)


def outcome_at(bits: bytes, position: int, following: int) -> str:
    """What became of an element: one of WORDS, or started. From position ``following`` on none was handed out."""
    byte = bits[position >> 2] if position >> 2 < len(bits) else 0
    outcome = (byte >> (6 - 2 * (position & 3))) & 3
    return "started" if outcome == 0 and position < following else WORDS[outcome]


def open_positions(bits: bytes, following: int) -> Iterator[int]:
    """Positions before ``following`` of elements that have not ended."""
    for found in _OPEN.finditer(bits.ljust((following + 3) // 4, b"\0")):
        for position in range(4 * found.start(), min(4 * found.start() + 4, following)):
            if (found[0][0] >> (6 - 2 * (position & 3))) & 3 == 0:
                yield position


def element_ranges(bits: bytes, array: str, following: int) -> dict[str, str]:
    """Word of `outcome_at` -> ranges of indices. ``array`` is ``start:step:count``."""
    start, step, count = map(int, array.split(":"))
    suffix = f":{step}" if step > 1 else ""
    found: dict[str, list[str]] = {}
    for word, first, end in _joined(_runs(bits, count, following)):
        low, high = start + first * step, start + (end - 1) * step
        found.setdefault(word, []).append(str(low) if low == high else f"{low}-{high}{suffix}")
    return {word: ",".join(pieces) for word, pieces in found.items()}


def _joined(runs: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Neighbours of one word as one."""
    last: tuple[str, int, int] | None = None
    for word, first, end in runs:
        if last is not None and last[0] == word:
            last = word, last[1], end
            continue
        if last is not None:
            yield last
        last = word, first, end
    if last is not None:
        yield last


def _runs(bits: bytes, count: int, following: int) -> Iterator[tuple[str, int, int]]:
    """(word, first position, position behind the last) from front to back."""
    position = 0
    for same in _SAME.finditer(bits.ljust((count + 3) // 4, b"\0")):
        byte = same[1][0]
        end = min(same.end() * 4, count)
        outcome = byte & 3
        if byte != outcome * 0x55:
            for place in range(position, end):
                yield outcome_at(bits, place, following), place, place + 1
        elif outcome == 0 and position < following < end:
            yield "started", position, following
            yield "waiting", following, end
        elif position < end:
            yield outcome_at(bits, position, following), position, end
        position = end


def _pieces(ranges: str) -> Iterator[range]:
    for piece in ranges.split(",") if ranges else ():
        span, _, step = piece.partition(":")
        low, _, high = span.partition("-")
        yield range(int(low), int(high or low) + 1, int(step or 1))


def count_of(ranges: str) -> int:
    """How many indices these ranges hold."""
    return sum(map(len, _pieces(ranges)))


def word_of(elements: dict[str, str], index: int) -> str | None:
    """The word whose ranges hold the index; None when none does."""
    return next((word for word, ranges in elements.items() if any(index in r for r in _pieces(ranges))), None)


def indices_of(ranges: str) -> Iterator[int]:
    """The indices that these ranges hold."""
    for piece in _pieces(ranges):
        yield from piece
