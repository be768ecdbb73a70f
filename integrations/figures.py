"""Measures the integrations against the ways in which the tools run without them: python integrations/figures.py NAME.

NAME is `joblib` or `snakemake`. Both ways run in turn, as the load of a machine changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = int(os.environ.get("ROUNDS", "3"))
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


def joblib_calls() -> None:
    """10,000 calls of 1 ms, by loky and by pilotq, both warm."""
    import joblib
    import joblib_pilotq  # noqa: F401

    def calls(backend: str, number: int) -> float:
        with joblib.parallel_config(backend=backend, n_jobs=2):
            return timed(lambda: joblib.Parallel()(joblib.delayed(spin)(0.001) for _ in range(number)))

    for backend in ("loky", "pilotq"):
        calls(backend, 100)
    for _ in range(ROUNDS):
        loky, pilotq = calls("loky", 10_000), calls("pilotq", 10_000)
        print(f"load {os.getloadavg()[0]:.1f}: loky {loky:.2f} s, pilotq {pilotq:.2f} s, ratio {pilotq / loky:.2f}")


def snakemake_jobs() -> None:
    """1,000 jobs of 0.1 s on 2 cores, the floor of Snakemake's own scheduling, and fewer by cluster-generic."""
    many = ["--jobs", "1000", "--max-jobs-per-timespan", "10000/1s"]
    pilotq = ["--executor", "pilotq", "--pilotq-nodes", "2", *many]
    submit = "sh -c 'sh \"$0\" >/dev/null 2>&1 & echo $!'"
    generic = ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", submit]
    for _ in range(ROUNDS):
        floor = workflow(1000, "true", ["--cores", "2"])
        ours = workflow(1000, "sleep 0.1", pilotq)
        local = workflow(1000, "sleep 0.1", ["--cores", "2"])
        bare = workflow(1000, "true", pilotq)
        slow = workflow(GENERIC_JOBS, "sleep 0.1", [*generic, "--jobs", "2", "--seconds-between-status-checks", "1"])
        print(
            f"load {os.getloadavg()[0]:.1f}: `true` local {floor:.1f} s, pilotq {bare:.1f} s; "
            f"0.1 s local {local:.1f} s, pilotq {ours:.1f} s; cluster-generic {slow / GENERIC_JOBS:.2f} s a job, "
            f"{slow / GENERIC_JOBS * 1000 / ours:.1f} x pilotq"
        )


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
    {"joblib": joblib_calls, "snakemake": snakemake_jobs}[sys.argv[1]]()
