"""The programs of examples/sweep, without a pilot: right numbers, the same on any number of cores, no half result."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.sweep.fit import Fit, Point, fit, from_line, in_parallel, read
from pilotq.broker.taskfiles.reader import read_tasks
from tests.support.paths import ROOT

SWEEP = ROOT / "examples" / "sweep"


def run(program: str, *arguments: str, cwd: Path, cpu: int | None = None) -> subprocess.CompletedProcess[str]:
    def pin() -> None:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})

    command = [sys.executable, "-B", str(SWEEP / program), *arguments]
    return subprocess.run(command, cwd=cwd, preexec_fn=pin, capture_output=True, text=True, check=False)


def log_likelihood(points: list[Point], parameters: Fit) -> float:
    start, half_life, background = parameters
    means = [start * 2 ** (-t / half_life) + background for t, _ in points]
    return sum(n * math.log(mean) - mean for (_, n), mean in zip(points, means, strict=True))


def test_fit_finds_the_parameters_of_a_curve_without_noise() -> None:
    points = [(float(t), 250.0 * 2 ** (-t / 90.0) + 7.0) for t in range(0, 900, 10)]
    assert fit(points) == pytest.approx((250.0, 90.0, 7.0), rel=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_no_parameters_near_the_fit_are_more_likely(axis: int, factor: float) -> None:
    points = read()
    best = fit(points)
    start, half_life, background = (value * (factor if i == axis else 1.0) for i, value in enumerate(best))
    assert log_likelihood(points, best) > log_likelihood(points, (start, half_life, background))


def test_resamples_surround_the_half_life_the_data_were_made_with() -> None:
    half_lives = sorted(h for task in range(3) for _, h, _ in in_parallel(read(), task, 20, 1))
    assert len(set(half_lives)) == 60
    assert 140 < half_lives[0] < 153.1 < half_lives[-1] < 166


def test_the_number_of_processes_changes_nothing() -> None:
    alone = in_parallel(read(), 5, 8, 1)
    assert in_parallel(read(), 5, 8, 3) == alone
    assert in_parallel(read(), 6, 8, 1) != alone


def test_a_task_writes_one_whole_file_and_the_same_again(tmp_path: Path) -> None:
    assert run("fit.py", "7", "4", cwd=tmp_path).returncode == 0
    first = (tmp_path / "results" / "fit-7.csv").read_bytes()
    one_cpu = min(os.sched_getaffinity(0))
    assert run("fit.py", "7", "4", cwd=tmp_path, cpu=one_cpu).stdout == "task 7: 4 fits on 1 cores\n"
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["fit-7.csv"]
    assert (tmp_path / "results" / "fit-7.csv").read_bytes() == first
    assert [from_line(line) for line in first.decode().splitlines()] == in_parallel(read(), 7, 4, 1)


def test_gather_sums_up_and_draws(tmp_path: Path) -> None:
    for task in range(3):
        run("fit.py", str(task), "10", cwd=tmp_path)
    done = run("gather.py", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert (summary["tasks"], summary["resamples"]) == (3, 30)
    half_lives = sorted(h for task in range(3) for _, h, _ in in_parallel(read(), task, 10, 1))
    found = summary["half_life_s"]
    assert found["fit"] == pytest.approx(fit(read())[1])
    assert found["median"] == pytest.approx((half_lives[14] + half_lives[15]) / 2)
    # 68 % of 30 values: between the 5th or 6th value and the 25th or 26th.
    assert half_lives[4] <= found["from"] <= half_lives[5]
    assert half_lives[24] <= found["to"] <= half_lives[25]
    assert (tmp_path / "results" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_gather_refuses_a_gap(tmp_path: Path) -> None:
    run("fit.py", "0", "2", cwd=tmp_path)
    done = run("gather.py", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "the results of 1 tasks, not 2" in done.stderr
    assert not (tmp_path / "results" / "sweep.png").exists()


def test_the_data_are_what_their_program_makes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert run("make_data.py", cwd=tmp_path).returncode == 0
    assert (tmp_path / "data" / "decay.csv").read_bytes() == (SWEEP / "data" / "decay.csv").read_bytes()


def test_the_task_file_is_a_thousand_fits_and_one_gather() -> None:
    one, two, gather = read_tasks(str(SWEEP / "sweep.toml")).tasks
    assert (one.size, one.request.cores) == (800, (1, 1))
    assert (two.size, two.request.cores) == (200, (2, 2))
    assert gather.after == [one.name, two.name]
    assert gather.command is not None and gather.command[-1] == str(one.size + two.size)
