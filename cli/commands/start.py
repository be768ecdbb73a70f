"""`pilotq start`: a pilot in the background, or, in a batch script, until the allocation ends."""

from __future__ import annotations

import os
import shlex
import time
from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.fit import never_here
from pilotq.broker.errors import NoPilot, ServerUnavailable
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.pilot.start import ALLOCATION_ENDED, StartedPilot
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.pilot_options import (
    POLL_S,
    await_nodes,
    differences,
    gpus_option,
    pilot_failure,
    pilot_options,
    plural,
    start,
    supervisor_options,
)


@click.command("start")
@pilot_options
@gpus_option
@click.option("--owner", type=int, default=0, hidden=True, help="It ends with this process.")
@click.option("--foreground/--background", default=None,
              help="Stay until it ends, or return when it is ready.  [default: in a batch script stay]")  # fmt: skip
def start_command(owner: int, foreground: bool | None, **values: Any) -> None:
    """Start a pilot in the background; prints its directory. In a batch script of Slurm it stays until the pilot ends.

    \b
    Example: pilotq start --nodes 4
    """
    options = supervisor_options(values, owner_pid=owner)
    if foreground is None:
        foreground = options.remote is not None and os.environ.get("ENVIRONMENT") == "BATCH" and not owner
    other = _other_pilot()
    pilot = start(values, options)
    if other is not None and not owner and other.directory != pilot.directory:
        stop = f"pilotq stop --dir {shlex.quote(other.directory)}"
        click.echo(f"pilotq: the pilot in {other.directory} runs, too: `{stop}` ends it", err=True)
    with Broker.connect(pilot.directory) as broker:
        await_nodes(broker, pilot, options)
        for sentence in differences(broker):
            click.echo(f"pilotq: {sentence}", err=True)
        for sentence in never_here(broker.link) if values["resume"] else ():
            click.echo(f"pilotq: {sentence}; a pilot that is resumed has the nodes of this command alone", err=True)
        _print_ready(pilot, broker, values)
        if foreground:
            with Interrupts(allocation=options.remote is not None) as interrupts:
                _stay_until_end(pilot, broker, interrupts)


def _other_pilot() -> Pilot | None:
    """The pilot that commands have meant so far, if it runs."""
    try:
        pilot = find(None)
    except NoPilot:
        return None
    return pilot if pilot.alive() else None


def _print_ready(pilot: StartedPilot, broker: Broker, values: dict[str, Any]) -> None:
    click.echo(pilot.directory)
    # Only a directory that --dir named must be named again.
    where = f" --dir {pilot.directory}" if values["directory"] or values["resume"] else ""
    cores = plural(sum(node.cores for node in broker.nodes()), "core")
    click.echo(
        f"pilotq: the pilot is ready, with {cores}. Next:\n"
        f"  pilotq enqueue{where} -- CMD ...\n  pilotq wait{where}\n  pilotq stop{where}",
        err=True,
    )


def _stay_until_end(pilot: StartedPilot, broker: Broker, interrupts: Interrupts) -> None:
    """Until the pilot has ended; signals request its end. Raises PilotFailed when it failed."""
    click.echo("pilotq: staying until `pilotq stop` or the end of the allocation", err=True)
    requested = ""
    while (code := pilot.process.poll()) is None:
        mode = "now" if interrupts.count > 1 else "stop" if interrupts.count else interrupts.end_mode
        if mode != requested:
            try:
                broker.request_stop(mode)
                requested = mode
            except ServerUnavailable:
                pass  # it is started again, or the pilot is ending
        time.sleep(POLL_S)
    if code not in (0, ALLOCATION_ENDED):
        raise pilot_failure(pilot)
    if code == ALLOCATION_ENDED or interrupts.end_mode:
        where = shlex.quote(pilot.directory)
        click.echo(
            f"pilotq: the allocation is ending: go on in the next one with `pilotq start --resume {where}`", err=True
        )
