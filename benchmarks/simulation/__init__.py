"""Simulates large machines: a real pilot, and up to a thousand nodes of 56 cores whose launchers only pretend.

    python -m benchmarks simulation
    PILOTQ_SIMULATION=queue,idle python -m benchmarks simulation         # only these parts
    PILOTQ_SIMULATION_NODES=1,8 PILOTQ_SIMULATION_QUEUED=100000 ...      # other sizes

The parts: ``nodes`` (rate and use of cores by number of nodes), ``lengths`` (weak scaling of short tasks), ``idle``
(cost of nodes without tasks), ``queue`` (rate, memory and latency by what waits), ``many`` (a million queued; 10,000
tasks on 2,500 cores). Tables are printed, and plots written to docs/plots.
"""

from __future__ import annotations

import os
import sys

from benchmarks.figures import Figure
from benchmarks.simulation.measured import Sizes
from benchmarks.simulation.nodes import measure_nodes
from benchmarks.simulation.queue import measure_many, measure_queue
from benchmarks.simulation.tables import Table

NODES = "1,4,16,64,256,1000"
PARTS = ("nodes", "lengths", "idle", "queue", "many")


def run() -> list[Figure]:
    parts = os.environ.get("PILOTQ_SIMULATION", ",".join(PARTS)).split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"PILOTQ_SIMULATION: unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    sizes = Sizes(
        nodes=[int(number) for number in os.environ.get("PILOTQ_SIMULATION_NODES", NODES).split(",")],
        queued=int(os.environ.get("PILOTQ_SIMULATION_QUEUED", "10000000")),
    )
    tables: list[Table] = []
    if "nodes" in parts or "lengths" in parts or "idle" in parts:
        tables += measure_nodes(sizes, [part for part in ("nodes", "lengths", "idle") if part in parts])
    if "queue" in parts:
        tables += measure_queue(sizes)
    figures = measure_many(sizes) if "many" in parts else []
    for table in tables:
        print(table.markdown(), file=sys.stderr, flush=True)
        table.plot()
    return [*(figure for table in tables for figure in table.figures()), *figures]
