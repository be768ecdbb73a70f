"""`pilotq report`: summarises the journal of a pilot, running or ended, draws it, or writes it for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from pilotq.broker.client.core_hours import CoreHours, core_hours
from pilotq.broker.client.executions import Executions, given_to
from pilotq.broker.client.overview_tally import pattern_of
from pilotq.broker.client.statistics import Statistics, statistics
from pilotq.broker.client.usage import Usage, usage
from pilotq.broker.errors import InvalidInput
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.tasks.quantities import size_text
from pilotq.broker.tasks.states import REASONS
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option
from pilotq.cli.report_text import facts_of

FILES = ("html", "gantt", "usage", "trace", "csv", "parquet")  # kinds that write a file
NAMES_MAX = 100  # lines of --by-name


@click.command("report")
@click.argument("kind", type=click.Choice(["stats", *FILES]), default="stats")
@click.argument("file", required=False)
@click.option(
    "--by-name", is_flag=True, help="What tasks of each name (t-* of t-1, t-2) asked for and used, and what to ask for."
)
@dir_option
@json_option
def report_command(kind: str, file: str | None, by_name: bool, directory: str | None, as_json: bool) -> None:
    """Summarise the journal (stats), or write FILE: a page, a picture, or the executions for other programs.

    \b
    stats    core-hours, waits, run times, failures by reason
    html     one page: the same with a chart to zoom into
    gantt    which core ran what, as .png, .svg or .pdf:
             pip install 'pilotq[report]'
    usage    the cores in use over time, as gantt
    trace    events for Perfetto (ui.perfetto.dev)
    csv      a row for each execution
    parquet  the same: pip install 'pilotq[parquet]'

    \b
    Example: pilotq report
    Example: pilotq report --by-name
    Example: pilotq report html run.html
    Example: pilotq report gantt run.png
    """
    pilot = find(directory)
    if (kind in FILES) == (file is None):
        raise InvalidInput(f"report {kind}: name the FILE to write" if kind in FILES else "report stats takes no FILE")
    if kind in FILES and by_name:
        raise InvalidInput(f"report: give {kind} or --by-name, not both")
    if kind in FILES and as_json:
        raise InvalidInput(f"report: --json is for stats; report {kind} writes {formatting.clean(file or '')} as it is")
    if file == "-":
        raise InvalidInput(f"report {kind} writes a file as a whole, not to stdout: name the FILE")
    if file is not None:
        number = _write(kind, pilot, file)
        click.echo(f"pilotq: {number:,} executions are in {formatting.clean(file)}", err=True)
        return
    if by_name:
        usages = usage(Journal(pilot.journal).entries(), pattern_of)
        click.echo(formatting.to_json(usages) if as_json else _usage_text(usages))
        return
    runs = Executions()
    found = statistics(given_to(Journal(pilot.journal).entries(), runs.add))
    hours = core_hours(runs)
    click.echo(formatting.to_json(_as_json(found, hours)) if as_json else _as_text(found, hours))


def _write(kind: str, pilot: Pilot, file: str) -> int:
    """Write the file, and return how many executions it shows."""
    from pilotq.cli import report_export

    if kind == "html":
        from pilotq.cli.report_page import write_page

        return write_page(Journal(pilot.journal), file)
    entries = Journal(pilot.journal).entries()
    if kind in ("csv", "parquet", "trace"):
        return int(getattr(report_export, f"write_{kind}")(entries, file))
    from pilotq.cli.report_drawing import draw_gantt, draw_usage

    runs = Executions(entries)
    (draw_gantt if kind == "gantt" else draw_usage)(runs, file)
    return len(runs)


def _usage_text(usages: Sequence[Usage]) -> str:
    rows, advice = [], []
    for one in usages[:NAMES_MAX]:
        name = one.name or f"({one.program})"
        rows.append([
            name, f"{one.executions:,}", f"{one.busy:.1f} of {one.cores}" if one.busy else str(one.cores),
            _of(one.peak, one.memory, size_text), _of(one.longest, one.limit, formatting.seconds),
        ])  # fmt: skip
        if ask := _to_ask(one):
            short = [f"{n:,} ended for {what}" for n, what in
                     ((one.short_of_memory, "memory"), (one.short_of_time, "their time limit")) if n]  # fmt: skip
            advice.append(f"{formatting.clean(name)}: ask for {ask}" + (f" ({', '.join(short)})" if short else ""))
    if not rows:
        return "no execution has ended"
    more = [f"and {len(usages) - NAMES_MAX:,} more names: --json has all"] if len(usages) > NAMES_MAX else []
    return "\n".join([formatting.table(("NAME", "RUNS", "CORES", "MEMORY", "TIME"), rows), *more, "", *advice])


def _of(used: float, asked: float, text: Callable[[Any], str]) -> str:
    return f"{text(used)} of {text(asked)}" if asked else text(used) if used else ""


def _to_ask(one: Usage) -> str:
    """Options for the next time, with a margin above what was used most."""
    words = [f"--cores {one.next_cores}"] if one.next_cores else []
    if one.next_memory:
        words.append(f"--memory {one.next_memory >> 20}M")
    if one.next_limit:
        words.append(f"--time-limit {one.next_limit:.0f}s")
    return " ".join(words)


def _as_json(found: Statistics, hours: CoreHours) -> dict[str, Any]:
    facts = {name: getattr(found, name) for name in found.__struct_fields__ if name != "longest"}
    spent = formatting.core_hours_json(hours)
    return {**facts, "longest": [line.id for line in found.longest], "core_hours": spent}


def _as_text(found: Statistics, hours: CoreHours) -> str:
    out = [f"{name:<12}{text}" for name, text in facts_of(found)]
    if hours.whole:
        out += ["", formatting.core_hours_table(hours), hours.advice]
    if found.failures:
        out += ["", "executions that did not finish:"]
        rows = sorted(found.failures.items(), key=lambda item: -item[1])
        out += [f"  {number:>8,}  {word}: {REASONS.get(word) or word}" for word, number in rows]
    if found.longest:
        out += ["", "the longest:"]
        rows_of = [
            [line.id, line.name, line.status, formatting.seconds(_ran(line)), line.cpus] for line in found.longest
        ]
        out.append(formatting.table(("ID", "NAME", "STATUS", "RAN", "CORES"), rows_of))
    return "\n".join(out)


def _ran(line: JournalEntry) -> float:
    return max((line.ended or 0.0) - (line.started or 0.0), 0.0)
