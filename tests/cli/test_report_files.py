"""What `pilotq report` writes its FILE to: new and existing files, links, pipes, and what it refuses."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.cli.commands.report import report_command
from pilotq.cli.report_export import COLUMNS, write_csv
from pilotq.cli.report_page import write_page

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


def test_the_page_is_made_of_one_reading(tmp_path: Path) -> None:
    class Once(Journal):
        readings = 0

        def entries(self) -> Iterator[JournalEntry]:
            self.readings += 1
            return super().entries()

    line = '{"id":"%d","name":"fit","status":"finished","execution":1,"node":"n1","cpus":"n1[0]","queued":1.0,'
    line += '"started":2.0,"ended":%d.0,"max_rss":1048576,"cpu":1.5}\n'
    (tmp_path / "journal.jsonl").write_text("".join(line % (number, 4 + number) for number in range(3)))
    journal = Once(str(tmp_path / "journal.jsonl"))
    assert write_page(journal, str(tmp_path / "run.html")) == 3 and journal.readings == 1
    text = (tmp_path / "run.html").read_text()
    assert all(part in text for part in ("Where the core-hours went", "Asked for and used", "<td>fit</td>"))
