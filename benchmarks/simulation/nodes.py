"""What grows with the number of nodes: rate and use of cores, weak scaling of short tasks, the cost of idle nodes."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.pretended.pilot import PretendedPilot, pretended_pilot
from benchmarks.server_use import ServerUse
from benchmarks.simulation.measured import CORES, Sizes, play
from benchmarks.simulation.tables import Column, Table
from pilotq.broker.errors import PilotqError

# As in the study of RADICAL-Pilot with Flux and Dragon on Frontier: four tasks a core, of no time and of 180 s.
A_CORE, LONG_S = 4, 180.0
FASTER = 60.0  # the clock: a task of 180 s takes 3 s
# As in Parsl's weak scaling: ten tasks a core.
SHORT_A_CORE, SHORT_MS = 10, (0, 10, 100, 1000)
SHORT_NODES = 64  # at most
FIRST_A_NODE = 8
IDLE_S = 6.0

Points = defaultdict[str, dict[int, float]]


def measure_nodes(sizes: Sizes, parts: Sequence[str]) -> list[Table]:
    found: Points = defaultdict(dict)
    for nodes in sizes.nodes:
        try:
            _measure(nodes, parts, found)
        except (PilotqError, SystemExit) as error:  # a machine that is too small for so many: the others count
            print(f"  {nodes} nodes: not all could be measured: {error}", file=sys.stderr, flush=True)
        print(f"  {nodes} nodes: {({name: values[nodes] for name, values in found.items() if nodes in values})}",
              file=sys.stderr, flush=True)  # fmt: skip
    return [table for part, table in _tables(sizes.nodes, found) if part in parts]


def _measure(nodes: int, parts: Sequence[str], found: Points) -> None:
    began = time.perf_counter()
    with pretended_pilot(nodes, CORES) as pilot:
        # When these have ended, the dispatcher knows all nodes (it reads in order), and the run time of such tasks.
        play(pilot, 0.0, nodes * FIRST_A_NODE)
        found["joined"][nodes] = time.perf_counter() - began
        if "idle" in parts:
            _idle(pilot, nodes, found)
        if "nodes" in parts:
            _four_a_core(pilot, nodes, found)
        if "lengths" in parts and nodes <= SHORT_NODES:
            _ten_a_core(pilot, nodes, found)


def _idle(pilot: PretendedPilot, nodes: int, found: Points) -> None:
    with contextlib.closing(ServerUse(pilot.directory)) as server:
        before, used = server.now(), pilot.cpu()
        time.sleep(IDLE_S)
        commands, now = (server.now() - before).commands, pilot.cpu()
    found["idle commands"][nodes] = commands / IDLE_S
    for part in ("server", "dispatcher", "supervisor", "pretended nodes"):
        found[f"idle {part}"][nodes] = (now[part] - used[part]) / IDLE_S * 100


def _four_a_core(pilot: PretendedPilot, nodes: int, found: Points) -> None:
    cores = nodes * CORES
    null = play(pilot, 0.0, A_CORE * cores)
    found["null rate"][nodes] = null.rate
    for part in ("server", "dispatcher", "supervisor", "pretended nodes"):
        found[f"us {part}"][nodes] = null.us(part)
    found["pretence"][nodes] = null.pretence / sum(null.used.values())
    ideal = A_CORE * LONG_S / FASTER
    long = play(pilot, LONG_S / FASTER, A_CORE * cores)
    found["long rate"][nodes] = long.rate
    found["use"][nodes] = ideal / long.seconds
    found["use in real time"][nodes] = A_CORE * LONG_S / (A_CORE * LONG_S + long.seconds - ideal)


def _ten_a_core(pilot: PretendedPilot, nodes: int, found: Points) -> None:
    for ms in SHORT_MS:
        short = play(pilot, ms / 1e3, SHORT_A_CORE * CORES * nodes)
        found[f"makespan {ms}"][nodes] = short.seconds
        found[f"short rate {ms}"][nodes] = short.rate


def _tables(steps: list[int], found: Points) -> list[tuple[str, Table]]:
    points = [float(n) for n in steps]

    def column(name: str, unit: str, key: str, slope: str = "") -> Column:
        return Column(name, unit, [found[key].get(n, math.nan) for n in steps], slope)

    parts = ("server", "dispatcher", "supervisor", "pretended nodes")
    return [
        ("nodes", Table("nodes", "Four tasks a core, 56 cores a node", "nodes", points, [
            column("null tasks", "tasks/s", "null rate", "power"),
            column("180 s, clock 60 times as fast", "tasks/s", "long rate", "power"),
            column("use of cores, clock as fast", "", "use"),
            column("use of cores, real clock", "", "use in real time"),
        ])),
        ("nodes", Table("nodes-cpu", "CPU time of each part, null tasks", "nodes", points, [
            *(column(part, "us a task", f"us {part}", "power") for part in parts),
            column("pretence, of all", "", "pretence"),
        ])),
        ("lengths", Table("lengths", "Ten tasks a core", "nodes", points, [
            *(column(f"{ms} ms", "s in all", f"makespan {ms}", "power") for ms in SHORT_MS),
            *(column(f"{ms} ms", "tasks/s", f"short rate {ms}") for ms in SHORT_MS),
        ])),
        ("idle", Table("idle", "Idle nodes", "nodes", points, [
            column("commands of the server", "commands/s", "idle commands", "linear"),
            *(column(part, "% of a core", f"idle {part}", "linear") for part in parts),
            column("from nothing until all have joined, and run 8 tasks each", "s", "joined", "linear"),
        ])),
    ]  # fmt: skip
