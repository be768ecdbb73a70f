"""Checks a history of a pilot against what is guaranteed: what was accepted, what tasks wrote, the journal, what lives.

It is pure, and believes only the ledgers: the events of `tests/support/fault_probe.py`, written by the tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pilotq.broker.store.journal import JournalEntry

FINISHED = frozenset({("finished", "")})


class Expected(NamedTuple):
    """What is expected of one accepted task.

    ``most``: how often it may run without any fault; ``endings``: the (status, reason) it may have; ``writes``: it
    keeps a ledger.
    """

    most: int = 1
    endings: frozenset[tuple[str, str]] = FINISHED
    writes: bool = True


class History(NamedTuple):
    """What happened to a pilot.

    ``lines``: of the journal, by task, in their order. ``ledger``: the fields of each line.
    ``faults``: how many were injected; each may cost as many tasks as there are ``cores`` one more execution, times
    ``held`` where those that a core has prefetched are lost together. ``left``: processes of tasks.
    """

    accepted: Mapping[str, Expected]
    lines: Mapping[str, Sequence[JournalEntry]]
    ledger: Iterable[Sequence[str]]
    faults: int
    cores: int
    left: Sequence[int]
    held: int = 1


def judge(history: History) -> list[str]:
    """The violations, one sentence each."""
    begins, ended = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    wrong: list[str] = []
    for me, execution, event, _, *more in history.ledger:
        begins[me, execution] += event == "begin"
        ended[me, execution] += event == "end"
        if event == "core":
            wrong.append(f"{me}.{execution}: core used twice: {' '.join(more)}")
        elif event == "again":
            wrong.append(f"{me}.{execution}: two executions at one time: {' '.join(more)}")
    begun = Counter[str]()
    for (me, execution), times in begins.items():
        begun[me] += times
        # One number, one process: after a fault a task runs under a new number.
        if times > 1:
            wrong.append(f"{me}.{execution}: it began {times} times")
    for me, expected in history.accepted.items():
        entries = history.lines.get(me, ())
        wrong += [f"{me}: {text}" for text in _task(expected, entries)]
        if expected.writes:
            wrong += [f"{me}: {text}" for text in _ledger(me, expected, entries, begun, ended, history.faults)]
    known = set(history.accepted)
    wrong += [f"{me}: nobody has submitted it" for me in sorted((set(history.lines) | set(begun)) - known)]
    extra = sum(begun.values()) - sum(e.most for e in history.accepted.values() if e.writes)
    if extra > history.faults * history.cores * history.held:
        wrong.append(f"{extra} executions more than tasks, with {history.faults} faults on {history.cores} cores")
    return wrong + [f"process {pid} of a task lives on" for pid in history.left]


def _task(expected: Expected, entries: Sequence[JournalEntry]) -> Iterator[str]:
    finals = [line for line in entries if line.final]
    if not finals:
        yield f"lost: it has not ended, the journal has {[line.execution for line in entries]}"
        return
    if len(finals) > 1 or not entries[-1].final:
        yield f"counted {len(finals)} times: {[(line.execution, line.status, line.final) for line in entries]}"
    if (finals[0].status, finals[0].reason) not in expected.endings:
        yield f"it is {finals[0].status} ({finals[0].reason or 'no reason'}): {finals[0].message}"
    numbers = [line.execution for line in entries]
    if numbers != sorted(set(numbers)):
        yield f"executions counted {numbers}"


def _ledger(
    me: str, expected: Expected, entries: Sequence[JournalEntry], begun: Counter[str], ended: Counter[tuple[str, str]],
    faults: int,
) -> Iterator[str]:  # fmt: skip
    final = next((line for line in entries if line.final), None)
    if final is not None and final.status == "finished" and ended[me, str(final.execution)] != 1:
        yield f"finished by execution {final.execution}, which has not come to its end"
    if final is not None and final.status == "finished" and not 1 <= begun[me] <= expected.most + faults:
        yield f"it began {begun[me]} times, with {faults} faults"
