"""`pilotq enqueue` and `pilotq submit`: tasks go to a pilot that runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TextIO

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.submit_context import POLICIES, capture
from pilotq.cli import exit_codes, formatting
from pilotq.cli.options import (
    dir_option,
    file_of_tasks,
    file_options,
    json_option,
    open_replies,
    task_of,
    task_options,
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
    """Submit one task, or one array of tasks; prints its id.

    \b
    Example: pilotq enqueue --cores 2 --array 0-99 -- ./simulate --seed {index}
    """
    task = task_of(command, options)
    with Broker.connect(directory) as broker:
        task.after = [f"={task_id}" for task_id in ids_of(broker, task.after)]
        ids = broker.enqueue_many([task], shared=capture(options["env_policy"]))
    _print([(ids[0], task.name or "", task.size)], as_json)


@click.command("submit", no_args_is_help=True)
@click.argument("file", metavar="FILE")
@file_options
@click.option("--key", metavar="KEY", help="Name of this submission: a second submit with it changes nothing.")
@click.option("--env-policy", type=click.Choice(POLICIES), default="submit",
              help="Whose environment the tasks have: yours, the worker's, or a clean one.")  # fmt: skip
@dir_option
@json_option
def submit_command(
    file: str, format: str | None, shell: bool, replies: str | None, key: str | None, env_policy: str,
    directory: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Submit the tasks of a file, all or none; prints their ids, one a line.

    FILE (- is stdin) has one command a line, or is TOML or JSON with a list `tasks`, or a request file of
    QCG-PilotJob.

    \b
    Example: pilotq submit tasks.toml
    """
    with Broker.connect(directory) as broker:
        batch = file_of_tasks(file, format, shell, replies)
        if batch.requests is not None:
            if key is not None:
                raise InvalidInput("--key: jobs of QCG-PilotJob are known by their names, and submitted once anyway")
            with ExitStack() as stack:
                return _play(broker, batch.requests, env_policy, open_replies(replies, stack), as_json)
        ids = broker.enqueue_many(batch.tasks, key=key, shared=capture(env_policy))
    _print([(i, task.name or "", task.size) for i, task in zip(ids, batch.tasks, strict=True)], as_json)
    return exit_codes.ALL_FINISHED


def _play(broker: Broker, bodies: list[Any], env_policy: str, replies: TextIO | None, as_json: bool) -> int:
    """Handle QCG-PilotJob's requests on a pilot that runs; prints the ids of the tasks that came of them."""
    from pilotq.broker.qcg.service.play import play, teller
    from pilotq.broker.qcg.service.requests import Requests

    requests = Requests(broker, env_policy=env_policy)
    try:
        before = set(requests.registry.jobs)
        played = play(requests, bodies, teller(replies))
        rows = [row for name, job in requests.registry.jobs.items() if name not in before for row in job.tasks()]
    finally:
        requests.close()
    for sentence in played.refused:
        click.echo(f"pilotq: {formatting.clean(sentence)}", err=True)
    for name, why in played.omitted.items():
        click.echo(f"pilotq: {formatting.clean(name)} is omitted: {why}", err=True)
    _print(rows, as_json)
    if played.refused:
        return exit_codes.TASKS_FAILED if rows else exit_codes.INVALID
    return exit_codes.ALL_FINISHED


def _print(rows: Sequence[tuple[str, str, int]], as_json: bool) -> None:
    """``rows`` are id, name, and how many tasks it stands for."""
    if as_json:
        click.echo(formatting.to_json([{"id": i, "name": name, "tasks": size} for i, name, size in rows]))
    elif rows:
        click.echo("\n".join(i for i, _, _ in rows))
