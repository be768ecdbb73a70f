#!/usr/bin/env python3
"""One task of the sweep: ``fit.py TASK RESAMPLES``.

Fits ``start * 2 ** (-t / half_life) + background`` to bootstrap resamples of data/decay.csv and writes them, one a
line, to results/fit-TASK.csv. It uses as many processes as it has cores. The resamples depend on TASK alone: neither
the number of cores nor a second run changes the file. It imports little on purpose: a task starts in 15 ms.
"""

import math
import os
import random
import sys

Point = tuple[float, float]  # time in seconds, counts
Fit = tuple[float, float, float]  # start, half-life in seconds, background

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "decay.csv")
FIRST_GUESS: Fit = (300.0, 120.0, 20.0)


def read(path: str = DATA) -> list[Point]:
    with open(path, encoding="utf-8") as file:
        next(file)
        return [(float(t), float(n)) for t, n in (line.split(",") for line in file)]


def fit(points: list[Point], guess: Fit = FIRST_GUESS) -> Fit:
    """The most likely parameters for Poisson counts.

    Gauss-Newton steps in (start, rate, background), each point weighted with 1 / model, the inverse of its variance.
    (Weights of 1 / counts look simpler and pull the background down: low counts would weigh most.)
    """
    a, rate, b = guess[0], math.log(2) / guess[1], guess[2]
    for _ in range(50):
        # The normal equations (J^T W J) step = J^T W r, summed up point by point.
        m00 = m01 = m02 = m11 = m12 = m22 = v0 = v1 = v2 = 0.0
        for t, n in points:
            e = math.exp(-rate * t)
            d = -a * t * e  # derivative by the rate; those by a and b are e and 1
            model = a * e + b
            w = 1.0 / model
            r = n - model
            m00 += w * e * e
            m01 += w * e * d
            m02 += w * e
            m11 += w * d * d
            m12 += w * d
            m22 += w
            v0 += w * e * r
            v1 += w * d * r
            v2 += w * r
        step = solve(((m00, m01, m02), (m01, m11, m12), (m02, m12, m22)), (v0, v1, v2))
        a, rate, b = a + step[0], rate + step[1], b + step[2]
        if abs(step[0]) < 1e-8 * a and abs(step[1]) < 1e-8 * rate:
            return a, math.log(2) / rate, b
    raise ArithmeticError(f"the fit did not converge: start {a}, rate {rate}, background {b}")


def solve(m: tuple[Fit, Fit, Fit], v: Fit) -> Fit:
    """Three linear equations by Cramer's rule."""
    (a, b, c), (d, e, f), (g, h, i) = m
    det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    x, y, z = v
    return (
        (x * (e * i - f * h) - b * (y * i - f * z) + c * (y * h - e * z)) / det,
        (a * (y * i - f * z) - x * (d * i - f * g) + c * (d * z - y * g)) / det,
        (a * (e * z - y * h) - b * (d * z - y * g) + x * (d * h - e * g)) / det,
    )


def resample(points: list[Point], task: int, number: int) -> list[Point]:
    """As many points, drawn with replacement; the same for the same ``task`` and ``number``."""
    return random.Random(f"{task}/{number}").choices(points, k=len(points))


def fits(points: list[Point], task: int, numbers: range) -> list[Fit]:
    return [fit(resample(points, task, number)) for number in numbers]


def in_parallel(points: list[Point], task: int, resamples: int, processes: int) -> list[Fit]:
    """The same list for any number of processes: process p takes the resamples p, p + processes, ..."""
    helpers = []
    for p in range(1, processes):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with open(writer, "w", encoding="utf-8") as pipe:
                pipe.writelines(as_line(found) for found in fits(points, task, range(p, resamples, processes)))
            os._exit(0)
        os.close(writer)
        helpers.append((child, reader))
    shares = [fits(points, task, range(0, resamples, processes))]
    for child, reader in helpers:
        with open(reader, encoding="utf-8") as pipe:
            shares.append([from_line(line) for line in pipe])
        if os.waitpid(child, 0)[1] != 0:
            raise ChildProcessError("one of the processes of this task failed")
    return [shares[number % processes][number // processes] for number in range(resamples)]


def as_line(found: Fit) -> str:
    return ",".join(map(repr, found)) + "\n"


def from_line(line: str) -> Fit:
    start, half_life, background = map(float, line.split(","))
    return start, half_life, background


def main() -> None:
    task, resamples = int(sys.argv[1]), int(sys.argv[2])
    cores = len(os.sched_getaffinity(0))
    found = in_parallel(read(), task, resamples, min(cores, resamples))
    os.makedirs("results", exist_ok=True)
    path = f"results/fit-{task}.csv"
    # Under another name first: who finds the file finds all of it.
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
        file.writelines(map(as_line, found))
    os.replace(file.name, path)
    print(f"task {task}: {resamples} fits on {cores} cores")


if __name__ == "__main__":
    main()
