"""Packs the executions of a report into its page: columns of numbers in the order of core and end, compressed.

A packed column is zlib's format in base64. Of numbers it has one byte that says how many bytes a number has; then come
the lowest bytes of all numbers, then those above, and so on: bytes that are alike are neighbours. Words are JSON.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from array import array
from base64 import b64encode
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pilotq.broker.client.executions import Executions, Words
from pilotq.broker.store.resources import parse_allocation
from pilotq.cli import formatting

CHARACTERS_MAX = 7_000_000  # of all packed columns
EXECUTIONS_MAX = 3_000_000  # more are not tried
UNITS = (1e-6, 1e-3)  # seconds that times are rounded to
MOMENTS = 1 << 20  # of the coarsest rounding
TAIL = re.compile(r"(?:0|[1-9][0-9]{0,14})\Z")


class Packed(NamedTuple):
    """Columns for the page's script, empty if not even times alone are small enough, and a sentence on what is lost."""

    columns: dict[str, Any]
    lost: str


def pack(data: bytes) -> str:
    return b64encode(zlib.compress(data, 6)).decode()


def pack_numbers(numbers: Iterable[int]) -> str:
    """Pack numbers that are not negative."""
    column = array("Q", numbers)
    if sys.byteorder == "big":
        column.byteswap()
    size = max((max(column, default=0).bit_length() + 7) // 8, 1)
    data = column.tobytes()
    return pack(bytes([size]) + b"".join(data[at::8] for at in range(size)))


def pack_bars(
    runs: Executions, held: Sequence[tuple[str, int]], begin: float, seconds: float, limit: int = CHARACTERS_MAX
) -> Packed:
    """Pack the executions, on the cores ``held``, into at most ``limit`` characters.

    They are shown from ``begin`` on for so many ``seconds``. What is too large loses: digits of times, names, ids.
    """
    many = "The executions are too many to be in the page one by one: it shows how busy cores were."
    if len(runs) > EXECUTIONS_MAX:
        return Packed({}, many)
    places, order = _by_core(runs, held)
    rest = {**places, "status": pack_numbers(runs.status[run] for run in order)}
    names, ids = _names(runs, order), _ids(runs, order)
    units = [*UNITS, *(unit for unit in [seconds / MOMENTS] if unit > UNITS[-1])]
    times: dict[float, dict[str, str]] = {}
    for words, without in (({**names, **ids}, ""), (ids, "names are"), ({}, "names and ids are")):
        for unit in units:
            if _size(rest, words) > limit:
                break
            if unit not in times:
                times[unit] = _times(runs, order, begin, unit)
            if _size(rest, words, times[unit]) > limit:
                continue
            rounded = f"times are rounded to {unit:.2g} s" if unit > UNITS[0] else ""
            lost = " and ".join(part for part in (rounded, without and f"{without} left out") if part)
            columns = {"unit": unit, "count": len(runs), **rest, **times[unit], **words}
            return Packed(columns, f"So that the page stays small, {lost}." if lost else "")
    return Packed({}, many)


def _size(*groups: dict[str, str]) -> int:
    return sum(len(text) for group in groups for text in group.values())


def _signed(number: int) -> int:
    """The number as one that is not negative: 0, -1, 1, -2 are 0, 1, 2, 3."""
    return 2 * number if number >= 0 else -2 * number - 1


def _differences(numbers: Iterable[int]) -> str:
    def each() -> Iterable[int]:
        before = 0
        for number in numbers:
            yield _signed(number - before)
            before = number

    return pack_numbers(each())


def _by_core(runs: Executions, held: Sequence[tuple[str, int]]) -> tuple[dict[str, str], list[int]]:
    """The places in the order of their rows, and the executions in that of their places and ends.

    A place is spans of rows: ``spans`` has their number for each place, ``first`` and ``rows`` are those of each span,
    ``runs`` is how many executions a place had.
    """
    row_of = {core: row for row, core in enumerate(held)}
    spans = [_spans(text, row_of) for text in runs.places.words]
    ranked = sorted(range(len(spans)), key=spans.__getitem__)
    rank, counts = array("L", bytes(array("L").itemsize * len(spans))), [0] * len(spans)
    for at, place in enumerate(ranked):
        rank[place] = at
    for place in runs.place:
        counts[rank[place]] += 1
    order = sorted(range(len(runs)), key=lambda run: rank[runs.place[run]])
    columns = {
        "runs": pack_numbers(counts),
        "spans": pack_numbers(len(spans[place]) for place in ranked),
        "first": _differences(first for place in ranked for first, _ in spans[place]),
        "rows": pack_numbers(rows for place in ranked for _, rows in spans[place]),
    }
    return columns, order


def _spans(text: str, row_of: dict[tuple[str, int], int]) -> list[tuple[int, int]]:
    """The rows of an allocation, as first ones and their numbers."""
    spans: list[tuple[int, int]] = []
    parts = parse_allocation(text) if text else ()
    for row in sorted(row_of[part.node, core] for part in parts for core in part.cores):
        if spans and sum(spans[-1]) == row:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((row, 1))
    return spans


def _times(runs: Executions, order: Sequence[int], begin: float, unit: float) -> dict[str, str]:
    """For each execution the time from the end of the one before it to its start (``gaps``), and its ``lengths``."""
    gaps, lengths, before = array("Q"), array("Q"), 0
    for run in order:
        start = round((runs.started[run] - begin) / unit)
        end = round((runs.ended[run] - begin) / unit)
        gaps.append(_signed(start - before))
        lengths.append(end - start)
        before = end
    return {"gaps": pack_numbers(gaps), "lengths": pack_numbers(lengths)}


def _names(runs: Executions, order: Sequence[int]) -> dict[str, str]:
    words = [formatting.clean(name) for name in runs.names.words]
    return {"names": pack(json.dumps(words).encode()), "name": pack_numbers(runs.name[run] for run in order)}


def _ids(runs: Executions, order: Sequence[int]) -> dict[str, str]:
    """Ids as a word and the number after it, plus one; 0 where there is none."""
    heads = Words()
    head, number = array("L"), array("Q")
    for run in order:
        text = runs.ids[run]
        tail = TAIL.search(text)
        head.append(heads.number(text[: tail.start()] if tail else text))
        number.append(int(tail[0]) + 1 if tail else 0)
    return {"heads": pack(json.dumps(heads.words).encode()), "head": pack_numbers(head), "number": _differences(number)}
