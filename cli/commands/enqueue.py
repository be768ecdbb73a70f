"""`pilotq enqueue`: one task, or one array of tasks, goes to a pilot that runs."""

from __future__ import annotations

from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.dependencies import ALL_FIELDS
from pilotq.broker.tasks.submit_context import capture_context
from pilotq.cli import formatting
from pilotq.cli.options import (
    dir_option,
    json_option,
    learn_option,
    stop_on_failures_option,
    task_of,
    task_options,
)
from pilotq.cli.task_selection import ids_of


@click.command("enqueue", context_settings={"allow_interspersed_args": False}, no_args_is_help=True)
@task_options
@click.option("--nodes", "task_nodes", metavar="N|MIN-MAX", help="Nodes, each with --cores, or entire ones.")
@click.option(
    "--after", "--after-ok", "after", multiple=True, metavar="ID", help="Wait until ID has finished; may be repeated."
)
@click.option("--after-any", multiple=True, metavar="ID", help="Wait until ID has ended in any way.")
@click.option("--after-notok", multiple=True, metavar="ID", help="Run only if ID has ended and not finished.")
@click.option("--join", is_flag=True, help="End it when what it enqueues has ended, too.")
@stop_on_failures_option
@learn_option
@dir_option
@json_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] CMD [ARGS]...")
def enqueue_command(
    command: tuple[str, ...], learn: bool, directory: str | None, as_json: bool, **options: Any
) -> None:
    """Submit one task, or an array of tasks; prints its id.

    \b
    Example: pilotq enqueue --cores 2 --array 0-99 -- ./simulate --seed {index}
    """
    task = task_of(command, options)
    if limit := "" if task.is_array else options["stop_on_failures"]:
        raise InvalidInput(
            f"--stop-on-failures is for arrays here: give --array, or `pilotq wait --stop-on-failures {limit}`"
        )
    if task.nice and task.priority and not options["priority"]:
        raise InvalidInput("--nice and #SBATCH --nice (a priority here) do not go together: use --no-directives")
    with Broker.connect(directory) as broker:
        for field in ALL_FIELDS:
            setattr(task, field, [f"={task_id}" for task_id in ids_of(broker, getattr(task, field))])
        (task_id,) = broker.enqueue_many([task], context=capture_context(options["env_policy"]), learn=learn)
    formatting.print_ids([(task_id, task.name or "", task.size)], as_json)
