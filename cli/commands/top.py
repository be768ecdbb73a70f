"""`pilotq top`: a pilot on a terminal, again and again; without one, a table of nodes and tasks, once."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any

import click
import msgspec

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker, open_pilot
from pilotq.broker.client.views import Counts, NodeView, TaskView
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option

READ_MAX = 500  # running tasks that are read to find those that run longest
OTHER_LINES = 6  # of a frame: counts, heads, blanks


class Frame(msgspec.Struct, kw_only=True):
    """The state of a pilot at one moment."""

    at: float
    counts: Counts
    ended: bool = False
    running: int = 0
    nodes: list[NodeView] = []
    tasks: list[TaskView] = []


@click.command("top")
@click.option("--once", is_flag=True, help="Show one frame, and end.")
@click.option("--every", type=click.FloatRange(0.1), default=1.0, show_default=True, metavar="S",
              help="Seconds between two frames.")  # fmt: skip
@dir_option
@json_option
def top_command(once: bool, every: float, directory: str | None, as_json: bool) -> None:
    """Watch the pilot: a map of nodes and cores, what runs, progress, what waits and why, failures; until q or its end.

    Keys: 1 to 5 or Tab choose the view, arrows a line, Enter shows its task, c cancels it after y, Esc leads back.
    Without a terminal, with --once and with --json, a table of nodes and of the tasks that run longest is shown once.

    \b
    Example: pilotq top
    """
    if not (as_json or once) and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from pilotq.cli.top_loop import watch

        watch(directory, every)
    frame = take_frame(directory)
    click.echo(formatting.to_json(_as_json(frame)) if as_json else text(frame))


def take_frame(directory: str | None) -> Frame:
    """One frame; raises as `reach`."""
    with open_pilot(directory) as pilot:
        now = time.time()
        frame = Frame(at=now, counts=pilot.counts(), ended=isinstance(pilot, Archive))
        if isinstance(pilot, Broker):
            frame.running, frame.nodes = pilot.running(), pilot.nodes()
            frame.tasks = list(pilot.tasks(status="started", limit=READ_MAX))
    frame.tasks = sorted((t for t in frame.tasks if not t.array_size), key=lambda t: t.times.get("started") or now)
    return frame


def text(frame: Frame) -> str:
    """As many of the running tasks as the terminal has lines for."""
    out = [f"{formatting.counts_text(frame.counts)}; {frame.running:,} running"]
    if frame.ended:
        return "\n".join([*out, "the pilot has ended"])
    out += ["", formatting.nodes_table(frame.nodes)]
    room = max(shutil.get_terminal_size().lines - len(frame.nodes) - OTHER_LINES, 3)
    if frame.tasks:
        out += ["", formatting.tasks_table(frame.tasks[:room])]
    return "\n".join(out)


def _as_json(frame: Frame) -> dict[str, Any]:
    return {
        "ended": frame.ended, "tasks": formatting.counts_json(frame.counts), "running": frame.running,
        "nodes": frame.nodes, "longest": [formatting.task_json(task) for task in frame.tasks],
    }  # fmt: skip
