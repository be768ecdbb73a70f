"""`pilotq explain`: why a task waits and when it may start, or why it ended as it did."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import open_pilot
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.task_selection import ids_of


@click.command("explain", no_args_is_help=True)
@click.argument("words", nargs=-1, required=True, metavar="ID...")
@dir_option
@json_option
def explain_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Explain why tasks wait and when they may start, or why they ended as they did.

    For a waiting task: which resources are missing and when they become free, what it depends on, which tasks go first,
    whether the pilot is paused. For one that has ended: the reason, the end of stderr, and which commands show more.

    \b
    Example: pilotq explain 1f
    """
    with open_pilot(directory) as pilot:
        found = [pilot.explain(task_id) for task_id in ids_of(pilot, words)]
    if as_json:
        click.echo(formatting.to_json(found))
    else:
        click.echo("\n\n".join(map(formatting.explanation_text, found)))
