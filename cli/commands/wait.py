"""`pilotq wait`: returns when tasks have ended, and says by its exit code how."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import click

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker, open_pilot
from pilotq.broker.client.views import Counts
from pilotq.broker.errors import ServerUnavailable, UnknownTask
from pilotq.broker.settings import Settings
from pilotq.broker.tasks.dependencies import ID
from pilotq.broker.tasks.quantities import parse_duration
from pilotq.cli import exit_codes, formatting, progress
from pilotq.cli.failure_stop import FailureStop
from pilotq.cli.options import dir_option, json_option, parsed, stop_on_failures_option
from pilotq.cli.task_selection import ids_of

LOOK_S = 0.5  # how often it is looked how many have ended, or failed
LOOK_SHARE = 0.05  # of the time of a wait that looking takes at most
RETRY_S = 0.2  # how often a wait tries a server that is away


@click.command("wait")
@click.argument("words", nargs=-1, metavar="[ID]...")
@click.option("--timeout", metavar="TIME", callback=parsed(parse_duration),
              help="Give up after: 90, 10m.  [default: never]")  # fmt: skip
@stop_on_failures_option
@click.option("--progress", "shows_progress", is_flag=True, help="Show a bar, or a line now and then, meanwhile.")
@dir_option
@json_option
def wait_command(
    words: tuple[str, ...], timeout: float | None, stop_on_failures: str, shows_progress: bool, directory: str | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Wait until these tasks (default: all) have ended.

    Exits with 0 when all of them finished, 1 when some did not, 4 when the time is over. For a pilot that has ended the
    journal gives the answer at once.

    \b
    Example: pilotq wait --timeout 10m && echo all finished
    """
    begin, asked, away_since = time.monotonic(), timeout, None
    watch = Watch(stop_on_failures, progress.display(not shows_progress or (as_json and sys.stdout.isatty())))
    with closing(watch.shown):
        while True:
            try:
                counts, sentence = _wait(words, timeout, directory, watch)
                break
            except ServerUnavailable:
                # It is being started again, or the pilot ends: then its journal has the answer.
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > Settings().server_wait_s:
                    raise
                timeout = None if asked is None else max(asked - (now - begin), 0.0)
                time.sleep(RETRY_S)
    if sentence:
        click.echo(f"pilotq: {sentence}", err=True)
    if as_json:
        click.echo(formatting.to_json(formatting.counts_json(counts)))
    elif (sys.stderr.isatty() or shows_progress) and not sentence:
        click.echo(f"pilotq: {formatting.counts_text(counts)}", err=True)
    return exit_codes.TASKS_FAILED if sentence else exit_codes.of_counts(counts)


class Watch:
    """What is done during a wait: what has ended is shown, and more failures than ``limit`` stop what waits."""

    def __init__(self, limit: str, shown: progress.Silent) -> None:
        self.limit = FailureStop(limit)
        self.shown = shown
        self.next = 0.0

    def look(self, pilot: Broker, ids: list[str] | None) -> None:
        """Look how many have ended, if it is time to."""
        began = time.monotonic()
        if began < self.next:
            return
        shows, stops = type(self.shown) is not progress.Silent, self.limit.limit and not self.limit.exceeded
        if shows or stops:
            counts = pilot.counts(ids=ids)
            if sentence := self.limit.enforce(pilot, counts, ids):
                click.echo(f"pilotq: {sentence}", err=True)
            if shows:
                self.shown.update(counts, min(pilot.running(), counts.left))
        now = time.monotonic()
        self.next = now + max(LOOK_S, (now - began) / LOOK_SHARE)


def _wait(words: Sequence[str], timeout: float | None, directory: str | None, watch: Watch) -> tuple[Counts, str]:
    """What became of the tasks, and a sentence about those that will never end. Raises WaitTimedOut."""
    with open_pilot(directory) as pilot:
        if not isinstance(pilot, Archive):
            ids = ids_of(pilot, words) if words else None
            return pilot.wait(ids, timeout=timeout, on_poll=partial(watch.look, pilot, ids)), ""
        counts = pilot.wait([_possible_id(pilot, word) for word in words] if words else None)
        where = pilot.pilot.directory
        if counts.left:
            return counts, (
                f"the pilot has ended, and {counts.left:,} of {counts.total:,} tasks had not: `pilotq start --resume "
                f"{where}` goes on with them"
            )
        if not words and not pilot.complete:
            return counts, (
                f"the pilot was killed: {formatting.counts_text(counts)}, but its journal does not know what "
                f"never ran; "
                f"`pilotq start --resume {where}` goes on with it"
            )
        return counts, ""


def _possible_id(pilot: Archive, word: str) -> str:
    """The id of a task; a word that may be an id is taken for one of a task that never ran: no journal has those."""
    try:
        return ids_of(pilot, [word])[0]
    except UnknownTask:
        if not ID.fullmatch(word):
            raise
        return word
