"""`pilotq retry`: runs tasks again that ended and did not finish."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.cli import exit_codes, formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.outcomes import AGAIN, retry_sentence
from pilotq.cli.task_selection import ids_of


@click.command("retry", no_args_is_help=True)
@click.argument("words", nargs=-1, metavar="ID...")
@click.option("--all", "everything", is_flag=True, help="All tasks that failed, were stopped, canceled or omitted.")
@dir_option
@json_option
def retry_command(words: tuple[str, ...], everything: bool, directory: str | None, as_json: bool) -> int:
    """Run tasks again that failed, were stopped or canceled; of an array the elements that did not finish.

    They keep their ids; each gets one more execution, with a new number. Tasks that were omitted because of one of them
    do not run again with it: name them too, or use --all. Exits with 1 when one of those named cannot run again.

    \b
    Example: pilotq retry 1f 1g_7
    """
    if bool(words) == everything:
        raise InvalidInput("say which tasks to run again, or --all" + (", not both" if words else ""))
    with Broker.connect(directory) as broker:
        known = {i: broker.task(i).status for i in ids_of(broker, words)}
        answers = broker.retry(broker.retriable() if everything else known)
        bundles = broker.bundles(list(answers))
    if as_json:
        click.echo(formatting.to_json([{"id": task_id, "outcome": word} for task_id, word in answers.items()]))
    else:
        for task_id, word in answers.items():
            named = formatting.clean(formatting.tasks_of(task_id, bundles))
            click.echo(f"{named}: {retry_sentence(word, known.get(task_id, ''))}")
    return exit_codes.ALL_FINISHED if AGAIN.issuperset(answers.values()) else exit_codes.TASKS_FAILED
