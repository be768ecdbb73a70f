"""Tasks that submit others and join them, on the command line: a program in shell, files, restarts, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import Cli, in_background, prompt
from tests.support.waiting import wait_until

PILOTQ = f"{sys.executable} -m pilotq"


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with in_background(tmp_path_factory.mktemp("pilot"), "--nodes", "2") as cli:
        yield cli


def enqueue(cli: Cli, script: str, *options: str) -> str:
    done = cli("enqueue", *options, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def show(cli: Cli, *ids: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(cli("show", "--json", *ids).stdout)
    return found


def joining(cli: Cli, task_id: str) -> None:
    wait_until(lambda: show(cli, task_id)[0]["reason"] == "joining", what=f"{task_id} joins")


NESTED = f"""
a=$({PILOTQ} enqueue -- sh -c 'touch half') || exit
{PILOTQ} enqueue --join --after $a -- {PILOTQ} enqueue --array 0-2 -- sh -c 'until [ -e go ]; do sleep 0.05; done'
echo submitted
"""


def test_a_program_in_shell_that_submits_others(pilot: Cli, tmp_path: Path) -> None:
    top = enqueue(pilot, NESTED, "--join", "--cores", "2", "--cwd", str(tmp_path), "--env", f"PWD={tmp_path}")
    after = enqueue(pilot, f"test -e {tmp_path}/go", "--after", top)
    joining(pilot, top)  # its two cores are free: otherwise nothing of this could run
    wait_until((tmp_path / "half").exists)
    wait_until(lambda: show(pilot, top)[0]["open_children"] == 1, what="one child has ended")
    text = pilot("show", top).stdout
    assert "reason        joining: its process has ended\n" in text and "waits for 1 of its 2 children" in text
    assert pilot("logs", top).stdout.endswith("submitted\n") and pilot("logs", "-f", top).returncode == 0
    child = pilot("logs", top).stdout.split()[0]
    joining(pilot, child)
    assert f"child of      {top}\n" in pilot("show", child).stdout
    why = pilot("explain", top).stdout
    assert "is deferred\n  its process has ended: finished\n  it waits for 1 of its 2 children\n" in why
    assert f"task {child} is deferred" in why
    assert "joining" in pilot("list", "--status", "deferred").stdout
    assert json.loads(pilot("status", "--json").stdout)["tasks"]["left"] >= 4
    assert pilot("wait", "--timeout", "0.2", top).returncode == 4
    (tmp_path / "go").touch()
    assert pilot("wait", top, after).returncode == 0
    ended, last = show(pilot, top, child)
    assert (ended["status"], ended["exit_code"], ended["execution"], ended["children"]) == ("finished", 0, 1, 2)
    assert ended["times"]["started"] <= ended["times"]["joining"] <= ended["times"]["ended"]  # type: ignore[index]
    assert last["times"]["ended"] <= ended["times"]["ended"]  # type: ignore[index]
    assert pilot("logs", top).stdout.endswith("submitted\n")


def test_a_child_that_fails(pilot: Cli) -> None:
    top = enqueue(pilot, f"{PILOTQ} enqueue -- false; {PILOTQ} enqueue -- true", "--join", "--name", "top")
    notok = enqueue(pilot, "true", "--after-notok", top)
    assert pilot("wait", top).returncode == 1 and pilot("wait", notok).returncode == 0
    (bad, _) = pilot("logs", top).stdout.split()
    assert show(pilot, top)[0]["reason"] == "children"
    assert f"task {bad} did not finish" in pilot("explain", top).stdout
    again = pilot("retry", "--all").stdout
    assert f"{top}: runs again" in again and bad not in again
    assert pilot("wait", top).returncode == 1


def test_cancel(pilot: Cli, tmp_path: Path) -> None:
    top = enqueue(pilot, f"{PILOTQ} enqueue --name held -- sleep 600", "--join", "--cwd", str(tmp_path))
    joining(pilot, top)
    assert pilot("cancel", top).stdout == f"{top}: is running, and is being ended\n"
    assert pilot("wait", top).returncode == 1
    assert [task["status"] for task in show(pilot, top, "held")] == ["canceled", "canceled"]


def test_what_would_wait_for_itself_is_refused(pilot: Cli) -> None:
    top = enqueue(pilot, f"{PILOTQ} enqueue --after-any $PILOTQ_TASK_ID -- true", "--join")
    assert pilot("wait", top).returncode == 1
    assert "each would wait for the other" in pilot("logs", "--stderr", top).stdout
    refused = pilot("enqueue", "--join", "--array", "0-3", "--", "true")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "join is for single tasks" in refused.stderr


def test_the_pilot_of_another_directory_has_no_part_in_it(pilot: Cli, tmp_path: Path) -> None:
    """Ids of pilots are alike: what goes to another one is nobody's child."""
    with in_background(tmp_path, "--nodes", "1") as other:
        held = enqueue(other, "sleep 600", "--join")
        script = f"{PILOTQ} enqueue --dir {tmp_path}/.pilotq/current -- true"
        done = other("enqueue", "--", "true", PILOTQ_TASK_ID=held, PILOTQ_DIR="/")
        assert done.returncode == 3 or "no pilot" in done.stderr
        top = enqueue(pilot, script, "--join")
        assert pilot("wait", top).returncode == 0
        assert show(pilot, top)[0]["children"] == 0 == show(other, held)[0]["children"]


def test_run_ends_with_the_last_child_and_a_file_may_say_join(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(
        f"[[tasks]]\nname = 'a'\njoin = true\ncommand = \"{PILOTQ} enqueue -- sh -c 'sleep 0.3; touch child'\"\n"
        "[[tasks]]\nafter = 'a'\ncommand = 'test -e child'\n"
    )
    done = prompt(tmp_path)("run", "tasks.toml", "--nodes", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"]["finished"] == 3


def test_a_pilot_that_ends_meanwhile_goes_on(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1") as cli:
        script = "touch begun; until [ -e go ]; do sleep 0.05; done"
        top = enqueue(cli, f"{PILOTQ} enqueue -- sh -c '{script}'; echo out", "--join")
        joining(cli, top)
        wait_until((tmp_path / "begun").exists)
        assert cli("stop", "--now").returncode == 0
        (ended,) = show(cli, top)
        assert (ended["status"], ended["reason"]) == ("deferred", "joining")
        assert cli("wait", top).returncode == 1 and cli("logs", top).stdout.endswith("out\n")
        assert "children      have not all ended" in cli("show", top).stdout
        assert cli("start", "--resume", ".pilotq/current", "--nodes", "1").returncode == 0
        joining(cli, top)
        (tmp_path / "go").touch()
        assert cli("wait", top).returncode == 0
        assert cli("stop").returncode == 0
        (ended,) = show(cli, top)
        assert (ended["status"], ended["execution"], ended["exit_code"]) == ("finished", 1, 0)
