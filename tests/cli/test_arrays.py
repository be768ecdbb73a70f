"""Arrays with gaps, and with a limit of how many of their elements run at a time, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import Cli, in_background, prompt
from tests.support.waiting import wait_until


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "4") as cli:
        yield cli


def test_an_array_of_several_ranges(pilot: Cli, tmp_path: Path) -> None:
    """Its life on the command line: with its own indices everywhere."""
    code = "test {index} != 4 -o -e mended && echo $PILOTQ_INDEX | tee at-{index}"
    (array,) = pilot("enqueue", "--name", "gaps", "--array", "1,3-5,10-20:5", "--", "sh", "-c", code).stdout.split()
    after = pilot("enqueue", "--after", f"{array}_15", "--", "touch", "after").stdout.strip()
    assert pilot("wait", array, after).returncode == 1
    assert (tmp_path / "after").exists()
    (shown,) = json.loads(pilot("show", "gaps", "--json").stdout)
    assert (shown["array_size"], shown["elements"]) == (7, {"finished": "1,3,5,10-20:5", "failed": "4"})
    assert pilot("logs", f"{array}_15").stdout == "15\n"
    for index in (0, 2, 6, 11, 25):
        assert pilot("show", f"{array}_{index}").returncode == 2
    assert pilot("cancel", f"{array}_12").returncode == 2
    (tmp_path / "mended").touch()
    assert pilot("retry", array).returncode == pilot("wait", array).returncode == 0
    assert {path.name for path in tmp_path.glob("at-*")} == {f"at-{index}" for index in (1, 3, 4, 5, 10, 15, 20)}
    assert pilot("enqueue", "--array", "0-9%0", "--", "true").returncode == 2


# Each element notes how many of its array run at that moment, itself included.
AT_WORK = "mkdir at-{index}; ls -d at-* | wc -l >>seen; echo {index} >>ran; sleep 0.05; rmdir at-{index}"
TASKS = """
[[tasks]]
name = "some"
array = "1,3-5,10-40:2%2"
script = '''{script}'''

[[tasks]]
array = "0-19"
after_each = "some"
command = "touch after-{index}"
"""


def test_a_limit_in_a_file_holds_while_the_pilot_is_stopped_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(TASKS.replace("{script}", AT_WORK))
    with in_background(tmp_path, "--nodes", "4,4") as cli:
        first, second = cli("submit", "tasks.toml").stdout.split()
        assert "\nat a time     at most 2\n" in cli("show", first).stdout
        wait_until(lambda: (tmp_path / "ran").exists() and len((tmp_path / "ran").read_text().split()) > 3)
        assert cli("stop", "--now").returncode == 0
        for folder in tmp_path.glob("at-*"):
            folder.rmdir()
        assert cli("start", "--resume", ".pilotq/current").returncode == 0
        assert cli("wait").returncode == 0
        shown = json.loads(cli("show", first, second, "--json").stdout)
    assert [array["elements"] for array in shown] == [{"finished": "1,3-5,10-40:2"}, {"finished": "0-19"}]
    assert {int(line) for line in (tmp_path / "seen").read_text().split()} == {1, 2}
    assert {int(line) for line in (tmp_path / "ran").read_text().split()} == {1, 3, 4, 5, *range(10, 41, 2)}
    assert len(list(tmp_path.glob("after-*"))) == 20


def test_lines_of_a_file_by_their_indices(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("".join(f"line {n}\n" for n in range(10)))
    cli = prompt(tmp_path)
    run = ("run", "--nodes", "2", "--each-line", "lines", "--array")
    ran = cli(*run, "2,7-8%1", "--", "sh", "-c", 'echo "$PILOTQ_INDEX $PILOTQ_VALUE" >>out')
    assert "3 tasks: 3 finished" in ran.stdout, ran.stderr
    assert (tmp_path / "out").read_text() == "2 line 2\n7 line 7\n8 line 8\n"
    ran = cli(*run, "2,10", "--", "true")
    assert ran.returncode == 2 and "array names the index 10, but the last of the values has the index 9" in ran.stderr
