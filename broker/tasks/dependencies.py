"""What a file of tasks becomes, and the check of the names in it. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.model import Task

# The form of ids: ours, RQ's own (a UUID), and, with `=` in front where no name is meant, any that a producer of RQ's
# may have chosen. Whether there is such a task is found out at submit.
ID = re.compile(r"[0-9a-v]{1,13}(?:_[0-9]{1,15})?|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|=[A-Za-z0-9_-]{1,200}")
_ELEMENT = re.compile(r"(.+):([0-9]{1,15})", re.DOTALL)


class Batch(msgspec.Struct):
    """Tasks ready for ``Broker.enqueue_many``; names in ``after`` and ``after_each`` are resolved there.

    Of a QCG-PilotJob file ``requests`` instead: as they stand, to be handled one after the other.
    """

    tasks: list[Task]
    requests: list[Any] | None = None


def check_names(tasks: list[Task], place: Callable[[int], str]) -> None:
    """Refuse names used twice, dependencies on nothing, and cycles. ``place(i)`` says where task i stands.

    A dependency is the name of a task of the batch, ``name:INDEX`` of an element of such an array, or has the form
    of an id.
    """
    names = _names(tasks, place)
    known: dict[int, list[int]] = {}
    for number, task in enumerate(tasks):
        if task.after or task.after_each:
            known[number] = [target for target in _targets(number, tasks, names, place) if target is not None]
    if cycle := _cycle(known):
        path = " -> ".join(tasks[number].name or "" for number in cycle)
        raise InvalidInput(f"{place(cycle[0])}.after: tasks wait for each other: {path}")


def _names(tasks: list[Task], place: Callable[[int], str]) -> dict[str, int]:
    names: dict[str, int] = {}
    for number, task in enumerate(tasks):
        if task.name is not None and names.setdefault(task.name, number) != number:
            other = place(names[task.name]).rpartition(": ")[2]
            raise InvalidInput(f"{place(number)}.name: {task.name!r} is the name of {other} already")
    return names


def element_of(text: str, tasks: list[Task], names: dict[str, int]) -> int | None:
    """The number of the array that ``name:INDEX`` means an element of; None when there is no such element."""
    match = _ELEMENT.fullmatch(text)
    if match is None or (number := names.get(match[1])) is None:
        return None
    array, values, index = tasks[number].array, tasks[number].values, int(match[2])
    if values is not None:
        return number if index < len(values) else None
    if array is not None and array.start <= index <= array.stop and (index - array.start) % array.step == 0:
        return number
    return None


def _targets(which: int, tasks: list[Task], names: dict[str, int], place: Callable[[int], str]) -> Iterator[int | None]:
    task = tasks[which]
    for name in task.after:
        number = names.get(name)
        if number is None:
            number = element_of(name, tasks, names)
        if number is None and not ID.fullmatch(name):
            raise InvalidInput(f"{place(which)}.after: {name!r} is neither the name of a task here nor an id")
        yield number
    for name in task.after_each:
        number = names.get(name)
        if number is None and not ID.fullmatch(name):
            raise InvalidInput(f"{place(which)}.after_each: {name!r} is neither the name of a task here nor an id")
        if number is not None and (not tasks[number].is_array or tasks[number].size != task.size):
            raise InvalidInput(f"{place(which)}.after_each: {name!r} is not an array of {task.size:,} elements")
        yield number


def _cycle(edges: dict[int, list[int]]) -> list[int]:
    """A path that ends where it begins, or nothing. Without recursion: chains may be as long as the file."""
    done: set[int] = set()
    for root, first in edges.items():
        if root in done:
            continue
        path = [root]
        place = {root: 0}
        pending = [iter(first)]
        while pending:
            number = next(pending[-1], None)
            if number is None:
                pending.pop()
                last = path.pop()
                del place[last]
                done.add(last)
            elif number in place:
                return [*path[place[number] :], number]
            elif number not in done and number in edges:
                place[number] = len(path)
                path.append(number)
                pending.append(iter(edges[number]))
    return []
