"""`pilotq wait` and `pilotq cancel`."""

from __future__ import annotations

import sys

import click

from pilotq.broker.client import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.quantities import parse_duration
from pilotq.cli import exit_codes, render
from pilotq.cli.options import dir_option, json_option, parsed
from pilotq.cli.select import ids_of


@click.command("wait")
@click.argument("words", nargs=-1, metavar="[ID]...")
@click.option("--timeout", metavar="TIME", callback=parsed(parse_duration),
              help="Give up after: 90, 10m.  [default: never]")  # fmt: skip
@dir_option
@json_option
def wait_command(words: tuple[str, ...], timeout: float | None, directory: str | None, as_json: bool) -> int:
    """Wait until these tasks (without any: all) have ended.

    Ends with 0 when all of them finished, 1 when some did not, 4 when the time is over.

    \b
    Example: pilotq wait --timeout 10m && echo all well
    """
    with Broker.connect(directory) as broker:
        counts = broker.wait(ids_of(broker, words) if words else None, timeout=timeout)
    if as_json:
        click.echo(render.to_json(render.counts_json(counts)))
    elif sys.stderr.isatty():
        click.echo(f"pilotq: {render.counts_text(counts)}", err=True)
    return exit_codes.of_counts(counts)


@click.command("cancel", no_args_is_help=True)
@click.argument("words", nargs=-1, metavar="ID...")
@click.option("--all", "everything", is_flag=True, help="All tasks that have not ended.")
@dir_option
@json_option
def cancel_command(words: tuple[str, ...], everything: bool, directory: str | None, as_json: bool) -> None:
    """Cancel tasks: waiting ones never start, running ones are ended.

    \b
    Example: pilotq cancel 1f 1g
    """
    if bool(words) == everything:
        raise InvalidInput("say which tasks to cancel, or --all" + (", not both" if words else ""))
    with Broker.connect(directory) as broker:
        outcome = broker.cancel(_open_ids(broker) if everything else ids_of(broker, words))
    if as_json:
        click.echo(render.to_json([{"id": task_id, "outcome": word} for task_id, word in outcome.items()]))
        return
    sentences = {"canceled": "canceled", "told": "is running, and is being ended", "unknown": "is gone"}
    for task_id, word in outcome.items():
        click.echo(f"{task_id}: {sentences.get(word, f'had ended before: {word}')}")


def _open_ids(broker: Broker) -> list[str]:
    """Ids of the tasks that have not ended; an array stands for its elements."""
    return [t.id for t in broker.tasks(limit=sys.maxsize) if not t.ended and not t.array]
