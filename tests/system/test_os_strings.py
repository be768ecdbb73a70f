"""Bytes that are not UTF-8 in everything that the system hands over, and in everything that it is given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker import ArrayRange, Task
from pilotq.broker.errors import InvalidInput
from pilotq.broker.os_strings import from_json, printable, to_json, unusable
from tests.support.command_line import TIMEOUT, environment
from tests.support.live_pilot import LivePilot, live_pilot

ODD = b"caf\xe9"  # Latin-1
ODD_TEXT = os.fsdecode(ODD)
# Entrance -> options and command of `pilotq enqueue`, and what the task then prints. ODD is a line of the file `lines`.
ENTRANCES: dict[str, tuple[list[bytes], bytes]] = {
    "argument": ([b"--", b"printf", b"%s", ODD], ODD),
    "program": ([b"--", b"./" + ODD + b".sh"], b"ran"),
    "inherited variable": ([b"--", b"sh", b"-c", b'printf %s "$INHERITED"'], ODD),
    "inherited name": ([b"--", b"env"], b"N" + ODD + b"=1"),
    "--env": ([b"--env", b"T=" + ODD, b"--", b"sh", b"-c", b'printf %s "$T"'], ODD),
    "--env from here": ([b"--env", b"INHERITED", b"--", b"sh", b"-c", b'printf %s "$INHERITED"'], ODD),
    "name of --env": ([b"--env", b"M" + ODD + b"=1", b"--", b"env"], b"M" + ODD + b"=1"),
    "clean environment": ([b"--env-policy", b"clean", b"--", b"sh", b"-c", b'printf %s "$LC_ODD"'], ODD),
    "--cwd": ([b"--cwd", ODD, b"--", b"pwd"], b"/" + ODD + b"/" + ODD),
    "current directory": ([b"--", b"pwd"], b"/" + ODD),
    "--stdin": ([b"--stdin", ODD + b".in", b"--", b"cat"], b"input"),
    "--stdout": ([b"--stdout", b"new/" + ODD, b"--", b"echo", b"out"], b"out"),
    "--stderr": ([b"--stderr", ODD + b".err", b"--", b"echo", b"out"], b"out"),
    "--name": ([b"--name", ODD, b"--", b"echo", b"named"], b"named"),
    "--script": ([b"--script", b"script"], ODD),
    "variables of an array": ([b"--array", b"7", b"--", b"printf", b"%s", ODD + b"{index}"], ODD + b"7"),
    "--each-line": ([b"--each-line", b"lines", b"--", b"printf", b"%s", b"<{value}>"], b"<" + ODD + b">"),
}


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    """A pilot in a directory whose name is not UTF-8, with the user's files."""
    folder = tmp_path_factory.mktemp("strings") / ODD_TEXT
    (folder / ODD_TEXT).mkdir(parents=True)
    (folder / f"{ODD_TEXT}.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / f"{ODD_TEXT}.sh").chmod(0o755)
    (folder / f"{ODD_TEXT}.in").write_text("input")
    (folder / "script").write_bytes(b"printf %s " + ODD)
    (folder / "lines").write_bytes(ODD + b"\n")
    with live_pilot(folder, "n1:2") as live:
        yield live


def cli(pilot: LivePilot, *args: bytes | str, **env: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**environment(**env), "INHERITED": ODD_TEXT, "N" + ODD_TEXT: "1", "LC_ODD": ODD_TEXT}
    return subprocess.run(
        [sys.executable, "-m", "pilotq", *args], cwd=Path(pilot.pilot.directory).parent, stdin=subprocess.DEVNULL,
        env={**variables, "PILOTQ_DIR": pilot.pilot.directory}, capture_output=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


def latin1(tmp_path: Path) -> dict[str, str]:
    name = "en_US.ISO-8859-1"
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / name], capture_output=True, check=False)
    if not (tmp_path / name).is_dir():
        pytest.skip("localedef cannot make a locale here")
    return {"LOCPATH": str(tmp_path), "LC_ALL": name}


@pytest.mark.parametrize(
    ("locale", "entrances"),
    [("UTF-8", list(ENTRANCES)), ("Latin-1", ["argument", "--env", "--cwd", "--stdout", "--name", "--each-line"])],
)
def test_every_entrance_of_the_command_line_lets_bytes_through(
    pilot: LivePilot, tmp_path: Path, locale: str, entrances: list[str]
) -> None:
    env = latin1(tmp_path) if locale == "Latin-1" else {}
    tasks = {}
    for entrance in entrances:
        submitted = cli(pilot, "enqueue", *ENTRANCES[entrance][0], **env)
        assert (submitted.returncode, submitted.stderr) == (0, b""), entrance
        tasks[entrance] = submitted.stdout.decode().strip()
    seen = {}
    for entrance, task in tasks.items():
        assert pilot.ended(task).status == "finished", entrance
        suffix = {"variables of an array": "_7", "--each-line": "_0"}.get(entrance, "")
        output = pilot.output(task + suffix)
        right = ENTRANCES[entrance][1]
        ends = output.rstrip()[-len(right) :] if right.startswith(b"/") else b""
        seen[entrance] = right if right in (ends, *output.splitlines()) else output
    assert seen == {entrance: ENTRANCES[entrance][1] for entrance in entrances}
    assert cli(pilot, "logs", tasks["argument"], **env).stdout == ODD
    named = cli(pilot, "list", "--json", **env)
    assert named.stdout.count(b'"name": "caf\\\\xe9"') >= 1, named.stderr


def test_what_runs_and_what_has_ended_is_shown_and_found(pilot: LivePilot) -> None:
    folder = Path(pilot.pilot.directory).parent
    missing = pilot.enqueue(f"/nowhere/{ODD_TEXT}")
    assert "'/nowhere/caf\\xe9'" in pilot.ended(missing).message
    for command in ("list", "status", "nodes", "doctor", "report"):
        done = cli(pilot, command)
        assert b"Traceback" not in done.stderr and done.returncode in (0, 1), (command, done.stderr)
    refused = [cli(pilot, "logs", b"x" + ODD), cli(pilot, "submit", ODD + b".toml"), cli(pilot, ODD)]
    assert [done.returncode for done in refused] == [2, 2, 2]
    assert all(done.stderr.startswith(b"pilotq: ") and b"Traceback" not in done.stderr for done in refused)
    rerun = pilot.enqueue(
        "sh", "-c", "echo $PILOTQ_EXECUTION; exit 1", stdout=ODD_TEXT + ".two", retries=1, cwd=str(folder)
    )
    pilot.ended(rerun)
    assert (pilot.output(rerun), (folder / f"{ODD_TEXT}.two").read_bytes()) == (b"2\n", b"2\n")


def raises(name: str) -> None:
    raise ValueError(f"cannot read {name}")


def test_an_exception_may_say_what_it_likes(pilot: LivePilot) -> None:
    for name in (ODD_TEXT, "half \ud800", f"\ud83d\ude00 {ODD_TEXT}"):
        with pytest.raises(ValueError, match="cannot read") as caught:
            pilot.broker.result(pilot.broker.enqueue(Task(function=raises, args=(name,))), timeout=60)
        assert caught.value.args == (f"cannot read {name}",)
    echo = pilot.broker.enqueue(Task(function=os.fsencode, values=[ODD_TEXT, "ü"]))
    assert [pilot.broker.result(f"{echo}_{n}", timeout=60) for n in range(2)] == [ODD, "ü".encode()]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"command": ["echo", "half \ud800"]}, r"task 1: a command cannot contain '\ud800', which is no character in"),
        ({"command": ["x"], "values": ["\udc00"]}, r"task 1: values cannot contain '\udc00', which is no"),
        ({"command": ["x"], "cwd": "a\0b"}, "task 1: cwd cannot contain a NUL character"),
        ({"command": ["x"], "env": {"A": "\ud800"}}, r"task 1: env cannot contain '\ud800', which is no"),
    ],
)
def test_what_no_system_can_take_is_refused_as_a_whole(pilot: LivePilot, fields: dict[str, object], why: str) -> None:
    before = pilot.broker.counts().total
    with pytest.raises(InvalidInput) as caught:
        pilot.broker.enqueue(Task(**fields))  # type: ignore[arg-type]
    assert str(caught.value).startswith(why)
    assert pilot.broker.counts().total == before


def test_json_holds_every_path() -> None:
    found = {"a": ODD_TEXT, "b": "ü", "c": [1, {"d": "x\udcff"}]}
    assert from_json(to_json(found), dict[str, object]) == found
    assert from_json(to_json({1: ODD_TEXT}), dict[int, str]) == {1: ODD_TEXT}
    assert ArrayRange(0, 1) == from_json(to_json(ArrayRange(0, 1)), ArrayRange)
    assert [printable(t) for t in ("ü", ODD_TEXT, ODD, "\ud800")] == ["ü", "caf\\xe9", "caf\\xe9", "\\ud800"]
    assert unusable(ODD_TEXT) == unusable("ü") == ""
