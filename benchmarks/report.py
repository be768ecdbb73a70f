"""Measures `pilotq report html`: CPU time, peak memory and size of the page, of journals that are made up.

    python -m benchmarks report

512 cores on four nodes run tasks of 0.25 to 6 s one after the other; one in twenty fails. The figures are CPU time:
other work on the machine stays out of them that way. Each page is made by a process of its own.
"""

from __future__ import annotations

import heapq
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks.figures import Figure
from pilotq.broker.store.journal import JournalEntry

CORES, NODES = 512, 4
# executions -> seconds, MB of memory, MB of page; 0: there is no bound
BOUNDS = {100_000: (5, 0, 10), 1_000_000: (60, 1000, 10)}
MAKE = """
import json, os, resource, sys
from pilotq.broker.store.journal import Journal
from pilotq.cli.report_page import write_page
write_page(Journal(sys.argv[1]), sys.argv[2])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, os.path.getsize(sys.argv[2]) / 1e6]))
"""


def run() -> list[Figure]:
    figures = []
    for number, bounds in BOUNDS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plant(folder / "journal.jsonl", number)
            command = [sys.executable, "-c", MAKE, str(folder / "journal.jsonl"), str(folder / "page.html")]
            measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        units = (("CPU time", "s"), ("peak memory", "MB"), ("size", "MB"))
        for (what, unit), value, bound in zip(units, measured, bounds, strict=True):
            figures.append(Figure(f"report html, {number:,} executions, {what}", value, unit, bound, at_least=False))
    return figures


def plant(path: Path, number: int) -> None:
    """A journal of so many executions."""
    rng = random.Random(1)
    encode = msgspec.json.Encoder().encode
    free = [(0.5, core) for core in range(CORES)]
    with open(path, "wb") as file:
        for task in range(number):
            at, core = heapq.heappop(free)
            started = at + rng.random() * 0.02
            ended = started + rng.choice((0.5, 1, 2, 4)) * rng.uniform(0.5, 1.5)
            failed = rng.random() < 0.05
            node = f"n{core % NODES + 1}"
            entry = JournalEntry(
                id=f"1_{task}", name=rng.choice(("sim", "post")), status="failed" if failed else "finished",
                reason="exit" if failed else "", exit_code=int(failed), execution=1, node=node,
                cpus=f"{node}[{core // NODES}]", queued=1.7e9, handed=1.7e9 + started, started=1.7e9 + started,
                ended=1.7e9 + ended, cpu=ended - started, max_rss=rng.randrange(10**8), memory=1 << 28,
                command="./sim",
            )  # fmt: skip
            file.write(encode(entry) + b"\n")
            heapq.heappush(free, (ended, core))
