"""Arrays with gaps, and with a limit of how many of their elements run at a time, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.command_line import Cli


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
