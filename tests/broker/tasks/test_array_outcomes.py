"""Two bits an element: what they say one by one, and as ranges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotq.broker.tasks.array_outcomes import count_indices, element_ranges, outcome_at, outcome_of

OUTCOMES = st.lists(st.sampled_from([0, 1, 1, 1, 2, 3]), min_size=1, max_size=70)


def packed(outcomes: list[int]) -> bytes:
    """As BITFIELD u2 writes them: the first element in the highest bits, nothing behind the last that was set."""
    data = bytearray((len(outcomes) + 3) // 4)
    for place, outcome in enumerate(outcomes):
        data[place >> 2] |= outcome << (6 - 2 * (place & 3))
    return bytes(data).rstrip(b"\0")


@given(OUTCOMES, st.integers(0, 70), st.integers(0, 9), st.integers(1, 3))
def test_ranges_say_of_each_element_what_its_bits_do(
    outcomes: list[int], following: int, start: int, step: int
) -> None:
    bits = packed(outcomes)
    ranges = element_ranges(bits, f"{start}:{step}:{len(outcomes)}", following)
    for place in range(len(outcomes)):
        assert outcome_of(ranges, start + place * step) == outcome_at(bits, place, following)
    assert sum(map(count_indices, ranges.values())) == len(outcomes)
    assert outcome_of(ranges, start + len(outcomes) * step) is None


def test_ranges_are_compact() -> None:
    assert element_ranges(b"\x55" * 1000, "0:1:5000", 4500) == {
        "finished": "0-3999", "started": "4000-4499", "waiting": "4500-4999",
    }  # fmt: skip
    assert element_ranges(b"\x55\x95", "10:5:8", 8) == {"finished": "10-25:5,35-45:5", "failed": "30"}
    assert count_indices("10-25:5,35-45:5") == 7 and count_indices("") == 0
