"""Measures a pilot on four nodes of a real Slurm (tests/slurm/slurm-cluster, as root), and on 64 virtual nodes.

How long until a task runs on each node, how many short tasks a second, against one `srun -n1` step for each task in the
same allocation, and how soon the death of a node's worker is known.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure
from tests.slurm.cluster import CPUS, NODES, PROGRAM, Cluster, supervisor_and_worker
from tests.slurm.cluster import run as outside
from tests.support.waiting import wait_until

TASKS, STEPS, ROUNDS, VIRTUAL = 2000, 40, 3, 64
# Each task of the first pilot says when and where it began.
SCRIPT = f"""
for n in $(seq {ROUNDS}); do
  date +%s.%N >begin.$n
  pilotq run --dir first-$n --array 0-63 -- sh -c "date +%s.%N >at.$n.\\$PILOTQ_NODELIST.{{index}}; sleep 0.3"
  begin=$(date +%s.%N)
  for i in $(seq {STEPS}); do srun --overlap -Q -N1 -n1 /bin/true; done
  echo $begin $(date +%s.%N) >steps.$n
  pilotq run --dir many-$n --json --array 1-{TASKS} -- /bin/true >many.$n
done
"""


def _seconds_to_first(folder: Path, number: int, nodes: int) -> float:
    begin = float((folder / f"begin.{number}").read_text())
    first: dict[str, float] = {}
    for path in folder.glob(f"at.{number}.*"):
        node = path.name.split(".")[2]
        first[node] = min(first.get(node, float("inf")), float(path.read_text()))
    assert len(first) == nodes, f"tasks ran on {sorted(first)}"
    return max(first.values()) - begin


def _rates(folder: Path, number: int) -> tuple[float, float]:
    """Tasks a second by steps, and by a pilot (from the journal: first start to last end)."""
    from pilotq.broker.store.journal import Journal

    begin, end = map(float, (folder / f"steps.{number}").read_text().split())
    lines = [line for line in Journal(str(folder / f"many-{number}" / "journal.jsonl")).entries() if line.array]
    assert len(lines) == TASKS
    spent = max(line.ended or 0 for line in lines) - min(line.started or 0 for line in lines)
    return STEPS / (end - begin), TASKS / spent


def run() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        up = outside(str(PROGRAM), "up", "--nodes", str(NODES), "--cpus", str(CPUS), seconds=300)
        assert up.returncode == 0, up.stderr
        cluster = Cluster(folder)
        job = cluster.submit(*SCRIPT.splitlines(), options=f"-N{NODES} --exclusive -t30")
        assert job.await_end(1200) == "COMPLETED", job.said()
        first = sorted(_seconds_to_first(folder, n + 1, NODES) for n in range(ROUNDS))
        lost = _losses(cluster)
        rates = [_rates(folder, n + 1) for n in range(ROUNDS)]
        ratios = sorted(pilot / steps for steps, pilot in rates)
        virtual = _virtual(folder)
    middle = ROUNDS // 2
    spread = f"{first[0]:.1f} to {first[-1]:.1f}"
    detail = ", ".join(f"{pilot:.0f}/s against {steps:.0f}/s" for steps, pilot in rates)
    return [
        Figure("first task on each of 4 Slurm nodes", first[middle], "s", 3.0, False, spread),
        Figure("tasks/s over `srun -n1` a task, 4 nodes", ratios[middle], "x", 20.0, True, detail),
        *lost,
        Figure("first task on each of 64 virtual nodes", virtual, "s", 15.0, False),
    ]


def _virtual(folder: Path) -> float:
    nodes = ",".join(f"v{n}:1" for n in range(VIRTUAL))
    (folder / "begin.v").write_text(f"{time.time()}")
    script = "date +%s.%N >at.v.$PILOTQ_NODELIST.{index}; sleep 2"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PILOTQ_", "SLURM_"))}
    command = [sys.executable, "-m", "pilotq", "run", "--dir", "virtual", "--nodes", nodes, "--array", "0-255", "--"]
    subprocess.run([*command, "sh", "-c", script], cwd=folder, env=env, check=True, capture_output=True, timeout=600)
    begin = float((folder / "begin.v").read_text())
    first: dict[str, float] = {}
    for path in folder.glob("at.v.*"):
        node = path.name.split(".")[2]
        first[node] = min(first.get(node, float("inf")), float(path.read_text()))
    assert len(first) == VIRTUAL, f"{len(first)} nodes had tasks"
    return max(first.values()) - begin


def _losses(cluster: Cluster) -> list[Figure]:
    """From the kill of a node's worker, or of the step task there, until the dispatcher has given its tasks back."""
    settings = {"worker_restart_s": 0.2, "restart_limit": 20}
    job = cluster.submit("pilotq start --dir lossy", options="-N2 --exclusive -t10", **settings)
    job.await_text("staying until")
    pilot = cluster.folder / "lossy"
    log = pilot / "logs" / "dispatcher.log"
    found: dict[str, list[float]] = {"worker": [], "supervisor": []}

    def up() -> bool:
        shown = outside("pilotq", "nodes", "--dir", str(pilot), "--json")
        return any((n["name"], n["state"]) == ("node2", "up") for n in json.loads(shown.stdout or "[]"))

    for victim in [*found] * ROUNDS:
        wait_until(up, seconds=60)
        supervisor, worker = wait_until(lambda: supervisor_and_worker("node2", cluster.folder), seconds=30)
        said = log.stat().st_size
        begin = time.monotonic()
        os.kill(worker if victim == "worker" else supervisor, signal.SIGKILL)
        wait_until(lambda said=said: b"node node2 is lost" in log.read_bytes()[said:], seconds=60)
        found[victim].append(time.monotonic() - begin)
    outside("pilotq", "stop", "--dir", str(pilot))
    job.await_end()
    words = {
        "worker": "a killed worker is known, by its node supervisor",
        "supervisor": "a killed step task is known, by srun",
    }
    return [
        Figure(words[victim], sorted(times)[ROUNDS // 2], "s", 5.0, False, f"{min(times):.2f} to {max(times):.2f}")
        for victim, times in found.items()
    ]
