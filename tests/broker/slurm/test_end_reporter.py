"""The end of an allocation that has joined: its nodes report it before they take tasks, and again when it is moved."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from pilotq.broker.slurm import end_reporter
from pilotq.broker.slurm.end_reporter import AllocationEndReporter
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal
from tests.support.command_line import command, environment, in_background
from tests.support.engine import Engine, fixtures
from tests.support.waiting import wait_until

engine, server, _ = fixtures
# Answers that the job ends in as many seconds as the file `left` has, and writes that it was asked.
SCONTROL = """\
#!/bin/sh
cd {folder}; sleep 0.3; echo asked >>asked
echo "JobId=$3 EndTime=$(date -d "+$(cat left) seconds" +%Y-%m-%dT%H:%M:%S) Deadline=N/A"
"""


def asked(folder: Path) -> int:
    return len((folder / "asked").read_text().split()) if (folder / "asked").exists() else 0


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file `left`, and a scontrol on PATH that reads it."""
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL.format(folder=tmp_path))
    program.chmod(0o755)
    (tmp_path / "left").write_text("300")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def reported(engine: Engine) -> float | None:
    """Seconds until the nodes of job 78 get nothing new."""
    value = engine.link.call("HGET", keys.ALLOCATION_ENDS, "78")
    return float(value.split()[0]) - time.time() if value else None


def make(engine: Engine, place: int, of: int) -> AllocationEndReporter:
    step = {"SLURM_JOB_ID": "78", "SLURM_STEP_NUM_TASKS": str(of), "SLURM_PROCID": str(place)}
    return AllocationEndReporter(engine.link, step, 60.0, 15, engine.settings)


def test_one_node_of_a_job_asks_and_the_others_need_not(engine: Engine, slurm: Path) -> None:
    engine.reset(allocation_poll_s=1000.0)
    for place in (0, 1, 2):
        make(engine, place, 3).report_first(lambda: False)
        end = reported(engine)
        assert end is not None and 200 < end < 241
    assert asked(slurm) == 1


def test_a_node_without_a_report_asks_by_itself(engine: Engine, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reset()
    monkeypatch.setattr(end_reporter, "FIRST_NODE_S", 0.1)
    make(engine, 1, 2).report_first(lambda: False)
    assert reported(engine) and asked(slurm) == 1


def test_the_nodes_take_turns(engine: Engine, slurm: Path) -> None:
    """One by one, so that an end that was moved is soon known, by whoever is left to ask."""
    engine.reset(allocation_poll_s=0.2)
    first, second = make(engine, 0, 2), make(engine, 1, 2)
    first.report_first(lambda: False)
    second.report_first(lambda: False)
    first.close()  # its node is lost
    (slurm / "left").write_text("3000")

    def moved() -> bool:
        second.poll(time.monotonic())
        return (reported(engine) or 0.0) > 2000

    wait_until(moved)
    second.close()


def test_a_joined_node_leaves_before_its_allocation_ends(slurm: Path) -> None:
    """It begins nothing that does not fit, until the end is moved; and what runs at the end goes back uncharged."""
    settings = json.dumps({"allocation_poll_s": 0.3, "kill_grace_s": 0.5})
    with in_background(slurm, "--nodes", "own:1", PILOTQ_SETTINGS=settings) as cli:
        assert cli("nodes", "drain", "own").returncode == 0
        long = cli("enqueue", "--time-request", "10m", "--", "sh", "-c", "touch up; sleep 600").stdout
        short = cli("enqueue", "--time-request", "10s", "--", "true").stdout.strip()
        job = {"SLURM_JOB_ID": "78", "SLURMD_NODENAME": "n9", "PILOTQ_SETTINGS": settings}
        with subprocess.Popen(
            command("worker", "--grace", "20s"), cwd=slurm, env=environment(**job),
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as worker:  # fmt: skip
            assert cli("wait", short, "--timeout", "60").returncode == 0
            assert json.loads(cli("show", long.strip(), "--json").stdout)[0]["status"] == "queued"
            (slurm / "left").write_text("3000")
            wait_until((slurm / "up").exists, seconds=60)
            (slurm / "left").write_text("19")
            assert worker.wait(60) == 0
        wait_until(lambda: (slurm / ".pilotq" / "current" / "journal.jsonl").read_text().count("walltime") == 1)
        (cut,) = [
            line for line in Journal(str(slurm / ".pilotq" / "current" / "journal.jsonl")).entries() if not line.final
        ]
        assert (cut.id, cut.reason, cut.node) == (long.strip(), "walltime", "n9-78")
        assert json.loads(cli("show", long.strip(), "--json").stdout)[0]["status"] == "queued"
