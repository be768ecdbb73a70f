"""`pilotq submit`: the tasks of a file go to a pilot that runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, TextIO

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.submit_context import POLICIES, capture_context
from pilotq.cli import exit_codes, formatting
from pilotq.cli.options import (
    dir_option,
    file_of_tasks,
    file_options,
    json_option,
    learn_option,
    open_replies,
)


@click.command("submit", no_args_is_help=True)
@click.argument("file", metavar="FILE")
@file_options
@click.option("--key", metavar="KEY", help="A name for this submission: a second submit with it submits nothing.")
@click.option("--env-policy", type=click.Choice(POLICIES), default="submit",
              help="The environment of the tasks: yours, the worker's, or a clean one.")  # fmt: skip
@learn_option
@dir_option
@json_option
def submit_command(
    file: str, key: str | None, env_policy: str, learn: bool, directory: str | None, as_json: bool, **options: Any
) -> int:
    """Submit the tasks of a file, all or none; prints their ids, one per line.

    FILE (- is stdin) has one command a line, or is TOML or JSON with a list `tasks`, or a request file of
    QCG-PilotJob.

    \b
    Example: pilotq submit tasks.toml
    """
    with Broker.connect(directory) as broker:
        batch = file_of_tasks(file, options["format"], options["shell"], options["replies"])
        if batch.requests is not None:
            if key is not None:
                raise InvalidInput("--key: jobs of QCG-PilotJob are known by their names, and submitted once anyway")
            if learn:
                raise InvalidInput("--learn: jobs of QCG-PilotJob ask for what their file says")
            with ExitStack() as stack:
                return _play(broker, batch.requests, env_policy, open_replies(options["replies"], stack), as_json)
        ids = broker.enqueue_many(batch.tasks, key=key, context=capture_context(env_policy), learn=learn)
    formatting.print_ids([(i, task.name or "", task.size) for i, task in zip(ids, batch.tasks, strict=True)], as_json)
    return exit_codes.ALL_FINISHED


def _play(broker: Broker, bodies: list[Any], env_policy: str, replies: TextIO | None, as_json: bool) -> int:
    """Handle QCG-PilotJob's requests on a running pilot; prints the ids of the tasks that they created."""
    from pilotq.broker.qcg.service.play import play, reply_writer
    from pilotq.broker.qcg.service.requests import Requests

    requests = Requests(broker, env_policy=env_policy)
    try:
        before = set(requests.registry.jobs)
        played = play(requests, bodies, reply_writer(replies))
        rows = [row for name, job in requests.registry.jobs.items() if name not in before for row in job.tasks()]
    finally:
        requests.close()
    for sentence in played.refused:
        click.echo(f"pilotq: {formatting.clean(sentence)}", err=True)
    for name, why in played.omitted.items():
        click.echo(f"pilotq: {formatting.clean(name)} is omitted: {formatting.clean(why)}", err=True)
    formatting.print_ids(rows, as_json)
    if played.refused:
        return exit_codes.TASKS_FAILED if rows else exit_codes.INVALID
    return exit_codes.ALL_FINISHED
