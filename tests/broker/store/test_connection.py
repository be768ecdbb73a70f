"""`Connection`: the one way to the server, on a real one."""

from __future__ import annotations

import os

import pytest
import redis

from pilotq.broker.store.connection import Connection, parse_url
from tests.support.engine import Engine, fixtures

engine, server, node = fixtures


def test_a_forked_process_has_a_connection_of_its_own(engine: Engine) -> None:
    """Over a shared one each would get replies of the other, also of what the parent has under way."""
    link = Connection(engine.running.address)
    link.post("ECHO", "the parent's")
    ours, theirs = os.pipe()
    pids = []
    for number in range(4):
        if not (pid := os.fork()):
            try:
                wrong = sum(link.call("ECHO", f"{number}.{n}") != f"{number}.{n}".encode() for n in range(200))
                os.write(theirs, b"." if not wrong else b"x")
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    found = []
    while not found:
        found = link.replies()
    assert found == [b"the parent's"] and link.call("ECHO", "more") == b"more"
    assert os.read(ours, 10) == b"...."
    for end in (ours, theirs):
        os.close(end)
    link.close()


@pytest.mark.parametrize(
    ("url", "host", "shown"),
    [
        ("redis://[::1]:7000/2", "::1", "[::1]:7000"),
        ("redis://u:p%40ss@[2001:db8::17]/0", "2001:db8::17", "[2001:db8::17]:6379"),
        ("redis://[fe80::1%25eth0]:7000/0", "fe80::1%eth0", "[fe80::1%eth0]:7000"),
        ("redis://login.example:7000/0", "login.example", "login.example:7000"),
        ("redis://10.0.0.7/0", "10.0.0.7", "10.0.0.7:6379"),
    ],
)
def test_a_url_of_any_host_comes_back_as_it_was_written(url: str, host: str, shown: str) -> None:
    address = parse_url(url)
    assert (address.host, str(address)) == (host, shown)
    assert parse_url(address.url()) == address
    taken = redis.connection.parse_url(address.url())
    assert (taken["host"], taken["port"]) == (host, address.port), "RQ's programs read it alike"
