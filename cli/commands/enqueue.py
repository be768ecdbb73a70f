"""`pilotq enqueue`: one task, or one array of tasks, goes to a pilot that runs."""

from __future__ import annotations

from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.tasks.submit_context import capture_context
from pilotq.cli import formatting
from pilotq.cli.options import (
    dir_option,
    json_option,
    task_options,
    tasks_of,
)
from pilotq.cli.task_selection import ids_of


@click.command("enqueue", context_settings={"allow_interspersed_args": False}, no_args_is_help=True)
@task_options
@click.option("--nodes", "task_nodes", metavar="N|MIN-MAX", help="Nodes, each with --cores, or entire ones.")
@click.option("--after", multiple=True, metavar="ID", help="Wait until ID has finished; may be repeated.")
@dir_option
@json_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] CMD [ARGS]...")
def enqueue_command(command: tuple[str, ...], directory: str | None, as_json: bool, **options: Any) -> None:
    """Submit one task, or an array of tasks; prints its id, and of several ranges one id each.

    \b
    Example: pilotq enqueue --cores 2 --array 0-99 -- ./simulate --seed {index}
    """
    tasks = tasks_of(command, options)
    with Broker.connect(directory) as broker:
        after = [f"={task_id}" for task_id in ids_of(broker, tasks[0].after)]
        for task in tasks:
            task.after = after
        ids = broker.enqueue_many(tasks, context=capture_context(options["env_policy"]))
    rows = [(task_id, task.name or "", task.size) for task_id, task in zip(ids, tasks, strict=True)]
    formatting.print_ids(rows, as_json)
