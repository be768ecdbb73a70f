"""The packed lines of elements of an array that finished: they travel as columns, and become entries in the file.

>>> rows = [(7, 0, 500, 2000, 4711, 1 << 20, 1500)]
>>> run = RunLines("1f", "sim", "s1", "n1", 1, 100.0, 101.0, "sim", 0, 0.0, ["n1[0]"], 102.0, rows)
>>> entry = next(run.entries())
>>> entry.id, entry.index, entry.started, entry.ended, entry.cpu
('1f_7', 7, 102.0005, 102.0025, 0.0015)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from pilotq.broker.store.journal import PackedEntry

# index, place of its allocation, microseconds from `base` to its start, microseconds that it ran, pid, bytes of memory,
# microseconds of CPU time
Row = tuple[int, int, int, int, int, int, int]


class RunLines(msgspec.Struct, array_like=True):
    """What the entries of a run have in common, and a row for each element. Times are unix seconds."""

    array: str
    name: str
    submission: str
    node: str
    execution: int
    queued: float
    handed: float
    command: str
    memory: int  # bytes that were asked for
    limit: float  # of their time, in seconds; 0: none
    allocations: list[str]
    base: float
    rows: list[Row]
    more: dict[int, dict[str, Any]] = {}  # number of a row -> other fields of its entry
    bundled: bool = False  # they are tasks of a bundle: their index is no user's

    def entries(self) -> Iterator[PackedEntry]:
        """The entry of each element, in the order of the rows."""
        for number, (index, place, after, lasted, pid, max_rss, cpu) in enumerate(self.rows):
            started = round(self.base + after / 1e6, 6)
            entry = PackedEntry(
                id=f"{self.array}_{index}",
                name=self.name,
                status="finished",
                execution=self.execution,
                node=self.node,
                cpus=self.allocations[place],
                queued=self.queued,
                handed=self.handed,
                started=started,
                ended=round(started + lasted / 1e6, 6),
                exit_code=0,
                pid=pid,
                max_rss=max_rss,
                cpu=cpu / 1e6,
                array=self.array,
                index=None if self.bundled else index,
                command=self.command,
                submission=self.submission,
                memory=self.memory,
                limit=self.limit or None,
            )
            for name, value in self.more.get(number, {}).items():
                setattr(entry, name, value)
            yield entry
