"""Commits a staged submit: in one script call, or, when it is large, in one that accepts it and one for each piece."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from pilotq.broker.errors import InvalidInput, PilotFailed, ServerRefused, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument
from pilotq.broker.store.store import Store, pack
from pilotq.broker.tasks.dependencies import Dependency, Element, Parent, Parents, read_dependency
from pilotq.broker.tasks.model import Task, id_of

# What one script call handles: it holds up the server for some milliseconds.
PIECE_TASKS, PIECE_PARENTS = 500, 500
NO_BUNDLE = 255  # in the layout: the task has a record of its own
LARGE_TASKS, LARGE_PARENTS = 1000, 500  # above this a submission is committed in pieces

StatusesInJournal = Callable[[Sequence[str]], Mapping[str, str]]


class SubmitPlan(NamedTuple):
    """A submit that was checked: what to write, and what to commit."""

    tasks: Sequence[Task]
    classes: list[str]  # class name of each task
    parents: Parents
    total: int
    payloads: dict[int, bytes]  # position of a function -> its packed call
    likes: Sequence[int]  # of each task the position of one that differs in command and name at most
    members: dict[int, list[bytes]]  # position of a bundle -> its packed tasks
    layout: bytes  # where there are bundles: for each task of the user's the number of its bundle, or NO_BUNDLE

    def size_of(self, bundle: int) -> int:
        """The bytes of the tasks of a bundle, not compressed."""
        return sum(map(len, self.members[bundle]))

    @property
    def is_large(self) -> bool:
        links = sum(map(len, self.parents.after.values())) + sum(map(len, self.parents.after_each.values()))
        return len(self.tasks) > LARGE_TASKS or links > LARGE_PARENTS


class Submission(NamedTuple):
    """A plan with what makes a submission of it."""

    plan: SubmitPlan
    ids: list[str]  # of its records
    first: int  # number of the first task
    key: str
    shared: str  # content key of the submit context
    carried: Sequence[Argument] = ()  # arguments of commit.lua that hold all records; none: they are to be staged
    submitter: str = ""  # id of the task within which they are submitted


def commit(
    store: Store, submission: Submission, statuses_in_journal: StatusesInJournal, stage: Callable[[], None]
) -> list[str] | None:
    """Stage what does not come with the call, and commit; returns the ids, None when one of them is taken.

    It is refused before anything is visible, or accepted as a whole.
    """
    calls = _Calls(store, submission, statuses_in_journal)
    if submission.plan.is_large:
        return _commit_large(store, submission, calls, stage)
    if not submission.carried:
        stage()
    work = {**_work(submission, range(len(submission.ids))), **_common(submission)}
    answer = calls.answer("whole", work)
    return None if answer[0] == b"taken" else _ids(submission, answer)


def _commit_large(store: Store, submission: Submission, calls: _Calls, stage: Callable[[], None]) -> list[str]:
    name, number = keys.staged(submission.first), 0
    calls.look_up_parents(_checks(submission))
    for piece in _pieces(submission, calls.past):
        commands: list[tuple[Argument, ...]] = [("RPUSH", name, pack(piece))]
        # Its time runs from the first piece on, that of each hash later: while it is there, they all are.
        store.link.pipeline(commands if number else [*commands, ("EXPIRE", name, store.settings.stage_ttl_s)])
        number += 1
    stage()
    ids = _ids(submission, calls.answer("accept", {"pieces": number, **_common(submission)}))
    # Another process with the same key may have died behind this call: then its pieces are left.
    first = int(ids[0].partition("_")[0], 32)
    try:
        while calls.make("rest", {}, first)[0] == b"more":
            pass
    except ServerRefused:
        pass  # the memory is full: the dispatcher goes on, as ends make room
    return ids


class _Calls:
    """Calls of commit.lua; ``past`` has the statuses of the parents that only the journal knows."""

    def __init__(self, store: Store, submission: Submission, statuses_in_journal: StatusesInJournal) -> None:
        self._store = store
        self._submission = submission
        self._statuses_in_journal = statuses_in_journal
        self._each = {p for parents in submission.plan.parents.after_each.values() for p in parents}
        self.past: dict[str, str] = {}

    def make(self, what: str, work: dict[str, Any], first: int) -> list[Any]:
        plan = self._submission.plan
        carried = self._submission.carried if what == "whole" else ()
        return self._store.commit(self._submission.key, first, len(plan.tasks), plan.total, work, what, carried)

    def look_up_parents(self, checks: Iterator[dict[str, Any]]) -> None:
        """Look at all parents, and then once into the journal, before anything is written."""
        works = list(checks)
        answers = [self.make("check", work, self._submission.first) for work in works]
        self._look_up([p.decode() for answer in answers if answer[0] == b"unknown" for p in answer[1]])
        for work in works:
            self.answer("check", work)

    def _look_up(self, missing: Sequence[str]) -> None:
        """The statuses of parents without records; raises UnknownTask where the journal does not know one either."""
        found = self._statuses_in_journal([p for p in missing if p not in self._each]) if missing else {}
        for parent in missing:
            if parent not in found:
                raise UnknownTask(f"after: there is no task {parent!r} here (any more)")
        self.past.update(found)

    def answer(self, what: str, work: dict[str, Any]) -> list[Any]:
        """The answer when all parents are known; a refusal is raised."""
        while True:
            answer = self.make(what, {**work, "past": self.past}, self._submission.first)
            if answer[0] != b"unknown":
                break
            self._look_up([parent.decode() for parent in answer[1]])
        if answer[0] == b"unequal":
            parent = answer[1].decode()
            raise InvalidInput(f"after_each: {parent!r} is no array of as many elements as the one that waits")
        if answer[0] == b"gone":
            raise PilotFailed("the submit took too long and its staged records have expired: submit again")
        return answer


def ids_of_tasks(ids: Sequence[str], layout: bytes) -> list[str]:
    """The id of each task: those of a bundle are numbered as elements of an array are.

    >>> ids_of_tasks(["1f", "1g", "1h"], bytes([0, 255, 0, 255]))
    ['1f_0', '1g', '1f_1', '1h']
    """
    left, bundles = iter(ids), {}
    found = []
    for number in layout:
        if number == NO_BUNDLE:
            found.append(next(left))
            continue
        if number not in bundles:
            bundles[number] = (next(left), count())
        bundle, places = bundles[number]
        found.append(f"{bundle}_{next(places)}")
    return found


def _common(submission: Submission) -> dict[str, Any]:
    found, layout = {"shared": submission.shared}, submission.plan.layout
    if layout:
        found["layout"] = b64encode(zlib.compress(layout, 1)).decode()
    if submission.submitter:
        found["submitter"] = submission.submitter
    return found


def _ids(submission: Submission, answer: list[Any]) -> list[str]:
    """The ids of the tasks of a submission that was accepted, now or before."""
    ids, layout = submission.ids, submission.plan.layout
    if answer[0] == b"again":
        ids = [id_of(int(answer[1]) + n) for n in range(int(answer[2]))]
        layout = zlib.decompress(b64decode(answer[3])) if answer[3] else b""
    return ids_of_tasks(ids, layout) if layout else ids


def _checks(submission: Submission) -> Iterator[dict[str, Any]]:
    """Work that only names the parents of other submissions, in slices; those of this one are there with it."""
    plan = submission.plan
    known_before = (d.parent for several in plan.parents.after.values() for d in several if isinstance(d.parent, str))
    names = list(dict.fromkeys(known_before))
    for first in range(0, len(names), PIECE_PARENTS):
        yield {"waits": [("", "", names[first : first + PIECE_PARENTS], 1)]}
    each = [
        ("", "", arrays, plan.tasks[number].size)
        for number, several in plan.parents.after_each.items()
        if (arrays := [parent for parent in several if isinstance(parent, str)])
    ]
    for first in range(0, len(each), PIECE_TASKS):
        yield {"elementwise": each[first : first + PIECE_TASKS]}


def _pieces(submission: Submission, past: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The work of a submission in pieces, of which one script call handles each."""
    plan, first, links, number_of_records = submission.plan, 0, 0, len(submission.ids)
    for number in range(number_of_records):
        own = len(plan.parents.after.get(number) or plan.parents.after_each.get(number) or ())
        if number > first and (number - first == PIECE_TASKS or links + own > PIECE_PARENTS):
            yield _piece(submission, range(first, number), past)
            first, links = number, 0
        links += own
        if own > PIECE_PARENTS:
            yield from _parts(submission, number, past)
            first, links = number + 1, 0
    if first < number_of_records:
        yield _piece(submission, range(first, number_of_records), past)


def _piece(submission: Submission, numbers: range, past: Mapping[str, str]) -> dict[str, Any]:
    work = _work(submission, numbers)
    sizes = {submission.ids[n]: submission.plan.tasks[n].size for n in numbers if submission.plan.tasks[n].is_array}
    known = _known(past, (text for item in work["waits"] for text in item[2]))
    return {**work, "key": submission.key, "sizes": sizes, "past": known}


def _parts(submission: Submission, number: int, past: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One task that waits for very many: some of its parents in each piece."""
    piece = _piece(submission, range(number, number + 1), past)
    task_id, name, parents, size = piece["waits"][0]
    for first in range(0, len(parents), PIECE_PARENTS):
        some = parents[first : first + PIECE_PARENTS]
        part = 1 if not first else -1 if first + PIECE_PARENTS >= len(parents) else 0
        yield {**piece, "waits": [(task_id, name, some, size, part)], "past": _known(past, some)}


def _known(past: Mapping[str, str], dependencies: Iterable[str]) -> dict[str, str]:
    """What the journal knows of these."""
    return {p: past[p] for p, _ in map(read_dependency, dependencies) if p in past} if past else {}


def _work(submission: Submission, numbers: range) -> dict[str, Any]:
    """What commit.lua is to do with these tasks."""
    plan, ids = submission.plan, submission.ids
    groups: dict[str, list[str]] = {}
    waits, each, extra = [], [], []
    for number in numbers:
        task, name = plan.tasks[number], plan.classes[number]
        if after := plan.parents.after.get(number):
            waits.append((ids[number], name, [dependency_text(d, ids) for d in after], task.size))
        elif after_each := plan.parents.after_each.get(number):
            each.append((ids[number], name, [parent_id(p, ids) for p in after_each], task.size))
        else:
            groups.setdefault(name, []).append(ids[number])
        if task.values is not None or number in plan.members:
            extra.append(keys.values(ids[number]))
    return {"groups": list(groups.items()), "waits": waits, "elementwise": each, "extra": extra}


def dependency_text(dependency: Dependency, ids: list[str]) -> str:
    """A dependency as it is stored, when the ids of its submission are known."""
    return dependency.text(parent_id(dependency.parent, ids))


def parent_id(parent: Parent, ids: list[str]) -> str:
    """The id of a parent, when those of its submission are known."""
    if isinstance(parent, int):
        return ids[parent]
    return f"{ids[parent.array]}_{parent.element}" if isinstance(parent, Element) else parent
