#!/usr/bin/env python3
"""The last task of the sweep: ``gather.py TASKS`` makes results/summary.json and results/sweep.png.

It refuses to draw from fewer results than ``TASKS``: a gap would look like a finished measurement.
"""

import json
import statistics
import sys
from pathlib import Path

from fit import Fit, Point, fit, from_line, read

NAMES = ("start", "half_life_s", "background")
RESULTS = Path("results")
# The central 68 % and 95 % of the resamples, in 1/1000.
INNER = (159, 841)
OUTER = (25, 975)


def collect(tasks: int) -> list[Fit]:
    files = sorted(RESULTS.glob("fit-*.csv"))
    if len(files) != tasks:
        sys.exit(f"{RESULTS.resolve()} holds the results of {len(files)} tasks, not {tasks}: run the sweep again.")
    return [from_line(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def between(values: list[float], bounds: tuple[int, int]) -> tuple[float, float]:
    """The two quantiles, given in 1/1000."""
    cuts = statistics.quantiles(values, n=1000, method="inclusive")
    return cuts[bounds[0] - 1], cuts[bounds[1] - 1]


def summarize(best: Fit, fits: list[Fit], tasks: int) -> dict[str, object]:
    summary: dict[str, object] = {"tasks": tasks, "resamples": len(fits)}
    for name, value, column in zip(NAMES, best, zip(*fits, strict=True), strict=True):
        low, high = between(list(column), INNER)
        summary[name] = {"fit": value, "median": statistics.median(column), "from": low, "to": high}
    return summary


def draw(points: list[Point], best: Fit, fits: list[Fit], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        sys.exit("gather.py draws with matplotlib, which is not installed: pip install 'pilotq[report]'.")
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    times = [t for t, _ in points]
    some = fits[:: max(1, len(fits) // 1000)]  # a band looks the same from 1,000 curves
    band = [between([a * 2 ** (-t / h) + b for a, h, b in some], OUTER) for t in times]
    left.errorbar(
        times, [n for _, n in points], [n**0.5 for _, n in points], fmt=".", color="0.55", ms=4, lw=0.8, label="counts"
    )
    left.fill_between(times, *zip(*band, strict=True), color="C1", alpha=0.35, lw=0, label="95 % of the resamples")
    left.plot(times, [best[0] * 2 ** (-t / best[1]) + best[2] for t in times], color="C1", lw=1.4, label="fit")
    left.set(xlabel="time in s", ylabel="counts in 10 s", yscale="log", title="A decaying sample")
    left.legend(frameon=False)

    half_lives = [h for _, h, _ in fits]
    low, high = between(half_lives, INNER)
    right.hist(half_lives, bins=60, color="C0", alpha=0.8)
    right.axvspan(low, high, color="C1", alpha=0.2, lw=0)
    right.axvline(best[1], color="C1", lw=1.4)
    title = f"{best[1]:.1f} s, 68 % between {low:.1f} and {high:.1f} s"
    right.set(xlabel="half-life in s", ylabel=f"of {len(fits):,} resamples", title=title)
    figure.savefig(path, dpi=130)


def main() -> None:
    tasks = int(sys.argv[1])
    points, fits = read(), collect(tasks)
    best = fit(points)
    summary = summarize(best, fits, tasks)
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(points, best, fits, RESULTS / "sweep.png")
    low, high = between([h for _, h, _ in fits], INNER)
    print(f"half-life {best[1]:.1f} s, 68 % of {len(fits):,} resamples between {low:.1f} and {high:.1f} s")


if __name__ == "__main__":
    main()
