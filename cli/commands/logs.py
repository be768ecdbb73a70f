"""`pilotq logs`: what a task has written, byte for byte."""

from __future__ import annotations

import sys
import time

import click

from pilotq.broker.client.broker import open_pilot
from pilotq.broker.errors import InvalidInput
from pilotq.cli.options import dir_option
from pilotq.cli.task_selection import ids_of

FOLLOW_S = 0.2  # how often `logs -f` polls


@click.command("logs", no_args_is_help=True)
@click.argument("word", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended.")
@click.option("--stderr", "stderr", is_flag=True, help="Show stderr instead of stdout.")
@dir_option
def logs_command(word: str, follow: bool, stderr: bool, directory: str | None) -> None:
    """Print the output of the last execution of a task so far, byte for byte. Of an array, name an element: 1f_7.

    \b
    Example: pilotq logs 1f --stderr
    """
    stream = "stderr" if stderr else "stdout"
    out = sys.stdout.buffer
    with open_pilot(directory) as pilot:
        (task_id,) = ids_of(pilot, [word])
        task = pilot.task(task_id)
        if size := task.array_size:
            kind, example = ("a bundle", f"{task_id}_0") if task.is_bundle else ("an array", f"{task_id}_INDEX")
            raise InvalidInput(
                f"{task_id} is {kind} of {size:,} tasks, and each has its own output: name one, `pilotq logs {example}`"
            )
        for piece in pilot.follow(task_id, stream):
            out.write(piece)
            if not piece:
                out.flush()
                if not follow:
                    return
                time.sleep(FOLLOW_S)
        out.flush()
