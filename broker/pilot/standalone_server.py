"""A server without a supervisor: does for server and journal what the supervisor does, without dispatcher and workers.

It is for debugging, and for pilots whose parts are started by something else (compose, srun). It makes the pilot's
directory, writes connection.json when the server serves, and writes the journal.
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
from pilotq.broker.log import log, log_as
from pilotq.broker.pilot.directory import ConnectionInfo, Pilot, create, establish_queue_id
from pilotq.broker.pilot.lock import HEARTBEAT_S, Lock
from pilotq.broker.pilot.queue_client import POLL_S, QueueClient
from pilotq.broker.pilot.rollback import open_journal
from pilotq.broker.pilot.server import RunningServer
from pilotq.broker.settings import Settings
from pilotq.broker.store.connection import Connection


def run_server(directory: str, settings: Settings, *, bind: list[str], durability: str, server: str | None) -> int:
    """Serve the pilot of ``directory`` until SIGTERM, SIGINT or `pilotq stop`; returns the exit code.

    Raises InvalidInput, PilotExists, StateLost, or PilotFailed when the server's process ends by itself.
    """
    log_as("server")
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
            if running.wait_ready(stopped=lambda: bool(stopping)):
                _serve(pilot, running, lock, settings, stopping)
        finally:
            pilot.remove_connection()
            running.stop()
    finally:
        lock.release()
    return 0


def _serve(pilot: Pilot, running: RunningServer, lock: Lock, settings: Settings, stopping: list[int]) -> None:
    connection = Connection(running.address)
    try:
        queue_id = establish_queue_id(pilot, connection)
    finally:
        connection.close()
    journal = open_journal(pilot, running.address, settings)
    queue = QueueClient(running.address, queue_id, journal)
    try:
        pilot.write_connection(
            ConnectionInfo(
                address=running.address, admin=running.admin, queue_id=queue_id, pilot=pilot.id,
                host=socket.gethostname(), pid=os.getpid(), version=__version__, directory=pilot.directory,
                started=time.time(),
            )
        )  # fmt: skip
        log(f"the server of {pilot.directory} serves at {running.address}")
        heartbeat_at = 0.0
        while not stopping and not queue.stop_mode:
            now = time.monotonic()
            if now >= heartbeat_at:
                lock.heartbeat()
                heartbeat_at = now + HEARTBEAT_S
            if running.part.ended():
                raise PilotFailed(f"the server {running.part.ended()}:\n{running.part.last_lines()}")
            queue.poll(now)
            if queue.lost:
                raise StateLost("the server does not hold the tasks it had")
            replies = queue.fileno()
            select.select([] if replies is None else [replies], [], [], POLL_S)
        queue.drain_journal(time.monotonic())
        log("the server ends")
    finally:
        queue.close()
        journal.close()
