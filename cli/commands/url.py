"""`pilotq url`: the URL of the pilot's server, for other tools."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import Broker
from pilotq.cli.options import dir_option


@click.command("url")
@dir_option
def url_command(directory: str | None) -> None:
    """Print the URL of the pilot's server. It holds the password: `pilotq exec` keeps it out of sight.

    \b
    Example: pilotq url --dir p
    """
    with Broker.connect(directory) as broker:
        click.echo(broker.url)
