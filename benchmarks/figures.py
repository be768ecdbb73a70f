"""The results of benchmarks: figures with their targets, printed as one table."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """``reach`` is the bound of the design; ``at_least`` tells which side of it is good. 0: there is none."""

    what: str
    value: float
    unit: str
    reach: float = 0.0
    at_least: bool = True
    detail: str = ""

    @property
    def verdict(self) -> str:
        if not self.reach:
            return ""
        good = self.value >= self.reach if self.at_least else self.value <= self.reach
        return "reached" if good else "missed"


def table(figures: list[Figure]) -> str:
    rows = [("figure", "value", "reach", "", "detail")]
    for f in figures:
        bound = f"{'>=' if f.at_least else '<='} {f.reach:,.4g}" if f.reach else ""
        rows.append((f.what, f"{f.value:,.4g} {f.unit}", bound, f.verdict, f.detail))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
