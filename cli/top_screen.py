"""The screens of `pilotq top`: an overview becomes lines of styled pieces, without a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from pilotq.broker.client.overview import ExecutionView, NodeOverview, Overview, Progress
from pilotq.broker.store.resources import parse_allocation
from pilotq.cli import formatting

VIEWS = ("nodes", "running", "progress", "queue", "failures")
KEYS = "1-5 Tab view  arrows select  Enter task  c cancel  q quit"
TASK_KEYS = "arrows scroll  c cancel  Esc back  q quit"
NODE_WIDTH, LABEL_WIDTH = 16, 44  # columns of a node's name, and of all that stands before its cores
MARKS = {"lost": "L", "drained": "D", "retired": "R", "quarantined": "Q"}
STYLES = {"lost": "bold red", "quarantined": "red", "drained": "yellow", "retired": "yellow"}
BEHIND_MAX = 1 << 16  # bytes of the journal that are not read yet of which nothing is said: it grows all the time
REASONS_MAX = 4  # closed nodes whose reason stands below a map of whole nodes

Line = list[tuple[str, str]]  # pieces of one line: text, style of rich


class Row(NamedTuple):
    """A line that can be selected; ``task`` is the id that Enter and `c` are about, empty where there is none."""

    task: str
    line: Line


class Choice(NamedTuple):
    """What the user has chosen: the view, the selected row, the task whose page is open, its first line shown."""

    view: str = VIEWS[0]
    row: int = 0
    task: str = ""
    scroll: int = 0
    notice: str = ""


def screen(found: Overview, choice: Choice, page: Sequence[str], columns: int, lines: int) -> list[Line]:
    """As many lines as the terminal has, each at most as wide as it; ``page`` is the text of the task that is open."""
    room = max(lines - 4, 1)
    if choice.task:
        body: list[Line] = [[(line, "")] for line in page[choice.scroll : choice.scroll + room]]
    else:
        body = _body(found, choice, columns, room)
    body = body[:room] + [[] for _ in range(room - len(body))]
    keys = TASK_KEYS if choice.task else KEYS
    last: Line = [(choice.notice, "bold")] if choice.notice else [(keys, "dim")]
    return [cut(line, columns) for line in (*_head(found), _tabs(choice), *body, last)][:lines]


def cut(line: Line, columns: int) -> Line:
    """The line without control characters, and no wider than this."""
    out: Line = []
    left = columns
    for text, style in line:
        text = formatting.shorten(formatting.clean(text), left) if left > 0 else ""
        if text:
            out.append((text, style))
        left -= formatting.width(text)
    return out


def rows(found: Overview, view: str, columns: int) -> list[Row]:
    """The lines of a view that can be selected."""
    if view in ("nodes", "running"):
        return [_running_row(one, found.at) for one in _longest(found)]
    if view == "progress":
        return [Row(one.array, _progress_line(one, columns)) for one in found.progress]
    if view == "queue":
        return [
            Row(one.first, [
                (f"{one.waiting:>9,}  {one.queue:<10.10}  p{one.priority:<3}  ", ""),
                (f"{one.shape:<14.14}", "cyan"), (f"  {one.first:<8}  {' '.join(one.why)}", ""),
            ])
            for one in found.queue
        ]  # fmt: skip
    return [
        Row(one.example, [
            (f"{one.number:>9,}  ", ""), (f"{one.reason:<10.10}", "red"),
            (f"  {'' if one.exit_code is None else one.exit_code!s:>4}  {fit(one.name, 16)}  {one.node:<10.10}", ""),
            (f"  {one.example:<8}  {one.message}", ""),
        ])
        for one in found.failures
    ]  # fmt: skip


HEADS = {
    "nodes": "TASK      NAME                  RAN  CORES",
    "running": "TASK      NAME                  RAN  CORES",
    "progress": "NAME                  DONE  PROGRESS",
    "queue": "  WAITING  QUEUE       PRIO  SHAPE           FIRST     WHY IT WAITS",
    "failures": "    TASKS  REASON      EXIT  NAME              NODE        LAST ONE  MESSAGE",
}
EMPTY = {
    "nodes": "no execution that is named runs", "running": "no execution that is named runs",
    "progress": "there are no tasks", "queue": "nothing waits", "failures": "nothing has failed",
}  # fmt: skip


def _head(found: Overview) -> Iterator[Line]:
    counts = found.counts
    failed = "bold red" if counts.failed else ""
    left = f"  {formatting.seconds(found.left_s)} left" if found.left_s is not None else ""
    yield [
        (f"{counts.ended:,} of {counts.total:,} ended", "bold"), (f"  {counts.finished:,} finished", "green"),
        (f"  {counts.failed:,} failed", failed), (f"  {counts.canceled:,} canceled", ""),
        (f"  {found.rate:,.1f}/s{left}", ""),
    ]  # fmt: skip
    notes = "; ".join(found.notes)
    yield [
        (f"{found.running:,} running", "cyan"),
        (f"  {found.prefetched:,} prefetched  {found.waiting:,} waiting  {found.used:,} of {found.cores:,} cores", ""),
        (f"  {notes}" if notes else "", "bold yellow"),
    ]


def _tabs(choice: Choice) -> Line:
    if choice.task:
        return [(f"task {choice.task}", "reverse")]
    return [
        (f"[{number} {name}]" if name == choice.view else f" {number} {name} ",
         "reverse" if name == choice.view else "") for number, name in enumerate(VIEWS, 1)
    ]  # fmt: skip


def _body(found: Overview, choice: Choice, columns: int, room: int) -> list[Line]:
    out: list[Line] = []
    if choice.view == "nodes":
        out = [*node_map(found, columns, max(room // 2, room - len(found.executions) - 2)), []]
    elif found.behind > BEHIND_MAX:
        out = [[("the journal is still being read: names and failures are incomplete", "yellow")]]
    found_rows = rows(found, choice.view, columns - 2)
    if not found_rows:
        return [*out, [(EMPTY[choice.view], "dim")]]
    out.append([("  " + HEADS[choice.view], "bold")])
    more = _more(found, choice.view)
    height = max(room - len(out) - bool(more), 1)
    first = max(min(choice.row - height // 2, len(found_rows) - height), 0)
    for number, row in enumerate(found_rows[first : first + height], first):
        if number == choice.row:
            out.append([("> " + "".join(text for text, _ in row.line), "reverse")])
        else:
            out.append([("  ", ""), *row.line])
    return [*out, [(more, "dim")]] if more else out


def _more(found: Overview, view: str) -> str:
    number, what = {
        "queue": (found.more_classes, "shapes"), "failures": (found.more_failures, "failures"),
        "running": (found.unnamed, "executions without a name here: short ones of arrays and bundles, or too many"),
    }.get(view, (0, ""))  # fmt: skip
    return f"  and {number:,} more {what}" if number else ""


def fit(text: str, columns: int) -> str:
    """The text in exactly so many columns."""
    text = formatting.shorten(formatting.clean(text), columns)
    return text + " " * (columns - formatting.width(text))


# -- nodes ----------------------------------------------------------------------------------------------------------


def node_map(found: Overview, columns: int, room: int) -> list[Line]:
    """A line for each node with a sign for each core, or fewer signs where there is less space; at most ``room``."""
    if not found.nodes:
        return [[("no node has joined", "yellow")]]
    if len(found.nodes) + 1 > room:
        return _map_of_nodes(found, columns, room)
    cells = max(columns - LABEL_WIDTH, 8)
    busy = _named_cores(found)
    each = max(-(-len(node.cores) // cells) for node in found.nodes)
    legend = "# task  + not named  . free"
    if each > 1:
        legend = f"a sign is {each} cores: . free  1-9 tenths in use  # all"
    return [_node_line(node, busy.get(node.name, set()), each) for node in found.nodes] + [[(legend, "dim")]]


def _node_line(node: NodeOverview, named: set[int], each: int) -> Line:
    style = STYLES.get(node.state, "")
    gpus = f"{len(node.gpus)}g" if node.gpus else ""
    out: Line = [
        (fit(node.name, NODE_WIDTH), ""), (f" {node.state:<11}", style),
        (f"{node.used:>5}/{len(node.cores):<5}{gpus:<4} ", ""),
    ]  # fmt: skip
    signs = _density(node, each) if each > 1 else _core_signs(node, named)
    out += _coloured(signs)
    return [*out, (f" {node.why}", style)] if node.why else out


def _core_signs(node: NodeOverview, named: set[int]) -> str:
    others = node.used - len(named)  # which cores they have is not known: the first that are free stand for them
    signs = ""
    for core in node.cores:
        if core in named:
            signs += "#"
        elif others > 0:
            signs, others = signs + "+", others - 1
        else:
            signs += "."
    return signs


def _density(node: NodeOverview, each: int) -> str:
    left, signs = node.used, ""
    for first in range(0, len(node.cores), each):
        size = min(each, len(node.cores) - first)
        signs += _part(min(left, size), size)
        left -= min(left, size)
    return signs


def _part(used: int, of: int) -> str:
    """How much is in use, as one character; only what is all in use is ``#``, only what is free ``.``."""
    if used <= 0 or not of:
        return "."
    return "#" if used >= of else str(min(max(round(10 * used / of), 1), 9))


def _map_of_nodes(found: Overview, columns: int, room: int) -> list[Line]:
    """A sign for each node, or for several that follow one another."""
    closed = [node for node in found.nodes if node.state != "up"]
    said = min(len(closed), REASONS_MAX, max(room - 2, 0))
    cells = max(room - 1 - said, 1) * columns
    each = -(-len(found.nodes) // cells)
    signs = ""
    for first in range(0, len(found.nodes), each):
        part = found.nodes[first : first + each]
        marks = {MARKS.get(node.state, "") for node in part}
        used = _part(sum(node.used for node in part), sum(len(node.cores) for node in part))
        signs += marks.pop() if len(marks) == 1 and "" not in marks else used
    out = [_coloured(signs[first : first + columns]) for first in range(0, len(signs), columns)]
    out += [
        [(fit(node.name, NODE_WIDTH), ""), (f" {node.state} {node.why}", STYLES.get(node.state, ""))]
        for node in closed[:said]
    ]
    what = "a node" if each == 1 else f"{each} nodes"
    legend = f"a sign is {what}: . free  1-9 tenths in use  # all  L D R Q: lost, drained..."
    return [*out, [(legend, "dim")]][-room:]


def _coloured(signs: str) -> Line:
    """The signs with their styles, those that are alike and follow one another as one piece."""
    styles = {"#": "green", ".": "dim"} | dict.fromkeys(MARKS.values(), "red")
    return [(span, styles.get(sign, "cyan")) for sign, group in groupby(signs) if (span := "".join(group))]


def _named_cores(found: Overview) -> dict[str, set[int]]:
    busy: dict[str, set[int]] = {}
    for execution in found.executions:
        for share in parse_allocation(execution.cores) if execution.cores else ():
            busy.setdefault(share.node, set()).update(share.cores)
    return busy


# -- tasks ----------------------------------------------------------------------------------------------------------


def _longest(found: Overview) -> list[ExecutionView]:
    """Those that were launched, the one that runs longest first; then those that are the next on their nodes."""
    return sorted(found.executions, key=lambda one: (one.started is None, one.started or 0.0, one.id))


def _running_row(one: ExecutionView, now: float) -> Row:
    ran = "next" if one.started is None else formatting.seconds(max(now - one.started, 0.0))
    text = f"{one.id:<8}  {fit(one.name, 16)}  {ran:>7}  {one.cores or one.node}"
    return Row(one.id, [(text, "dim" if one.started is None else "")])


def _progress_line(one: Progress, columns: int) -> Line:
    name = "others" if one.name is None else one.name or "(no name)"
    if one.array:
        name = f"{one.array} {one.name}".strip()
    ended = one.finished + one.failed + one.canceled
    share = ended / one.total if one.total else 0.0
    tail = f" {ended:,}/{one.total:,}"
    if one.failed:
        tail += f" {one.failed:,} failed"
    if one.handed:
        tail += f" {one.handed:,} run"
    if one.left_s is not None:
        tail += f" {formatting.seconds(one.left_s)} left"
    size = max(columns - 29 - max(len(tail), 30), 8)
    full, bad = (round(size * part / one.total) if one.total else 0 for part in (one.finished, one.failed))
    gone = min(round(size * one.canceled / one.total) if one.total else 0, max(size - full - bad, 0))
    return [
        (f"{fit(name, 20)}  {int(100 * share):>3}%  ", ""), ("#" * full, "green"), ("!" * bad, "red"),
        ("x" * gone, "yellow"), ("." * max(size - full - bad - gone, 0), "dim"), (tail, ""),
    ]  # fmt: skip
