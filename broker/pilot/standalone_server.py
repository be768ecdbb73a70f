"""A server by hand: what the supervisor does for server and journal, without dispatcher and workers.

For debugging, and for pilots whose parts are started by something else (compose, srun). It makes the pilot's
directory, writes connection.json when the server serves, and keeps the journal.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from types import FrameType

from pilotq import __version__
from pilotq.broker.errors import PilotFailed, StateLost
from pilotq.broker.pilot.directory import Connection, Pilot, create, establish_epoch
from pilotq.broker.pilot.lock import BEAT_S, Lock
from pilotq.broker.pilot.queue_client import POLL_S, SupervisorLink
from pilotq.broker.pilot.rollback import open_journal
from pilotq.broker.pilot.server import RunningServer, wait_ready
from pilotq.broker.processes import log
from pilotq.broker.settings import Settings
from pilotq.broker.store.connection import Link


def run_server(directory: str, settings: Settings, *, bind: list[str], durability: str, server: str | None) -> int:
    """Serve the pilot of ``directory`` until SIGTERM, SIGINT or `pilotq stop`; returns the exit code.

    Raises InvalidInput, PilotExists, StateLost, or PilotFailed when the server's process ends by itself.
    """
    stopping: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    pilot = create(directory)
    lock = Lock.take(pilot.path("lock"))
    try:
        running = RunningServer(pilot.directory, bind=bind, durability=durability, server=server)
        try:
            running.start()
            if wait_ready(running.address, running.part, stopped=lambda: bool(stopping)):
                _serve(pilot, running, lock, settings, stopping)
        finally:
            pilot.remove_connection()
            running.stop()
    finally:
        lock.release()
    return 0


def _serve(pilot: Pilot, running: RunningServer, lock: Lock, settings: Settings, stopping: list[int]) -> None:
    link = Link(running.address)
    try:
        epoch = establish_epoch(pilot, link)
    finally:
        link.close()
    journal = open_journal(pilot, running.address, settings)
    side = SupervisorLink(running.address, epoch, journal)
    try:
        pilot.write_connection(
            Connection(
                address=running.address, admin=running.admin, epoch=epoch, pilot=pilot.id, host=socket.gethostname(),
                pid=os.getpid(), version=__version__, directory=pilot.directory, started=time.time(),
            )
        )  # fmt: skip
        log(f"the server of {pilot.directory} serves at {running.address}")
        beat = 0.0
        while not stopping and not side.wish:
            now = time.monotonic()
            if now >= beat:
                lock.beat()
                beat = now + BEAT_S
            if running.part.ended():
                raise PilotFailed(f"the server {running.part.ended()}:\n{running.part.last_words()}")
            side.poll(now)
            if side.lost:
                raise StateLost("the server does not hold the tasks it had")
            answer = side.fileno()
            select.select([] if answer is None else [answer], [], [], POLL_S)
        side.drain_journal(time.monotonic())
        log("the server ends")
    finally:
        side.close()
        journal.close()
