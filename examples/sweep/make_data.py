#!/usr/bin/env python3
"""Makes data/decay.csv: the simulated counts of a detector that watches a decaying sample.

The model is that of a school experiment with Ba-137m, whose half-life is 153.1 s: in a bin of width ``WIDTH`` seconds
that starts at t the detector counts a Poisson number with mean ``START * 2 ** (-t / HALF_LIFE) + BACKGROUND``.
"""

import csv
import math
import random

HALF_LIFE = 153.1  # seconds
START = 400.0  # counts in the first bin
BACKGROUND = 12.0  # counts in every bin
WIDTH = 10  # seconds
BINS = 120


def poisson(rng: random.Random, mean: float) -> int:
    """A Poisson number, by Knuth's product of uniform numbers (good for means below some 700)."""
    threshold, product, count = math.exp(-mean), rng.random(), 0
    while product > threshold:
        product *= rng.random()
        count += 1
    return count


def main() -> None:
    rng = random.Random(1)
    with open("data/decay.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["t_s", "counts"])
        for t in range(0, BINS * WIDTH, WIDTH):
            rows.writerow([t, poisson(rng, START * 2 ** (-t / HALF_LIFE) + BACKGROUND)])


if __name__ == "__main__":
    main()
