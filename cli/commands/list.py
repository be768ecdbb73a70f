"""`pilotq list`: tasks as a table, of a pilot that runs or has ended."""

from __future__ import annotations

import click

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import open_pilot
from pilotq.broker.tasks.states import STATUSES
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option


@click.command("list")
@click.option("--status", type=click.Choice(sorted(STATUSES)), metavar="STATUS",
              help="Only tasks that are " + ", ".join(sorted(STATUSES)) + ".")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="At most so many.")
@dir_option
@json_option
def list_command(status: str | None, limit: int, directory: str | None, as_json: bool) -> None:
    """List tasks: running, waiting, then those that have ended.

    \b
    Example: pilotq list --status failed
    """
    with open_pilot(directory) as pilot:
        tasks = list(pilot.tasks(status=status, limit=limit + 1))
    shown = tasks[:limit]
    if as_json:
        click.echo(formatting.to_json([formatting.task_json(task) for task in shown]))
        return
    if isinstance(pilot, Archive):
        click.echo(f"pilotq: the pilot in {pilot.pilot.directory} has ended; these are from its journal", err=True)
        if pilot.gap:
            click.echo(f"pilotq: {pilot.gap}", err=True)
    click.echo(formatting.tasks_table(shown))
    if len(tasks) > limit:
        click.echo(f"pilotq: there are more than {limit}; --limit {10 * limit} shows more of them", err=True)
