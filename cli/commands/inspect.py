"""`pilotq list`, `show`, `logs` and `status`: looking changes nothing."""

from __future__ import annotations

import sys
import time

import click

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker, reach
from pilotq.broker.client.views import TaskView
from pilotq.broker.errors import PilotFailed
from pilotq.broker.tasks.states import REASONS, STATUSES
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.task_selection import ids_of

FOLLOW_S = 0.2  # how often `logs -f` looks


@click.command("list")
@click.option("--status", type=click.Choice(sorted(STATUSES)), metavar="STATUS",
              help="Only tasks that are " + ", ".join(sorted(STATUSES)) + ".")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="At most so many.")
@dir_option
@json_option
def list_command(status: str | None, limit: int, directory: str | None, as_json: bool) -> None:
    """List tasks: running, waiting, then those that have ended.

    \b
    Example: pilotq list --status failed
    """
    with reach(directory) as pilot:
        tasks = list(pilot.tasks(status=status, limit=limit + 1))
    shown = tasks[:limit]
    if as_json:
        click.echo(formatting.to_json([formatting.task_json(task) for task in shown]))
        return
    if isinstance(pilot, Archive):
        click.echo(f"pilotq: the pilot in {pilot.pilot.directory} has ended; its journal has these", err=True)
        if pilot.gap:
            click.echo(f"pilotq: {pilot.gap}", err=True)
    click.echo(formatting.tasks_table(shown))
    if len(tasks) > limit:
        click.echo(f"pilotq: there are more than {limit}; --limit {10 * limit} shows more of them", err=True)


@click.command("show", no_args_is_help=True)
@click.argument("words", nargs=-1, required=True, metavar="ID...")
@dir_option
@json_option
def show_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Show all that is known of tasks; ID is an id or the name of one task.

    \b
    Example: pilotq show 1f
    """
    with reach(directory) as pilot:
        tasks = [pilot.task(task_id) for task_id in ids_of(pilot, words)]
    if as_json:
        click.echo(formatting.to_json([formatting.details_json(task) for task in tasks]))
    else:
        click.echo("\n\n".join(_details(task) for task in tasks))


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
        ("array", f"{task.array}, index {task.index}" if task.array else ""),
        ("elements", f"{task.array_size:,}" if task.array_size else ""),
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


@click.command("logs", no_args_is_help=True)
@click.argument("word", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended.")
@click.option("--stderr", "stderr", is_flag=True, help="What it wrote to stderr, not what to stdout.")
@dir_option
def logs_command(word: str, follow: bool, stderr: bool, directory: str | None) -> None:
    """Print what the last execution of a task has written so far, byte for byte.

    \b
    Example: pilotq logs 1f --stderr
    """
    stream = "stderr" if stderr else "stdout"
    out = sys.stdout.buffer
    with reach(directory) as pilot:
        (task_id,) = ids_of(pilot, [word])
        for piece in pilot.follow(task_id, stream):
            out.write(piece)
            if not piece:
                out.flush()
                if not follow:
                    return
                time.sleep(FOLLOW_S)
        out.flush()


@click.command("status")
@click.option("--left", is_flag=True, help="Print only how many tasks have not ended: for scripts.")
@dir_option
@json_option
def status_command(left: bool, directory: str | None, as_json: bool) -> None:
    """Show how far the pilot is: tasks that ended, nodes, cores in use.

    \b
    Example: pilotq status
    """
    with reach(directory) as pilot:
        counts, running, nodes = pilot.counts(), 0, []
        if isinstance(pilot, Broker):
            running, nodes = pilot.running(), pilot.nodes()
    ended = isinstance(pilot, Archive)
    gap = pilot.gap if isinstance(pilot, Archive) else ""
    if left:
        if gap and not counts.left:
            raise PilotFailed(gap)  # a script would take a 0 for the end of all of them
        click.echo(counts.left)
        return
    cores, used = sum(n.cores for n in nodes), sum(n.used for n in nodes)
    if as_json:
        facts = {"ended": ended, "tasks": formatting.counts_json(counts), "running": running}
        click.echo(formatting.to_json({**facts, "nodes": len(nodes), "cores": cores, "used": used}))
        return
    click.echo(f"tasks  {formatting.counts_text(counts)}; {running:,} running")
    if ended:
        click.echo(f"nodes  none: {gap or 'the pilot has ended'}")
    else:
        click.echo(f"nodes  {len(nodes)}, with {cores:,} cores, {used:,} in use")
