"""Formats tasks, nodes and numbers: tables for people, JSON for programs.

Names, commands and messages come from users and their programs: in a table they are shown without control
characters and terminal escapes, so that nobody's task name can move a cursor, hide a line or write a clipboard.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import msgspec

from pilotq.broker.client.core_hours import PARTS, CoreHours
from pilotq.broker.client.views import Counts, Explanation, GpuView, NodeView, TaskView
from pilotq.broker.os_strings import printable
from pilotq.broker.tasks.array_outcomes import ids_text
from pilotq.broker.tasks.states import ENDED, REASONS

# ESC or its 8-bit form, then: a string up to its terminator (OSC, DCS, ...), a CSI sequence, or one more character.
ESCAPE = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|\Z)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)
COLOURS = {"finished": "green", "failed": "red", "canceled": "yellow", "stopped": "yellow", "started": "cyan"}
TASK_COLUMNS = ("ID", "NAME", "STATUS", "REASON", "EXIT", "CORES", "RAN", "COMMAND")
DETAILS = (
    "queue", "command", "message", "signal", "max_rss", "cpu", "retries", "array", "index", "array_size", "array_limit",
    "elements", "ended", "children", "open_children", "child_of",
)  # fmt: skip
STDERR_LINES = 10  # last lines of stderr in an explanation
NODE_COLUMNS = ("NAME", "STATE", "HOST", "CORES", "USED", "RUNNING", "HEARTBEAT")


def clean(text: str) -> str:
    """One line without terminal escapes; what cannot be printed, line breaks too, becomes a space."""
    return "".join(c if c.isprintable() else " " for c in ESCAPE.sub("", printable(text)))


def lines(text: str) -> list[str]:
    """The lines of a program's output, each cleaned."""
    return [clean(line).rstrip() for line in text.replace("\t", "    ").splitlines()]


def width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, limit: int) -> str:
    """The text, cut to ``limit`` columns with an ellipsis."""
    if width(text) <= limit:
        return text
    while text and width(text) > limit - 1:
        text = text[:-1]
    return text + "…"


def coloured(stream: Any) -> bool:
    """Whether to write colours: only to a terminal, and never with NO_COLOR set (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and bool(stream.isatty())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned with two spaces between; on a terminal the last one is cut to its width.

    Numbers (a column in which every cell is one) stand to the right. Cells are cleaned here, and a cell that is a
    status is coloured, where stdout takes colours.
    """
    cells = [list(columns), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    right = [
        bool(values) and all(re.fullmatch(r"-?[\d.,]*", v) for v in values) for _, *values in zip(*cells, strict=True)
    ]
    colours = coloured(sys.stdout)
    if sys.stdout.isatty():
        import shutil

        room = shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * len(widths[:-1])
        widths[-1] = min(widths[-1], max(room, 10))
    out = []
    for row in cells:
        row[-1] = shorten(row[-1], widths[-1])
        parts = []
        for cell, columns_wide, to_right in zip(row, widths, right, strict=True):
            space = " " * (columns_wide - width(cell))
            if colours and cell in COLOURS:
                cell = click.style(cell, fg=COLOURS[cell])
            parts.append(space + cell if to_right else cell + space)
        out.append("  ".join(parts).rstrip())
    return "\n".join(out)


def seconds(value: float | None) -> str:
    """A duration for people: ``0.12s``, ``42s``, ``3m07s``, ``2h05m``, ``3d04h``."""
    if value is None:
        return ""
    if value < 9.995:
        return f"{value:.2f}s"
    whole = round(value)
    for size, unit, part, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{small}"
    return f"{whole}s"


def moment(value: float | None) -> str:
    return "" if value is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))


def ran(task: TaskView) -> float | None:
    """Seconds that the last execution has run (so far); None when it never started."""
    started = task.times.get("started")
    if started is None:
        return None
    ended = task.times.get("joining") or task.times.get("ended") or time.time()
    return max(ended - started, 0.0)


def task_row(task: TaskView) -> list[str]:
    exit_text = f"sig {task.signal}" if task.signal else "" if task.exit_code is None else str(task.exit_code)
    name = task.name + (f" [{task.array_size}]" if task.array_size else "")
    command = shorten(task.command, 60)
    return [task.id, name, task.status, task.reason, exit_text, task.cores, seconds(ran(task)), command]


def tasks_table(tasks: Iterable[TaskView]) -> str:
    return table(TASK_COLUMNS, (task_row(task) for task in tasks))


def task_json(task: TaskView) -> dict[str, Any]:
    """The record that every ``--json`` listing is made of."""
    return {
        "id": task.id,
        "name": task.name,
        "status": task.status,
        "reason": task.reason,
        "exit_code": task.exit_code,
        "execution": task.execution,
        "node": task.node,
        "cores": task.cores,
        "times": task.times,
    }


def details_json(task: TaskView) -> dict[str, Any]:
    """The record of one task that was asked for: that of a listing, and all else that is known."""
    return {**task_json(task), **{name: getattr(task, name) for name in DETAILS}}


def _place(task: TaskView) -> str:
    """The array or bundle that it is part of."""
    return f"{task.array}, index {task.index}" if task.index is not None else task.array


def elements_text(task: TaskView, ranges: str) -> str:
    """Which elements of an array these ranges hold, or which tasks of a bundle, by their ids."""
    return ids_text(task.id, ranges) if task.is_bundle else ranges


def tasks_of(task_id: str, bundles: Mapping[str, int]) -> str:
    """An id, or where it is of one of these bundles those of its tasks: ``1f_0 to 1f_1999``."""
    return ids_text(task_id, f"0-{bundles[task_id] - 1}") if task_id in bundles else task_id


def _children(task: TaskView) -> str:
    """What was submitted within a task that joins."""
    if task.reason == "joining" and not task.children:  # the pilot has ended, and its journal does not know how many
        return "have not all ended"
    if task.reason == "joining":
        return f"waits for {task.open_children:,} of its {task.children:,} children"
    return f"{task.children:,}, {_open(task.open_children)}" if task.children else ""


def _open(number: int) -> str:
    return f"{number:,} of them have not ended" if number else "all of them have ended"


def details_text(task: TaskView) -> str:
    """All that is known of one task, a line for each fact."""
    says = "its process has ended" if task.reason == "joining" else REASONS.get(task.reason)
    reason = f"{task.reason}: {says}" if says else task.reason
    times = task.times
    facts = [
        ("id", task.id),
        ("name", task.name),
        ("status", task.status),
        ("reason", reason),
        ("message", task.message),
        ("exit code", "" if task.exit_code is None else str(task.exit_code)),
        ("signal", str(task.signal or "")),
        ("command", task.command),
        ("queue", task.queue),
        ("children", _children(task)),
        ("child of", task.child_of),
        ("array" if task.index is not None else "bundle", _place(task)),
        ("tasks" if task.is_bundle else "elements", f"{task.array_size:,}" if task.array_size else ""),
        ("at a time", f"at most {task.array_limit:,}" if task.array_limit else ""),
        *((f"  {status}", elements_text(task, ranges)) for status, ranges in task.elements.items()),
        ("execution", str(task.execution or "")),
        ("retries left", str(task.retries or "")),
        ("cores", task.cores),
        *((word, moment(times.get(word))) for word in ("queued", "handed", "started", "joining", "ended")),
        ("ran", seconds(ran(task))),
        ("CPU time", seconds(task.cpu)),
        ("memory", f"{task.max_rss / 2**20:,.1f} MiB at most" if task.max_rss else ""),
    ]
    out = [f"{name:<14}{clean(text)}" for name, text in facts if text]
    for stream, text in (("stdout", task.stdout_tail), ("stderr", task.stderr_tail)):
        if text.strip():
            out += [f"{stream}, the end:", *(f"  {line}" for line in lines(text))]
    return "\n".join(out)


def explanation_text(found: Explanation) -> str:
    """An explanation for people: a sentence a line, the end of stderr, commands that show more."""
    name = f" ({clean(found.name)})" if found.name else ""
    verb = found.status if found.status in ENDED - {"canceled", "stopped"} else f"is {found.status}"
    out = [
        f"task {clean(found.id)}{name} {verb}",
        *(f"  {clean(sentence)}" for sentence in found.why),
    ]
    if tail := [line for line in lines(found.output) if line][-STDERR_LINES:]:
        out += ["  the end of what it wrote to stderr:", *(f"    {line}" for line in tail)]
    if found.commands:
        out.append(f"  more: {', '.join(found.commands)}")
    return "\n".join(out)


def nodes_table(nodes: Iterable[NodeView]) -> str:
    now = time.time()
    return table(NODE_COLUMNS, [
        [n.name, n.state, n.host, str(n.cores) + ("*" if n.shared_cores else ""), str(n.used), str(n.running),
         "" if n.last_beat is None else f"{seconds(max(now - n.last_beat, 0.0))} ago"]
        for n in nodes
    ])  # fmt: skip


def gpus_text(gpus: Sequence[GpuView]) -> str:
    """``8 GPUs: 0-3 NVIDIA A100-SXM4-40GB, 40 GiB; 4-7 ...``: numbers, model and memory, as far as they are known."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for gpu in gpus:
        kinds.setdefault((gpu.model, gpu.memory), []).append(gpu.name)
    texts = []
    for (model, memory), names in kinds.items():
        facts = ", ".join(text for text in (model, f"{memory / (1 << 30):.3g} GiB" if memory else "") if text)
        texts.append(f"{number_ranges(names)} {facts}".rstrip())
    return f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}: {'; '.join(texts)}"


def number_ranges(names: Sequence[str]) -> str:
    """``0-3,6`` of the numbers 0, 1, 2, 3 and 6; names that are no numbers stand one by one."""
    found: list[list[str]] = []
    for name in names:
        last = found[-1][-1] if found else ""
        if last.isdecimal() and name.isdecimal() and int(name) == int(last) + 1:
            found[-1] = [found[-1][0], name]
        else:
            found.append([name])
    return ",".join("-".join(span) for span in found)


def counts_text(counts: Counts) -> str:
    """``7 of 10 tasks ended: 6 finished, 1 failed`` or, when none is left, ``10 tasks: 9 finished, 1 failed``."""
    words = [
        f"{number:,} {word}"
        for word, number in (("finished", counts.finished), ("failed", counts.failed), ("canceled", counts.canceled))
        if number
    ]
    noun = "task" if counts.total == 1 else "tasks"
    head = f"{counts.ended:,} of {counts.total:,} {noun} ended" if counts.left else f"{counts.total:,} {noun}"
    return head + (": " + ", ".join(words) if words else "")


def counts_json(counts: Counts) -> dict[str, int]:
    return {word: getattr(counts, word) for word in ("total", "finished", "failed", "canceled", "left")}


def to_json(value: Any) -> str:
    """Indented JSON."""
    try:
        return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # a path with bytes that are not UTF-8: as broker/os_strings.py has it
        return json.dumps(msgspec.to_builtins(value, str_keys=True), indent=2)


def print_ids(rows: Sequence[tuple[str, str, int]], as_json: bool) -> None:
    """Print the ids of submitted tasks, one a line; ``rows`` are id, name, and how many tasks it stands for."""
    if as_json:
        click.echo(to_json([{"id": i, "name": printable(name), "tasks": size} for i, name, size in rows]))
    elif rows:
        click.echo("\n".join(i for i, _, _ in rows))


def core_hours_json(found: CoreHours) -> dict[str, float | str]:
    """Core-hours by what they were spent on, and the sentence about it."""
    hours = {part: round(getattr(found, part) / 3.6e9, 9) for part in ("whole", *PARTS)}
    return {**hours, "advice": found.advice}


def core_time(micro: int) -> str:
    """Core-microseconds as core-hours: ``1.25``; what is below 0.01 as ``6.6 core-seconds``."""
    return f"{micro / 1e6:,.3g} core-seconds" if 0 < micro < 0.01 * 3.6e9 else f"{micro / 3.6e9:,.4g}"


def core_hours_table(found: CoreHours) -> str:
    """A row for each thing that core-hours were spent on."""
    rows = [[what, core_time(getattr(found, part)), f"{100 * found.share(part):.1f} %"] for part, what in PARTS.items()]
    return table(("CORE-HOURS WENT INTO", "CORE-HOURS", "SHARE"), rows)
