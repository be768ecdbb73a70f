"""`pilotq status`: how many tasks have ended, and how many cores are in use."""

from __future__ import annotations

import click

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker, open_pilot
from pilotq.broker.errors import PilotFailed
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option


@click.command("status")
@click.option("--left", is_flag=True, help="Print only the number of tasks that have not ended, for scripts.")
@dir_option
@json_option
def status_command(left: bool, directory: str | None, as_json: bool) -> None:
    """Show the progress of the pilot: tasks that ended, nodes, cores in use.

    \b
    Example: pilotq status
    """
    with open_pilot(directory) as pilot:
        counts, running, nodes = pilot.counts(), 0, []
        if isinstance(pilot, Broker):
            running, nodes = pilot.running(), pilot.nodes()
    ended = isinstance(pilot, Archive)
    gap = pilot.gap if isinstance(pilot, Archive) else ""
    if left:
        if gap and not counts.left:
            raise PilotFailed(gap)  # a script would take 0 to mean that all have ended
        click.echo(counts.left)
        return
    cores, used = sum(n.cores for n in nodes), sum(n.used for n in nodes)
    if as_json:
        facts = {"ended": ended, "tasks": formatting.counts_json(counts), "running": running}
        click.echo(formatting.to_json({**facts, "nodes": len(nodes), "cores": cores, "used": used}))
        return
    click.echo(f"tasks  {formatting.counts_text(counts)}; {running:,} running")
    if ended:
        click.echo(f"nodes  none: {gap or 'the pilot has ended'}")
    else:
        click.echo(f"nodes  {len(nodes)}, with {cores:,} cores, {used:,} in use")
