"""`pilotq-qcg-report`: the commands of QCG-PilotJob's report tool, on a real pilot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command_line import environment, in_background

Report = Callable[..., "subprocess.CompletedProcess[str]"]
CODE = "from pilotq.cli.qcg.report import main; main()"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    folder = tmp_path_factory.mktemp("qcg-report")

    def call(command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CODE, command, *words], cwd=folder, env=environment(), capture_output=True, text=True
        )

    with in_background(folder, "--nodes", "2") as pilot:
        pilot("enqueue", "--name", "good", "--", "sleep", "0.2")
        pilot("enqueue", "--name", "bad", "--", "false")
        pilot("wait")
        pilot("stop")
        yield call


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["stats", "--details"], ["1 failed, 1 finished", "CORE-HOURS WENT INTO"]),
        (["launch-stats", "--verbose"], ["executions  2", "longest"]),
        (["rusage", "--wo-init", "--until-last-job"], ["cores  ", "use    "]),
        (["efficiency", "--details"], ["efficiency", "of what finished"]),
        (["jobs", "--state", "failed"], ["bad  failed  exit"]),
        (["jobs", "--sort", "name", "--details"], ["bad", "good", "exit code 0"]),
        (["text"], ["good", "bad"]),
    ],
)
def test_reports(report: Report, words: list[str], texts: list[str]) -> None:
    done = report(*words, ".pilotq/current")
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in texts), done.stdout
    assert "good" not in done.stdout or words[-1] != "failed"


def test_pictures(report: Report, tmp_path: Path) -> None:
    for kind in ("gantt", "gantt-gaps"):
        done = report(kind, ".pilotq/current", str(tmp_path / f"{kind}.svg"))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{kind}.svg").read_bytes().startswith(b"<?xml")


def test_what_is_no_pilot_is_refused_in_a_sentence(report: Report) -> None:
    done = report("stats", "no/such/folder")
    assert done.returncode and done.stderr.startswith("pilotq-qcg-report: ") and "Traceback" not in done.stderr


def test_a_journal_that_cannot_be_read_is_a_sentence(report: Report, tmp_path: Path) -> None:
    (tmp_path / "pilot" / "server").mkdir(parents=True)
    (tmp_path / "pilot" / "journal.jsonl").mkdir()
    done = report("stats", str(tmp_path / "pilot"))
    assert done.returncode == 1 and done.stderr.startswith("pilotq-qcg-report: ")
    assert len(done.stderr.splitlines()) == 1 and "Is a directory" in done.stderr
