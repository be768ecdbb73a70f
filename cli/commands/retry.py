"""`pilotq retry`: runs tasks again that ended and did not finish."""

from __future__ import annotations

from typing import Final

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.states import WAITING
from pilotq.cli import exit_codes, formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.task_selection import ids_of

AGAIN: Final = frozenset({"queued", "deferred"})
# The answers of Broker.retry, except statuses of tasks that have nothing to run again.
SENTENCES: Final = {
    "queued": "runs again",
    "deferred": "runs again when what it depends on has finished",
    "dependency": "waits for a task that has not finished: retry that one, too",
    "ending": "was canceled, and still runs: try again when it has ended",
    "damaged": "has a record on the server that is damaged: submit it again",
    "gone": "is only in the journal: submit it again",
    "changed": "was changing meanwhile: try again",
    "unknown": "is only in the journal: submit it again",
    "finished": "has finished: there is nothing to run again",
}


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
    if as_json:
        click.echo(formatting.to_json([{"id": task_id, "outcome": word} for task_id, word in answers.items()]))
    else:
        for task_id, word in answers.items():
            click.echo(f"{formatting.clean(task_id)}: {_sentence(word, known.get(task_id, ''))}")
    return exit_codes.ALL_FINISHED if AGAIN.issuperset(answers.values()) else exit_codes.TASKS_FAILED


def _sentence(word: str, before: str) -> str:
    if word in AGAIN and before in WAITING:
        return f"is {before}: it has not ended"
    return SENTENCES.get(word, f"is {word}: it has not ended")
