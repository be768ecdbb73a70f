"""What a run and a wait show while they last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pilotq.broker.client.views import Counts, seconds_left
from pilotq.cli.progress import PAUSE_MIN_S, Plain, pause_after
from tests.support.command_line import command, environment, in_background
from tests.support.terminal import terminal


def test_lines_get_rarer() -> None:
    lines, elapsed = 0, 0.0
    while elapsed < 24 * 3600:
        elapsed += pause_after(elapsed)
        lines += 1
    assert lines < 300, "of a whole day"
    assert pause_after(0.0) == pause_after(10.0) == PAUSE_MIN_S


@pytest.mark.parametrize(
    ("finished", "running", "left"), [(40, 2, True), (40, 60, False), (98, 1, False), (0, 2, False)]
)
def test_the_time_left_is_shown_while_it_says_something(
    finished: int, running: int, left: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = Plain()
    now += 10.0
    lines.update(Counts(total=100, finished=finished), running)
    assert (" left" in capsys.readouterr().err) is left


def test_bar_page_and_top_have_one_time_that_is_left() -> None:
    assert seconds_left(60, 2, 4.0) == 15.0
    assert [seconds_left(*one) for one in ((60, 60, 4.0), (3, 1, 4.0), (60, 2, 0.0), (0, 0, 1.0))] == [None] * 4


def test_a_bar_has_a_rate_and_the_time_that_is_left(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("sleep 0.3\n" * 30)
    with terminal(command("run", "t.txt", "--nodes", "2"), tmp_path, environment(), columns=120) as screen:
        screen.read_until(" left")
        assert screen.read_to_end() == 0
    shown = screen.shown.decode()
    assert re.search(r"[0-9.]+/s, [0-9.]+s left", shown), shown
    assert "/30" in shown and "30 tasks: 30 finished" in shown


def test_a_wait_shows_what_it_waits_for(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "2") as cli:
        code = "until [ -e go ]; do sleep 0.05; done; test {index} -ne 3"
        ids = cli("enqueue", "--array", "0-9", "--", "sh", "-c", code).stdout.split()
        other = cli("enqueue", "--", "sleep", "1000").stdout.split()
        with terminal(command("wait", "--progress", *ids), tmp_path, environment(), columns=120) as screen:
            screen.read_until("0/10")
            (tmp_path / "go").touch()
            assert screen.read_to_end() == 1
        assert "1 task: 1 failed" in screen.shown.decode()

        done = cli("wait", "--progress", "--timeout", "3s", *other)
        assert done.returncode == 4
        assert "pilotq: 0 of 1 task ended; 1 running, after " in done.stderr
        assert "had not ended after 3 s" in done.stderr
        done = cli("wait", "--progress", *ids)
        assert done.stderr.splitlines()[-1].startswith("pilotq: ") and " failed" in done.stderr
        assert "pilotq" not in cli("wait", "--timeout", "0.1s", *ids).stderr, "nothing is shown without it"
