"""What `pilotq report` writes its FILE to: new and existing files, links, pipes, and what it refuses."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.journal import JournalEntry
from pilotq.cli.commands.report import report_command
from pilotq.cli.report_export import COLUMNS, write_csv

HEAD = ",".join(COLUMNS)


def lines() -> list[JournalEntry]:
    return [JournalEntry(id="1", status="finished", execution=1, started=1.0, ended=2.0, cpus="n1[0]")]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    kept = tmp_path / "there" / "run.csv"
    kept.write_text("old")
    kept.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to("there/run.csv")
    assert write_csv(lines(), str(link)) == 1
    assert link.is_symlink() and kept.read_text().startswith(HEAD)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640, "the mode is that of the file before"
    assert os.listdir(tmp_path / "there") == ["run.csv"] and sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert write_csv(lines(), str(pipe)) == 1
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(60)
    assert len(read) == 1 and read[0].startswith(HEAD) and len(read[0].splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("html", "run.html", "--json"), "--json is for stats"),
        (("csv", "run.csv", "--json"), "--json is for stats"),
        (("trace", "-"), "name the FILE"),
        (("gantt", "g.foo"), "name a .png, .svg or .pdf"),
        (("usage", "g"), "name a .png, .svg or .pdf"),
    ],
)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pilot" / "server").mkdir(parents=True)
    (tmp_path / "pilot" / "journal.jsonl").touch()
    with pytest.raises(InvalidInput, match=said):
        report_command.main([*words, "--dir", "pilot"], standalone_mode=False)
    assert os.listdir(tmp_path) == ["pilot"]
