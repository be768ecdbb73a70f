"""Reads the executions back that a page of `pilotq report html` holds."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple


class Bar(NamedTuple):
    id: str
    name: str
    status: str
    start: int  # in units of the page's rounding
    end: int
    spans: list[tuple[int, int]]  # first rows and their numbers


def data_of(page: Path) -> dict[str, Any]:
    """The data of the page's script."""
    data: dict[str, Any] = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    return data


def words_of(text: str) -> list[str]:
    words: list[str] = json.loads(zlib.decompress(b64decode(text)))
    return words


def numbers_of(text: str) -> list[int]:
    data = zlib.decompress(b64decode(text))
    count = (len(data) - 1) // data[0]
    planes = (data[1 + at * count : 1 + (at + 1) * count] for at in range(data[0]))
    return [int.from_bytes(number, "little") for number in zip(*planes, strict=True)]


def bars_of(columns: dict[str, Any], statuses: list[str]) -> list[Bar]:
    """The executions; what was left out is empty."""
    spans = list(zip(_sums(columns["first"]), numbers_of(columns["rows"]), strict=True))
    places, first = [], 0
    for runs, count in zip(numbers_of(columns["runs"]), numbers_of(columns["spans"]), strict=True):
        places += [spans[first : first + count]] * runs
        first += count
    number = len(places)
    names, ids = [""] * number, [""] * number
    if "names" in columns:
        words = words_of(columns["names"])
        names = [words[at] for at in numbers_of(columns["name"])]
    if "heads" in columns:
        words = words_of(columns["heads"])
        tails = (str(tail - 1) if tail else "" for tail in _sums(columns["number"]))
        ids = [words[at] + tail for at, tail in zip(numbers_of(columns["head"]), tails, strict=True)]
    bars, at = [], 0
    for index, (gap, length) in enumerate(zip(_signed(columns["gaps"]), numbers_of(columns["lengths"]), strict=True)):
        at += gap
        bars.append(Bar(ids[index], names[index], "", at, at + length, places[index]))
        at += length
    return [bar._replace(status=statuses[at]) for bar, at in zip(bars, numbers_of(columns["status"]), strict=True)]


def _signed(text: str) -> list[int]:
    return [-(number + 1) // 2 if number % 2 else number // 2 for number in numbers_of(text)]


def _sums(text: str) -> list[int]:
    return list(accumulate(_signed(text)))
