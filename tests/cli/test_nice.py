"""Nice tasks: they fill what is idle, and give way to all others without a charge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Cli, in_background
from tests.support.waiting import wait_until


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "2") as cli:
        yield cli


def shown(pilot: Cli, *ids: str) -> list[dict[str, Any]]:
    return json.loads(pilot("show", "--json", *ids).stdout)  # type: ignore[no-any-return]


def hold(name: str) -> tuple[str, ...]:
    return ("--", "sh", "-c", f"touch began-{name}; while [ ! -e go-{name} ]; do sleep 0.05; done")


def test_a_nice_task_gives_way_and_runs_again(pilot: Cli, tmp_path: Path) -> None:
    nice = [pilot("enqueue", "--nice", "--retries", "1", *hold(f"n{n}")).stdout.strip() for n in range(2)]
    wait_until(lambda: (tmp_path / "began-n0").exists() and (tmp_path / "began-n1").exists())
    (one,) = pilot("enqueue", *hold("one")).stdout.split()
    wait_until((tmp_path / "began-one").exists)
    assert sorted(view["status"] for view in shown(pilot, *nice)) == ["queued", "started"], "one was in the way"
    (waits,) = [view for view in shown(pilot, *nice) if view["status"] == "queued"]
    assert waits["execution"] == 1
    assert "comes after all that are not nice" in pilot("explain", waits["id"]).stdout
    (wide,) = pilot("enqueue", "--cores", "2", *hold("wide")).stdout.split()
    # Nothing is gained by ending the other one before `one` has ended; then both cores are needed.
    (tmp_path / "go-one").touch()
    wait_until((tmp_path / "began-wide").exists)
    assert [view["status"] for view in shown(pilot, *nice)] == ["queued", "queued"]
    for name in ("wide", "n0", "n1"):
        (tmp_path / f"go-{name}").touch()
    assert pilot("wait", one, wide, *nice).returncode == 0
    assert [view["execution"] for view in shown(pilot, *nice)] == [2, 2]
    assert "gave way" in (tmp_path / ".pilotq/current/journal.jsonl").read_text()


def test_it_fills_what_a_larger_task_leaves_idle(pilot: Cli, tmp_path: Path) -> None:
    (one,) = pilot("enqueue", *hold("one")).stdout.split()
    (wide,) = pilot("enqueue", "--cores", "2", *hold("wide")).stdout.split()
    (nice,) = pilot("enqueue", "--nice", *hold("nice")).stdout.split()
    wait_until((tmp_path / "began-nice").exists)
    (tmp_path / "go-one").touch()
    wait_until((tmp_path / "began-wide").exists)
    assert shown(pilot, nice)[0]["status"] == "queued"
    (tmp_path / "go-wide").touch()
    (tmp_path / "go-nice").touch()
    assert pilot("wait", one, wide, nice).returncode == 0


def test_a_script_that_asks_for_a_priority_is_no_nice_task(pilot: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/sh\n#SBATCH --nice=5\ntrue\n")
    refused = pilot("enqueue", "--nice", "--script", "job.sh")
    assert refused.returncode == 2 and "do not go together: use --no-directives" in refused.stderr
    assert pilot("enqueue", "--nice", "--no-directives", "--script", "job.sh").returncode == 0


def test_arrays_and_functions_are_nice_too(pilot: Cli, tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text(
        json.dumps({"tasks": [{"command": "true", "array": "0-49", "nice": True}, {"function": "time:sleep",
                   "args": [0.1], "nice": True}, {"command": "true", "nice": True, "priority": 3}]})
    )  # fmt: skip
    refused = pilot("submit", "jobs.json")
    assert refused.returncode == 2 and "nice and priority do not go together" in refused.stderr
    (tmp_path / "jobs.json").write_text((tmp_path / "jobs.json").read_text().replace(', "priority": 3', ""))
    assert pilot("submit", "jobs.json").returncode == pilot("wait").returncode == 0
