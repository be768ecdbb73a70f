"""`Connection`: the one way to the server, on a real one."""

from __future__ import annotations

import os

from pilotq.broker.store.connection import Connection
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
