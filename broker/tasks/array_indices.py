"""The indices of an array: as a user writes them, as few ascending ranges as can be, and by position. Pure.

Elements are counted by position, in the order of their indices. Which index stands at a position is written with the
array's record: ``start:step:count`` where one range holds all indices. Of several it is ``first:0:count``, and behind
that three numbers for each range, all of the same width, so that the scripts find a range without reading all of them:
position of its first element, its start, its step.

>>> text_of(ranges_of("10-14:2,1,2,7%4")[0])
'1:0:6 00 01 01 02 07 01 03 10 02'
>>> [Indices.read("1:0:6 00 01 01 02 07 01 03 10 02")[position] for position in range(6)]
[1, 2, 7, 10, 12, 14]
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import accumulate, chain
from operator import attrgetter

from pilotq.broker.errors import InvalidInput

INDEX_LIMIT = 2**53 - 1  # the server's scripts and many readers of JSON have no exact larger ones
RANGES_MAX = 10_000  # of one array: they stand in its record
COMPARED_MAX = 1_000_000  # indices of ranges that lie in each other

_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?")
_LIMIT = re.compile(r"[0-9]{1,15}")
_FORM = "write FIRST-LAST or FIRST-LAST:STEP, such as 0-99; several with commas, and %N behind all for N at a time"


def ranges_of(text: str) -> tuple[tuple[range, ...], int | None]:
    """``1,3-5,10-20:2%4`` -> ranges, and how many elements may run at a time; both ends are included.

    Raises InvalidInput, also for an index that is named twice.
    """
    body, percent, most = text.strip().partition("%")
    limit = int(most) if _LIMIT.fullmatch(most) else None
    if percent and limit is None:
        raise InvalidInput(f"{_short(text)} has no number behind %: {_FORM}")
    if limit == 0:
        raise InvalidInput(f"{_short(text)}: at most 0 at a time would run nothing: write %1 or more")
    return joined(_range(part.strip(), text) for part in body.split(",")), limit


def _range(part: str, text: str) -> range:
    match = _RANGE.fullmatch(part)
    if not match:
        if part.startswith("-") and _RANGE.fullmatch(part[1:]):
            raise InvalidInput(f"{_short(part)} is no array: an index cannot be negative")
        where = f" in {_short(text)}" if part != text.strip() else ""
        raise InvalidInput(f"{_short(part)}{where} is no array: {_FORM}")
    if max(map(len, filter(None, match.groups()))) > 18:
        raise InvalidInput(f"{_short(part)} is no array: an index may be at most {INDEX_LIMIT:,}")
    start, stop, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
    if problem := range_problem(start, stop, step):
        raise InvalidInput(problem)
    return range(start, stop + 1, step)


def range_problem(start: int, stop: int, step: int) -> str:
    """What is wrong with one range; empty if nothing."""
    text = f"'{start}-{stop}'" if step == 1 else f"'{start}-{stop}:{step}'"
    if start < 0:
        return f"{text}: an index cannot be negative"
    if stop < start or step < 1:
        return f"{text} is an array without elements: LAST must not be below FIRST, and STEP at least 1"
    if max(stop, step) > INDEX_LIMIT:
        return f"{text}: an index may be at most {INDEX_LIMIT:,}"
    return ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def joined(ranges: Iterable[range]) -> tuple[range, ...]:
    """The same indices in few ascending ranges, of which none begins before the one in front of it has ended.

    Raises InvalidInput for an index that stands in two of them, and for more than RANGES_MAX.
    """
    found: list[range] = []
    for group in _overlapping(sorted(ranges, key=attrgetter("start"))):
        for part in group if len(group) == 1 else _merged(group):
            _append(found, part)
    return _checked(found)


def joined_indices(indices: Iterable[int]) -> tuple[range, ...]:
    """As `joined`, of single indices."""
    try:
        ordered = sorted(map(operator.index, indices))
    except TypeError:
        raise InvalidInput(
            "indices are whole numbers; of a text such as '1,3-5' ArrayRange.parse makes an array"
        ) from None
    found: list[range] = []
    last = -1
    for index in ordered:
        if index < 0 or index > INDEX_LIMIT:
            raise InvalidInput(f"an index must be from 0 to {INDEX_LIMIT:,}, not {index:,}")
        if index == last:
            raise _twice(index)
        last = index
        _append(found, range(index, index + 1))
    return _checked(found)


def _checked(found: list[range]) -> tuple[range, ...]:
    if len(found) > RANGES_MAX:
        raise InvalidInput(
            f"an array may have at most {RANGES_MAX:,} ranges of indices, not {len(found):,}: submit several arrays, "
            "or name the indices as values (--each-line)"
        )
    return tuple(found) if len(found) == 1 else tuple(map(_tight, found))


def _twice(index: int) -> InvalidInput:
    return InvalidInput(f"the index {index} is named twice: each element runs once")


def _tight(part: range) -> range:
    """The same, with the last index as its end."""
    return range(part.start, part[-1] + 1, part.step if len(part) > 1 else 1)


def _overlapping(ranges: Sequence[range]) -> Iterator[list[range]]:
    """Groups of ranges of which each begins before one in front of it has ended; they are sorted by start."""
    group: list[range] = []
    end = -1
    for part in ranges:
        if group and part.start > end:
            yield group
            group = []
        group.append(part)
        end = max(end, part[-1])
    if group:
        yield group


def _merged(group: list[range]) -> Iterator[range]:
    """The indices of ranges that lie in each other, one by one."""
    if sum(map(_length, group)) > COMPARED_MAX:
        raise InvalidInput(
            f"ranges that lie in each other may have at most {COMPARED_MAX:,} indices: write them one behind the "
            "other, or submit several arrays"
        )
    last = -1
    for index in merge(*group):
        if index == last:
            raise _twice(index)
        last = index
        yield range(index, index + 1)


def _length(part: range) -> int:
    return (part.stop - part.start - 1) // part.step + 1  # len() fails above 2^63


def _append(found: list[range], part: range) -> None:
    """Add a range behind the others: as a part of the last one, or of the last two, where their steps go on."""
    last = found[-1] if found else None
    if last is None:
        found.append(part)
        return
    step = part.start - last[-1]
    goes_on = len(part) == 1 or part.step == step
    if goes_on and (last.step == step if len(last) > 1 else step == 1 or len(part) > 1):
        found[-1] = range(last.start, part[-1] + 1, step)
    elif goes_on and len(found) > 1 and len(last) == len(found[-2]) == 1 and last[0] - found[-2][0] == step:
        found[-2:] = [range(found[-2][0], part[-1] + 1, step)]
    else:
        found.append(part)


def text_of(ranges: Sequence[range]) -> str:
    """What stands in the array's record."""
    count = sum(map(len, ranges))
    if len(ranges) == 1:
        return f"{ranges[0].start}:{ranges[0].step}:{count}"
    positions = list(accumulate(map(len, ranges), initial=0))
    width = len(str(max(count, ranges[-1][-1])))
    rows = (
        f" {first:0{width}} {part.start:0{width}} {part.step:0{width}}"
        for first, part in zip(positions, ranges, strict=False)
    )
    return f"{ranges[0].start}:0:{count}" + "".join(rows)


class Indices:
    """The indices of an array by position. ``ranges`` as `joined` gives them."""

    def __init__(self, ranges: Sequence[range]) -> None:
        """Raises ValueError for more elements than can be counted."""
        self.ranges = tuple(ranges)
        if any(part.stop - part.start > INDEX_LIMIT * max(part.step, 1) for part in self.ranges):
            raise ValueError("an array of more elements than can be counted")
        self._firsts = list(accumulate(map(len, self.ranges), initial=0))  # positions; the last one is the number

    @classmethod
    def read(cls, text: str | bytes) -> Indices:
        """From the array's record. Raises ValueError where that is damaged."""
        head, *rest = (text.decode() if isinstance(text, bytes) else text).split(" ")
        start, step, count = map(int, head.split(":"))
        if start < 0 or count < 1 or step < 0 or bool(step) == bool(rest) or len(rest) % 3:
            raise ValueError(f"{head!r} is no array")
        if not rest:
            return cls([range(start, start + step * count, step)])
        numbers = list(map(int, rest))
        ends = [*numbers[3::3], count]
        parts = zip(numbers[::3], ends, numbers[1::3], numbers[2::3], strict=True)
        return cls([range(low, low + (end - first) * by, by) for first, end, low, by in parts])

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, position: int) -> int:
        number = bisect_right(self._firsts, position) - 1
        return self.ranges[number][position - self._firsts[number]]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self.ranges)

    def position(self, index: int) -> int | None:
        """The position of an element by its index; None when no element has it."""
        number = bisect_right(self.ranges, index, key=attrgetter("start")) - 1
        if number < 0 or index not in self.ranges[number]:
            return None
        return self._firsts[number] + self.ranges[number].index(index)

    def between(self, first: int, end: int) -> Iterator[range]:
        """The indices at the positions from ``first`` up to, but without, ``end``."""
        number = bisect_right(self._firsts, first) - 1
        while first < end:
            here = self._firsts[number]
            part = self.ranges[number][first - here : end - here]
            yield part
            first += len(part)
            number += 1
