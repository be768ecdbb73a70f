"""A table of measured points: as text for docs/figures.md, as a plot, and the slopes that fit its columns."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import Figure

PLOTS = Path(__file__).parents[2] / "docs" / "plots"


class Column(NamedTuple):
    """``slope``: how its values grow with the first column, as the exponent of a power, or for each unit of it."""

    name: str
    unit: str
    values: list[float]
    slope: str = ""  # "power", "linear" or "" for none


class Table(NamedTuple):
    """``x`` is what the points differ in; each panel of the plot shows the columns of one unit."""

    name: str
    title: str
    x: str
    points: list[float]
    columns: list[Column]

    def markdown(self) -> str:
        rows = [f"| {self.x} | {' | '.join(c.name + (f', {c.unit}' if c.unit else '') for c in self.columns)} |"]
        rows.append("|" + "---|" * (len(self.columns) + 1))
        for number, point in enumerate(self.points):
            rows.append(f"| {point:,g} | {' | '.join(shown(c.values[number]) for c in self.columns)} |")
        rows.append(f"| slope | {' | '.join(self._slope_text(c) for c in self.columns)} |")
        return f"\n{self.title}\n\n" + "\n".join(rows) + "\n"

    def slope(self, column: Column) -> float:
        """Over the points that have a value."""
        pairs = [(x, y) for x, y in zip(self.points, column.values, strict=True) if not math.isnan(y)]
        if column.slope == "power":
            pairs = [(math.log(x), math.log(y)) for x, y in pairs if y > 0]
        if len(pairs) < 2:
            return math.nan
        return statistics.linear_regression(*zip(*pairs, strict=True)).slope

    def figures(self) -> list[Figure]:
        """The slopes, and each column's last value."""
        found = []
        for column in self.columns:
            measured = [number for number, value in enumerate(column.values) if not math.isnan(value)]
            if not measured:
                continue
            last = measured[-1]
            detail = f"slope {self._slope_text(column)}" if column.slope else ""
            what = f"{self.title}: {column.name}, {self.points[last]:,g} {self.x}"
            found.append(Figure(what, column.values[last], column.unit, detail=detail))
        return found

    def plot(self) -> None:
        """Writes docs/plots/<name>.svg; needs matplotlib (the extra ``report``)."""
        import matplotlib as mpl

        mpl.use("svg")
        mpl.rcParams["svg.hashsalt"] = "pilotq"
        from matplotlib import pyplot as plt

        units = list(dict.fromkeys(column.unit for column in self.columns))
        figure, panels = plt.subplots(1, len(units), figsize=(4.2 * len(units), 3.2), squeeze=False)
        for unit, panel in zip(units, panels[0], strict=True):
            for column in self.columns:
                if column.unit == unit:
                    panel.plot(self.points, column.values, marker="o", label=column.name)
            panel.set_xscale("log")
            values = [v for c in self.columns if c.unit == unit for v in c.values if v > 0]
            if values and max(values) / min(values) > 10:
                panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
            panel.set_xlabel(self.x)
            panel.set_ylabel(unit or "share")
            panel.legend(fontsize="small")
            panel.grid(alpha=0.3)
        figure.suptitle(self.title, fontsize="medium")
        figure.tight_layout()
        PLOTS.mkdir(exist_ok=True)
        figure.savefig(PLOTS / f"{self.name}.svg", metadata={"Date": None})
        plt.close(figure)

    def _slope_text(self, column: Column) -> str:
        slope = self.slope(column) if column.slope else math.nan
        if math.isnan(slope):
            return ""
        return f"x^{slope:.2f}" if column.slope == "power" else f"{shown(slope)} each"


def shown(value: float) -> str:
    """A number for people; nothing where there is none."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
