"""`pilotq-qcg-report`: QCG-PilotJob's reports by their names in `qcg-pm-report`, on a pilot's directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click

from pilotq.broker.client.core_hours import CoreHours, core_hours
from pilotq.broker.client.executions import Executions, given_to
from pilotq.broker.client.statistics import statistics
from pilotq.broker.errors import InvalidInput, PilotqError
from pilotq.broker.pilot.directory import find
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.resources import parse_allocation
from pilotq.cli import formatting
from pilotq.cli.main import open_closed_streams, use_utf8
from pilotq.cli.report_text import facts_of

PROGRAM = "pilotq-qcg-report"
SORTS: dict[str, Callable[[JournalEntry], Any]] = {
    "start": lambda entry: entry.started or 0.0,
    "finish": lambda entry: entry.ended or 0.0,
    "runtime": lambda entry: (entry.ended or 0.0) - (entry.started or 0.0),
    "name": lambda entry: (entry.name, entry.index or 0),
    "state": lambda entry: entry.status,
}
_wdir = click.argument("wdir")
_details = click.option("--details", is_flag=True, help="Say more.")
_verbose = click.option(
    "--verbose", is_flag=True, hidden=True, expose_value=False
)  # of the original; nothing more is said here
_real = click.option("--real", is_flag=True, hidden=True, expose_value=False)  # all times are real ones


def main(argv: list[str] | None = None) -> NoReturn:
    open_closed_streams()
    use_utf8()
    try:
        reports.main(argv, prog_name=PROGRAM, standalone_mode=True)
    except PilotqError as error:
        click.echo(f"{PROGRAM}: {formatting.clean(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"{PROGRAM}: {formatting.clean(str(error))}", err=True)
        sys.exit(1)
    sys.exit(0)


@click.group()
def reports() -> None:
    """Reports on the pilot or service whose directory is WDIR, from its journal: while it runs, and afterwards."""


@reports.command()
@_wdir
@_details
@_verbose
def stats(wdir: str, details: bool) -> None:
    """Numbers, times, and what the core-hours went into."""
    runs = Executions()
    found = statistics(given_to(_entries(wdir), runs.add))
    _facts(facts_of(found))
    hours = core_hours(runs)
    if hours.whole:
        click.echo(f"\n{formatting.core_hours_table(hours) if details else hours.advice}")


@reports.command()
@_wdir
@_verbose
def text(wdir: str) -> None:
    """All executions, one a line."""
    _list(_executions(wdir), details=False)


@reports.command()
@_wdir
@click.option("--state", help="Only those that ended so: finished, failed, stopped.")
@click.option("--node", help="Only those on this node.")
@click.option("--core", type=int, help="Only those on a core with this number.")
@click.option("--sort", type=click.Choice(list(SORTS), case_sensitive=False), help="By what they are sorted.")
@_details
@_verbose
def jobs(wdir: str, state: str | None, node: str | None, core: int | None, sort: str | None, details: bool) -> None:
    """Executions, one a line."""

    def wanted(entry: JournalEntry) -> bool:
        parts = parse_allocation(entry.cpus) if entry.cpus else ()
        return state in (None, entry.status) and (
            (node is None and core is None)
            or any(node in (None, part.node) and (core is None or core in part.cores) for part in parts)
        )

    found: Any = filter(wanted, _executions(wdir))
    _list(sorted(found, key=SORTS[sort]) if sort else found, details=details)


@reports.command("launch-stats")
@_wdir
@_details
@_verbose
def launch_stats(wdir: str, details: bool) -> None:
    """How long executions took from being handed to a node to their start."""
    times: list[float] = []
    for entry in _executions(wdir):
        if entry.handed is not None and entry.started is not None:
            times.append(max(entry.started - entry.handed, 0.0))
            if details:
                click.echo(f"{formatting.clean(entry.name or entry.id)}  {formatting.seconds(times[-1])}")
    if not times:
        raise InvalidInput("the journal has no execution that began: there is nothing to report")
    times.sort()
    _facts([
        ("executions", f"{len(times):,}"), ("shortest", formatting.seconds(times[0])),
        ("mean", formatting.seconds(sum(times) / len(times))), ("median", formatting.seconds(times[len(times) // 2])),
        ("longest", formatting.seconds(times[-1])),
    ])  # fmt: skip


@reports.command()
@_wdir
@_details
@click.option("--wo-init", is_flag=True, help="Without the time before the first execution began.")
@click.option("--until-last-job", is_flag=True, help="Without the time after the last execution had begun.")
@_verbose
def rusage(wdir: str, details: bool, wo_init: bool, until_last_job: bool) -> None:
    """The share of the core-time that executions held."""
    runs, hours = _spent(wdir)
    whole = hours.whole - (hours.start_up if wo_init else 0)
    held = hours.finished + hours.lost
    if until_last_job:
        last = max(runs.started)
        begun = core_hours(runs, end=last)
        whole, held = begun.whole - (begun.start_up if wo_init else 0), begun.finished + begun.lost
    _facts([("cores", f"{len(runs.held()):,}"), ("use", _percent(held, whole))])
    if details:
        click.echo(f"\n{formatting.core_hours_table(hours)}")


@reports.command()
@_wdir
@_details
@_verbose
def efficiency(wdir: str, details: bool) -> None:
    """The share of the core-time in use while there was something to run, the gaps between tasks among it."""
    _, hours = _spent(wdir)
    held = hours.finished + hours.lost
    _facts([
        ("efficiency", _percent(held, held + hours.overhead + hours.large)),
        ("of what finished", _percent(hours.finished, hours.whole)),
    ])  # fmt: skip
    if details:
        click.echo(f"\n{formatting.core_hours_table(hours)}")


@reports.command()
@_wdir
@click.argument("output")
@_real
@_verbose
def gantt(wdir: str, output: str) -> None:
    """Draw which core ran what into OUTPUT: .png, .svg or .pdf."""
    from pilotq.cli.report_drawing import draw_gantt

    draw_gantt(Executions(_entries(wdir)), output)


@reports.command("gantt-gaps")
@_wdir
@click.argument("output")
@_real
@_verbose
def gantt_gaps(wdir: str, output: str) -> None:
    """Draw when which core was idle into OUTPUT: .png, .svg or .pdf."""
    from pilotq.cli.report_drawing import draw_gantt

    draw_gantt(Executions(_entries(wdir)), output, gaps=True)


def _entries(wdir: str) -> Iterator[JournalEntry]:
    return Journal(find(wdir).journal).entries()


def _executions(wdir: str) -> Iterator[JournalEntry]:
    return (entry for entry in _entries(wdir) if entry.execution and not entry.elements)


def _spent(wdir: str) -> tuple[Executions, CoreHours]:
    runs = Executions(_entries(wdir))
    hours = core_hours(runs)
    if not hours.whole:
        raise InvalidInput("the journal has no execution that ran: there is nothing to report")
    return runs, hours


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "nothing ran"


def _facts(facts: Sequence[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in facts), default=0) + 2
    for name, value in facts:
        click.echo(f"{name:<{width}}{value}")


def _list(entries: Any, *, details: bool) -> None:
    for entry in entries:
        ran = formatting.seconds(max((entry.ended or 0.0) - (entry.started or 0.0), 0.0))
        more = f"  queued {entry.queued} started {entry.started} ended {entry.ended} exit code {entry.exit_code}"
        line = f"{entry.id}  {entry.name}  {entry.status}  {entry.reason}  {ran}  {entry.cpus}{more if details else ''}"
        click.echo(formatting.clean(line))
