"""The summary that `pilotq run` prints: how many tasks ended how, the use of the cores, what failed and why."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

from pilotq.broker.client.core_hours import CoreHours, core_hours
from pilotq.broker.client.executions import Executions
from pilotq.broker.client.views import Counts
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.tasks.states import REASONS
from pilotq.cli import formatting

NAMED_MAX = 20  # failed tasks that are named
STDERR_LINES = 5  # last lines of what each of them wrote to stderr


class Summary(msgspec.Struct, kw_only=True):
    """``seconds`` is from the submission to the last end, ``core_seconds`` what executions held meanwhile.

    ``omitted`` are tasks of the file that could never run and were not submitted, with a sentence why; ``refused``
    has a sentence for each request to submit that was refused as a whole.
    """

    counts: Counts
    seconds: float
    cores: int
    core_seconds: float = 0.0
    core_hours: CoreHours = msgspec.field(default_factory=CoreHours)
    failed: list[JournalEntry] = []  # the first NAMED_MAX
    commands: dict[str, str] = {}  # what each of these runs, by its id or its array's, where that is known
    earlier: int = 0  # tasks that had failed before the run that is summed up, which resumes theirs
    omitted: dict[str, str] = {}
    refused: list[str] = []
    directory: str

    @property
    def efficiency(self) -> float | None:
        """The share of ``cores`` x ``seconds`` that executions held; None when there was nothing to hold."""
        possible = self.cores * self.seconds
        return self.core_seconds / possible if possible > 0 else None


def summarise(
    lines: Iterable[JournalEntry], *, counts: Counts, cores: int, begin: float, end: float, directory: str
) -> Summary:
    """Sum up the journal's lines of executions that ended since ``begin`` (unix seconds, as ``end``)."""
    summary = Summary(counts=counts, seconds=max(end - begin, 0.0), cores=cores, directory=directory)
    before = set()
    runs = Executions()
    for line in lines:
        if line.ended is None or line.ended < begin:  # of a run that this one resumes
            if line.final and line.status in ("failed", "stopped") and not line.elements:
                before.add(line.id)
            continue
        before.discard(line.id)
        runs.add(line)
        failed = line.final and line.status in ("failed", "stopped") and not line.elements  # an array is its elements
        if failed and len(summary.failed) < NAMED_MAX:
            summary.failed.append(line)
    summary.earlier = len(before)
    spans = zip(runs.cores, runs.started, runs.ended, strict=True)
    summary.core_seconds = sum(cores * (ended - started) for cores, started, ended in spans)
    summary.core_hours = core_hours(runs, cores=cores, begin=begin, end=max(begin, end))
    return summary


def as_json(summary: Summary, exit_code: int) -> dict[str, Any]:
    return {
        "exit_code": exit_code,
        "tasks": {**formatting.counts_json(summary.counts), "omitted": len(summary.omitted)},
        "seconds": round(summary.seconds, 3),
        "cores": summary.cores,
        "efficiency": None if summary.efficiency is None else round(summary.efficiency, 4),
        "core_hours": formatting.core_hours_json(summary.core_hours),
        "failed": [
            {"id": line.id, "name": line.name, "status": line.status, "reason": line.reason,
             "command": _command(summary, line), "exit_code": line.exit_code, "execution": line.execution,
             "node": line.node, "cores": line.cpus,
             "times": {"queued": line.queued, "handed": line.handed, "started": line.started, "ended": line.ended}}
            for line in summary.failed
        ],
        "omitted": summary.omitted,
        "refused": summary.refused,
        "directory": summary.directory,
    }  # fmt: skip


def as_text(summary: Summary, tails: dict[str, str]) -> str:
    """For people; ``tails`` holds the end of stderr by id of the failed task."""
    share = summary.efficiency
    used = "" if share is None else f", in use {100 * share:.0f} % of the time"
    noun = "core" if summary.cores == 1 else "cores"
    out = [
        formatting.counts_text(summary.counts) + (f"; {len(summary.omitted):,} omitted" if summary.omitted else ""),
        f"took {formatting.seconds(summary.seconds)} on {summary.cores} {noun}{used}",
    ]
    if advice := summary.core_hours.advice:
        out.append(advice)
    for line in summary.failed:
        out.append("")
        out.append(f"{failure(line)}")
        if command := _command(summary, line):
            out.append(f"  command: {formatting.clean(command)}")
        out += [f"    {text}" for text in formatting.lines(tails.get(line.id, ""))[-STDERR_LINES:]]
    more = summary.counts.failed - len(summary.failed) - summary.earlier
    if more > 0:
        out += ["", f"and {more:,} more failed"]
    if summary.earlier:
        out += ["", f"{summary.earlier:,} had failed before and did not run again"]
    for name, why in islice(summary.omitted.items(), NAMED_MAX):
        out += ["", f"{formatting.clean(name)} omitted: {formatting.clean(why)}"]
    if summary.counts.failed or summary.earlier:
        resume = f"pilotq start --resume {shlex.quote(summary.directory)}"
        out += ["", f"to run what failed again: `{resume}`, then `pilotq retry --all`"]
    return "\n".join([*out, "", f"the pilot's directory: {summary.directory}"])


def _command(summary: Summary, line: JournalEntry) -> str:
    return summary.commands.get(line.submitted_as, "")


def short(summary: Summary) -> str:
    """One line: ``1 task: 1 finished; took 0.52s on 2 cores; the pilot's directory: ...``."""
    cores = f"{summary.cores} " + ("core" if summary.cores == 1 else "cores")
    took = f"took {formatting.seconds(summary.seconds)} on {cores}"
    return f"{formatting.counts_text(summary.counts)}; {took}; the pilot's directory: {summary.directory}"


def failure(line: JournalEntry) -> str:
    """``task 1f (name) failed: ended with a non-zero exit code (3)``."""
    name = f" ({formatting.clean(line.name)})" if line.name else ""
    why = REASONS.get(line.reason) or line.reason
    if line.reason == "exit":
        why += f" ({line.exit_code})"
    elif line.message:
        why = formatting.clean(line.message).rstrip(".")  # says the same, with the name of the file or signal
    return f"task {formatting.clean(line.id)}{name} {line.status}: {why}"
