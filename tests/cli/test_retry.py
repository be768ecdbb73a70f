"""`pilotq retry` on a real pilot, and what the journal says of it afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import Cli, in_background, prompt


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "2") as cli:
        yield cli


def statuses(cli: Cli, *words: str) -> list[str]:
    return [row["status"] for row in json.loads(cli("show", "--json", *words).stdout)]


def test_mended_and_run_again(pilot: Cli, tmp_path: Path) -> None:
    pilot("enqueue", "--name", "first", "--", "sh", "-c", "echo try $PILOTQ_EXECUTION; test -e mended")
    pilot("enqueue", "--name", "second", "--after", "first", "--", "true")
    array = pilot("enqueue", "--array", "0-9", "--", "sh", "-c", "test {index} -lt 7 || test -e mended").stdout.strip()
    assert pilot("wait").returncode == 1
    assert statuses(pilot, "first", "second", array) == ["failed", "canceled", "failed"]
    (tmp_path / "mended").touch()
    done = pilot("retry", "first", "second", array)
    assert (done.returncode, [line.partition(": ")[2] for line in done.stdout.splitlines()]) == (
        0, ["runs again", "runs again when what it depends on has finished", "runs again"],
    )  # fmt: skip
    assert pilot("wait", "--timeout", "60s").returncode == 0
    assert "12 tasks: 12 finished" in pilot("status").stdout
    assert pilot("logs", "first").stdout == "try 2\n"
    (shown,) = json.loads(pilot("show", array, "--json").stdout)
    assert shown["elements"] == {"finished": "0-9"}
    again = pilot("retry", "first", array)
    assert again.returncode == 1 and again.stdout.count("has finished: there is nothing to run again") == 2
    pilot("stop")
    assert "12 tasks: 12 finished" in pilot("status").stdout


def test_what_waits_for_its_retry_when_the_pilot_ends_counts_as_not_ended(pilot: Cli, tmp_path: Path) -> None:
    pilot("enqueue", "--array", "0-3", "--", "sh", "-c", "test {index} = 0 || test -e mended")
    assert pilot("wait").returncode == 1
    # Nobody can start: both cores are taken, and the pilot ends with that.
    pilot("enqueue", "--cores", "2", "--priority", "9", "--", "sh", "-c", "test -e mended || sleep 100")
    assert json.loads(pilot("retry", "--all", "--json").stdout) == [{"id": "1", "outcome": "queued"}]
    pilot("stop", "--now")
    assert "1 of 5 tasks ended: 1 finished" in pilot("status").stdout
    assert prompt(tmp_path)("wait").returncode == 1
    (tmp_path / "mended").touch()
    with in_background(tmp_path, "--resume", ".pilotq/current") as cli:
        assert cli("wait", "--timeout", "60s").returncode == 0


def test_what_cannot_be_retried_is_a_sentence(pilot: Cli) -> None:
    task = pilot("enqueue", "--", "sleep", "100").stdout.strip()
    done = pilot("retry", task)
    assert done.returncode == 1 and "it has not ended" in done.stdout
    pilot("enqueue", "--name", "waits", "--after", task, "--", "true")
    assert "waits" not in (done := pilot("retry", "waits")).stdout and "is deferred: it has not ended" in done.stdout
    assert pilot("retry", "nobody").returncode == 2
    assert pilot("retry", "--all").stdout == ""
    assert pilot("retry", "--all", task).returncode == 2
