"""`pilotq server`: a server and its journal, without dispatcher and workers."""

from __future__ import annotations

import click

from pilotq.broker.pilot.server import DURABILITY
from pilotq.cli.part_options import settings


@click.command("server")
@click.option("--dir", "directory", required=True, metavar="DIR", help="The pilot's directory; made if missing.")
@click.option(
    "--bind",
    multiple=True,
    metavar="ADDRESS",
    help="Listen there too, on a random port; may be repeated.  [default: a unix socket only]",
)
@click.option("--server", metavar="FILE", help="The server's executable.  [default: $PILOTQ_SERVER, else found]")
@click.option("--durability", type=click.Choice(sorted(DURABILITY)), default="everysec",
              help="When accepted data are on disk.")  # fmt: skip
def server_command(directory: str, bind: tuple[str, ...], server: str | None, durability: str) -> int:
    """Run only the server of a pilot, with its journal, in the foreground.

    \b
    Example: pilotq server --dir p --bind 10.0.0.5
    """
    from pilotq.broker.pilot.standalone_server import run_server

    return run_server(directory, settings(), bind=list(bind), durability=durability, server=server)
