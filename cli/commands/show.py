"""`pilotq show`: everything known about single tasks."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import open_pilot
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.task_selection import ids_of


@click.command("show", no_args_is_help=True)
@click.argument("words", nargs=-1, required=True, metavar="ID...")
@dir_option
@json_option
def show_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Show everything known about tasks; ID is an id or the name of one task.

    \b
    Example: pilotq show 1f
    """
    with open_pilot(directory) as pilot:
        tasks = [pilot.task(task_id) for task_id in ids_of(pilot, words)]
    if as_json:
        click.echo(formatting.to_json([formatting.details_json(task) for task in tasks]))
    else:
        click.echo("\n\n".join(formatting.details_text(task) for task in tasks))
