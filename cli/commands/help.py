"""`pilotq help` and `pilotq completion`."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

import click

from pilotq.broker.errors import InvalidInput
from pilotq.cli.topics import TOPICS

SHELLS = ("bash", "zsh", "fish")


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
    elif word in main.VERBS:
        assert ctx.parent is not None, "it is a command of the group"
        command = main.pilotq.get_command(ctx.parent, word)
        with click.Context(command, ctx.parent, info_name=word) as context:
            click.echo(context.get_help())
    else:
        near = get_close_matches(word, [*TOPICS, *main.VERBS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`pilotq help` lists the topics"
        raise InvalidInput(f"there is no topic or command {word!r}: {hint}")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print the lines that let SHELL complete commands and options with the Tab key.

    \b
    Example: pilotq completion bash >> ~/.bashrc
    Example: pilotq completion fish > ~/.config/fish/completions/pilotq.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click knows all of SHELLS"
    main = import_module("pilotq.cli.main")
    click.echo(kind(main.pilotq, {}, "pilotq", "_PILOTQ_COMPLETE").source())
