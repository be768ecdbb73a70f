"""The simulation in small: each part gives its figures, and its plot can be drawn."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulation import nodes, queue
from benchmarks.simulation.measured import Sizes
from benchmarks.simulation.tables import Column, Table
from tests.support.paths import ROOT

SIZES = Sizes(nodes=[2], queued=1_000)


def test_parts_by_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "FASTER", 1800.0)
    monkeypatch.setattr(nodes, "IDLE_S", 0.1)
    monkeypatch.setattr(nodes, "SHORT_MS", (0, 10))
    found = {table.name: table for table in nodes.measure_nodes(SIZES, ["nodes", "lengths", "idle"])}
    assert set(found) == {"nodes", "nodes-cpu", "lengths", "idle"}
    assert all(value > 0 for value in found["nodes"].columns[0].values)
    use = next(column for column in found["nodes"].columns if "clock as fast" in column.name)
    assert all(0 < value <= 1 for value in use.values)


def test_parts_by_what_waits() -> None:
    (table,) = queue.measure_queue(SIZES)
    assert table.points == [1_000] and all(
        column.values[0] > 0 for column in table.columns if column.unit != "bytes a task"
    )
    assert all(figure.value > 0 for figure in queue.measure_many(SIZES))


TABLE = Table("t", "A title", "nodes", [1.0, 2.0, 4.0], [
    Column("square", "s", [1.0, 4.0, 16.0], "power"),
    Column("line", "s", [3.0, 5.0, math.nan], "linear"),
    Column("none", "MB", [math.nan] * 3),
])  # fmt: skip


def test_a_table_has_slopes() -> None:
    text = TABLE.markdown()
    assert "| slope | x^2.00 | 2 each |  |" in text and "| 4 | 16 |  |  |" in text
    assert [figure.value for figure in TABLE.figures()] == [16.0, 5.0]


def test_a_table_has_a_plot(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from benchmarks.simulation import tables; "
        "from tests.benchmarks.test_simulation import TABLE; "
        f"tables.PLOTS = Path({str(tmp_path)!r}); TABLE.plot()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)  # matplotlib keeps its fonts open
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")
