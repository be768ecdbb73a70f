"""Tasks that join what is submitted from within them: their children, and waits that lead back to their beginning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeVar

from pilotq.broker.client.commit import SubmitPlan
from pilotq.broker.client.record_views import array_of
from pilotq.broker.errors import InvalidInput
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.tasks.dependencies import read_dependency
from pilotq.broker.tasks.states import ENDED

T = TypeVar("T")
SLICE = 500
WALK_MAX = 2000  # tasks that are looked at for one answer, and children of one task
FIELDS = ("status", "pq_reason", "pq_after", "pq_array_of", "pq_join", "pq_parents")


def refuse_cycles(link: Connection, submitter: str, plan: SubmitPlan) -> None:
    """Raise InvalidInput when a task that is submitted within ``submitter`` would wait for that one, which joins it.

    Those that are waited for are followed, at most WALK_MAX of them; `explain` finds what comes about otherwise.
    """
    after = {d.parent for several in plan.parents.after.values() for d in several if isinstance(d.parent, str)}
    after |= {p for several in plan.parents.after_each.values() for p in several if isinstance(p, str)}
    above = _joining(link, submitter) if after else []
    way = way_to(link, sorted(after), set(above)) if above else []
    if way:
        through = "" if len(way) == 1 else f" (by {' -> '.join(way)})"
        raise InvalidInput(
            f"after: a task that is submitted within task {submitter} cannot wait for {way[-1]}{through}: that one "
            "joins it, so each would wait for the other; leave out the dependency, or --join"
        )


def _joining(link: Connection, task_id: str) -> list[str]:
    """The task, if it joins, and those that join it, upwards."""
    found: list[str] = []
    life = None
    while task_id and task_id not in found:
        fields = ("pq_join", "status", "pq_reason", "pq_sub")
        (join, status, reason, submission), *_ = link.read_hashes([keys.job(task_id)], *fields)
        has_ended = reason is not None or status == b"finished"
        if join is None or has_ended or life not in (None, join.decode()):
            break
        found.append(task_id)
        task_id, _, life = child_of(link, submission.decode() if submission else "").partition("#")
    return found


def child_of(link: Connection, submission: str) -> str:
    """``<task>#<life>`` of the task within which this was submitted, if that joins it; else empty."""
    name = link.call("HGET", keys.submission(submission), "child_of") if submission else None
    return name.decode() if name else ""


def way_to(link: Connection, begin: Sequence[str], goals: set[str]) -> list[str]:
    """The ids from one of ``begin`` to one of ``goals``, each waiting for the next one; empty where there is no way."""
    came_from: dict[str, str] = dict.fromkeys(begin, "")
    current = list(came_from)
    while current and len(came_from) <= WALK_MAX:
        if met := next((task_id for task_id in current if task_id in goals), None):
            way = [met]
            while came_from[way[0]]:
                way.insert(0, came_from[way[0]])
            return way
        found = [(task_id, other) for task_id, others in waits_for(link, current).items() for other in others]
        current = []
        for task_id, other in found:
            if other not in came_from:
                came_from[other] = task_id
                current.append(other)
    return []


def submitted_again(link: Connection, ids: Sequence[str]) -> set[str]:
    """Those of these tasks that were submitted within another one of them, which joins them: run again, it submits
    them again."""
    rows = [row for part in _parts(ids) for row in link.read_hashes([keys.job(i) for i in part], "pq_join", "pq_sub")]
    names = {f"{i}#{join.decode()}" for i, (join, _) in zip(ids, rows, strict=True) if join is not None}
    if not names:
        return set()
    submissions = list({submission for _, submission in rows if submission})
    found = [
        link.pipeline([("HGET", keys.submission(s.decode()), "child_of") for s in part]) for part in _parts(submissions)
    ]
    within = {s for s, name in zip(submissions, chain(*found), strict=True) if name and name.decode() in names}
    return {i for i, (_, submission) in zip(ids, rows, strict=True) if submission in within}


def _parts(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[first : first + SLICE] for first in range(0, len(items), SLICE)]


def waits_for(link: Connection, ids: Iterable[str]) -> dict[str, list[str]]:
    """What each of these waits for: the tasks that it depends on, and those that it joins."""
    several = list(ids)
    found: dict[str, list[str]] = {}
    rows = link.read_hashes([keys.job(task_id) for task_id in several], *FIELDS)
    for task_id, row in zip(several, rows, strict=True):
        if row[1] is not None or row[0] == b"finished":
            continue
        status, _, after, array, join, each = (value.decode("utf-8", "replace") if value else "" for value in row)
        if not status or array:
            found[task_id] = [other for other in [array or array_of(task_id)] if other]
        elif join:
            found[task_id] = children(link, task_id)
        if after and (status == "deferred" or each):
            found[task_id] = [*found.get(task_id, ()), *(read_dependency(text)[0] for text in after.split())]
    return found


def children(link: Connection, task_id: str) -> list[str]:
    """The first WALK_MAX tasks and arrays that were submitted within a task that joins."""
    return [child.decode() for child in link.call("LRANGE", keys.children(task_id), 0, WALK_MAX - 1)]


def open_children(link: Connection, task_id: str) -> list[str]:
    """Those of them that have not ended."""
    several = children(link, task_id)
    rows = link.read_hashes([keys.job(child) for child in several], "status") if several else []
    return [child for child, (status,) in zip(several, rows, strict=True) if status and status.decode() not in ENDED]
