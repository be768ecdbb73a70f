"""`pilotq supervisor` (hidden): the process that `run` and `start` leave in the background."""

from __future__ import annotations

import click


@click.command("supervisor", hidden=True)
@click.option("--options", "path", required=True, metavar="FILE")
def supervisor_command(path: str) -> int:
    """Run the process that `run` and `start` leave in the background; FILE is read and removed."""
    from pilotq.broker.pilot.start import read_options
    from pilotq.broker.pilot.supervisor import run_supervisor
    from pilotq.workers.machine.cleanup import clean_node

    return run_supervisor(read_options(path), clean_node)
