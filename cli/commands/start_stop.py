"""`pilotq start` and `pilotq stop`: a pilot in the background."""

from __future__ import annotations

import os
import shlex
import time
from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import NoPilot, ServerUnavailable
from pilotq.broker.pilot.directory import find
from pilotq.broker.pilot.start import CUT_SHORT, StartedPilot
from pilotq.broker.tasks.quantities import parse_duration
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.options import dir_option, parsed
from pilotq.cli.pilot_options import (
    LOOK_S,
    await_end,
    await_nodes,
    failure,
    pilot_options,
    plural,
    start,
    supervisor_options,
)

STOP_S = 90.0  # workers get 30 s, the server as long again; then something is wrong


@click.command("start")
@pilot_options
@click.option("--owner", type=int, default=0, hidden=True, help="It ends with this process.")
@click.option("--foreground/--background", default=None,
              help="Stay until it ends, or return when it is ready.  [default: stay in a batch script]")  # fmt: skip
def start_command(owner: int, foreground: bool | None, **values: Any) -> None:
    """Start a pilot in the background; prints its directory. In a Slurm batch script it stays until the pilot ends.

    \b
    Example: pilotq start --nodes 4
    """
    options = supervisor_options(values, owner_pid=owner)
    if foreground is None:
        foreground = options.remote is not None and os.environ.get("ENVIRONMENT") == "BATCH" and not owner
    pilot = start(values, options)
    with Broker.connect(pilot.directory) as broker:
        await_nodes(broker, pilot, options)
        _tell(pilot, broker, values)
        if foreground:
            with Interrupts(allocation=options.remote is not None) as interrupts:
                _stay(pilot, broker, interrupts)


def _tell(pilot: StartedPilot, broker: Broker, values: dict[str, Any]) -> None:
    click.echo(pilot.directory)
    # Only where --dir named the directory it must be named again.
    where = f" --dir {pilot.directory}" if values["directory"] or values["resume"] else ""
    cores = plural(sum(node.cores for node in broker.nodes()), "core")
    click.echo(
        f"pilotq: the pilot is ready, with {cores}; go on with\n"
        f"  pilotq enqueue{where} -- CMD ...\n  pilotq wait{where}\n  pilotq stop{where}",
        err=True,
    )


def _stay(pilot: StartedPilot, broker: Broker, interrupts: Interrupts) -> None:
    """Until the pilot has ended; signals are wishes to end it. Raises PilotFailed when it failed."""
    click.echo("pilotq: it stays until `pilotq stop`, or the end of the allocation", err=True)
    said = ""
    while (code := pilot.process.poll()) is None:
        mode = "now" if interrupts.count > 1 else "stop" if interrupts.count else interrupts.wish
        if mode != said:
            try:
                broker.request_stop(mode)
                said = mode
            except ServerUnavailable:
                pass  # it is started again, or the pilot is ending
        time.sleep(LOOK_S)
    if code not in (0, CUT_SHORT):
        raise failure(pilot)
    if code == CUT_SHORT or interrupts.wish:
        where = shlex.quote(pilot.directory)
        click.echo(f"pilotq: the allocation ends: go on in the next one with `pilotq start --resume {where}`", err=True)


@click.command("stop")
@click.option("--drain", "mode", flag_value="drain", help="Start nothing more, and let what runs end.")
@click.option("--now", "mode", flag_value="now", help="Kill what runs, without grace.")
@click.option("--timeout", metavar="TIME", callback=parsed(parse_duration),
              help="Wait for its end at most so long.  [default: 90s; with --drain: for ever]")  # fmt: skip
@dir_option
def stop_command(mode: str | None, timeout: float | None, directory: str | None) -> None:
    """End a pilot, and wait until it is gone. What waits or is cut off stays for `pilotq start --resume`.

    \b
    Example: pilotq stop --drain
    """
    pilot = find(directory)
    try:
        broker = Broker.connect(directory)
    except NoPilot:
        if not pilot.alive():
            raise
        click.echo("pilotq: the pilot is ending already", err=True)
        await_end(pilot, timeout=STOP_S if timeout is None else timeout)
        return
    with broker:
        broker.request_stop(mode or "stop")

        def say() -> str:
            try:
                running = broker.running()
            except ServerUnavailable:
                return "waiting for the server to end"
            whom = plural(running, "running task") if running else "the pilot"
            return f"waiting for {whom} to end"

        if timeout is None and mode != "drain":
            timeout = STOP_S
        await_end(pilot, timeout=timeout, say=say)
