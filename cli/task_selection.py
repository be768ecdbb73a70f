"""Finds the tasks that the words of a command line name: ids, or names of tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pilotq.broker.errors import InvalidInput, UnknownTask
from pilotq.broker.os_strings import printable

if TYPE_CHECKING:
    from pilotq.broker.client.archive import Archive
    from pilotq.broker.client.broker import Broker


def ids_of(pilot: Broker | Archive, words: Iterable[str]) -> list[str]:
    """An id for each word, which is an id or the name of exactly one task; raises UnknownTask, InvalidInput."""
    return [_id_of(pilot, printable(word)) for word in words]


def _id_of(pilot: Broker | Archive, word: str) -> str:
    try:
        return pilot.task(word).id
    except UnknownTask:
        found = pilot.find(word)
    if not found:
        raise UnknownTask(f"there is no task with the id or name {word!r} in this pilot: see `pilotq list`")
    if len(found) > 1:
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise InvalidInput(f"{len(found)} tasks are called {word!r} ({some}): give the id of the one you mean")
    return found[0]
