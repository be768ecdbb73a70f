"""Tasks that wait for others in several ways, on the command line, in scripts and in files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import Cli, in_background


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with in_background(tmp_path_factory.mktemp("pilot"), "--nodes", "2") as cli:
        yield cli


SCRIPT = "#!/bin/sh\n#SBATCH --dependency=afterany:bad,afternotok:bad\necho cleaned\n"


def test_each_way_to_wait(pilot: Cli, tmp_path: Path) -> None:
    go = tmp_path / "go"
    hold = ("--", "sh", "-c", f"while [ ! -e {go} ]; do sleep 0.05; done; exit 3")
    (bad,) = pilot("enqueue", "--name", "bad", *hold).stdout.split()
    (tmp_path / "job.sh").write_text(SCRIPT)
    ids = [
        pilot("enqueue", *words).stdout.strip()
        for words in (
            ("--after-any", "bad", "--after-notok", bad, "--", "true"),
            ("--after-ok", "bad", "--", "true"),
            ("--after-any", "bad", "--array", "0-2", "--", "true"),
            ("--script", str(tmp_path / "job.sh")),
            ("--after-ok", "bad", "--script", str(tmp_path / "job.sh")),
        )
    ]
    why = pilot("explain", *ids).stdout
    assert f"it waits for task {bad} (bad), which is started, and runs only if that does not finish\n" in why
    assert f"it waits for task {bad} (bad), which is started, however that ends\n" in why
    go.touch()
    assert pilot("wait", *ids).returncode == 1
    shown = json.loads(pilot("show", "--json", *ids).stdout)
    assert [task["status"] for task in shown] == ["finished", "canceled", "finished", "finished", "canceled"]
    assert "bad) failed" in pilot("explain", ids[1]).stdout
    assert pilot("retry", ids[4]).returncode == 1
    (never,) = pilot("enqueue", "--after-notok", ids[0], "--", "true").stdout.split()
    (behind,) = pilot("enqueue", "--after", never, "--", "true").stdout.split()
    why = pilot("explain", never).stdout
    assert f"did not end as required\n  task {ids[0]} finished, after " in why and "retry" not in why
    assert why.endswith("; this task runs only if that does not finish\n")
    again = pilot("retry", never)
    assert again.returncode == 1 and "and that finished: there is nothing to run again" in again.stdout
    everything = pilot("retry", "--all").stdout.split()
    assert f"{bad}:" in everything and not {f"{never}:", f"{behind}:"} & set(everything)
    refused = pilot("enqueue", "--after", bad, "--after-notok", "bad", "--", "true")
    assert refused.returncode == 2 and "it would have to end in two ways" in refused.stderr


TASKS = """
[[tasks]]
name = "fit"
array = "0-3"
script = "exit {index}"

[[tasks]]
after_any = "fit"
command = "touch summary"

[[tasks]]
after_notok = ["fit:2"]
command = "touch mended"

[[tasks]]
after_notok = "fit:0"
command = "touch never"
"""


def test_in_a_file(pilot: Cli, tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(TASKS.replace("touch ", f"touch {tmp_path}/"))
    ids = pilot("submit", str(tmp_path / "tasks.toml")).stdout.split()
    assert pilot("wait", *ids).returncode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tasks.toml", "summary", "mended"}
