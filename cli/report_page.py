"""Writes the report as one page of HTML that needs no network: tables, and charts that its own script draws.

Names and words of tasks are untrusted: in the page they are escaped, and in its data no ``<`` is left.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pilotq.broker.client.core_hours import PARTS, CoreHours, core_hours
from pilotq.broker.client.executions import Executions, given_to
from pilotq.broker.client.statistics import statistics
from pilotq.broker.client.timeline import Timeline
from pilotq.broker.client.usage import Usage, UsageTally
from pilotq.broker.store.journal import Journal
from pilotq.broker.tasks.quantities import size_text
from pilotq.broker.tasks.states import REASONS
from pilotq.cli import formatting
from pilotq.cli.report_bars import pack, pack_bars
from pilotq.cli.report_export import written_whole
from pilotq.cli.report_text import facts_of

COLUMNS, ROWS = 8192, 128  # of the chart of density
FEW = 50_000  # executions for which a quarter of these columns is enough
USE_COLUMNS = 1024
LISTED = 30  # rows of a table
WAITS = (0.1, 1.0, 10.0, 60.0, 600.0, 3600.0)  # seconds


def write_page(journal: Journal, file: str) -> int:
    """Write the page, and return the number of executions in its charts."""
    runs, usages = Executions(), UsageTally()
    found = statistics(given_to(journal.entries(), runs.add, usages.add))
    asked = _asked(usages.take())
    data, lost = _data(runs) if len(runs) else ({}, "")
    sections = [
        _section("Summary", _table(("", ""), [list(fact) for fact in facts_of(found)])),
        _section("Where the core-hours went", _spent(core_hours(runs))),
        _charts(lost) if len(runs) else "",
        _section("Waits in the queue", _waits(runs)),
        _section("What did not finish", _failures(runs)),
        _section("Asked for and used", asked),
    ]
    with written_whole(file) as draft, open(draft, "w", encoding="utf-8", errors="replace") as out:
        out.write(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>pilotq report</title><style>{_part('page.css')}</style></head>\n<body><h1>pilotq report</h1>\n"
        )
        out.writelines(sections)
        if len(runs):
            text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
            out.write(f'<script type="application/json" id="data">{text}</script>\n')
            out.write(f"<script>{_part('page.js')}</script>\n")
        out.write("</body></html>\n")
    return len(runs)


def _part(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text("utf-8")


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}\n" if content else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """All cells are escaped; those of the columns ``numbers`` stand at the right."""
    if not rows:
        return ""

    def line(tag: str, cells: Sequence[str]) -> str:
        parts = (
            f"<{tag}{' class=n' if at in numbers else ''}>{escape(formatting.clean(cell))}</{tag}>"
            for at, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>\n"

    head = line("th", heads) if any(heads) else ""
    return f'<div class="scroll"><table>{head}{"".join(line("td", row) for row in rows)}</table></div>'


def _meters(rows: Sequence[tuple[str, str, float]]) -> str:
    """Rows of a word, its value, and a bar for the share."""
    return "<table>" + "".join(
        f"<tr><td>{escape(word)}</td><td class=n>{escape(value)}</td><td class=n>{100 * share:.1f} %</td>"
        f'<td class=meter>{_bar(share)}</td></tr>\n'
        for word, value, share in rows
    ) + "</table>"  # fmt: skip


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{100 * share:.1f}%"></span>' if share else ""


def _spent(hours: CoreHours) -> str:
    if not hours.whole:
        return "<p>No execution has ended.</p>"
    rows = [
        (what, f"{getattr(hours, part) / 3.6e9:,.4g} core-hours", hours.share(part)) for part, what in PARTS.items()
    ]
    return f"<p>{escape(hours.advice)}.</p>{_meters(rows)}"


def _charts(lost: str) -> str:
    return f"""<h2>What the cores did</h2>
<p>Zoom with the wheel (with Shift: time only) or + and -, drag or use the arrows to move, 0 shows all. {lost}
<button id="in">Zoom in</button> <button id="out">Zoom out</button> <button id="all">Show all</button></p>
<canvas id="gantt" tabindex="0" role="img" aria-label="Gantt chart: which core ran what"></canvas>
<div id="tip" role="status"></div>
<canvas id="use" role="img" aria-label="Cores in use over time"></canvas>
"""


def _waits(runs: Executions) -> str:
    counts = [0] * (len(WAITS) + 1)
    for queued, started in zip(runs.queued, runs.started, strict=True):
        counts[sum(started - queued > bound for bound in WAITS)] += 1
    words = [f"up to {formatting.seconds(bound)}" for bound in WAITS] + ["longer"]
    return _meters([
        (word, f"{count:,}", count / len(runs)) for word, count in zip(words, counts, strict=True) if count
    ])  # fmt: skip


def _failures(runs: Executions) -> str:
    found: Counter[tuple[int, int, int]] = Counter()
    for status, reason, name, node in zip(runs.status, runs.reason, runs.name, runs.node, strict=True):
        if runs.statuses.words[status] != "finished":
            found[reason, name, node] += 1
    rows = [
        [f"{count:,}", (REASONS.get(word := runs.reasons.words[reason]) or word), runs.names.words[name],
         runs.nodes.words[node]]
        for (reason, name, node), count in found.most_common(LISTED)
    ]  # fmt: skip
    more = f"<p>and {len(found) - LISTED:,} more kinds</p>" if len(found) > LISTED else ""
    return _table(("EXECUTIONS", "REASON", "NAME", "NODE"), rows, (0,)) + more


def _asked(usages: Sequence[Usage]) -> str:
    rows = [
        [one.name or f"({one.program})", f"{one.executions:,}",
         f"{one.busy:.1f} of {one.cores}" if one.busy else str(one.cores),
         f"{size_text(one.peak)} of {size_text(one.memory)}" if one.memory else size_text(one.peak),
         f"{formatting.seconds(one.longest)} of {formatting.seconds(one.limit)}" if one.limit
         else formatting.seconds(one.longest)]
        for one in usages[:LISTED]
    ]  # fmt: skip
    more = f"<p>and {len(usages) - LISTED:,} more names</p>" if len(usages) > LISTED else ""
    return _table(("NAME", "RUNS", "CORES", "MEMORY", "TIME"), rows, (1,)) + more


def _data(runs: Executions) -> tuple[dict[str, Any], str]:
    """What the script of the page draws, and a sentence on what it lacks."""
    held = runs.held()
    time = Timeline(runs, COLUMNS if len(runs) > FEW else COLUMNS // 4, ROWS)
    use = Timeline(runs, USE_COLUMNS, 1)
    nodes: list[tuple[str, int, list[int]]] = []
    for row, (node, core) in enumerate(held):
        if not nodes or nodes[-1][0] != node:
            nodes.append((node, row, []))
        nodes[-1][2].append(core)
    seconds = max(time.end - time.begin, 1e-6)
    bars = pack_bars(runs, held, time.begin, seconds)
    data = {
        "seconds": seconds, "cores": len(held), "nodes": nodes,
        "rows": time.rows, "columns": time.columns, "busy": _levels(time.busy), "failed": _levels(time.failed),
        "use": [round(share, 3) for share in use.busy],
        "words": runs.statuses.words, "bars": bars.columns,
    }  # fmt: skip
    return data, bars.lost


def _levels(shares: array[float]) -> str:
    return pack(bytes(min(round(share * 255), 255) for share in shares))
