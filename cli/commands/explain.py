"""`pilotq explain`: why a task waits and when it may start, or why it ended as it did."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import open_pilot
from pilotq.broker.client.views import Explanation
from pilotq.broker.tasks.states import ENDED
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.task_selection import ids_of

STDERR_LINES = 10  # last lines of what it wrote to stderr


@click.command("explain", no_args_is_help=True)
@click.argument("words", nargs=-1, required=True, metavar="ID...")
@dir_option
@json_option
def explain_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Explain why tasks wait and when they may start, or why they ended as they did.

    For a waiting task: which resources are missing and when they become free, what it depends on, which tasks go first,
    whether the pilot is paused. For one that has ended: the reason, the end of stderr, and which commands show more.

    \b
    Example: pilotq explain 1f
    """
    with open_pilot(directory) as pilot:
        found = [pilot.explain(task_id) for task_id in ids_of(pilot, words)]
    if as_json:
        click.echo(formatting.to_json(found))
    else:
        click.echo("\n\n".join(map(_text, found)))


def _text(found: Explanation) -> str:
    name = f" ({formatting.clean(found.name)})" if found.name else ""
    verb = found.status if found.status in ENDED - {"canceled", "stopped"} else f"is {found.status}"
    out = [
        f"task {formatting.clean(found.id)}{name} {verb}",
        *(f"  {formatting.clean(sentence)}" for sentence in found.why),
    ]
    if tail := [line for line in formatting.lines(found.output) if line][-STDERR_LINES:]:
        out += ["  the end of what it wrote to stderr:", *(f"    {line}" for line in tail)]
    if found.commands:
        out.append(f"  more: {', '.join(found.commands)}")
    return "\n".join(out)
