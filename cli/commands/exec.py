"""`pilotq exec`: runs a program that finds the pilot's server in its environment."""

from __future__ import annotations

import os

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.cli.options import dir_option

# Read by `rq`, by many scripts, and by rq-dashboard.
VARIABLES = ("RQ_REDIS_URL", "REDIS_URL", "RQ_DASHBOARD_REDIS_URL")


@click.command("exec", context_settings={"allow_interspersed_args": False}, no_args_is_help=True)
@dir_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] CMD [ARGS]...")
def exec_command(command: tuple[str, ...], directory: str | None) -> None:
    """Run CMD with RQ_REDIS_URL, REDIS_URL, RQ_DASHBOARD_REDIS_URL and PILOTQ_DIR set.

    \b
    Example: pilotq exec -- rq info
    """
    with Broker.connect(directory) as broker:
        os.environ.update(dict.fromkeys(VARIABLES, broker.url))
        assert broker.pilot is not None, "connect always finds a directory"
        os.environ["PILOTQ_DIR"] = broker.pilot.directory
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell shall read it
    except OSError as error:
        raise InvalidInput(f"{command[0]} cannot be run: {error.strerror}") from None
