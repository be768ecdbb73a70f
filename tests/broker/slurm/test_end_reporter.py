"""The end of an allocation that has joined: its nodes tell it before they take tasks, and again when it is moved."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from pilotq.broker.slurm import end_reporter as herald_module
from pilotq.broker.slurm.end_reporter import Herald
from pilotq.broker.store import keys
from pilotq.broker.store.journal_writer import Journal
from tests.support.command_line import command, environment, in_background
from tests.support.engine import Engine, fixtures
from tests.support.waiting import wait_until

engine, server, _ = fixtures
# Says that the job ends in so many seconds as the file `left` tells, and notes that it was asked.
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


def told(engine: Engine) -> float | None:
    """Seconds until the nodes of job 78 get nothing new."""
    word = engine.link.call("HGET", keys.ENDS, "78")
    return float(word.split()[0]) - time.time() if word else None


def make(engine: Engine, place: int, of: int) -> Herald:
    step = {"SLURM_JOB_ID": "78", "SLURM_STEP_NUM_TASKS": str(of), "SLURM_PROCID": str(place)}
    return Herald(engine.link, step, 60.0, 15, engine.settings)


def test_one_node_of_a_job_asks_and_the_others_need_not(engine: Engine, slurm: Path) -> None:
    engine.reset(deadline_s=1000.0)
    for place in (0, 1, 2):
        make(engine, place, 3).learn(lambda: False)
        end = told(engine)
        assert end is not None and 200 < end < 241
    assert asked(slurm) == 1


def test_who_is_not_told_asks_for_itself(engine: Engine, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reset()
    monkeypatch.setattr(herald_module, "OTHERS_S", 0.1)
    make(engine, 1, 2).learn(lambda: False)
    assert told(engine) and asked(slurm) == 1


def test_the_nodes_take_turns(engine: Engine, slurm: Path) -> None:
    """One by one, so that an end that was moved is soon known, by whoever is left to ask."""
    engine.reset(deadline_s=0.2)
    first, second = make(engine, 0, 2), make(engine, 1, 2)
    first.learn(lambda: False)
    second.learn(lambda: False)
    first.close()  # it is gone
    (slurm / "left").write_text("3000")

    def moved() -> bool:
        second.turn(time.monotonic())
        return (told(engine) or 0.0) > 2000

    wait_until(moved)
    second.close()


def test_a_joined_node_leaves_before_its_allocation_ends(slurm: Path) -> None:
    """It begins nothing that does not fit, until the end is moved; and what runs at the end goes back uncharged."""
    settings = json.dumps({"deadline_s": 0.3, "kill_grace_s": 0.5})
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
            line for line in Journal(str(slurm / ".pilotq" / "current" / "journal.jsonl")).lines() if not line.final
        ]
        assert (cut.id, cut.reason, cut.node) == (long.strip(), "walltime", "n9-78")
        assert json.loads(cli("show", long.strip(), "--json").stdout)[0]["status"] == "queued"
