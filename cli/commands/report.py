"""`pilotq report`: summarises the journal of a pilot, running or ended, or draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from pilotq.broker.client.statistics import Spread, Statistics, statistics
from pilotq.broker.client.usage import Usage, usage
from pilotq.broker.errors import InvalidInput
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.resources import parse_allocation
from pilotq.broker.tasks.quantities import size_text
from pilotq.broker.tasks.states import REASONS
from pilotq.cli import formatting
from pilotq.cli.options import dir_option, json_option

COLOURS = {"finished": "tab:green", "failed": "tab:red", "stopped": "tab:orange", "canceled": "tab:orange"}
ROWS_MAX = 512  # rows of one chart: more could not be distinguished


@click.command("report")
@click.argument("kind", type=click.Choice(["stats", "gantt"]), default="stats")
@click.argument("file", required=False)
@click.option("--by-name", is_flag=True, help="What tasks of each name asked for and used, and what to ask for next.")
@dir_option
@json_option
def report_command(kind: str, file: str | None, by_name: bool, directory: str | None, as_json: bool) -> None:
    """Summarise the journal (stats), or draw which core ran what into FILE: .png, .svg or .pdf (gantt).

    Stats are the use of the cores, waits, run times, failures by reason, and the longest executions. Drawing needs
    matplotlib: `pip install 'pilotq[report]'`.

    \b
    Example: pilotq report
    Example: pilotq report --by-name
    Example: pilotq report gantt run.png
    """
    pilot = find(directory)
    if (kind == "gantt") == (file is None):
        raise InvalidInput("report gantt: name the FILE to write" if kind == "gantt" else "report stats takes no FILE")
    if kind == "gantt" and by_name:
        raise InvalidInput("report: give gantt or --by-name, not both")
    if kind == "gantt":
        assert file is not None, "checked above"
        number = _draw(pilot, file)
        click.echo(f"pilotq: {number:,} executions are in {file}", err=True)
        return
    if by_name:
        usages = usage(Journal(pilot.journal).entries())
        click.echo(formatting.to_json(usages) if as_json else _usage_text(usages))
        return
    found = statistics(Journal(pilot.journal).entries())
    click.echo(formatting.to_json(_as_json(found)) if as_json else _as_text(found))


def _usage_text(usages: Sequence[Usage]) -> str:
    rows, advice = [], []
    for one in usages:
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
    return "\n".join([formatting.table(("NAME", "RUNS", "CORES", "MEMORY", "TIME"), rows), "", *advice])


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


def _as_json(found: Statistics) -> dict[str, Any]:
    facts = {name: getattr(found, name) for name in found.__struct_fields__ if name != "longest"}
    return {**facts, "longest": [line.id for line in found.longest]}


def _as_text(found: Statistics) -> str:
    use = "" if found.use is None else f", in use {100 * found.use:.0f} % of the time"
    facts = [
        ("tasks", ", ".join(f"{n:,} {status}" for status, n in sorted(found.tasks.items())) or "none has ended"),
        ("executions", f"{found.executions:,} on {len(found.nodes):,} node" + ("" if len(found.nodes) == 1 else "s")),
        ("time", f"{formatting.seconds(found.seconds)} from the first start to the last end"),
        ("cores", f"{found.cores:,}{use}"),
        ("CPU time", formatting.seconds(found.cpu_seconds)),
        ("waits", _spread(found.waits)),
        ("run times", _spread(found.runs)),
    ]
    out = [f"{name:<12}{text}" for name, text in facts if text]
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


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    words = (("half of them up to", spread.median), ("90 %", spread.p90), ("the longest", spread.longest))
    return ", ".join(f"{word} {formatting.seconds(value)}" for word, value in words)


def _draw(pilot: Pilot, file: str) -> int:
    """Bars of all executions that ran, a row for each core; returns their number."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InvalidInput("report gantt needs matplotlib: `pip install 'pilotq[report]'`") from None
    mpl.use("agg")
    from matplotlib import pyplot as plt

    bars: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    number = 0
    for line in Journal(pilot.journal).entries():
        if line.started is None or line.ended is None or not line.cpus:
            continue
        number += 1
        bar = (line.started, line.ended - line.started, COLOURS.get(line.status, "tab:gray"))
        for part in parse_allocation(line.cpus):
            for core in part.cores:
                bars.setdefault((part.node, core), []).append(bar)
    if not number:
        raise InvalidInput(f"the journal of {pilot.directory} has no execution that ran: there is nothing to draw")
    if len(bars) > ROWS_MAX:
        raise InvalidInput(f"{len(bars)} cores are too many for one chart: it has room for {ROWS_MAX}")
    begin = min(start for row in bars.values() for start, _, _ in row)
    figure, axes = plt.subplots(figsize=(12, 1.5 + 0.2 * len(bars)), layout="constrained")
    for place, name in enumerate(sorted(bars)):
        row = bars[name]
        spans, colours = [(start - begin, length) for start, length, _ in row], [colour for *_, colour in row]
        axes.broken_barh(spans, (place - 0.4, 0.8), facecolors=colours, edgecolors="white", linewidth=0.3)
    axes.set_yticks(range(len(bars)), [f"{node}:{core}" for node, core in sorted(bars)])
    axes.set_xlabel("seconds since the first start")
    axes.invert_yaxis()
    try:
        figure.savefig(file)
    except ValueError as error:  # an ending that matplotlib does not know
        raise InvalidInput(f"{file}: {error}") from None
    finally:
        plt.close(figure)
    return number
