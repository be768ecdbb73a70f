"""The indices of an array: joined to ranges, by position, and as they stand in a record."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.array_indices import INDEX_LIMIT, RANGES_MAX, Indices, joined, joined_indices, text_of
from pilotq.broker.tasks.array_outcomes import element_ranges, indices_of
from pilotq.broker.tasks.model import ArrayRange, Task
from pilotq.broker.tasks.validation import validate

RANGES = st.tuples(st.integers(0, 60), st.integers(0, 12), st.integers(1, 5)).map(
    lambda r: range(r[0], r[0] + r[1] + 1, r[2])
)


@given(st.lists(RANGES, min_size=1, max_size=6))
def test_ranges_in_any_order_are_joined_or_name_an_index_twice(ranges: list[range]) -> None:
    indices = sorted(index for part in ranges for index in part)
    twice = len(set(indices)) < len(indices)
    if twice:
        with pytest.raises(InvalidInput, match="is named twice"):
            joined(ranges)
        return
    found = joined(ranges)
    assert [index for part in found for index in part] == indices
    assert all(len(one) and one[-1] < other[0] for one, other in pairwise(found))
    assert [index for part in joined_indices(reversed(indices)) for index in part] == indices
    validate(Task(command=["true"], array=ArrayRange.of(indices, limit=1)), "here")


@given(st.sets(st.integers(0, 99) | st.integers(INDEX_LIMIT - 9, INDEX_LIMIT), min_size=1), st.data())
def test_a_record_tells_index_and_position(wanted: set[int], data: st.DataObject) -> None:
    expected = sorted(wanted)
    indices = Indices.read(text_of(ArrayRange.of(wanted).ranges))
    assert list(indices) == expected == [indices[position] for position in range(len(indices))]
    asked = [*range(101), *range(INDEX_LIMIT - 10, INDEX_LIMIT + 2)]
    assert [i for i in asked if indices.position(i) is not None] == expected
    assert [indices.position(index) for index in expected] == list(range(len(expected)))
    first = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(first, len(expected)))
    assert [index for part in indices.between(first, end) for index in part] == expected[first:end]
    ranges = element_ranges(b"\x55" * 40, text_of(indices.ranges))
    assert list(indices_of(ranges["finished"])) == expected


def test_ranges_are_few() -> None:
    million = ArrayRange.of(range(1, 2_000_001, 2))
    assert million == ArrayRange(1, 1_999_999, 2) and len(million) == 1_000_000
    assert ArrayRange.of([*range(5), 9, *range(20, 30, 3)]).ranges == (range(5), range(9, 10), range(20, 30, 3))
    assert text_of(ArrayRange.parse("1,3-5,10-20:2").ranges) == "1:0:10 00 01 01 01 03 01 04 10 02"


@pytest.mark.parametrize(
    "text", ["", "x", "1:2", "1:1:0", "0:0:5", "1:1:2 0 1 1", "1:0:3 0 1 1 1", "1:0:3 0 1 x", "-1:1:3"]
)
def test_a_damaged_record_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        Indices.read(text)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (ArrayRange(0, 9, limit=0), "limit must be at least 1"),
        (ArrayRange(0, 9, limit=True), "limit must be a whole number"),
        (ArrayRange(0, 9, more=((9, 12, 1),)), "must be apart and ascending"),
        (ArrayRange(0, 9, more=((20, 12, 1),)), "'20-12' is an array without elements"),
        (ArrayRange(0, 9, more=[(20, 22, 1)]), r"more must be a tuple of \(start, stop, step\), not list"),  # type: ignore[arg-type]
        (ArrayRange(0, 0, more=tuple((n, n, 1) for n in range(1, RANGES_MAX + 1))), "at most 10,000 ranges"),
        (ArrayRange(-2, 9), "an index cannot be negative"),
        (ArrayRange(0, INDEX_LIMIT + 1), "may be at most 9,007,199,254,740,991"),
    ],
)
def test_arrays_that_are_refused(array: ArrayRange, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        validate(Task(command=["true"], array=array), "here")


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([], "needs an index"),
        ([3, 1, 3], "index 3 is named twice"),
        ([-1], "not -1"),
        ("1-3", "ArrayRange.parse"),
        ([INDEX_LIMIT + 1], "from 0 to"),
    ],
)
def test_indices_that_are_refused(indices: list[int], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        ArrayRange.of(indices)
