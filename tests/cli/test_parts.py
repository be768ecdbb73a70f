"""The parts of a pilot, each started by hand: over a unix socket, over TCP, and on a server of the user's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pilotq.broker import Broker
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.server import start_server
from pilotq.broker.store import keys
from pilotq.workers.process_tree import processes, read_process
from tests.support.waiting import wait_until

TIMEOUT = 60.0
Start = Callable[..., subprocess.Popen[bytes]]


def pilotq(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pilotq", *args], cwd=cwd, env=environment(**env), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PILOTQ_")}, **more}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a part; in the end they get SIGTERM, the last one first, and must end well."""
    parts: list[subprocess.Popen[bytes]] = []

    def begin(*args: str, **env: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"{args[0]}.log", "ab") as log:
            part = subprocess.Popen(
                [sys.executable, "-m", "pilotq", *args], cwd=tmp_path, env=environment(**env),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        parts.append(part)
        return part

    yield begin
    codes = []
    for part in reversed(parts):
        part.terminate()
        try:
            codes.append(part.wait(TIMEOUT))
        except subprocess.TimeoutExpired:
            part.kill()
            codes.append(part.wait())
    assert codes == [0] * len(parts), [p.read_text() for p in tmp_path.glob("*.log")]


@pytest.mark.parametrize("bind", [(), ("--bind", "127.0.0.1")], ids=["unix", "tcp"])
def test_parts_by_hand_make_a_pilot(start: Start, tmp_path: Path, bind: tuple[str, ...]) -> None:
    start("server", "--dir", "p", *bind)
    wait_until((tmp_path / "p" / "connection.json").exists)
    # Each waits for the others, so the order does not matter.
    start("worker", "--dir", "p", "--node", "n1", "--cores", "0,1", "--real", "0:0,1:0")
    start("dispatcher", "--dir", "p")
    made = pilotq("enqueue", "--dir", "p", "--cores", "2", "--", "sh", "-c", "echo $PILOTQ_NODELIST", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    task = made.stdout.strip()
    assert pilotq("wait", task, "--dir", "p", "--timeout", "30", cwd=tmp_path).returncode == 0
    assert pilotq("logs", "-f", task, "--dir", "p", cwd=tmp_path).stdout == "n1\n"
    url = pilotq("url", "--dir", "p", cwd=tmp_path).stdout
    assert url.startswith("redis://" if bind else "unix://")


def test_a_worker_does_not_take_a_name_in_use(start: Start, tmp_path: Path) -> None:
    """It would end what runs there. One whose number and machine are not known here lives as long as its heartbeats."""
    start("server", "--dir", "p", "--bind", "127.0.0.1")
    wait_until((tmp_path / "p" / "connection.json").exists)
    start("dispatcher", "--dir", "p")
    words = ("worker", "--dir", "p", "--node", "n1", "--cores", "0")
    with subprocess.Popen(
        [sys.executable, "-m", "pilotq", *words], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    ) as first:
        script = "touch up; until [ -e go ]; do sleep 0.05; done; echo $PILOTQ_EXECUTION"
        task = pilotq("enqueue", "--dir", "p", "--", "sh", "-c", script, cwd=tmp_path).stdout.strip()
        wait_until((tmp_path / "up").exists, seconds=60)
        with Broker.connect(str(tmp_path / "p")) as broker:
            [record] = broker.link.call("HVALS", keys.NODES)
            for change in ({}, {"machine": "another"}):
                broker.link.call("HSET", keys.NODES, "n1", json.dumps({**json.loads(record), **change}))
                refused = pilotq(*words, cwd=tmp_path)
                assert refused.returncode == 2
                assert f"node n1 has a worker already (process {first.pid} on " in refused.stderr
        (tmp_path / "go").touch()
        assert pilotq("wait", task, "--dir", "p", "--timeout", "30", cwd=tmp_path).returncode == 0
        assert pilotq("logs", "-f", task, "--dir", "p", cwd=tmp_path).stdout == "1\n"
        start(*words, "--replace")
        assert first.wait(TIMEOUT) == 3


def test_a_worker_ends_what_one_that_was_killed_with_its_launchers_has_left(start: Start, tmp_path: Path) -> None:
    """Nobody else does, where it was started by hand: the task would run twice at one time."""
    start("server", "--dir", "p", "--bind", "127.0.0.1")
    wait_until((tmp_path / "p" / "connection.json").exists)
    start("dispatcher", "--dir", "p")
    words = ("worker", "--dir", "p", "--node", "n1", "--cores", "0")
    script = (
        "exec 9>lock; flock -n 9 || touch twice; echo $$ >pid.$PILOTQ_EXECUTION; until [ -e go ]; do sleep 0.05; done"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "pilotq", *words], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    ) as first:
        task = pilotq("enqueue", "--dir", "p", "--", "sh", "-c", script, cwd=tmp_path).stdout.strip()
        wait_until((tmp_path / "pid.1").exists, seconds=60)
        everybody = processes()
        below = [p.pid for p in everybody.values() if p.parent == first.pid]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (first.pid, *below):
                os.kill(pid, number)
    left = read_process(int((tmp_path / "pid.1").read_text()))
    assert left is not None and left.alive
    start(*words)
    wait_until((tmp_path / "pid.2").exists, seconds=60)
    assert not (tmp_path / "twice").exists()
    (tmp_path / "go").touch()
    assert pilotq("wait", task, "--dir", "p", "--timeout", "30", cwd=tmp_path).returncode == 0


def test_parts_find_a_server_of_the_users_own_without_a_password_in_argv(start: Start, tmp_path: Path) -> None:
    start("server", "--dir", "p", "--bind", "127.0.0.1")
    wait_until((tmp_path / "p" / "connection.json").exists)
    address = Pilot(str(tmp_path / "p")).connection().address
    (tmp_path / "secret").write_text(address.password + "\n")
    url = f"redis://{address.user}@{address.host}:{address.port}/0"
    parts = [
        start("dispatcher", "--dir", "d", "--redis", url, PILOTQ_PASSWORD_FILE="secret"),
        start("worker", "--dir", "w", "--node", "n1", "--cores", "0", PILOTQ_REDIS_URL=address.url()),
    ]
    task = pilotq("enqueue", "--dir", "p", "--", "true", cwd=tmp_path).stdout.strip()
    assert pilotq("wait", task, "--dir", "p", "--timeout", "30", cwd=tmp_path).returncode == 0
    for part in parts:
        assert address.password.encode() not in Path(f"/proc/{part.pid}/cmdline").read_bytes()


def test_a_dispatcher_with_journal_makes_a_pilot_on_a_server_of_the_users_own(start: Start, tmp_path: Path) -> None:
    server = start_server(str(tmp_path / "server"), bind=["127.0.0.1"])
    try:
        address = server.address
        (tmp_path / "secret").write_text(address.password + "\n")
        url = f"redis://{address.user}@{address.host}:{address.port}/0"
        for task in ("1", "2"):  # a stopped pilot goes on with what it had, under the same directory
            begin = ("dispatcher", "--journal", "--dir", "d")
            dispatcher = start(*begin, PILOTQ_REDIS_URL=url, PILOTQ_PASSWORD_FILE="secret")
            wait_until((tmp_path / "d" / "connection.json").exists, seconds=TIMEOUT)
            worker = start("worker", "--dir", "d", "--node", "n1", "--virtual", "4")
            made = pilotq("enqueue", "--dir", "d", "--cores", "4", "--", "echo", "$PILOTQ_CPUS", cwd=tmp_path)
            assert made.stdout.strip() == task, made.stderr
            assert pilotq("wait", task, "--dir", "d", "--timeout", "30", cwd=tmp_path).returncode == 0
            assert pilotq("logs", "-f", task, "--dir", "d", cwd=tmp_path).stdout == "$PILOTQ_CPUS\n"
            (node,) = json.loads(pilotq("nodes", "--dir", "d", "--json", cwd=tmp_path).stdout)
            assert (node["name"], node["cores"], node["shared_cores"]) == ("n1", 4, True)
            # It ends the workers, too, and what has ended is answered from the journal.
            assert pilotq("stop", "--dir", "d", cwd=tmp_path).returncode == 0
            assert (dispatcher.wait(TIMEOUT), worker.wait(TIMEOUT)) == (0, 0)
            assert (
                json.loads(pilotq("show", task, "--dir", "d", "--json", cwd=tmp_path).stdout)[0]["status"] == "finished"
            )
    finally:
        server.stop()


def test_a_dispatcher_keeps_a_journal_only_for_a_server_of_the_users_own(tmp_path: Path) -> None:
    result = pilotq("dispatcher", "--journal", "--dir", "d", cwd=tmp_path)
    assert result.returncode == 2 and "--redis" in result.stderr
    result = pilotq("worker", "--dir", "d", "--virtual", "2", "--cores", "0", cwd=tmp_path)
    assert result.returncode == 2 and "--virtual" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_password_in_argv_is_refused(tmp_path: Path) -> None:
    result = pilotq("worker", "--dir", "w", "--redis", "redis://u:secret@localhost:1/0", cwd=tmp_path)
    assert result.returncode == 2
    assert "PILOTQ_REDIS_URL" in result.stderr and "secret" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_part_waits_for_its_server_and_then_gives_up(tmp_path: Path) -> None:
    (tmp_path / "p" / "server").mkdir(parents=True)
    result = pilotq("dispatcher", "--dir", "p", cwd=tmp_path, PILOTQ_SETTINGS='{"server_wait_s": 0.1}')
    assert result.returncode == 2
    assert "waiting for the server" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("pilotq: no pilot runs in")


def test_wrong_settings_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "p" / "server").mkdir(parents=True)
    result = pilotq("dispatcher", "--dir", "p", cwd=tmp_path, PILOTQ_SETTINGS='{"no_such_setting": 1}')
    assert result.returncode == 2
    assert "no_such_setting" in result.stderr and "Traceback" not in result.stderr
