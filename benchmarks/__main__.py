"""Measures figures: ``python -m benchmarks [NAME...]`` prints a table and writes benchmarks/results.json."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

from benchmarks.figures import Figure, table

NAMES = (
    "submitting", "chain", "makespan", "spawning", "functions", "placement", "dashboard", "live_page", "metrics",
    "rq_jobs", "qcg",
    "faults", "dispatch", "latency", "occupancy", "costs", "traffic",
)  # fmt: skip

# Needs root, and starts a Slurm cluster; takes a quarter of an hour; installs and runs others; minutes; half an hour;
# a launcher alone; a minute, and half a GB of disk.
BY_NAME = ("slurm", "endurance", "peers", "scale", "simulation", "launching", "report")


def main(names: list[str]) -> None:
    unknown = set(names) - set(NAMES) - set(BY_NAME)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES + BY_NAME)}")
    figures: list[Figure] = []
    for name in names or NAMES:
        before = os.getloadavg()[0]
        found = importlib.import_module(f"benchmarks.{name}").run()
        figures += [f._replace(detail=f"{f.detail}{'; ' if f.detail else ''}load {before:.1f} before") for f in found]
    print(table(figures))
    result = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "figures": [{**f._asdict(), "verdict": f.verdict} for f in figures],
    }
    path = Path(__file__).with_name("results.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")
    if missing := [f.what for f in figures if math.isnan(f.value)]:
        raise SystemExit(f"not measured: {'; '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
