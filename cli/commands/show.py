"""`pilotq show`: everything known about single tasks."""

from __future__ import annotations

import click

from pilotq.broker.client.broker import open_pilot
from pilotq.broker.client.views import TaskView
from pilotq.broker.tasks.states import REASONS
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.task_selection import ids_of


@click.command("show", no_args_is_help=True)
@click.argument("words", nargs=-1, required=True, metavar="ID...")
@dir_option
@json_option
def show_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Show everything known about tasks; ID is an id or the name of one task.

    \b
    Example: pilotq show 1f
    """
    with open_pilot(directory) as pilot:
        tasks = [pilot.task(task_id) for task_id in ids_of(pilot, words)]
    if as_json:
        click.echo(formatting.to_json([formatting.details_json(task) for task in tasks]))
    else:
        click.echo("\n\n".join(_details(task) for task in tasks))


def _place(task: TaskView) -> str:
    """The array or bundle that it is part of."""
    return f"{task.array}, index {task.index}" if task.index is not None else task.array


def _details(task: TaskView) -> str:
    reason = f"{task.reason}: {REASONS[task.reason]}" if REASONS.get(task.reason) else task.reason
    times = task.times
    facts = [
        ("id", task.id),
        ("name", task.name),
        ("status", task.status),
        ("reason", reason),
        ("message", task.message),
        ("exit code", "" if task.exit_code is None else str(task.exit_code)),
        ("signal", str(task.signal or "")),
        ("command", task.command),
        ("queue", task.queue),
        ("array" if task.index is not None else "bundle", _place(task)),
        ("elements", f"{task.array_size:,}" if task.array_size else ""),
        ("at a time", f"at most {task.array_limit:,}" if task.array_limit else ""),
        *((f"  {status}", ranges) for status, ranges in task.elements.items()),
        ("execution", str(task.execution or "")),
        ("retries left", str(task.retries or "")),
        ("cores", task.cores),
        *((word, formatting.moment(times.get(word))) for word in ("queued", "handed", "started", "ended")),
        ("ran", formatting.seconds(formatting.ran(task))),
        ("CPU time", formatting.seconds(task.cpu)),
        ("memory", f"{task.max_rss / 2**20:,.1f} MiB at most" if task.max_rss else ""),
    ]
    out = [f"{name:<14}{formatting.clean(text)}" for name, text in facts if text]
    for stream, text in (("stdout", task.stdout_tail), ("stderr", task.stderr_tail)):
        if text.strip():
            out += [f"{stream}, the end:", *(f"  {line}" for line in formatting.lines(text))]
    return "\n".join(out)
