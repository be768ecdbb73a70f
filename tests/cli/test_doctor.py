"""`pilotq doctor`: a machine and a pilot without faults, and what it finds where there are some."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path

import pytest

from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.cli import doctor_checks
from pilotq.cli.doctor_checks import Check
from tests.support.command_line import Cli, in_background, prompt
from tests.support.live_pilot import live_pilot


def named(checks: list[Check], name: str) -> list[Check]:
    return [check for check in checks if check.name == name]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return prompt(tmp_path)


def test_a_machine_without_a_pilot(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stdout
    rows = json.loads(cli("doctor", "--json").stdout)
    assert {row["name"] for row in rows} >= {
        "server", "libraries", "cores", "memory", "nofile", "nproc", "directory", "disk", "socket", "Slurm", "MPI",
    }  # fmt: skip
    assert all(set(row) == {"name", "level", "text", "hint"} for row in rows)
    assert not (tmp_path / ".pilotq").exists()
    assert cli("doctor", "--dir", "nothing").returncode == 2


def test_a_server_that_is_none(cli: Cli, tmp_path: Path) -> None:
    old = tmp_path / "old-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.1 sha=0'\n")
    old.chmod(0o755)
    for path, text in ((str(old), "at least 7.0"), ("/no/such/server", "does not exist"), ("/bin/true", "is no Redis")):
        done = cli("doctor", PILOTQ_SERVER=path)
        assert done.returncode == 3
        assert text in done.stdout


def test_a_variable_that_nothing_reads(cli: Cli) -> None:
    done = cli("doctor", PILOTQ_DRI="x", PILOTQ_COUNTERS="a=1")
    assert "PILOTQ_DRI: nothing reads such a variable" in done.stdout and "PILOTQ_COUNTERS set" in done.stdout
    assert done.returncode == 0


def test_low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    files, processes = doctor_checks.limits()
    assert (files.level, files.hint) == ("note", "`ulimit -Sn 1024` before the pilot starts")
    assert processes.hint == "`ulimit -Su 1024` before the pilot starts"


def test_a_pilot_that_runs_and_has_ended(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1") as cli:
        rows = {row["name"]: row for row in json.loads(cli("doctor", "--json").stdout)}
        assert {"pilot", "processes", "permissions", "data", "clock", "nodes", "server memory"} <= set(rows)
        assert all(row["level"] != "bad" for row in rows.values()), rows
        assert "its server answers" in rows["pilot"]["text"]
        for part in ("server", "dispatcher", "worker-n0"):
            assert re.search(rf"\b{part} [\d.]+ MiB, [\d.]+ s, \d+ files", rows["processes"]["text"]), rows["processes"]
        cli("stop")
        assert "has ended" in cli("doctor").stdout
        assert cli("doctor").returncode == 0


def test_what_is_wrong_with_a_pilot(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as live:
        pilot = Pilot(live.pilot.directory)
        live.broker.pause(True)
        live.broker.store.write("HSET", keys.STATUS, "journal", "no space left")
        checks = doctor_checks.examine(pilot, pilot.directory)
        assert named(checks, "journal") == [
            Check("journal", "bad", "no space left", "no task starts until that is solved"),
        ]
        assert "it is paused: no task starts" in [check.text for check in named(checks, "pilot")]
        live.broker.store.write("HDEL", keys.STATUS, "journal")
        live.broker.store.write("HSET", keys.NODES, "n9", "{}")
        (bad,) = named(doctor_checks.examine(pilot, pilot.directory), "nodes")[:1]
        assert bad.level == "bad" and "node n9 on the server is damaged" in bad.text
        live.broker.store.write("HDEL", keys.NODES, "n9")
        live.broker.pause(False)
        Path(pilot.journal).chmod(0o644)
        (bad,) = named(doctor_checks.examine(pilot, pilot.directory), "permissions")
        assert bad.level == "bad" and pilot.journal in bad.text
        Path(pilot.journal).chmod(0o600)
    folder = Path(pilot.path("server", "appendonlydir"))
    lost = next(folder.glob("*.incr.aof"))
    lost.rename(tmp_path / "moved")
    (bad,) = named(doctor_checks.examine(pilot, pilot.directory), "data")
    assert bad.level == "bad" and lost.name in bad.text


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:3], 0, 0, *real[5:])))
    (disk,) = named(list(doctor_checks.directory(str(tmp_path / "new" / "place"))), "disk")
    assert disk.level == "bad" and str(tmp_path) in disk.text
