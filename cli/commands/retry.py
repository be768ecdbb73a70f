"""`pilotq retry`: what ended and did not finish runs again."""

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
# The words of Broker.retry that are no status of a task that has nothing to run again.
SENTENCES: Final = {
    "queued": "runs again",
    "deferred": "runs again when what it depends on has finished",
    "dependency": "waits for a task that has not finished: retry that one, too",
    "ending": "was canceled, and still runs: try again when it has ended",
    "gone": "is known to the journal only: submit it again",
    "changed": "changes all the time: try again",
    "unknown": "is known to the journal only: submit it again",
    "finished": "has finished: there is nothing to run again",
}


@click.command("retry", no_args_is_help=True)
@click.argument("words", nargs=-1, metavar="ID...")
@click.option("--all", "everything", is_flag=True, help="All that failed, was stopped, canceled or omitted.")
@dir_option
@json_option
def retry_command(words: tuple[str, ...], everything: bool, directory: str | None, as_json: bool) -> int:
    """Run tasks again that failed, were stopped or canceled; of an array the elements that did not finish.

    They keep their ids; each gets one more execution, with a number of its own. What was omitted because of a task is
    not run again with it: name it too, or use --all. Ends with 1 when one of those named cannot run again.

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
            click.echo(f"{task_id}: {_sentence(word, known.get(task_id, ''))}")
    return exit_codes.ALL_FINISHED if AGAIN.issuperset(answers.values()) else exit_codes.TASKS_FAILED


def _sentence(word: str, before: str) -> str:
    if word in AGAIN and before in WAITING:
        return f"is {before}: it has not ended"
    return SENTENCES.get(word, f"is {word}: it has not ended")
