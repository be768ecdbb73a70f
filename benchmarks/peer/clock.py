"""How a side is measured: the same code for the peers and for pilotq. It needs nothing but the standard library."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

TRUE = "/bin/true"
CHAIN = "chain"
LINKS, CHAINS = 200, 3  # of each chain; the median of so many counts
LEAST = 0.7  # a measurement takes at least this share of the seconds
STEP = 8
WARM = 20

# Does so many tasks, from the first submit to the end of the last one as the client sees it; what it returns tells
# afterwards how many of them are known to have done what they should.
Play = Callable[[int], Callable[[], int]]
System = Callable[[int], AbstractContextManager[Mapping[str, Play]]]


def nothing(number: int) -> int:
    return number + 1


def right(values: Iterable[object]) -> int:
    """How many results of ``nothing`` for 0, 1, 2, ... are right."""
    return sum(value == nothing(number) for number, value in enumerate(values))


def rate(plays: Mapping[str, Play], what: str, seconds: float) -> float:
    """Tasks a second, of as many tasks as take about so many seconds; a chain has the same length everywhere."""
    return chained(plays[what]) if what == CHAIN else scaled(what, plays[what], seconds)


def chained(play: Play) -> float:
    timed(CHAIN, play, WARM)
    return LINKS / median(timed(CHAIN, play, LINKS) for _ in range(CHAINS))


def scaled(what: str, play: Play, seconds: float) -> float:
    timed(what, play, WARM)  # a system may take seconds to have its workers; that would pass for a low rate
    number = WARM
    # Step by step: what a system needs for any number of tasks must not pass for what each of them takes.
    while (took := timed(what, play, number)) < seconds * LEAST:
        number = math.ceil(number * min(seconds / took, STEP))
    return number / took


def timed(what: str, play: Play, number: int) -> float:
    began = time.monotonic()
    done = play(number)
    took = time.monotonic() - began
    if (good := done()) != number:
        raise SystemExit(f"{what}: {good} of {number} tasks did what they should")
    return took


def main(system: System) -> None:
    """The program of a peer's side; arguments: cores, seconds, file for the rate, what to measure."""
    cores, seconds, report, what = sys.argv[1:]
    with system(int(cores)) as plays:
        found = rate(plays, what, float(seconds))
    Path(report).write_text(str(found))
