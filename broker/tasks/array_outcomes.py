"""The outcomes of the elements of an array: the decoder of two bits each, by position, and compact ranges of indices.

Ranges are text as people write it: ``0-3,7``; with a step ``0-8:2``.

>>> element_ranges(b"\x55\x95", "10:5:8")
{'finished': '10-25:5,35-45:5', 'failed': '30'}
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from pilotq.broker.tasks.array_indices import Indices

FINISHED, FAILED, CANCELED = 1, 2, 3  # the two bits of an element; 0: it has not ended
OUTCOMES = ("waiting", "finished", "failed", "canceled")  # by the two bits
_SHIFTS = (6, 4, 2, 0)  # of a byte, for its four elements
_OPEN = re.compile(b"[%s]" % re.escape(bytes(b for b in range(256) if any(not b >> s & 3 for s in _SHIFTS))))
_SAME = re.compile(rb"(.)\1*", re.DOTALL)
_ONLY_FINISHED = bytes(sum((byte >> s & 3 == FINISHED) << s for s in _SHIFTS) for byte in range(256))


def outcome_at(outcomes: bytes, position: int, next_position: int) -> str:
    """The outcome of an element: one of OUTCOMES, or started. From ``next_position`` on none was handed out."""
    byte = outcomes[position >> 2] if position >> 2 < len(outcomes) else 0
    outcome = (byte >> (6 - 2 * (position & 3))) & 3
    return "started" if outcome == 0 and position < next_position else OUTCOMES[outcome]


def positions_with(outcomes: bytes, wanted: Container[int], count: int) -> Iterator[int]:
    """Positions of the elements, of ``count``, with one of these outcomes (FAILED or CANCELED)."""
    for place, byte in enumerate(outcomes):
        if byte not in (0x00, 0x55):
            for number, shift in enumerate(_SHIFTS):
                if byte >> shift & 3 in wanted and 4 * place + number < count:
                    yield 4 * place + number


def number_with(outcomes: bytes, outcome: int) -> int:
    """How many elements have this outcome."""
    return sum(outcomes.translate(bytes(sum(byte >> s & 3 == outcome for s in _SHIFTS) for byte in range(256))))


def only_finished(outcomes: bytes) -> bytes:
    """The same with only FINISHED kept: all other elements have not ended."""
    return outcomes.translate(_ONLY_FINISHED)


def open_positions(outcomes: bytes, next_position: int) -> Iterator[int]:
    """Positions before ``following`` of elements that have not ended."""
    for found in _OPEN.finditer(outcomes.ljust((next_position + 3) // 4, b"\0")):
        for position in range(4 * found.start(), min(4 * found.start() + 4, next_position)):
            if (found[0][0] >> (6 - 2 * (position & 3))) & 3 == 0:
                yield position


def element_ranges(outcomes: bytes, array: str, next_position: int = 0) -> dict[str, str]:
    """Outcome, as of `outcome_at` -> ranges of indices. ``array`` as `array_indices.text_of` has it."""
    indices = Indices.read(array)
    found: dict[str, list[str]] = {}
    for word, first, end in _joined(_runs(outcomes, len(indices), next_position)):
        found.setdefault(word, []).extend(map(_range_text, indices.between(first, end)))
    return {word: ",".join(pieces) for word, pieces in found.items()}


def _range_text(part: range) -> str:
    if len(part) == 1:
        return str(part[0])
    return f"{part[0]}-{part[-1]}:{part.step}" if part.step > 1 else f"{part[0]}-{part[-1]}"


def _joined(runs: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Neighbours with the same outcome as one run."""
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


def _runs(outcomes: bytes, count: int, next_position: int) -> Iterator[tuple[str, int, int]]:
    """(outcome, first position, position behind the last) from front to back."""
    position = 0
    for same in _SAME.finditer(outcomes.ljust((count + 3) // 4, b"\0")):
        byte = same[1][0]
        end = min(same.end() * 4, count)
        outcome = byte & 3
        if byte != outcome * 0x55:
            for place in range(position, end):
                yield outcome_at(outcomes, place, next_position), place, place + 1
        elif outcome == 0 and position < next_position < end:
            yield "started", position, next_position
            yield "waiting", next_position, end
        elif position < end:
            yield outcome_at(outcomes, position, next_position), position, end
        position = end


def _pieces(ranges: str) -> Iterator[range]:
    for piece in ranges.split(",") if ranges else ():
        span, _, step = piece.partition(":")
        low, _, high = span.partition("-")
        yield range(int(low), int(high or low) + 1, int(step or 1))


def count_indices(ranges: str) -> int:
    """How many indices these ranges hold."""
    return sum(map(len, _pieces(ranges)))


def ids_text(bundle: str, ranges: str) -> str:
    """The ids of the tasks of a bundle that ranges hold, for people: ``1f_0 to 1f_3, 1f_7``."""
    return ", ".join(
        f"{bundle}_{part[0]}" if len(part) == 1 else f"{bundle}_{part[0]} to {bundle}_{part[-1]}"
        for part in _pieces(ranges)
    )


def outcome_of(elements: dict[str, str], index: int) -> str | None:
    """The outcome whose ranges hold the index; None when none does."""
    return next((outcome for outcome, ranges in elements.items() if any(index in r for r in _pieces(ranges))), None)


def indices_of(ranges: str) -> Iterator[int]:
    """The indices that these ranges hold."""
    for piece in _pieces(ranges):
        yield from piece
