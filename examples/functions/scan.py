"""Finds where the logistic map becomes chaotic: a Python function for each parameter, on all cores.

    python examples/functions/scan.py [--points 2000] [--nodes SPEC]

Prints the share of parameters whose Lyapunov exponent is positive, and the first of them. The exponent is the mean of
log |r (1 - 2 x)| along x -> r x (1 - x): above zero, neighbouring values part (chaos); below, they meet.
"""

from __future__ import annotations

import argparse
import math

from pilotq.broker import Executor

SETTLE, STEPS = 500, 2_000
FIRST, LAST = 3.4, 4.0


def exponent(r: float) -> float:
    """The Lyapunov exponent of the logistic map at ``r``."""
    x = 0.4
    for _ in range(SETTLE):
        x = r * x * (1.0 - x)
    total = 0.0
    for _ in range(STEPS):
        x = r * x * (1.0 - x)
        total += math.log(max(abs(r * (1.0 - 2.0 * x)), 1e-300))
    return total / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description="Scan the logistic map for chaos.")
    parser.add_argument("--points", type=int, default=2_000)
    parser.add_argument("--nodes", help="cores of a private pilot, as in `pilotq start --nodes`")
    options = parser.parse_args()
    parameters = [FIRST + (LAST - FIRST) * n / (options.points - 1) for n in range(options.points)]
    # On the pilot that runs here, else on a private one. The call of each parameter is a task: pinned, seen by
    # `pilotq list`, and tried alone if it fails.
    with Executor(nodes=options.nodes) as executor:
        exponents = list(executor.map(exponent, parameters))
    chaotic = [r for r, value in zip(parameters, exponents, strict=True) if value > 0.0]
    print(f"{len(chaotic) / len(parameters):.1%} of {len(parameters)} parameters are chaotic")
    print(f"the first is r = {chaotic[0]:.3f}")


if __name__ == "__main__":
    main()
