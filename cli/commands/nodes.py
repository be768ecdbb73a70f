"""`pilotq nodes`: lists nodes, closes them (drain, retire) and opens them again (resume)."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.resources import BY_CGROUP, BY_WATCHER
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option

# NodeInfo.memory_by -> a sentence
MEMORY_BY = {
    "": "memory that tasks ask for is reserved, and nothing holds them to it",
    BY_WATCHER: "tasks are ended when they use more memory than they asked for: each worker measures them",
    BY_CGROUP: "tasks are ended when they use more memory than they asked for: the kernel limits their cgroups",
}


@click.group("nodes", invoke_without_command=True)
@dir_option
@json_option
@click.pass_context
def nodes_command(ctx: click.Context, directory: str | None, as_json: bool) -> None:
    """List the nodes of the pilot, their cores, and how many are in use; close nodes, and open them again.

    \b
    Example: pilotq nodes
    Example: pilotq nodes drain n2
    """
    ctx.obj = directory
    if ctx.invoked_subcommand is not None:
        return
    with Broker.connect(directory) as broker:
        nodes = broker.nodes()
    if as_json:
        click.echo(formatting.to_json(nodes))
        return
    click.echo(formatting.nodes_table(nodes))
    if any(node.shared_cores for node in nodes):
        click.echo("* several of these cores share a physical one")
    for how in sorted({node.memory_by for node in nodes}):
        names = [node.name for node in nodes if node.memory_by == how]
        click.echo(f"{MEMORY_BY.get(how, how)}{'' if len(names) == len(nodes) else ': ' + ', '.join(names)}")
    for node in nodes:
        if node.gpus:
            click.echo(f"{node.name} has {formatting.clean(formatting.gpus_text(node.gpus))}")
    for node in nodes:
        if node.why:
            click.echo(f"{node.name} is {node.state}: {formatting.clean(node.why)}")


@nodes_command.command("drain", no_args_is_help=True)
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
@click.option("--reason", default="", metavar="TEXT", help="Shown by `pilotq nodes`.")
@dir_option
@click.pass_context
def drain_command(ctx: click.Context, names: tuple[str, ...], reason: str, directory: str | None) -> None:
    """Start nothing more on these nodes; what runs there goes on.

    \b
    Example: pilotq nodes drain n2 --reason 'slow disk'
    """
    _close(directory or ctx.obj, names, "drained", reason)


@nodes_command.command("retire", no_args_is_help=True)
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
@click.option("--reason", default="", metavar="TEXT", help="Shown by `pilotq nodes`.")
@dir_option
@click.pass_context
def retire_command(ctx: click.Context, names: tuple[str, ...], reason: str, directory: str | None) -> None:
    """Start nothing more on these nodes, and end their workers when nothing runs there any more.

    \b
    Example: pilotq nodes retire n2
    """
    _close(directory or ctx.obj, names, "retired", reason)


@nodes_command.command("resume", no_args_is_help=True)
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
@dir_option
@click.pass_context
def resume_command(ctx: click.Context, names: tuple[str, ...], directory: str | None) -> None:
    """Use these nodes again, whether they were drained, retired or quarantined. The worker of a retired node is started
    again if the pilot had started it.

    \b
    Example: pilotq nodes resume n2
    """
    with Broker.connect(directory or ctx.obj) as broker:
        closed = broker.closed_nodes()
        for name in names:
            if name not in closed:
                raise InvalidInput(f"node {name} is neither drained, retired nor quarantined: see `pilotq nodes`")
        broker.open_nodes(names)


def _close(directory: str | None, names: tuple[str, ...], state: str, reason: str) -> None:
    with Broker.connect(directory) as broker:
        known = {node.name for node in broker.nodes()}
        for name in names:
            if name not in known:
                raise InvalidInput(
                    f"there is no node {name!r} in this pilot: {', '.join(sorted(known)) or 'none has joined'}"
                )
        broker.close_nodes(names, state, reason)
