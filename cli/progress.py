"""The progress of a run: a live bar on a terminal, else a plain line on stderr now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from pilotq.broker.client.views import Counts
from pilotq.cli import formatting

PLAIN_S = 2.0  # a plain line at most this often


class Silent:
    """Shows nothing: one command shows its own output."""

    def update(self, counts: Counts, running: int) -> None:
        pass

    def close(self) -> None:
        pass


class Plain(Silent):
    """A line on stderr when something has changed, at most each PLAIN_S seconds."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._last = self._begin
        self._printed = ""

    def update(self, counts: Counts, running: int) -> None:
        now = time.monotonic()
        text = f"{formatting.counts_text(counts)}; {running:,} running"
        if text == self._printed or now - self._last < PLAIN_S:
            return
        self._last, self._printed = now, text
        click.echo(f"pilotq: {text}, after {formatting.seconds(now - self._begin)}", err=True)


class Bar(Silent):
    """A live bar; it vanishes at the end, when the summary takes its place."""

    def __init__(self) -> None:
        # rich takes 75 ms to import: only a run that shows the bar pays for it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress: Any = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=Console(file=sys.stdout), transient=True, redirect_stdout=False, redirect_stderr=True,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("", total=None)

    def update(self, counts: Counts, running: int) -> None:
        words = [f"{running:,} running"]
        if counts.failed:
            words.append(f"[red]{counts.failed:,} failed[/red]")
        if counts.canceled:
            words.append(f"[yellow]{counts.canceled:,} canceled[/yellow]")
        self._progress.update(self._task, completed=counts.ended, total=counts.total, description=", ".join(words))

    def close(self) -> None:
        self._progress.stop()


def display(quiet: bool) -> Silent:
    """The display that fits stdout; close it before anything else is printed."""
    if quiet:
        return Silent()
    return Bar() if sys.stdout.isatty() else Plain()
