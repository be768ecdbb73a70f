"""Says in words what a pilot has done, for `pilotq report` and its page."""

from __future__ import annotations

from pilotq.broker.client.statistics import Spread, Statistics
from pilotq.cli import formatting


def facts_of(found: Statistics) -> list[tuple[str, str]]:
    """Names and values of what is known."""
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
    return [(name, text) for name, text in facts if text]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    words = (("half of them up to", spread.median), ("90 %", spread.p90), ("the longest", spread.longest))
    return ", ".join(f"{word} {formatting.seconds(value)}" for word, value in words)
