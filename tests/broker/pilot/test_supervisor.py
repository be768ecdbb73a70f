"""The supervisor: a pilot starts, restarts its parts, and ends without a trace. Its parts are stubs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotq.broker.errors import InvalidInput, NoPilot, PilotExists, PilotFailed, StateLost
from pilotq.broker.pilot.directory import SCHEMA_VERSION, Pilot
from pilotq.broker.pilot.lock import holder
from pilotq.broker.pilot.queue_client import QueueClient
from pilotq.broker.pilot.server import start_server
from pilotq.broker.pilot.start import LocalNode, StartedPilot, SupervisorOptions, start_pilot
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.journal_writer import JournalWriter
from pilotq.broker.store.messages import ControlChanged, Leave, NodeLost
from pilotq.broker.store.resources import NodeInfo
from tests.support.paths import TESTS
from tests.support.waiting import wait_until

STAND_IN = [sys.executable, str(TESTS / "support" / "stub_parts.py")]
NODE = LocalNode("n1", [0], {0: 0})
Start = Callable[..., StartedPilot]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start_pilot` in tmp_path/pilot with stand-in parts; at the end all are killed that a test has left."""
    monkeypatch.setenv("PILOTQ_SETTINGS", '{"journal_fsync_s": 0.05, "stop_wait_s": 1.0, "restart_limit": 2}')
    started: list[StartedPilot] = []

    def run(*behaviour: str, **options: Any) -> StartedPilot:
        made = SupervisorOptions(nodes=[NODE], program=[*STAND_IN, *behaviour], **options)
        started.append(start_pilot(str(tmp_path / "pilot"), made))
        return started[-1]

    yield run
    for pilot in started:
        if pilot.process.poll() is None:
            pilot.process.terminate()
            pilot.process.wait()


def ask(pilot: Pilot, *command: Any, admin: bool = False) -> Any:
    connection = pilot.connection()
    with closing(Connection(connection.admin or connection.address if admin else connection.address)) as link:
        return link.call(*command)


def part(pilot: Pilot, name: str) -> int:
    """The number of the pilot's process with this in its command line; 0 if there is none."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(w.startswith(os.fsencode(pilot.directory)) for w in words) and name.encode() in b" ".join(words):
            return int(entry.name)
    return 0


def registered(pilot: Pilot, node: str = "n1") -> NodeInfo | None:
    record = ask(pilot, "HGET", keys.NODES, node)
    return msgspec.json.decode(record, type=NodeInfo) if record else None


def log(pilot: Pilot) -> str:
    return Path(pilot.log("supervisor")).read_text()


def assert_nothing_left(pilot: Pilot, where: Address) -> None:
    assert part(pilot, "") == 0
    assert not os.path.exists(os.path.dirname(where.path) or "/nowhere")
    assert not pilot.alive()
    left = {"journal.jsonl", "logs", "output", "server", "submitted", "submit-context", "swept"}
    assert set(os.listdir(pilot.directory)) <= left


# -- starting and ending ----------------------------------------------------------------------------------------------


def test_a_pilot_is_ready_when_start_returns_and_leaves_nothing_when_it_was_stopped(start: Start) -> None:
    pilot = start()
    connection = pilot.connection()
    assert (connection.pilot, connection.directory, connection.pid) == ("pilot", pilot.directory, pilot.process.pid)
    assert ask(pilot, "MGET", keys.QUEUE_ID, keys.SCHEMA) == [connection.queue_id.encode(), SCHEMA_VERSION.encode()]
    wait_until(lambda: registered(pilot))
    assert part(pilot, "dispatcher")
    held = holder(pilot.path("lock"))
    assert held is not None
    assert held.pid == connection.pid
    ask(pilot, "HSET", keys.CONTROL, "stop", "stop")
    assert pilot.process.wait(20) == 0
    assert_nothing_left(pilot, connection.address)
    assert not os.path.exists(pilot.path("swept"))  # its worker ended well by itself


def test_sigterm_ends_it_in_order_and_ctrl_c_does_not(start: Start) -> None:
    pilot = start()
    where = pilot.connection().address
    wait_until(lambda: registered(pilot))
    pilot.process.send_signal(signal.SIGINT)
    assert ask(pilot, "PING") == b"PONG"
    pilot.process.terminate()
    assert pilot.process.wait(20) == 0
    assert_nothing_left(pilot, where)
    assert "bye bye" in Path(pilot.log("server")).read_text()


def test_it_ends_with_the_process_it_was_started_for(start: Start) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as owner:
        pilot = start(owner_pid=owner.pid)
        assert ask(pilot, "PING") == b"PONG"
        owner.kill()
        assert pilot.process.wait(20) == 0
    assert "the pilot ends (now)" in log(pilot)


def test_drain_waits_until_nothing_is_busy(start: Start) -> None:
    pilot = start()
    wait_until(lambda: registered(pilot))
    ask(pilot, "HSET", keys.STATUS, "busy", "1")
    ask(pilot, "HSET", keys.CONTROL, "stop", "drain")
    wait_until(lambda: ask(pilot, "HGET", keys.CONTROL, "paused"))
    assert ask(pilot, "LRANGE", keys.EVENTS, 0, -1) == [msgspec.msgpack.encode(ControlChanged())]
    # A part that dies meanwhile is still started again: the drain may take hours.
    first = part(pilot, "dispatcher")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: part(pilot, "dispatcher") not in (0, first))
    assert pilot.process.poll() is None
    ask(pilot, "HSET", keys.STATUS, "busy", "0")
    assert pilot.process.wait(20) == 0


def test_who_hurries_ends_a_drain(start: Start) -> None:
    pilot = start()
    ask(pilot, "HSET", keys.STATUS, "busy", "1")
    ask(pilot, "HSET", keys.CONTROL, "stop", "drain")
    wait_until(lambda: ask(pilot, "HGET", keys.CONTROL, "paused"))
    ask(pilot, "HSET", keys.CONTROL, "stop", "now")
    assert pilot.process.wait(20) == 0


def test_a_worker_that_does_not_end_is_killed_and_its_tasks_are_swept(start: Start) -> None:
    pilot = start("stubborn-worker")
    where = pilot.connection().address
    wait_until(lambda: registered(pilot))
    ask(pilot, "HSET", keys.CONTROL, "stop", "stop")
    assert pilot.process.wait(20) == 0
    assert Path(pilot.path("swept")).read_text() == "n1\n"
    assert_nothing_left(pilot, where)


def test_workers_of_other_nodes_are_told_and_waited_for(start: Start) -> None:
    pilot = start()
    far = NodeInfo("far", 7, "elsewhere", 1, [0])
    ask(pilot, "HSET", keys.NODES, "far", msgspec.json.encode(far))
    with closing(Connection(pilot.connection().address)) as link:
        link.call("HSET", keys.CONTROL, "stop", "now")
        inbox = link.call("XREAD", "BLOCK", 20_000, "STREAMS", keys.inbox("far", 7), "0", timeout=30)[0][1]
        assert inbox[0][1] == [b"m", msgspec.msgpack.encode([Leave(0.0)])]
        link.call("HDEL", keys.NODES, "far")
    assert pilot.process.wait(20) == 0


def test_a_second_pilot_in_one_directory_is_refused(start: Start) -> None:
    pilot = start()
    with pytest.raises(PilotExists, match=f"process {pilot.process.pid} on .*`pilotq stop --dir {pilot.directory}`"):
        start()
    assert ask(pilot, "PING") == b"PONG"
    assert pilot.connection().pid == pilot.process.pid


def test_a_start_that_fails_says_why_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\ntest "$1" = --version && echo v=9.1.0 && exit 0\necho the disk is on fire\nexit 3\n')
    server.chmod(0o755)
    pilot = Pilot(str(tmp_path / "pilot"))
    with pytest.raises(PilotFailed, match=r"(?s)^the server ended with exit code 3;.*the disk is on fire$"):
        start(server=str(server))
    assert_nothing_left(pilot, Address())
    with pytest.raises(InvalidInput, match="durability 'most' is unknown"):
        start(durability="most")
    assert_nothing_left(pilot, Address())
    with pytest.raises(NoPilot):
        pilot.connection()


def test_files_are_private_and_no_secret_is_in_an_argument_list_or_log(start: Start) -> None:
    before = os.umask(0)
    try:
        pilot = start()
    finally:
        os.umask(before)
    connection = pilot.connection()
    wait_until(lambda: registered(pilot))
    found = [Path(pilot.directory), *Path(pilot.directory).rglob("*")]
    assert {"connection.json", "lock", "journal.jsonl", "worker-n1.log", "users.acl"} <= {path.name for path in found}
    assert [path for path in found if path.stat().st_mode & 0o077 and not path.is_symlink()] == []
    assert connection.admin is not None
    secrets = [connection.address.password.encode(), connection.admin.password.encode()]
    texts = [path.read_bytes() for path in found if path.is_file() and path.name != "connection.json"]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            texts.append((entry / "cmdline").read_bytes())
        except OSError:
            continue
    assert not any(secret in text for text in texts for secret in secrets)


# -- mending ---------------------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_with_the_same_data(start: Start) -> None:
    pilot = start()
    connection = pilot.connection()
    ask(pilot, "SET", "kept", "yes")
    for _ in range(2):
        first = part(pilot, "server.conf")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda first=first: part(pilot, "server.conf") not in (0, first))
        assert wait_until(lambda: answer(pilot, "GET", "kept")) == b"yes"
    assert pilot.connection() == connection
    ask(pilot, "HSET", keys.CONTROL, "stop", "stop")
    assert pilot.process.wait(20) == 0
    assert "the server was killed by signal 9; it is started again" in log(pilot)


def answer(pilot: Pilot, *command: str) -> Any:
    try:
        return ask(pilot, *command)
    except PilotFailed:
        return None


def test_a_killed_worker_is_swept_announced_and_started_again(start: Start) -> None:
    pilot = start()
    first = wait_until(lambda: registered(pilot))
    os.kill(first.pid, signal.SIGKILL)
    second = wait_until(lambda: (info := registered(pilot)) and info.pid != first.pid and info)
    assert second.incarnation > first.incarnation
    assert Path(pilot.path("swept")).read_text() == "n1\n"
    lost = NodeLost("n1", first.incarnation, "its worker was killed by signal 9")
    assert ask(pilot, "LRANGE", keys.EVENTS, 0, -1) == [msgspec.msgpack.encode(lost)]


def test_what_dies_too_often_ends_the_pilot_and_says_why(start: Start) -> None:
    pilot = start("broken-dispatcher")
    assert pilot.process.wait(20) == 3
    assert "PilotFailed: the dispatcher ended with exit code 7, after 2 restarts within 60 s" in log(pilot)
    assert log(pilot).endswith("there is no way\nthere is no way\nthere is no way\n")
    assert_nothing_left(pilot, Address())


def test_a_server_that_comes_back_empty_stops_everybody(start: Start) -> None:
    pilot = start()
    where = pilot.connection().address
    ask(pilot, "FLUSHALL", admin=True)
    assert pilot.process.wait(20) == 3
    assert "StateLost: the server came back without the tasks it had" in log(pilot)
    assert_nothing_left(pilot, where)
    # Nor can it be resumed as if nothing had been.
    with pytest.raises(StateLost, match="it is empty"):
        start()
    assert_nothing_left(pilot, where)


def test_when_the_supervisor_is_killed_all_end_and_the_next_one_takes_over(start: Start) -> None:
    first = start()
    wait_until(lambda: registered(first))
    connection = first.connection()
    ask(first, "SET", "kept", "yes")
    first.process.kill()
    first.process.wait()
    wait_until(lambda: part(first, "") == 0, what="parts end with their supervisor")
    second = start()
    assert ask(second, "GET", "kept") == b"yes"
    assert second.connection().queue_id == connection.queue_id
    assert second.connection().address.password != connection.address.password
    assert not os.path.exists(os.path.dirname(connection.address.path))


def test_a_pilot_whose_directory_was_taken_over_ends_without_touching_it(start: Start) -> None:
    pilot = start()
    socket = pilot.connection().address.path
    os.unlink(pilot.path("lock"))
    Path(pilot.path("lock")).write_text("another's")
    assert pilot.process.wait(20) == 3
    assert "Superseded: " in log(pilot)
    assert part(pilot, "") == 0
    assert Path(pilot.path("lock")).read_text() == "another's"
    assert not os.path.exists(os.path.dirname(socket))


# -- journal, other servers --------------------------------------------------------------------------------------------


def test_the_journal_is_written_as_things_end_and_to_the_last(start: Start) -> None:
    def end(task_id: str) -> None:
        line = msgspec.msgpack.encode(JournalEntry(task_id))
        verdict = msgspec.msgpack.encode({"status": "finished", "reason": "", "final": True})
        ask(pilot, "XADD", keys.JOURNAL, "*", "e", b"\x91\x92" + line + verdict)

    pilot = start()
    journal = Journal(pilot.journal)
    end("a")
    wait_until(lambda: journal.find("a"))
    wait_until(lambda: ask(pilot, "XLEN", keys.JOURNAL) == 0, what="the stream is trimmed")
    os.kill(pilot.process.pid, signal.SIGSTOP)
    end("b")
    ask(pilot, "HSET", keys.CONTROL, "stop", "now")
    os.kill(pilot.process.pid, signal.SIGCONT)
    assert pilot.process.wait(20) == 0
    pilot = start()
    assert ask(pilot, "HGET", keys.CONTROL, "stop") is None  # it was for the pilot before
    end("c")
    pilot.process.terminate()
    assert pilot.process.wait(20) == 0
    assert [line.id for line in journal.entries()] == ["a", "b", "c"]


def test_draining_the_journal_is_not_disturbed_by_answers_under_way(tmp_path: Path) -> None:
    server = start_server(str(tmp_path))
    line = b"\x91\x92" + msgspec.msgpack.encode(JournalEntry("a")) + msgspec.msgpack.encode({"final": True})
    try:
        with (
            closing(Connection(server.address)) as link,
            closing(JournalWriter(str(tmp_path / "journal.jsonl"), fsync_s=0.0)) as journal,
            closing(QueueClient(server.address, "e", journal)) as side,
        ):
            link.pipeline([("SET", keys.QUEUE_ID, "e"), ("XADD", keys.JOURNAL, "*", "e", line)])
            side.poll(1.0)
            assert side.fileno() is not None
            assert side.drain_journal(1.0)
            for now in (2.0, 3.0):
                side.poll(now)
            assert side.fileno() is None
    finally:
        server.stop()
    assert [line.id for line in Journal(str(tmp_path / "journal.jsonl")).entries()] == ["a"]


def test_a_signal_after_the_end_does_not_change_the_exit_code(start: Start) -> None:
    pilot = start()
    wait_until(lambda: registered(pilot))
    pilot.process.terminate()
    deadline = time.monotonic() + 20
    while pilot.process.poll() is None and time.monotonic() < deadline:
        pilot.process.terminate()  # up to the last moment of the interpreter
        with suppress(subprocess.TimeoutExpired):
            pilot.process.wait(0.002)
    assert pilot.process.returncode == 0


def test_over_tcp(start: Start) -> None:
    pilot = start(bind=["127.0.0.1"])
    connection = pilot.connection()
    assert (connection.address.host, connection.address.path) == ("127.0.0.1", "")
    wait_until(lambda: registered(pilot))
    pilot.process.terminate()
    assert pilot.process.wait(20) == 0
    assert_nothing_left(pilot, connection.address)


def test_on_a_server_of_the_users_own(start: Start, tmp_path: Path) -> None:
    server = start_server(str(tmp_path / "own"))
    try:
        pilot = start(redis=server.address.url())
        connection = pilot.connection()
        assert (connection.address, connection.admin) == (server.address, None)
        wait_until(lambda: registered(pilot))
        assert server.address.password not in "".join(p.read_text() for p in Path(pilot.directory, "logs").iterdir())
        pilot.process.terminate()
        assert pilot.process.wait(20) == 0
        assert part(pilot, "") == 0
        with closing(Connection(server.address)) as link:
            assert link.call("GET", keys.QUEUE_ID) == connection.queue_id.encode()
    finally:
        server.stop()
