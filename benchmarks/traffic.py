"""Counts what does not depend on the machine: what a pilot says to its server, and the server to others, for each task.

    python -m benchmarks traffic      # PILOTQ_TRAFFIC=N: with N tasks of each shape instead of 5,000

One pretended node of 56 cores runs tasks that take no time; everything that the server is told, from the submit to the
last line of the journal, is watched by MONITOR. tests/system/test_traffic.py has a ceiling for each of these figures.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import NamedTuple

from redis import Redis
from rq import Queue

from benchmarks.costs import (
    Submit,
    await_ends,
    journal_bytes,
    submit_array,
    submit_many,
    submit_single,
    submit_some,
)
from benchmarks.figures import Figure
from benchmarks.pretended.pilot import PretendedPilot, pretended_pilot
from benchmarks.server_use import ServerUse
from pilotq.broker import Broker
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.connection import Connection

CORES = 56
WARM = 500
END_S = 30.0
LOOK_S = 0.02
NOT_COUNTED = (b"", b"INFO", b"AUTH")  # ours; the first is the answer to MONITOR itself


class Traffic(NamedTuple):
    """Of one task: requests of clients and replies to them, commands of the server (those in scripts, too), entries
    that go to nodes, to the dispatcher and into the journal's stream, tasks' messages in them, and bytes."""

    requests: float
    commands: float
    inbox_entries: float
    messages: float
    events: float
    journal_entries: float
    log_bytes: float
    journal_bytes: float


class _Monitor:
    """Counts commands until it is closed. A task's own words cannot look like these: they stand in packed strings."""

    def __init__(self, directory: str) -> None:
        info = Pilot(directory).connection()
        self.requests = self.commands = self.inbox = self.events = self.journal = 0
        self._link = Connection(info.admin or info.address)
        self._link.post("MONITOR")
        self._other = Connection(info.admin or info.address)
        self._end = os.urandom(8).hex().encode()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def close(self) -> None:
        """Returns when all that the server has done so far is counted."""
        self._other.call("ECHO", self._end)
        self._thread.join(END_S)
        self._other.close()
        self._link.close()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._link.fileno(), select.POLLIN)
        while poll.poll(END_S * 1000):
            for line in self._link.replies():
                if self._end in line:
                    return
                self._count(line)

    def _count(self, line: bytes) -> None:
        who, _, command = line.partition(b'] "')
        name = command.partition(b'"')[0].upper()
        if name in NOT_COUNTED:
            return
        self.commands += 1
        self.requests += not who.endswith(b" lua")
        self.inbox += name == b"XADD" and b'"pilotq:inbox:' in command
        self.journal += name == b"XADD" and b'"pilotq:journal"' in command
        self.events += name == b"RPUSH" and b'"pilotq:events"' in command


def traffic(submit: Submit, number: int) -> Traffic:
    """Of one of so many tasks of this shape."""
    with pretended_pilot(1, CORES) as pilot:
        _play(pilot, submit, WARM)
        use, journal, handed = ServerUse(pilot.directory), journal_bytes(pilot.directory), pilot.report()["messages"]
        before, monitor = use.now(), _Monitor(pilot.directory)
        try:
            _play(pilot, submit, number)
        finally:
            monitor.close()
        log = (use.now() - before).log_bytes
        use.close()
        counted = (
            monitor.requests, monitor.commands, monitor.inbox, pilot.report()["messages"] - handed, monitor.events,
            monitor.journal, log, journal_bytes(pilot.directory) - journal,
        )  # fmt: skip
    return Traffic(*(count / number for count in counted))


def submit_rq(broker: Broker, number: int) -> None:
    """As many jobs of a producer that knows only RQ; they are known to the pilot when this returns."""
    known, deadline = broker.counts().total, time.monotonic() + END_S
    with Redis.from_url(broker.url) as connection:
        queue = Queue("default", connection=connection)
        queue.enqueue_many([Queue.prepare_data("math.sqrt", (n,)) for n in range(number)])
    while broker.counts().total < known + number:
        if time.monotonic() > deadline:
            raise SystemExit(f"{number} jobs of a producer were not known to the pilot after {END_S:g} s")
        time.sleep(LOOK_S)


def _play(pilot: PretendedPilot, submit: Submit, number: int) -> None:
    """All of them wait when the first one begins, so that batches have the size that the code gives them."""
    pilot.broker.pause(True)
    submit(pilot.broker, number)
    pilot.broker.pause(False)
    await_ends(pilot.broker, pilot.directory)


def run() -> list[Figure]:
    number = int(os.environ.get("PILOTQ_TRAFFIC", "5000"))
    found = {
        "element of an array": traffic(submit_array, number),
        "task of a bundle": traffic(submit_many, number),
        "single task": traffic(submit_some, number),
        "task of an enqueue of its own": traffic(submit_single, number // 5),
        "job of an RQ producer": traffic(submit_rq, number),
    }
    return [
        Figure(f"{what}, {field.replace('_', ' ')}", value, "")
        for what, one in found.items()
        for field, value in one._asdict().items()
    ]
