"""`pilotq completion`: what makes a shell complete commands and options."""

from __future__ import annotations

from importlib import import_module

import click

SHELLS = ("bash", "zsh", "fish")


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
