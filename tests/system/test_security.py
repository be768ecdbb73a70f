"""Private by default: what others can see and do of a pilot, and what names, output and files can do to its owner."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pilotq.broker import ArrayRange, Broker, Task
from pilotq.broker.errors import InvalidInput, NoPilot
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.cli.doctor_checks import readable_by_others
from pilotq.workers.process_tree import environment, processes
from tests.support.command_line import Cli, in_background, prompt
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

NOBODY = 65534
EVIL = "\x1b]0;owned\x07\x1b[31m\x9b31m\x1b[2J"  # a title, colours, a cleared screen
ESCAPES = ("\x1b", "\x9b", "\x07")


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user may enter, as all above it: what lies in it protects itself or not at all."""
    place = Path(tempfile.mkdtemp(prefix="private-", dir="/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def careless(open_place: Path) -> Iterator[LivePilot]:
    """A pilot that was started with umask 0, and has run tasks of many kinds."""
    before = os.umask(0)
    try:
        with live_pilot(open_place, "n1:2") as live:
            code = "import sys; sys.stdout.write('x' * {index} * 100_000)"
            loud = Task(command=[sys.executable, "-I", "-S", "-c", code], array=ArrayRange(0, 12, 6))
            live.ended(live.broker.enqueue(loud))
            live.ended(live.enqueue("sh", "-c", "echo oops >&2; exit 3"))
            live.ended(live.broker.enqueue(Task(function="os:getpid")))
            yield live
    finally:
        os.umask(before)


# -- strangers --------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """What a stranger sends to the server, and the beginning of the answer."""

    sent: bytes
    answer: bytes


STRANGERS = {
    "nothing": Exchange(b"PING\r\n", b"-NOAUTH"),
    "no user": Exchange(b"AUTH x\r\n", b"-WRONGPASS"),
    "default": Exchange(b"AUTH default x\r\n", b"-WRONGPASS"),
    "wrong": Exchange(b"AUTH pilotq 0123456789abcdef\r\n", b"-WRONGPASS"),
    "empty": Exchange(b'AUTH pilotq ""\r\n', b"-WRONGPASS"),
    "hello": Exchange(b"HELLO 3 AUTH admin admin\r\n", b"-WRONGPASS"),
    "script": Exchange(b"EVAL 'return 1' 0\r\n", b"-NOAUTH"),
    "http": Exchange(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),  # a web page of somebody: it is hung up on
}


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("bind", [(), ("--bind", "127.0.0.1")], ids=["unix", "tcp"])
def test_strangers_get_nothing(tmp_path: Path, who: str, bind: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pilotq", "server", "--dir", "p", *bind]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until((tmp_path / "p" / "connection.json").exists)
            address = Pilot(str(tmp_path / "p")).connection().address
            family = socket.AF_INET if bind else socket.AF_UNIX
            with socket.socket(family) as stranger:
                stranger.settimeout(30)
                stranger.connect((address.host, address.port) if bind else address.path)
                stranger.sendall(STRANGERS[who].sent)
                assert stranger.recv(4096).startswith(STRANGERS[who].answer)
        finally:
            server.terminate()


PROBE = """
import json, os, socket, sys
directory, path, pid = sys.argv[1:]
def refused(call):
    try:
        call()
    except PermissionError:
        return True
    return False
def connect():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
print(json.dumps({
    "sees the place": not refused(lambda: os.listdir(os.path.dirname(directory))),
    "list": refused(lambda: os.listdir(directory)),
    "connection": refused(lambda: open(directory + "/connection.json")),
    "journal": refused(lambda: open(directory + "/journal.jsonl")),
    "data": refused(lambda: os.listdir(directory + "/server")),
    "socket": refused(connect),
    "socket directory": refused(lambda: os.listdir(os.path.dirname(path))),
    "environment": refused(lambda: open(f"/proc/{pid}/environ").read()),
    "kill": refused(lambda: os.kill(int(pid), 0)),
    "make": refused(lambda: open(directory + "/new", "w")),
}))
"""


def test_another_user_of_the_machine_can_neither_look_nor_act(careless: LivePilot, open_place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    assert python is not None, "another user needs a Python outside of the home of this one"
    address = Pilot(careless.pilot.directory).connection().address
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", python, "-I", "-S", "-c", PROBE]
    done = subprocess.run(
        [*nobody, careless.pilot.directory, address.path, str(careless.pilot.process.pid)], cwd="/",
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == dict.fromkeys(found, True)


def test_nothing_is_open_to_others_while_it_runs_and_afterwards(open_place: Path, careless: LivePilot) -> None:
    directory = careless.pilot.directory
    folder = Path(Pilot(directory).connection().address.path).parent
    found = [path for place in (Path(directory), folder) for path in (place, *place.rglob("*"))]
    assert len(found) > 15
    assert [str(p) for p in found if not p.is_symlink() and stat.S_IMODE(p.lstat().st_mode) & 0o077] == []
    careless.pilot.process.terminate()
    careless.pilot.process.wait()
    assert list(readable_by_others(directory)) == []
    assert not folder.exists()


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_no_password_in_arguments_environments_logs_and_tasks(careless: LivePilot, tmp_path: Path) -> None:
    connection = Pilot(careless.pilot.directory).connection()
    assert connection.admin is not None
    secrets = [connection.address.password.encode(), connection.admin.password.encode()]
    # A script under `pilotq exec` has it, and what that submits has it not.
    submit = (
        "from pilotq.broker import Broker, Task\nwith Broker.connect() as b: print(b.enqueue(Task(command=['env'])))"
    )
    directory = ["--dir", careless.pilot.directory]
    done = subprocess.run(
        [sys.executable, "-m", "pilotq", "exec", *directory, "--", sys.executable, "-c", submit],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    task = done.stdout.strip()
    assert careless.ended(task).status == "finished"
    texts = {"what a task sees": careless.output(task)}
    assert b"PILOTQ_TASK_ID" in texts["what a task sees"]
    sleeper = careless.enqueue("sleep", "100")
    wait_until(careless.of_tasks)
    mark = os.fsencode(careless.pilot.directory)
    ours = 0
    for pid, process in processes().items():
        try:
            command, around = Path(f"/proc/{pid}/cmdline").read_bytes(), environment(pid)
        except OSError:
            continue  # it has ended
        if pid == os.getpid() or not process.alive:
            continue
        texts[f"arguments of {pid}"] = command
        if mark in command or mark in around:
            ours += 1
            texts[f"environment of {pid}"] = around
    assert ours >= 5, "supervisor, server, dispatcher, worker, launcher, task"
    for path in Path(careless.pilot.directory).rglob("*"):
        if path.is_file() and path.name != "connection.json":
            texts[str(path)] = path.read_bytes()
    assert [where for where, text in texts.items() if any(secret in text for secret in secrets)] == []
    careless.broker.cancel([sleeper])
    careless.ended(sleeper)


def test_errors_do_not_tell_the_password(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    for url in ("redis://u:hunter2hunter2@localhost:1/0", "redis://u:hunter2hunter2@localhost:1/zero"):
        done = cli("run", "--nodes", "1", "--", "true", PILOTQ_REDIS_URL=url)
        assert done.returncode != 0 and "hunter2" not in done.stderr + done.stdout, done.stderr


# -- names and arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../n", "..", ".hidden", "-w", "a/b", "a b", "a\nb", "", "ü", "x" * 64])
def test_a_node_name_stays_within_its_directory_and_is_no_option(tmp_path: Path, name: str) -> None:
    cli = prompt(tmp_path)
    for words in (["start", f"--nodes={name}:1"], ["worker", "--dir", "p", f"--node={name or '.'}", "--cores", "0"]):
        done = cli(*words)
        assert done.returncode == 2 and "node name" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "2") as cli:
        yield cli


def test_words_of_users_lead_out_of_no_directory(pilot: Cli, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    for word in ("../secret", "/etc/passwd", "..", "../../../../etc/passwd", "1/../../secret", "\x1b[2J", "*", "%s"):
        for verb in ("show", "explain", "logs", "cancel", "retry"):
            done = pilot(verb, word)
            assert done.returncode == 2 and not done.stdout, (verb, word)
            assert not any(escape in done.stderr for escape in ESCAPES)
    for option in ("--name=../x", "--name=a/b", "--queue=../x", "--queue=a.b", "--queue=rq:queue:x", "--name="):
        done = pilot("enqueue", option, "--", "true")
        assert done.returncode == 2, option
    assert not list(tmp_path.glob("x*"))


def test_words_that_look_like_options_are_words(pilot: Cli, tmp_path: Path) -> None:
    first = pilot("enqueue", "--name=--help", "--", "echo", "--dir", "-x", "--", "--json").stdout.strip()
    assert pilot("wait", "--timeout", "60s").returncode == 0
    assert pilot("logs", first).stdout == "--dir -x -- --json\n"
    assert json.loads(pilot("show", "--json", "--", "--help").stdout)[0]["id"] == first
    # A program that is called like an option is a program, and no option of bash or of ours.
    for script in (["--", "-c", "touch pwned"], ["--", "--version"]):
        task = pilot("enqueue", *script).stdout.strip()
        pilot("wait", task)
        (row,) = json.loads(pilot("show", "--json", task).stdout)
        assert (row["status"], row["reason"]) == ("failed", "not found")
    script = tmp_path / "-script"
    script.write_text("echo fine")
    task = pilot("enqueue", "--script=-script").stdout.strip()
    assert pilot("wait", task).returncode == 0 and pilot("logs", task).stdout == "fine\n"
    assert not (tmp_path / "pwned").exists()


# -- links ------------------------------------------------------------------------------------------------------------


def test_a_link_to_the_connection_of_another_is_not_followed(tmp_path: Path, pilot: Cli) -> None:
    real = Path(os.path.realpath(tmp_path / ".pilotq" / "current"))
    fake = tmp_path / "fake"
    (fake / "server").mkdir(parents=True)
    (fake / "connection.json").symlink_to(real / "connection.json")
    with pytest.raises(InvalidInput, match="cannot be read"):
        Broker.connect(str(fake))
    if os.geteuid() == 0:
        (fake / "connection.json").unlink()
        shutil.copy(real / "connection.json", fake)
        (fake / "connection.json").chmod(0o600)
        os.chown(fake / "connection.json", NOBODY, NOBODY)
        with pytest.raises(InvalidInput, match="belongs to another user"):
            Broker.connect(str(fake))


def test_a_link_in_the_place_of_a_pilot_is_nothing_to_write_through(tmp_path: Path) -> None:
    """Where somebody else may write, nothing of ours is made through what they have put there."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep").write_text("theirs")
    (tmp_path / "p").symlink_to(target)
    done = prompt(tmp_path)("start", "--dir", "p", "--nodes", "1")
    assert done.returncode == 2 and "neither empty nor a pilot's directory" in done.stderr
    assert [path.name for path in target.iterdir()] == ["keep"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o055, "and it is not closed to its own users"
    with pytest.raises(NoPilot):
        find(str(target))


# -- terminals --------------------------------------------------------------------------------------------------------


def test_names_commands_and_output_do_nothing_to_a_terminal(pilot: Cli, tmp_path: Path) -> None:
    done = pilot("enqueue", f"--name=x{EVIL}", "--", "true")
    assert done.returncode == 2, "control characters are no part of a name"
    name = "y\x9b31m\u202edlrow"
    task = pilot("enqueue", f"--name={name}", "--", "sh", "-c", f"printf '{EVIL}' >&2; exit 3").stdout.strip()
    sleeper = pilot("enqueue", f"--name={name}2", "--", "sh", "-c", "sleep 100", EVIL).stdout.strip()
    wait_until(lambda: json.loads(pilot("top", "--json").stdout)["running"] == 1)
    (tmp_path / "directives").write_text(f"#!/bin/sh\n#SBATCH --comment=x{EVIL}\n#SBATCH --no{EVIL}such=1\ntrue\n")
    outputs = [pilot(*words) for words in (
        ["list"], ["show", task, sleeper], ["explain", task, sleeper], ["top"], ["status"], ["nodes"], ["wait", task],
        ["explain", f"no{EVIL}such"], ["show", name], ["list"], ["report"], ["explain", task], ["list", EVIL],
        ["logs", f"no{EVIL}"], ["run", f"no{EVIL}.txt"], ["submit", f"no{EVIL}.txt"], ["doctor", "--dir", EVIL],
        ["help", EVIL], ["cancel", sleeper], ["retry", task], [EVIL], ["enqueue", "--script=directives"],
    )]  # fmt: skip
    for done in outputs:
        assert not any(escape in done.stdout + done.stderr for escape in ESCAPES), done.args
    assert any("\u202e" in done.stdout for done in outputs) is False, "text is not turned around either"


def test_a_run_that_fails_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(
        "[[tasks]]\nname = 'bad'\nscript = '''printf '\\033]0;x\\007\\033[31mred' >&2; exit 3'''\n"
    )
    done = prompt(tmp_path)("run", "--nodes", "1", "tasks.toml")
    assert done.returncode == 1 and "red" in done.stdout
    assert not any(escape in done.stdout + done.stderr for escape in ESCAPES)
