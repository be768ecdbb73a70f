"""What tasks wait for: the names and ids in ``after`` and the like of one submission, and cycles of them. Pure.

Files of tasks and submits are checked by the same pair: `resolve` finds what each name stands for, `check_cycles`
refuses tasks that wait for each other. A dependency is written in one of these forms:

=============  =====================================================================================
``name``       the task of the submission that has this name
``name:7``     element 7 of the array of the submission that has this name
``7f``         the id of a task that was submitted before (``7f_3``: of an element), or RQ's UUID
``=ID``        an id in any case, also where a task has that name, or where a producer of RQ's chose it
=============  =====================================================================================

Which ends of a parent release what waits for it is written in letters: k (it finished), f (it failed), o (it was
stopped, canceled or deleted). Any other end omits what waits. In Redis a dependency is the parent's id, with
``:LETTERS`` behind it unless these are ``k``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.model import Task

# The form of ids. Whether there is such a task is found out at submit.
ID = re.compile(r"[0-9a-v]{1,13}(?:_[0-9]{1,16})?|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|=[A-Za-z0-9_-]{1,200}")
_ELEMENT = re.compile(r"(.+):([0-9]{1,16})", re.DOTALL)


class Element(NamedTuple):
    """One element of an array of the same submission."""

    array: int  # position of the array
    element: int  # index in it


# A task of the same submission by its position, one element of such an array, or the id of a task submitted before.
Parent = int | Element | str


FINISHED, ANY_END, NOT_FINISHED = "k", "kfo", "fo"
FIELDS = {"after": FINISHED, "after_any": ANY_END, "after_notok": NOT_FINISHED}  # of Task
ALL_FIELDS = (*FIELDS, "after_each")
END_LETTERS = {"finished": "k", "failed": "f", "stopped": "o", "canceled": "o"}


class Dependency(NamedTuple):
    """A parent, and the letters of those of its ends that release what waits."""

    parent: Parent
    ends: str

    def text(self, parent_id: str) -> str:
        """As it is stored."""
        return parent_id if self.ends == FINISHED else f"{parent_id}:{self.ends}"


def read_dependency(text: str) -> tuple[str, str]:
    """The reverse of `Dependency.text`: id and letters.

    >>> [read_dependency(text) for text in ("7f", "7f_3:kfo")]
    [('7f', 'k'), ('7f_3', 'kfo')]
    """
    parent, _, ends = text.partition(":")
    return parent, ends or FINISHED


class Parents(NamedTuple):
    """What tasks wait for, by the position of the one that waits; tasks that wait for nothing have no entry."""

    after: dict[int, list[Dependency]]
    after_each: dict[int, list[Parent]]


# From the position of a task (and the name of one of its fields) to the place that messages give.
Place = Callable[[int, str], str]


def resolve(tasks: Sequence[Task], place: Place) -> Parents:
    """What each task waits for; raises InvalidInput for names given twice and for dependencies on nothing."""
    names = _names(tasks, place)
    found = Parents({}, {})
    for number, task in enumerate(tasks):
        if task.after or task.after_any or task.after_notok:
            found.after[number] = _dependencies(task, tasks, names, place, number)
        if task.after_each:
            found.after_each[number] = [
                _array(text, tasks, names, place, number) for text in dict.fromkeys(task.after_each)
            ]
    return found


def _names(tasks: Sequence[Task], place: Place) -> dict[str, int]:
    names: dict[str, int] = {}
    for number, task in enumerate(tasks):
        if task.name is not None and names.setdefault(task.name, number) != number:
            other = place(names[task.name], "").rpartition(": ")[2]
            raise InvalidInput(f"{place(number, 'name')}: {task.name!r} is the name of {other} already")
    return names


def _dependencies(
    task: Task, tasks: Sequence[Task], names: dict[str, int], place: Place, waiting: int
) -> list[Dependency]:
    """Each parent once; one that is named twice must end as both want it."""
    ends: dict[Parent, str] = {}
    for field, letters in FIELDS.items():
        for text in dict.fromkeys(getattr(task, field)):
            parent = _parent(text, tasks, names, place, waiting, field)
            ends[parent] = "".join(letter for letter in ends.get(parent, ANY_END) if letter in letters)
            if not ends[parent]:
                raise InvalidInput(
                    f"{place(waiting, field)}: {text!r} is in after, too: it would have to end in two ways"
                )
    return [Dependency(parent, letters) for parent, letters in ends.items()]


def _parent(text: str, tasks: Sequence[Task], names: dict[str, int], place: Place, waiting: int, field: str) -> Parent:
    is_id = ID.fullmatch(text) is not None
    if is_id and text.startswith("="):
        return text[1:]
    number = names.get(text)
    if number is not None:
        return number
    element = _element(text, tasks, names)
    if element is not None:
        return element
    if not is_id:
        raise InvalidInput(f"{place(waiting, field)}: {text!r} is neither the name of a task here nor an id")
    return text


def _array(text: str, tasks: Sequence[Task], names: dict[str, int], place: Place, waiting: int) -> Parent:
    """A parent whose elements are waited for one by one."""
    parent = _parent(text, tasks, names, place, waiting, "after_each")
    if isinstance(parent, Element) or (isinstance(parent, str) and "_" in parent):
        raise InvalidInput(f"{place(waiting, 'after_each')}: {text!r} is one element: name its array")
    if isinstance(parent, int):
        other, size = tasks[parent], tasks[waiting].size
        if not other.is_array or other.size != size:
            raise InvalidInput(f"{place(waiting, 'after_each')}: {text!r} is not an array of {size:,} elements")
    return parent


def _element(text: str, tasks: Sequence[Task], names: dict[str, int]) -> Element | None:
    """The element that ``name:INDEX`` means; None when no array here has such an element."""
    match = _ELEMENT.fullmatch(text)
    if match is None or (number := names.get(match[1])) is None:
        return None
    array, values, index = tasks[number].array, tasks[number].values, int(match[2])
    indices = array if array is not None else range(len(values or ()))
    return Element(number, index) if index in indices else None


def check_cycles(tasks: Sequence[Task], parents: Parents, place: Place) -> None:
    """Raise InvalidInput, with the path, when tasks wait for each other."""
    edges: dict[int, list[int]] = {}
    for number, dependencies in parents.after.items():
        edges[number] = list(_positions(dependency.parent for dependency in dependencies))
    for number, arrays in parents.after_each.items():
        edges.setdefault(number, []).extend(_positions(arrays))
    if cycle := _cycle(edges):
        path = " -> ".join(tasks[number].name or "" for number in cycle)
        raise InvalidInput(f"{place(cycle[0], 'after')}: tasks wait for each other: {path}")


def _positions(parents: Iterable[Parent]) -> Iterable[int]:
    for parent in parents:
        if isinstance(parent, int):
            yield parent
        elif isinstance(parent, Element):
            yield parent.array


def _cycle(edges: dict[int, list[int]]) -> list[int]:
    """A path that ends where it begins, or nothing. Without recursion: chains may be as long as the submission."""
    done: set[int] = set()
    for root in sorted(edges):
        if root in done:
            continue
        path = [root]
        place = {root: 0}
        pending = [iter(edges[root])]
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
