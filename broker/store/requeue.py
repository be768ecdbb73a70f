"""Requeues ended tasks that did not finish: tasks one by one, arrays as a whole, or some of their elements."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import CANCELED, FAILED, number_with, only_finished, positions_with
from pilotq.broker.tasks.dependencies import read_dependency
from pilotq.broker.tasks.states import ENDED

OUTCOMES_ARGUMENT = 5  # number of the argument of requeue.lua that has the outcomes as they are to be
BATCH = 500  # tasks in one script call
ATTEMPTS = 5  # the outcomes of an array may change between the read and the script


def requeue(store: Store, ids: Sequence[str]) -> dict[str, str]:
    """id -> answer, as `Broker.retry` says. In the order given: a parent comes before what depends on it."""
    answers: dict[str, str] = {}
    plain: list[str] = []

    def flush() -> None:
        answers.update(_in_batches(store, plain))
        plain.clear()

    for task_id, status in zip(ids, _array_statuses(store, ids), strict=True):
        if status is None:
            plain.append(task_id)
            continue
        flush()  # what stands before it may be what it depends on
        answers[task_id] = _array(store, task_id)
    flush()
    hopeless = never_again(store.link, [task_id for task_id, word in answers.items() if word == "dependency"])
    answers.update(dict.fromkeys(hopeless, "never"))
    return answers


def never_again(link: Connection, ids: Sequence[str]) -> set[str]:
    """Those of these omitted tasks that run only if another does not finish, which has finished, and what is omitted
    because of them. In the order of submission; what depends on one element of an array is not found."""
    found: set[str] = set()
    for first in range(0, len(ids), BATCH):
        part = ids[first : first + BATCH]
        rows = link.pipeline([("HMGET", keys.job(i), "pq_reason", "pq_after") for i in part])
        after = {
            task_id: [read_dependency(text) for text in (parents or b"").decode("utf-8", "replace").split()]
            for task_id, (reason, parents) in zip(part, rows, strict=True) if reason == b"dependency"
        }  # fmt: skip
        named = list({parent for several in after.values() for parent, ends in several if "k" not in ends})
        statuses = link.pipeline([("HGET", keys.job(i), "status") for i in named]) if named else []
        finished = {i for i, status in zip(named, statuses, strict=True) if status == b"finished"}
        for task_id, several in after.items():
            if any((p in finished and "k" not in ends) or (p in found and "o" not in ends) for p, ends in several):
                found.add(task_id)
    return found


def _array_statuses(store: Store, ids: Sequence[str]) -> Iterator[str | None]:
    """The status of each array, None for what is none."""
    for first in range(0, len(ids), BATCH):
        part = ids[first : first + BATCH]
        for array, status in store.link.pipeline([("HMGET", keys.job(i), "pq_array", "status") for i in part]):
            yield status.decode() if array and status else None


def _in_batches(store: Store, ids: Sequence[str]) -> Iterator[tuple[str, str]]:
    for first in range(0, len(ids), BATCH):
        part = ids[first : first + BATCH]
        yield from zip(part, store.requeue([[task_id] for task_id in part]), strict=True)


def _array(store: Store, array: str) -> str:
    """Requeue what did not finish of an array, whether it has ended or not."""
    answer = "changed"
    for _ in range(ATTEMPTS):
        (text, status), outcomes = store.link.pipeline(
            [("HMGET", keys.job(array), "pq_array", "status"), ("GET", keys.outcomes(array))]
        )
        if text is None:
            return "unknown"
        try:
            indices = Indices.read(text)
        except ValueError:
            return "damaged"
        count = len(indices)
        outcomes = outcomes or b""
        unfinished = positions_with(outcomes, (FAILED, CANCELED), count)
        if status.decode() not in ENDED and number_with(outcomes, FAILED) + number_with(outcomes, CANCELED):
            return _elements(store, (f"{array}_{indices[position]}" for position in unfinished))
        failed = [f"{array}_{indices[position]}" for position in positions_with(outcomes, (FAILED,), count)]
        item = _whole(store, array, outcomes, next(unfinished, count), failed)
        (answer,) = store.requeue([item], only_finished(outcomes))
        if answer != "changed":
            return answer
    return answer


def _whole(store: Store, array: str, outcomes: bytes, first: int, failed: list[str]) -> list[Any]:
    """The argument of requeue.lua for an array that has ended; ``first``: the first position to run."""
    there = store.link.pipeline([("EXISTS", keys.job(i)) for i in failed]) if failed else []
    with_record = [i for i, found in zip(failed, there, strict=True) if found]
    digest = hashlib.sha1(outcomes, usedforsecurity=False).hexdigest()
    numbers = number_with(outcomes, FAILED), number_with(outcomes, CANCELED)
    return [array, digest, OUTCOMES_ARGUMENT, *numbers, first, with_record]


def _elements(store: Store, ids: Iterable[str]) -> str:
    """Some elements of an array that has not ended run again; the best of the answers."""
    answers = {answer for _, answer in _in_batches(store, list(ids))}
    return next((word for word in ("queued", "deferred") if word in answers), min(answers))
