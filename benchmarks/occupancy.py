"""Measures how much of the cores is used while 20,000 x /bin/true run: what is missing waits for something.

    python -m benchmarks occupancy      # PILOTQ_COSTS=N: with N elements instead of 20,000

The share is the CPU time of the pilot's processes and of the tasks, over the time from the submit to the last end and
the cores. On a machine that others use, the cores are theirs, too: the detail says how much of them nobody used at all.
"""

from __future__ import annotations

import os
import statistics

from benchmarks.costs import submit_array, watched
from benchmarks.figures import Figure

ROUNDS = 3


def run() -> list[Figure]:
    number = int(os.environ.get("PILOTQ_COSTS", "20000"))
    found = [watched(submit_array, number) for _ in range(ROUNDS)]
    detail = (
        f"rounds {', '.join(f'{one.share:.2f}' for one in found)}; idle {', '.join(f'{one.idle:.2f}' for one in found)}"
    )
    what = f"share of the cores in use while {number:,} x /bin/true run"
    return [Figure(what, statistics.median(one.share for one in found), "", 0.95, True, detail)]
