"""Measures the integrations against the ways in which the tools run without them: python integrations/figures.py NAME.

NAME is `hq`, `joblib` or `snakemake`. Both ways run in turn, as the load of a machine changes. CPU time is said where
waiting for a core is most of the time on a busy machine.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROUNDS = int(os.environ.get("ROUNDS", "3"))
CALLS = int(os.environ.get("CALLS", "10000"))  # of joblib
JOBS = int(os.environ.get("JOBS", "1000"))  # of Snakemake
SUBMITS = 20
GENERIC_JOBS = 20  # of cluster-generic, which takes seconds for each
RULES = """
rule all:
    input: expand("out/{{i}}.txt", i=range({jobs}))
rule one:
    output: touch("out/{{i}}.txt")
    shell: "{command}"
"""


def spin(seconds: float) -> None:
    """Use a core for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def spent() -> float:
    """CPU time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def hq_submits() -> None:
    """`hq submit` of one task, and Python that does nothing: the median of each, and the CPU time."""
    from pilotq.broker.client import private_pilot

    hq = os.path.join(os.path.dirname(sys.executable), "hq")
    commands = {
        "hq submit": [hq, "submit", "--stdout=none", "--stderr=none", "true"],
        "python": [sys.executable, "-c", ""],
    }
    pilot = private_pilot.start(1)
    os.environ["PILOTQ_DIR"] = pilot.directory
    try:
        for _ in range(ROUNDS):
            walls: dict[str, list[float]] = {name: [] for name in commands}
            cpus = dict.fromkeys(commands, 0.0)
            for _ in range(SUBMITS):
                for name, command in commands.items():
                    before = spent()
                    run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
                    walls[name].append(timed(run))
                    cpus[name] += spent() - before
            said = (f"{n} {statistics.median(walls[n]):.3f} s, CPU {cpus[n] / SUBMITS:.3f} s" for n in commands)
            print(f"load {os.getloadavg()[0]:.1f}: {'; '.join(said)}")
    finally:
        private_pilot.end(pilot)
        private_pilot.remove_kept()


def joblib_calls() -> None:
    """CALLS calls of 1 ms, by loky and by pilotq, both warm."""
    import joblib
    import joblib_pilotq  # noqa: F401

    def calls(backend: str, number: int) -> float:
        with joblib.parallel_config(backend=backend, n_jobs=2):
            return timed(lambda: joblib.Parallel()(joblib.delayed(spin)(0.001) for _ in range(number)))

    for backend in ("loky", "pilotq"):
        calls(backend, 100)
    for _ in range(ROUNDS):
        loky, pilotq = calls("loky", CALLS), calls("pilotq", CALLS)
        print(f"load {os.getloadavg()[0]:.1f}: loky {loky:.2f} s, pilotq {pilotq:.2f} s, ratio {pilotq / loky:.2f}")


def snakemake_jobs() -> None:
    """JOBS jobs of 0.1 s on 2 cores, the floor of Snakemake's own scheduling, and fewer by cluster-generic."""
    many = ["--jobs", "1000", "--max-jobs-per-timespan", "10000/1s"]
    pilotq = ["--executor", "pilotq", "--pilotq-nodes", "2", *many]
    submit = "sh -c 'sh \"$0\" >/dev/null 2>&1 & echo $!'"
    generic = ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", submit]
    for _ in range(ROUNDS):
        floor = workflow(JOBS, "true", ["--cores", "2"])
        ours = workflow(JOBS, "sleep 0.1", pilotq)
        local = workflow(JOBS, "sleep 0.1", ["--cores", "2"])
        bare = workflow(JOBS, "true", pilotq)
        print(
            f"load {os.getloadavg()[0]:.1f}: `true` local {floor:.1f} s, pilotq {bare:.1f} s; "
            f"0.1 s local {local:.1f} s, pilotq {ours:.1f} s, {ours / floor:.2f} x the floor",
            flush=True,
        )
        if find_spec("snakemake_executor_plugin_cluster_generic") is None:
            print("cluster-generic is not installed: snakemake-executor-plugin-cluster-generic")
            continue
        slow = workflow(GENERIC_JOBS, "sleep 0.1", [*generic, "--jobs", "2", "--seconds-between-status-checks", "1"])
        per_job = slow / GENERIC_JOBS
        print(f"cluster-generic {per_job:.2f} s a job, {per_job * JOBS / ours:.1f} x pilotq", flush=True)


def workflow(jobs: int, command: str, options: list[str]) -> float:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "Snakefile").write_text(RULES.format(jobs=jobs, command=command))
        whole = [sys.executable, "-m", "snakemake", "--quiet", "all", *options]
        took = timed(lambda: subprocess.run(whole, cwd=folder, check=True, stdout=subprocess.DEVNULL))
        assert len(list((folder / "out").iterdir())) == jobs
        return took
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    {"hq": hq_submits, "joblib": joblib_calls, "snakemake": snakemake_jobs}[sys.argv[1]]()
