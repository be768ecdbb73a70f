"""Runs of elements in the journal: their lines say what their entries say."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pilotq.broker.os_strings import from_json
from pilotq.broker.store.journal import JournalEntry, PackedEntry, decode_entry
from pilotq.broker.store.journal_runs import INDEX_PLACE, RunLines
from pilotq.broker.store.journal_writer import _FINISHED, _items_of, _render

TEXTS = st.text(max_size=12) | st.sampled_from([
    "", "a b", "\x7f\t", "\udcff", 'quote " and \\ back',
    "snow \N{SNOWMAN}", "\\u0000i", f"x{INDEX_PLACE}y{INDEX_PLACE}"
])  # fmt: skip
SMALL = st.integers(0, 10**6)
ROWS = st.tuples(st.integers(0, 10**15), st.integers(0, 1), SMALL, SMALL, SMALL, st.integers(0, 2**50), SMALL)
TIMES = st.floats(0, 4e9)
MORE = st.fixed_dictionaries({}, optional={"command": TEXTS, "name": TEXTS, "stdout": TEXTS | st.binary(max_size=5)})
RUNS = st.builds(
    RunLines, st.sampled_from(["1f", "v0"]), TEXTS, TEXTS, TEXTS, st.integers(1, 9), TIMES, TIMES, TEXTS,
    st.integers(0, 2**50), st.sampled_from([0.0, 60.0, 1e-6]), st.lists(TEXTS, min_size=2, max_size=2), TIMES,
    st.lists(ROWS, min_size=1, max_size=4), st.dictionaries(st.integers(0, 4), MORE, max_size=3), st.booleans(),
)  # fmt: skip


@given(RUNS)
def test_a_line_says_what_the_entry_says(run: RunLines) -> None:
    lines = run.begun_lines()
    written = any("stdout" in more for more in run.more.values())
    assert (lines is None) == written
    for line, entry in zip(lines or (), run.entries(), strict=lines is not None):
        made = _render(line, _FINISHED, "7-0:3")
        assert made.startswith(b'{"id":"') and made.endswith(b"}\n") and made.count(b"\n") == 1
        expected = _render(entry, _FINISHED, "7-0:3")
        assert from_json(made, PackedEntry) == from_json(expected, PackedEntry)


def test_times_that_are_none_are_left_to_the_entries() -> None:
    run = RunLines("1f", "", "s", "n", 1, 1.0, float("nan"), "c", 0, 0.0, ["n[0]"], 2.0, [(1, 0, 1, 1, 1, 1, 1)])
    assert run.begun_lines() is None


def test_lines_of_runs_are_read_as_entries() -> None:
    rows = [(7, 0, 500, 2000, 4711, 1 << 20, 1), (9, 0, 600, 2000, 4712, 1 << 20, 1500)]
    run = RunLines("1f", "sim", "s1", "n1", 1, 100.0, 101.0, f"sim {INDEX_PLACE}", 0, 0.0, ["n1[0]"], 102.0, rows)
    items = _items_of(b"r", msgspec.msgpack.encode([run, run]))
    found = [decode_entry(_render(item, ending, "7-0:3")) for item, ending in items]
    assert [entry.id for entry in found] == ["1f_7", "1f_9"] * 2
    first: JournalEntry = found[0]
    assert (first.command, first.started, first.cpu, first.at) == ("sim 7", 102.0005, 1e-06, "7-0:3")
    assert (first.status, first.final, first.array, first.index) == ("finished", True, "1f", 7)
