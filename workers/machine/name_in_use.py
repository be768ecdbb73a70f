"""Finds out whether a node's name is in use: a second worker would take the first one's place, and end what it runs."""

from __future__ import annotations

import time

from pilotq.broker.errors import InvalidInput, ServerUnavailable
from pilotq.broker.process_identity import machine_id, start_time
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.registry import read_node

HEARTBEATS = 2.5  # of another machine's worker so many are waited for: none means that it is dead
POLL_S = 0.05


def check_name_is_free(connection: Connection, name: str, settings: Settings) -> None:
    """Raises InvalidInput while a worker of this name lives. One that died has not always been reported yet."""
    try:
        info = read_node(connection, name)
        if info is None:
            return
        if info.machine == machine_id():
            alive = start_time(info.pid) == info.start
        else:
            alive = _sends_heartbeats(connection, name, HEARTBEATS * settings.heartbeat_s)
    except ServerUnavailable:
        return  # the worker waits for it, and registers when it is back
    if alive:
        raise InvalidInput(
            f"node {name} has a worker already (process {info.pid} on {info.host}): give another name with --node; "
            "--replace takes its place, and ends what runs there"
        )


def _sends_heartbeats(connection: Connection, name: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    first = connection.call("HGET", keys.worker(name), "last_heartbeat")
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        if connection.call("HGET", keys.worker(name), "last_heartbeat") not in (first, None):
            return True
    return False
