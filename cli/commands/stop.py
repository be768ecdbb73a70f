"""`pilotq stop`: ends a pilot, and returns when it is gone."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput, NoPilot, ServerUnavailable
from pilotq.broker.pilot.directory import find
from pilotq.broker.tasks.quantities import parse_duration
from pilotq.cli.options import dir_option, parsed
from pilotq.cli.pilot_options import (
    await_end,
    plural,
)

STOP_S = 90.0  # workers get 30 s, the server as much again; then something is wrong


@click.command("stop")
@click.option("--drain", is_flag=True, help="Start nothing more, and wait for running tasks.")
@click.option("--now", is_flag=True, help="Kill running tasks at once.")
@click.option("--timeout", metavar="TIME", callback=parsed(parse_duration),
              help="Wait at most this long for its end.  [default: 90s; with --drain: for ever]")  # fmt: skip
@dir_option
def stop_command(drain: bool, now: bool, timeout: float | None, directory: str | None) -> None:
    """End a pilot, and wait until it has ended. Tasks that have not ended stay for `pilotq start --resume`.

    \b
    Example: pilotq stop --drain
    """
    if drain and now:
        raise InvalidInput("give --drain, which waits for running tasks, or --now, which kills them, not both")
    pilot = find(directory)
    try:
        broker = Broker.connect(directory)
    except NoPilot:
        if not pilot.alive():
            raise
        click.echo("pilotq: the pilot is already ending", err=True)
        await_end(pilot, timeout=STOP_S if timeout is None else timeout)
        return
    with broker:
        broker.request_stop("drain" if drain else "now" if now else "stop")

        def say() -> str:
            try:
                running = broker.running()
            except ServerUnavailable:
                return "waiting for the server to end"
            whom = plural(running, "running task") if running else "the pilot"
            return f"waiting for {whom} to end"

        if timeout is None and not drain:
            timeout = STOP_S
        await_end(pilot, timeout=timeout, say=say)
