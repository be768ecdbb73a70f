"""What the commands of single parts (server, dispatcher, worker) share: the pilot, its server, the settings."""

from __future__ import annotations

import os

import click

from pilotq.broker.errors import InvalidInput
from pilotq.broker.log import log, log_form
from pilotq.broker.pilot.directory import Pilot, create, establish_queue_id, find
from pilotq.broker.pilot.server import wait_ready
from pilotq.broker.settings import Settings, load
from pilotq.broker.store.connection import Address, Connection, parse_url
from pilotq.cli.options import server_url

redis_option = click.option(
    "--redis", metavar="URL", help="Your own server: redis://host:port, unix:///path.  [default: $PILOTQ_REDIS_URL]"
)


def settings() -> Settings:
    log_form()  # a wrong one is refused as early as wrong settings
    return load(os.environ.get("PILOTQ_SETTINGS"))


def reach_part(directory: str | None, redis: str | None) -> tuple[Pilot, Address, str]:
    """The pilot, its server's address, the id of its queue; waits for the server. Raises NoPilot, PilotFailed."""
    url = server_url(redis)
    if url is None:
        pilot = find(directory)
        log(f"waiting for the server of {pilot.directory}, at most {settings().server_wait_s:.0f} s")
        found = pilot.await_connection(settings().server_wait_s)
        return pilot, found.address, found.queue_id
    if directory is None:
        raise InvalidInput("--redis needs --dir, too: a directory for output, and for what the pilot must remember")
    address = parse_url(url)
    pilot = create(directory)
    log(f"waiting for the server at {address}")
    wait_ready(address)
    connection = Connection(address)
    try:
        return pilot, address, establish_queue_id(pilot, connection)
    finally:
        connection.close()
