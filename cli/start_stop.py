"""`pilotq start` and `pilotq stop`: a pilot in the background."""

from __future__ import annotations

from typing import Any

import click

from pilotq.broker.client import Broker
from pilotq.broker.errors import NoPilot, ServerUnavailable
from pilotq.broker.pilot import find
from pilotq.broker.quantities import parse_duration
from pilotq.cli.options import dir_option, parsed
from pilotq.cli.pilots import await_end, await_nodes, cores_of, pilot_options, plural, start, supervisor_options

STOP_S = 90.0  # workers get 30 s, the server as long again; then something is wrong


@click.command("start")
@pilot_options
def start_command(**values: Any) -> None:
    """Start a pilot in the background; prints its directory.

    \b
    Example: pilotq start --nodes 4
    """
    options = supervisor_options(values)
    pilot = start(values, options)
    with Broker.connect(pilot.directory) as broker:
        await_nodes(broker, pilot, options)
    click.echo(pilot.directory)
    # Only where --dir named the directory it must be named again.
    where = f" --dir {pilot.directory}" if values["directory"] or values["resume"] else ""
    cores = plural(cores_of(options.nodes), "core")
    click.echo(
        f"pilotq: the pilot is ready, with {cores}; go on with\n"
        f"  pilotq enqueue{where} -- CMD ...\n  pilotq wait{where}\n  pilotq stop{where}",
        err=True,
    )


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
