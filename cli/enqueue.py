"""`pilotq enqueue` and `pilotq submit`: tasks go to a pilot that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from pilotq.broker.client import Broker
from pilotq.broker.surroundings import POLICIES, capture
from pilotq.broker.task import Task
from pilotq.cli import render
from pilotq.cli.options import dir_option, file_of_tasks, file_options, json_option, task_of, task_options
from pilotq.cli.select import ids_of


@click.command("enqueue", context_settings={"allow_interspersed_args": False}, no_args_is_help=True)
@task_options
@click.option("--nodes", "task_nodes", metavar="N|MIN-MAX", help="So many nodes, each with --cores, or entire ones.")
@click.option("--after", multiple=True, metavar="ID", help="Wait until ID has finished; may be repeated.")
@dir_option
@json_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] CMD [ARGS]...")
def enqueue_command(command: tuple[str, ...], directory: str | None, as_json: bool, **options: Any) -> None:
    """Submit one task, or one array of tasks; prints its id.

    \b
    Example: pilotq enqueue --cores 2 --array 0-99 -- ./simulate --seed {index}
    """
    task = task_of(command, options)
    with Broker.connect(directory) as broker:
        task.after = ids_of(broker, task.after)
        ids = broker.enqueue_many([task], shared=capture(options["env_policy"]))
    _print(ids, [task], as_json)


@click.command("submit", no_args_is_help=True)
@click.argument("file", metavar="FILE")
@file_options
@click.option("--key", metavar="KEY", help="Name of this submission: a second submit with it changes nothing.")
@click.option("--env-policy", type=click.Choice(POLICIES), default="submit",
              help="Whose environment the tasks have: yours, the worker's, or a clean one.")  # fmt: skip
@dir_option
@json_option
def submit_command(
    file: str, format: str | None, shell: bool, key: str | None, env_policy: str, directory: str | None, as_json: bool
) -> None:
    """Submit the tasks of a file, all or none; prints their ids, one a line.

    FILE (- is stdin) has one command a line, or is TOML or JSON with a list `tasks`, or a request file of
    QCG-PilotJob.

    \b
    Example: pilotq submit tasks.toml
    """
    with Broker.connect(directory) as broker:
        cores = sum(node.cores for node in broker.nodes())
        batch = file_of_tasks(file, format, shell, cores or None)
        ids = broker.enqueue_many(batch.tasks, key=key, shared=capture(env_policy))
    for name, why in batch.omitted.items():
        click.echo(f"pilotq: {render.clean(name)} is omitted: {why}", err=True)
    _print(ids, batch.tasks, as_json)


def _print(ids: Sequence[str], tasks: Sequence[Task], as_json: bool) -> None:
    if as_json:
        pairs = zip(ids, tasks, strict=True)
        click.echo(render.to_json([{"id": i, "name": t.name or "", "tasks": t.size} for i, t in pairs]))
    elif ids:
        click.echo("\n".join(ids))
