"""Measures request files of QCG-PilotJob on our service and on the original, in turn.

The original is installed from the package index into an environment of its own, which is removed afterwards. A run of
either that does not do all of its jobs ends the benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environments import WAIT_S, install
from benchmarks.figures import Figure

VERSION = "0.14.2"
OURS = [sys.executable, "-m", "pilotq.cli.qcg.service"]
NODES = 64


def run(tasks: int = 5_000, rounds: int = 3, chain: int = 2_000, short_chain: int = 500) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as name:
        home = Path(name)
        theirs = [str(install(home / "venv", f"qcg-pilotjob=={VERSION}") / "qcg-pm-service")]
        rates: list[tuple[float, float]] = []
        empty: list[tuple[float, float]] = []
        for number in range(rounds):
            pair = [serve(service, home / f"iterations-{number}-{who}", iterations(tasks), tasks)
                    for who, service in enumerate((OURS, theirs))]  # fmt: skip
            rates.append((tasks / pair[0], tasks / pair[1]))
            pair = [serve(service, home / f"empty-{number}-{who}", [], 0) for who, service in enumerate((OURS, theirs))]
            empty.append((pair[0], pair[1]))
        chains = {
            number: serve(OURS, home / f"chain-{number}", links(number), number)
            for number in (short_chain, chain, 5 * chain)
        }
        original = serve(theirs, home / "chain-original", links(short_chain), short_chain)
        many = ",".join(["1"] * NODES)
        start = serve(OURS, home / "many", [], 0, nodes=many)
        spread = tasks / serve(OURS, home / "many-tasks", iterations(tasks), tasks, nodes=many)
    ours_rate, their_rate = (median(column) for column in zip(*rates, strict=True))
    ours_empty, their_empty = (median(column) for column in zip(*empty, strict=True))
    return [
        Figure(f"QCG file, {tasks:,} x /bin/true, against the original", median(a / b for a, b in rates), "x", 1.5,
               detail=f"{ours_rate:,.0f}/s against {their_rate:,.0f}/s, {rounds} rounds"),
        Figure("QCG file without jobs", ours_empty, "s", 1.0, False, f"the original: {their_empty:.2f} s"),
        Figure(f"QCG file, chain of {chain:,}", chains[chain], "s", 10.0, False,
               f"of {short_chain:,}: {chains[short_chain]:.2f} s, the original {original:.2f} s"),
        Figure(f"the same of {5 * chain:,} against {chain:,}", chains[5 * chain] / chains[chain], "x", 5.5, False,
               f"{chains[5 * chain]:.1f} s"),
        Figure(f"QCG file without jobs, {NODES} virtual nodes", start, "s", 15.0, False),
        Figure(f"QCG file, {tasks:,} x /bin/true, {NODES} virtual nodes", spread, "/s"),
    ]  # fmt: skip


def serve(service: Sequence[str], folder: Path, jobs: list[dict[str, Any]], tasks: int, nodes: str = "2") -> float:
    """Seconds from the start of the service to its end; all ``tasks`` must have succeeded."""
    folder.mkdir()
    submit = [{"request": "submit", "jobs": jobs}] if jobs else []
    file = folder / "requests.json"
    file.write_text(json.dumps([*submit, {"request": "control", "command": "finishAfterAllTasksDone"}]))
    begin = time.monotonic()
    done = subprocess.run(
        [*service, "--file-path", str(file), "--nodes", nodes], cwd=folder, check=False, capture_output=True, text=True,
        timeout=WAIT_S,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    (status,) = folder.glob(".qcgpjm-service-*/final_status.json")
    finished = json.loads(status.read_text())["IterationStats"]["FinishedIterations"]
    if done.returncode or finished != tasks:
        raise SystemExit(f"{service[-1]}: {finished} of {tasks} jobs succeeded, code {done.returncode}: {done.stderr}")
    return seconds


def iterations(tasks: int) -> list[dict[str, Any]]:
    return [{"name": "it", "iteration": {"stop": tasks}, "execution": {"exec": "/bin/true"}}]


def links(tasks: int) -> list[dict[str, Any]]:
    return [
        {"name": f"t{n}", "execution": {"exec": "/bin/true"}}
        | ({"dependencies": {"after": [f"t{n - 1}"]}} if n else {})
        for n in range(tasks)
    ]
