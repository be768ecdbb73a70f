"""Draws the executions of a journal with matplotlib: which core ran what, and how many cores were in use."""

from __future__ import annotations

import os
from typing import Any

from pilotq.broker.client.executions import Executions
from pilotq.broker.client.timeline import Timeline
from pilotq.broker.errors import InvalidInput
from pilotq.broker.os_strings import printable
from pilotq.broker.store.resources import parse_allocation
from pilotq.cli.report_export import written_whole

COLOURS = {"finished": "tab:green", "failed": "tab:red", "stopped": "tab:orange", "canceled": "tab:orange"}
ROWS_MAX, BARS_MAX = 512, 50_000  # of one chart with a bar for each execution; beyond them it shows density
COLUMNS = 1200  # of a chart of density, and of the use over time


def draw_gantt(runs: Executions, file: str, *, gaps: bool = False) -> None:
    """A row for each core and a bar for each execution; for many, how busy a core or group of cores was.

    With ``gaps`` the chart shows which share of the time cores were idle.
    """
    plt = _pyplot("gantt", file)
    held = runs.held()
    if not held:
        raise InvalidInput("the journal has no execution that ran: there is nothing to draw")
    if gaps or len(held) > ROWS_MAX or len(runs) > BARS_MAX:
        figure, axes = plt.subplots(figsize=(12, 7), layout="constrained")
        time = Timeline(runs, COLUMNS, min(len(held), ROWS_MAX))
        shares = [1.0 - share for share in time.busy] if gaps else list(time.busy)
        rows = [shares[row * COLUMNS : (row + 1) * COLUMNS] for row in range(time.rows)]
        picture = axes.imshow(
            rows, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis",
            extent=(0, time.end - time.begin, len(held), 0),
        )  # fmt: skip
        figure.colorbar(picture, label="share of the time idle" if gaps else "share of the time in use")
        axes.set_ylabel(f"cores, {held[0][0]}:{held[0][1]} to {held[-1][0]}:{held[-1][1]}")
    else:
        figure, axes = plt.subplots(figsize=(12, 1.5 + 0.2 * len(held)), layout="constrained")
        _bars(axes, runs, held)
    axes.set_xlabel("seconds since the first start")
    _save(plt, figure, file)


def _bars(axes: Any, runs: Executions, held: list[tuple[str, int]]) -> None:
    begin = min(runs.started)
    bars: dict[tuple[str, int], list[int]] = {core: [] for core in held}
    for run, place in enumerate(runs.place):
        if text := runs.places.words[place]:
            for part in parse_allocation(text):
                for core in part.cores:
                    bars[part.node, core].append(run)
    for row, key in enumerate(held):
        spans = [(runs.started[run] - begin, runs.ended[run] - runs.started[run]) for run in bars[key]]
        colours = [COLOURS.get(runs.statuses.words[runs.status[run]], "tab:gray") for run in bars[key]]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colours, edgecolors="white", linewidth=0.3)
    axes.set_yticks(range(len(held)), [f"{node}:{core}" for node, core in held])
    axes.invert_yaxis()


def draw_usage(runs: Executions, file: str) -> None:
    """How many cores executions held over time."""
    plt = _pyplot("usage", file)
    held = runs.held()
    if not held:
        raise InvalidInput("the journal has no execution that ran: there is nothing to draw")
    time = Timeline(runs, COLUMNS, 1)
    width = (time.end - time.begin) / COLUMNS
    figure, axes = plt.subplots(figsize=(12, 4), layout="constrained")
    axes.stairs([share * len(held) for share in time.busy], [width * at for at in range(COLUMNS + 1)], fill=True)
    axes.axhline(len(held), color="tab:gray", linestyle="--")
    axes.set(xlabel="seconds since the first start", ylabel=f"cores in use, of {len(held):,}", ylim=(0, None))
    _save(plt, figure, file)


def _ending(file: str) -> str:
    return os.path.splitext(file)[1][1:].lower()


def _pyplot(kind: str, file: str) -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise InvalidInput(f"report {kind} needs matplotlib: `pip install 'pilotq[report]'`") from None
    from matplotlib.backend_bases import FigureCanvasBase

    if _ending(file) not in FigureCanvasBase.get_supported_filetypes():
        raise InvalidInput(f"{printable(file)}: the ending says how to draw: name a .png, .svg or .pdf")
    mpl.use("agg")
    from matplotlib import pyplot as plt

    return plt


def _save(plt: Any, figure: Any, file: str) -> None:
    try:
        with written_whole(file) as draft:
            figure.savefig(draft, format=_ending(file))
    finally:
        plt.close(figure)
