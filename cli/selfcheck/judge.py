"""Judges whether the tasks observed what is promised. Pure: ledgers, journal lines and nodes are arguments."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import msgspec

from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.resources import NodeShare, parse_allocation
from pilotq.cli.selfcheck.ledger import Ledger, Start
from pilotq.cli.selfcheck.plan import Expected
from pilotq.cli.selfcheck.probe import output

# Clocks of hosts differ a little; and a launcher may be delayed between a start and reading the clock.
SLACK_S = 1.0
# The last three are for MPI launchers that a task calls.
OWN_PREFIXES = (
    "PILOTQ_", "QCG_PM_", "OMP_NUM_THREADS", "CUDA_", "ROCR_", "ZE_", "OMPI_MCA_", "HYDRA_", "I_MPI_HYDRA_"
)  # fmt: skip
SHELL_VARIABLES = {"_", "OLDPWD", "PWD", "SHLVL"}  # what a shell sets in the environment of what it runs
# The C library ignores its own two signals in what it spawns, and Python two more; pilotq is not the cause of either.
LIBRARY_SIGNALS = {32, 33}
PYTHON_SIGNALS = {signal.SIGPIPE.value, signal.SIGXFSZ.value}


class Node(NamedTuple):
    """``cores``: how many. ``real`` maps them to CPUs; None where only the tasks can tell. ``shared``: some have a
    CPU in common."""

    cores: int
    real: Mapping[int, int] | None = None
    shared: bool = False


class Outcome(msgspec.Struct, kw_only=True):
    """All that is known of one task: what was asked, what it saw, what the journal says, what its output holds.

    ``lines`` are in the order of the journal. ``output`` is that of the last execution.
    """

    expected: Expected
    ledger: Ledger
    lines: list[JournalEntry]
    output: dict[str, bytes]


class Run(NamedTuple):
    """``begin`` and ``end`` are unix seconds; ``unexpected`` are ledgers and lines of other tasks, and ``left``
    numbers of processes that outlived their tasks."""

    outcomes: list[Outcome]
    nodes: Mapping[str, Node]
    begin: float
    end: float
    unexpected: list[str]
    left: list[int]


class Verdict(NamedTuple):
    """``judged`` counts what was looked at, ``wrong`` says what is not as promised, one sentence each."""

    check: str
    promise: str
    judged: int
    wrong: list[str]


def judge(run: Run) -> list[Verdict]:
    """One verdict for each check, in the order of a task's life."""
    found = [
        Verdict(
            name, promise, len(run.outcomes), [f"{o.expected.name}: {text}" for o in run.outcomes for text in check(o)]
        )
        for name, (promise, check) in BY_TASK.items()
    ]
    for name, (promise, look) in BY_EXECUTION.items():
        pairs = [(o, start) for o in run.outcomes for start in o.ledger.starts]
        wrong = [f"{o.expected.name}: {text}" for o, start in pairs for text in look(o.expected, start)]
        found.append(Verdict(name, promise, len(pairs), wrong))
    found[0].wrong.extend(f"{name}: it was not submitted" for name in run.unexpected)
    found += [_masks(run), _overlaps(run), _times(run)]
    left = [f"process {pid} is still alive" for pid in run.left]
    found.append(Verdict("processes", "none outlives its task", len(run.outcomes), left))
    return found


# -- what concerns a task as a whole ----------------------------------------------------------------------------------


def _once(o: Outcome) -> Iterator[str]:
    """Numbers of executions may be missing: one that was handed to a node and taken back did not begin."""
    begun = [start.execution for start in o.ledger.starts]
    if len(begun) != o.expected.executions or begun != sorted(set(begun)):
        yield f"executions {begun} began, there should be {o.expected.executions}"
    ended = [(end.execution, end.pid) for end in o.ledger.ends]
    if ended != ([(start.execution, start.pid) for start in o.ledger.starts] if o.expected.ends else []):
        yield f"executions {begun} began, and {[number for number, _ in ended]} came to their end"


def _journal(o: Outcome) -> Iterator[str]:
    expected = o.expected
    begun = [start.execution for start in o.ledger.starts]
    if [line.execution for line in o.lines] != begun:
        yield f"the journal has executions {[line.execution for line in o.lines]}, the ledger {begun}"
        return
    for number, (line, start) in enumerate(zip(o.lines, o.ledger.starts, strict=True), 1):
        final = number == len(o.lines)
        code = expected.exit_codes[min(number, expected.executions) - 1]
        wanted = (expected.status, expected.reason, code, expected.signal) if final else ("failed", "exit", code, None)
        said = (line.status, line.reason, line.exit_code, line.signal)
        if (line.final, *said) != (final, *wanted):
            more = "" if line.final else ", and that it is tried again"
            yield f"execution {line.execution}: the journal says {said}{more}; not {wanted}"
        parts = parse_allocation(line.cpus)
        said_of = (line.node, list(parts[0].cores), [part.node for part in parts], sum(len(p.cores) for p in parts))
        seen = (_node(start), _cores(start), _nodes(start), int(start.env.get("PILOTQ_CORES", 0)))
        if said_of != seen:
            yield f"execution {line.execution}: it has (node, cores there, nodes, all cores) {seen}, not {said_of}"


def _output(o: Outcome) -> Iterator[str]:
    expected = o.expected
    last = o.ledger.starts[-1].execution if o.ledger.starts else 0
    text = {stream: output(expected.name, last, stream, expected.size) for stream in ("stdout", "stderr")}
    if expected.stdout and expected.stdout == expected.stderr:
        text = dict.fromkeys(text, text["stdout"] + text["stderr"])
    for stream, wanted in text.items():
        if o.output[stream] != wanted:
            yield f"{stream} holds {_shown(o.output[stream])}, not {_shown(wanted)}"


# -- what one execution saw -------------------------------------------------------------------------------------------


def _resources(expected: Expected, start: Start) -> Iterator[str]:
    here = len(_cores(start))
    if expected.cores is not None and not expected.cores[0] <= here <= expected.cores[1]:
        yield f"it has {here} cores, it asked for {expected.cores}"
    if len(set(_nodes(start))) != expected.nodes or start.env.get("PILOTQ_NODES") != str(expected.nodes):
        yield f"it has the nodes {_nodes(start)}, it asked for {expected.nodes}"
    threads = expected.env.get("OMP_NUM_THREADS", str(here))
    if start.env.get("OMP_NUM_THREADS") != threads:
        yield f"OMP_NUM_THREADS is {start.env.get('OMP_NUM_THREADS')}, not {threads}"


def _directory(expected: Expected, start: Start) -> Iterator[str]:
    if start.cwd != expected.cwd:
        yield f"its directory is {start.cwd}, not {expected.cwd}"


def _umask(expected: Expected, start: Start) -> Iterator[str]:
    if start.umask != expected.umask:
        yield f"its umask is {start.umask:04o}, not {expected.umask:04o}"


def _limits(expected: Expected, start: Start) -> Iterator[str]:
    for number, wanted in expected.limits.items():
        soft, hard = start.limits[number]
        # A negative number stands for no limit; what is above the hard limit cannot be had.
        wanted = hard if wanted < 0 else wanted if hard < 0 else min(wanted, hard)
        if soft != wanted:
            yield f"soft limit {number} is {soft}, not {wanted}"


def _signals(_: Expected, start: Start) -> Iterator[str]:
    blocked, ignored = map(_numbers, start.signals)
    ignored -= LIBRARY_SIGNALS if start.by_shell else LIBRARY_SIGNALS | PYTHON_SIGNALS
    if blocked or ignored:
        yield f"signals {sorted(blocked)} are blocked and {sorted(ignored)} ignored"
    if not start.leads:
        yield "it does not lead a session and a process group of its own"


def _descriptors(expected: Expected, start: Start) -> Iterator[str]:
    more = {number: where for number, where in start.descriptors.items() if number > 2 and not _is_probe(where)}
    if more:
        yield f"it has inherited {more}"
    if not start.descriptors.keys() >= {0, 1, 2}:
        yield f"of 0, 1 and 2 only {sorted(start.descriptors.keys() & {0, 1, 2})} are open"
    wanted = {0: f"{expected.name}.in" if expected.stdin else "null"}
    wanted.update({n: path.rpartition("/")[2] for n, path in ((1, expected.stdout), (2, expected.stderr)) if path})
    for number, name in wanted.items():
        # Reruns write to a name of their own, which is published later.
        end = f".{start.execution}" if number and start.execution > 1 else ""
        if start.descriptors.get(number, "").rpartition("/")[2] != name + end:
            yield f"descriptor {number} leads to {start.descriptors.get(number)}, not to {name + end}"
    if start.stdin != expected.stdin:
        yield f"it read {start.stdin!r}, not {expected.stdin!r}"


def _environment(expected: Expected, start: Start) -> Iterator[str]:
    ids = {"PILOTQ_TASK_ID": expected.id, "PILOTQ_EXECUTION": str(start.execution)}
    if expected.index is not None:
        ids.update(PILOTQ_ARRAY_ID=expected.id.rpartition("_")[0], PILOTQ_INDEX=str(expected.index))
    wanted = {**expected.env, **ids}
    for name in wanted.keys() | start.env.keys():
        known = name.startswith(OWN_PREFIXES) or (expected.shell and name in SHELL_VARIABLES)
        if name in wanted and start.env.get(name) != wanted[name] and name not in SHELL_VARIABLES:
            yield f"{name} is {start.env.get(name)!r}, not {wanted[name]!r}"
        elif name not in wanted and not known:
            yield f"{name} is set, to {start.env[name]!r}"


# -- what concerns all of them ----------------------------------------------------------------------------------------


def _masks(run: Run) -> Verdict:
    """The CPUs of a core are known, or learned from tasks of one core."""
    wrong = []
    starts = [(o.expected.name, start) for o in run.outcomes for start in o.ledger.starts]
    real = {(name, core): cpu for name, node in run.nodes.items() for core, cpu in (node.real or {}).items()}
    for _, start in starts:
        if len(_cores(start)) == len(start.mask) == 1:
            real.setdefault((_node(start), _cores(start)[0]), start.mask[0])
    for name, start in starts:
        wanted = sorted({real.get((_node(start), core), -1) for core in _cores(start)})
        if start.mask != wanted:
            wrong.append(f"{name}: it may use CPUs {start.mask}, cores {_cores(start)} of {_node(start)} are {wanted}")
    for name, node in run.nodes.items():
        cpus = [cpu for (where, _), cpu in real.items() if where == name]
        if not node.shared and len(cpus) != len(set(cpus)):
            wrong.append(f"node {name}: several cores have the same CPU, of {sorted(cpus)}")
    return Verdict("mask", "a task may use the CPUs of its cores, and no others", len(starts), wrong)


def _overlaps(run: Run) -> Verdict:
    """No core has two tasks at any time; and a task with an entire node has all of its cores."""
    wrong = []
    uses: dict[tuple[str, str, int], list[tuple[float, float, str]]] = {}
    for o in run.outcomes:
        ends = {(end.execution, end.pid): end.ended for end in o.ledger.ends}
        for start in o.ledger.starts:
            # A killed execution has at least begun.
            span = (
                start.begun,
                ends.get((start.execution, start.pid), start.begun),
                f"{o.expected.name}.{start.execution}",
            )
            for part in _parts(o, start):
                if o.expected.cores is None and len(part.cores) != run.nodes[part.node].cores:
                    wrong.append(f"{span[2]}: it asked for entire nodes and has only cores {part.cores} of {part.node}")
                for core in part.cores:
                    # Times by clocks of different hosts cannot be compared.
                    uses.setdefault((start.clock, part.node, core), []).append(span)
    for (_, node, core), spans in uses.items():
        spans.sort()
        latest = spans[0]
        for span in spans[1:]:
            if span[0] < latest[1]:
                wrong.append(f"{latest[2]} and {span[2]} had core {core} of {node} at the same time")
            latest = max(latest, span, key=lambda s: s[1])
    return Verdict("overlap", "no core has two tasks at one time", sum(map(len, uses.values())), wrong)


def _times(run: Run) -> Verdict:
    wrong = []
    lines = 0
    for o in run.outcomes:
        for line in o.lines:
            lines += 1
            marks = [run.begin, line.queued, line.handed, line.started]
            marks += [start.at for start in o.ledger.starts if start.execution == line.execution]
            marks += [end.at for end in o.ledger.ends if end.execution == line.execution]
            marks += [line.ended, run.end]
            known = [mark for mark in marks if mark is not None]
            if len(known) != len(marks) or any(b < a - SLACK_S for a, b in pairwise(known)):
                times = " ".join("none" if mark is None else f"{mark - run.begin:.3f}" for mark in marks)
                wrong.append(
                    f"{o.expected.name}: begin of all, queued, handed, started, what the task saw, ended, end of all "
                    f"do not ascend: {times}"
                )
    return Verdict("times", "the journal's times enclose what the task saw", lines, wrong)


def _parts(o: Outcome, start: Start) -> Iterable[NodeShare]:
    """What the execution held as it saw it; the parts on other nodes than its first are only in the journal."""
    lines = (parse_allocation(line.cpus)[1:] for line in o.lines if line.execution == start.execution and line.cpus)
    return (NodeShare(_node(start), tuple(_cores(start))), *next(lines, ()))


def _nodes(start: Start) -> list[str]:
    return start.env.get("PILOTQ_NODELIST", "").split(",")


def _node(start: Start) -> str:
    return _nodes(start)[0]


def _cores(start: Start) -> list[int]:
    return [int(core) for core in start.env.get("PILOTQ_CPUS", "").split(",") if core]


def _numbers(bits: int) -> set[int]:
    return {number + 1 for number in range(64) if bits >> number & 1}


def _is_probe(where: str) -> bool:
    return where.endswith("/probe.py")  # some versions of Python keep open what they run


def _shown(data: bytes) -> str:
    return f"{data!r}" if len(data) <= 60 else f"{len(data):,} bytes, {data[:40]!r}..."


BY_TASK: dict[str, tuple[str, Callable[[Outcome], Iterator[str]]]] = {
    "once": ("what was submitted ran, exactly as often as it should", _once),
    "journal": ("it says what the task saw", _journal),
    "output": ("every byte arrives, and no other", _output),
}
BY_EXECUTION: dict[str, tuple[str, Callable[[Expected, Start], Iterator[str]]]] = {
    "resources": ("as many nodes and cores as asked for", _resources),
    "cwd": ("the directory asked for", _directory),
    "umask": ("the submitter's", _umask),
    "limits": ("the submitter's soft limits", _limits),
    "signals": ("all at their defaults, none blocked, an own session", _signals),
    "descriptors": ("0, 1 and 2 lead where they should, nothing else is open", _descriptors),
    "environment": ("the submitter's, the task's, pilotq's, and nothing else", _environment),
}
