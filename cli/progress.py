"""The progress of a run: a live bar on a terminal, else a plain line on stderr now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from pilotq.broker.client.views import Counts, seconds_left
from pilotq.cli import formatting

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

PAUSE_MIN_S, PAUSE_MAX_S = 2.0, 600.0
PAUSE_SHARE = 0.1  # of the time that a run has taken so far
RATE_S = 30.0  # the rate of a bar is that of so many seconds


def pause_after(elapsed: float) -> float:
    """Seconds until the next plain line of a run that has taken so long: lines get rarer, some 200 in a day.

    >>> [pause_after(seconds) for seconds in (1, 60, 3600, 86400)]
    [2.0, 6.0, 360.0, 600.0]
    """
    return min(max(PAUSE_SHARE * elapsed, PAUSE_MIN_S), PAUSE_MAX_S)


class Silent:
    """Shows nothing: one command shows its own output."""

    def update(self, counts: Counts, running: int) -> None:
        pass

    def close(self) -> None:
        pass


class Plain(Silent):
    """A line on stderr when something has changed, at most each `pause_after` seconds."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._last, self._ended, self._printed = self._begin, 0, ""

    def update(self, counts: Counts, running: int) -> None:
        now = time.monotonic()
        text = f"{formatting.counts_text(counts)}; {running:,} running"
        if text == self._printed or now - self._last < pause_after(self._last - self._begin):
            return
        rate = (counts.ended - self._ended) / (now - self._last)
        self._last, self._ended, self._printed = now, counts.ended, text
        speed = f", {_speed(counts, running, rate)}" if rate > 0 else ""
        click.echo(f"pilotq: {text}, after {formatting.seconds(now - self._begin)}{speed}", err=True)


class Bar(Silent):
    """A live bar with the rate and the time that is left; it vanishes at the end, when the summary takes its place."""

    def __init__(self) -> None:
        # rich takes 75 ms to import: only a run that shows the bar pays for it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Speed(ProgressColumn):
            def render(self, task: Task) -> Text:
                rate = task.speed or 0.0
                counts = Counts(total=int(task.total or 0), finished=int(task.completed))
                return Text(_speed(counts, task.fields.get("running", 0), rate) if rate > 0 else "")

        self._progress: Any = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), Speed(),
            console=Console(file=sys.stdout), transient=True, redirect_stdout=False, redirect_stderr=True,
            speed_estimate_period=RATE_S,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("", total=None)

    def update(self, counts: Counts, running: int) -> None:
        words = [f"{running:,} running"]
        if counts.failed:
            words.append(f"[red]{counts.failed:,} failed[/red]")
        if counts.canceled:
            words.append(f"[yellow]{counts.canceled:,} canceled[/yellow]")
        text = ", ".join(words)
        self._progress.update(self._task, completed=counts.ended, total=counts.total, description=text, running=running)

    def close(self) -> None:
        self._progress.stop()


def _speed(counts: Counts, running: int, rate: float) -> str:
    """The rate, and the time that is left at it."""
    text = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"
    left = seconds_left(counts.left, running, rate)
    return text if left is None else f"{text}, {formatting.seconds(left)} left"


def display(quiet: bool) -> Silent:
    """The display that fits stdout; close it before anything else is printed."""
    if quiet:
        return Silent()
    return Bar() if sys.stdout.isatty() else Plain()
