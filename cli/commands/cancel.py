"""`pilotq cancel`: waiting tasks never start, running ones are ended."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.outcomes import NOTHING_WAITS, cancel_sentence
from pilotq.cli.task_selection import ids_of


@click.command("cancel", no_args_is_help=True)
@click.argument("words", nargs=-1, metavar="ID...")
@click.option("--all", "everything", is_flag=True, help="All tasks that have not ended.")
@click.option("--waiting", is_flag=True, help="Only what waits: what runs goes on.")
@dir_option
@json_option
def cancel_command(
    words: tuple[str, ...], everything: bool, waiting: bool, directory: str | None, as_json: bool
) -> None:
    """Cancel tasks: waiting ones never start, running ones are ended.

    \b
    Example: pilotq cancel 1f 1g
    """
    if bool(words) == everything:
        raise InvalidInput("say which tasks to cancel, or --all" + (", not both" if words else ""))
    with Broker.connect(directory) as broker:
        ids = broker.open_ids() if everything else ids_of(broker, words)
        views = [broker.task(task_id) for task_id in ids] if waiting and not everything else []
        idle = [view.id for view in views if view.array_size and "waiting" not in view.elements]
        outcome = broker.cancel(ids, waiting=waiting)
        bundles = broker.bundles(list(outcome))
    if as_json:
        click.echo(formatting.to_json([{"id": task_id, "outcome": word} for task_id, word in outcome.items()]))
        return
    for task_id, word in outcome.items():
        sentence = NOTHING_WAITS if task_id in idle else cancel_sentence(word)
        click.echo(f"{formatting.clean(formatting.tasks_of(task_id, bundles))}: {sentence}")
