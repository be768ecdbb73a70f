"""`pilotq top`: progress, nodes and the longest running tasks of a pilot, again and again."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

import click
import msgspec

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker, open_pilot
from pilotq.broker.client.views import Counts, NodeView, TaskView
from pilotq.broker.errors import ServerUnavailable
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option

READ_MAX = 500  # running tasks that are read to find those that run longest
OTHER_LINES = 6  # of a frame: counts, heads, blanks


class Frame(msgspec.Struct, kw_only=True):
    """The state of a pilot at one moment. ``rate`` is tasks ended per second since the frame before."""

    at: float
    counts: Counts
    ended: bool = False
    running: int = 0
    rate: float | None = None
    nodes: list[NodeView] = []
    tasks: list[TaskView] = []


@click.command("top")
@click.option("--once", is_flag=True, help="Show one frame, and end.")
@click.option("--every", type=click.FloatRange(0.1), default=1.0, show_default=True, metavar="S",
              help="Seconds between two frames.")  # fmt: skip
@dir_option
@json_option
def top_command(once: bool, every: float, directory: str | None, as_json: bool) -> None:
    """Watch the pilot: tasks, nodes, and the tasks that run longest; until Ctrl-C or the pilot's end.

    Without a terminal, and with --json, one frame is shown.

    \b
    Example: pilotq top
    """
    frame = take_frame(directory, None)
    if as_json:
        click.echo(formatting.to_json(_as_json(frame)))
    elif once or not sys.stdout.isatty():
        click.echo(text(frame))
    else:
        _live(directory, frame, every)


def _live(directory: str | None, frame: Frame, every: float) -> None:
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(Text.from_ansi(text(frame)), screen=True, auto_refresh=False) as live:
            while not frame.ended:
                time.sleep(every)
                try:
                    frame = take_frame(directory, frame)
                except ServerUnavailable:
                    continue  # it is being started again, or the pilot ends: the next frame shows which
                live.update(Text.from_ansi(text(frame)), refresh=True)
    except KeyboardInterrupt:
        pass  # the usual way to end it
    click.echo(text(frame))


def take_frame(directory: str | None, before: Frame | None) -> Frame:
    """One frame; raises as `reach`."""
    with open_pilot(directory) as pilot:
        now = time.time()
        frame = Frame(at=now, counts=pilot.counts(), ended=isinstance(pilot, Archive))
        if isinstance(pilot, Broker):
            frame.running, frame.nodes = pilot.running(), pilot.nodes()
            frame.tasks = list(pilot.tasks(status="started", limit=READ_MAX))
    frame.tasks = sorted((t for t in frame.tasks if not t.array_size), key=lambda t: t.times.get("started") or now)
    if before is not None and now > before.at:
        frame.rate = max(frame.counts.ended - before.counts.ended, 0) / (now - before.at)
    return frame


def text(frame: Frame) -> str:
    """As many of the running tasks as the terminal has lines for."""
    rate = "" if frame.rate is None else f"; {frame.rate:,.1f} ended per second"
    out = [f"{formatting.counts_text(frame.counts)}; {frame.running:,} running{rate}"]
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
