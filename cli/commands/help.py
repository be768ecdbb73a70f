"""`pilotq help`: explains a topic or a command."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

import click

from pilotq.broker.errors import InvalidInput
from pilotq.cli.topics import TOPICS


@click.command("help")
@click.argument("word", required=False, metavar="[TOPIC|COMMAND]")
@click.pass_context
def help_command(ctx: click.Context, word: str | None) -> None:
    """Explain a topic: states, files, resources, dependencies, environment, exit-codes, schema; or a command.

    \b
    Example: pilotq help states
    """
    main = import_module("pilotq.cli.main")
    if word is None:
        topics = "\n".join(f"  {name:<14}{topic.summary}" for name, topic in TOPICS.items())
        click.echo(f"Topics of `pilotq help TOPIC`:\n\n{topics}\n\n`pilotq --help` lists the commands.")
    elif word in TOPICS:
        click.echo(TOPICS[word].text())
    elif word in main.COMMANDS:
        assert ctx.parent is not None, "it is a command of the group"
        command = main.pilotq.get_command(ctx.parent, word)
        with click.Context(command, ctx.parent, info_name=word) as context:
            click.echo(context.get_help())
    else:
        near = get_close_matches(word, [*TOPICS, *main.COMMANDS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`pilotq help` lists the topics"
        raise InvalidInput(f"there is no topic or command {word!r}: {hint}")
