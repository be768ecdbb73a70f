"""Turns the jobs of QCG-PilotJob's submits into tasks: elements, dependencies, and jobs that can never run. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.qcg_variables import LAUNCH_VARIABLES, fill, fill_early, split
from pilotq.broker.tasks.dependencies import check_cycles, resolve
from pilotq.broker.tasks.model import Request, Task

_SAME_INDEX = re.compile(r"(.+):\$(?:\{it\}|it)")
ELEMENT_TASKS_LIMIT = 100_000
_ONE_INDEX = re.compile(r"(.+):([0-9]{1,15})")


def waits_elementwise(text: str) -> bool:
    """Whether a dependency is on the element of the same index: ``job:${it}``."""
    return _SAME_INDEX.fullmatch(text) is not None


class UnmetDependency(Exception):
    """Raised for a dependency that can never be met; its text says why."""


class EarlierJob(Protocol):
    """A job that was submitted before."""

    @property
    def indices(self) -> range | None:
        """What its ``${it}`` counts through; None when it is no iteration."""

    @property
    def array(self) -> str | None:
        """The id of its one array that can still be waited for element by element, if it has one."""

    def parents(self, index: int | None) -> Sequence[str]:
        """Ids to wait for, for one element or (None) all of it; none when that has ended well. Raises Unmet."""


class JobDraft(msgspec.Struct):
    """A job that was read. ``after`` is as written; ``requests`` is the plan of schedulers, one for each element.

    ``unrunnable`` says why it can run nowhere, whatever the pilot.
    """

    name: str
    path: str
    task: Task
    after: list[str]
    requests: list[Request] | None = None
    unrunnable: str = ""

    @property
    def indices(self) -> range | None:
        """What ``${it}`` counts through; None when the job is no iteration."""
        if self.task.values is not None:
            return range(len(self.task.values))
        if self.task.array is not None:
            return range(self.task.array.start, self.task.array.stop + 1)
        return None


def tasks_of(
    drafts: Sequence[JobDraft], file: str, earlier: Mapping[str, EarlierJob] | None = None
) -> tuple[list[Task], dict[str, str]]:
    """The tasks, and the names of jobs and elements that are omitted, with a sentence why.

    Omitted is what waits for a job or element that neither ``drafts`` nor ``known`` have, or that did not end well,
    and all that waits for it.
    """
    names: dict[str, JobDraft] = {}
    for draft in drafts:
        other = names.setdefault(draft.name, draft)
        if other is not draft:
            raise InvalidInput(f"{file}: {draft.path}.name: {draft.name!r} is the name of {other.path} already")
    graph = _DependencyGraph(names, earlier or {})
    tasks: list[Task] = []
    paths: dict[str, str] = {}
    omitted: dict[str, str] = {}
    for draft in drafts:
        found = _elements(draft, file) if draft.name in graph.per_element else [(None, draft.task)]
        for index, task in found:
            name = task.name or ""
            try:
                after, after_each = graph.resolve(draft, index)
            except UnmetDependency as unmet:
                omitted[name] = f"it waits for {unmet}"
                after, after_each = [], []
            tasks.append(msgspec.structs.replace(task, after=after, after_each=after_each))
            paths[name] = draft.path
    _omit_dependents(tasks, omitted)
    tasks = [task for task in tasks if task.name not in omitted]

    def place(number: int, field: str) -> str:
        path = paths[tasks[number].name or ""]
        return f"{file}: {path}.{field}" if field else f"{file}: {path}"

    check_cycles(tasks, resolve(tasks, place), place)
    return tasks, omitted


class _DependencyGraph:
    """The dependencies of jobs. ``per_element`` are the iteration jobs that need a task for each element."""

    def __init__(self, names: Mapping[str, JobDraft], earlier: Mapping[str, EarlierJob]) -> None:
        self.names = names
        self.earlier = earlier
        self.per_element: set[str] = set()
        users: dict[str, list[str]] = defaultdict(list)
        found = [draft.name for draft in names.values() if draft.requests is not None]
        for draft in names.values():
            same = [match[1] for text in draft.after if (match := _SAME_INDEX.fullmatch(text))]
            if draft.indices is None or not same:
                continue
            # An array waits for elements of equal arrays, or for whole tasks, but not for both.
            if len(same) < len(draft.after) or not all(self._alike(draft, name) for name in same):
                found.append(draft.name)
            for name in same:
                users[name].append(draft.name)
        while found:
            name = found.pop()
            if name not in self.per_element:
                self.per_element.add(name)
                found += users[name]

    def _alike(self, draft: JobDraft, name: str) -> bool:
        other = self._find(name)
        if isinstance(other, JobDraft):
            return other.indices is None or other.indices == draft.indices
        return other is None or (other.indices == draft.indices and other.array is not None)

    def _find(self, name: str) -> JobDraft | EarlierJob | None:
        return self.names.get(name) or self.earlier.get(name)

    def resolve(self, draft: JobDraft, index: int | None) -> tuple[list[str], list[str]]:
        """(after, after_each) of a job, or of one element of it. Raises Unmet."""
        after: list[str] = []
        after_each: list[str] = []
        for text in draft.after:
            same, one = _SAME_INDEX.fullmatch(text), _ONE_INDEX.fullmatch(text)
            if self._find(text) is not None:
                after += self._parents(text, None)
                continue
            name = (same or one or [text, text])[1]
            other = self._find(name)
            if other is None or other.indices is None or (same and draft.indices is None):
                raise UnmetDependency(f"{text!r}, which no request brings")
            if same and index is None:
                after_each.append(name if isinstance(other, JobDraft) else f"={other.array}")
                continue
            wanted = int(one[2]) if one else index
            if wanted not in other.indices:
                raise UnmetDependency(f"'{name}:{wanted}', which no request brings")
            after += self._parents(name, wanted)
        return after, after_each

    def _parents(self, name: str, index: int | None) -> list[str]:
        draft = self.names.get(name)
        if draft is None:
            return [f"={parent}" for parent in self.earlier[name].parents(index)]
        if index is not None:
            return [f"{name}:{index}"]
        return [f"{name}:{i}" for i in draft.indices or ()] if name in self.per_element else [name]


def _elements(draft: JobDraft, file: str) -> Iterator[tuple[int, Task]]:
    """A task per element, with ``it`` and ``itval`` filled in."""
    task, indices = draft.task, draft.indices or range(0)
    if len(indices) > ELEMENT_TASKS_LIMIT:
        raise InvalidInput(f"{file}: {draft.path}: its {len(indices):,} elements differ; {ELEMENT_TASKS_LIMIT:,} may")
    for position, index in enumerate(indices):
        value = str(index) if task.values is None else task.values[position]
        # Other variables of a script are filled in at launch: one in a value would be taken for the script's own.
        if task.script is not None and len(split(value, LAUNCH_VARIABLES, True)) > 1:
            raise InvalidInput(f"{file}: {draft.path}.iteration.values[{position}]: {value!r} has a variable in it")
        variables = {"it": str(index), "itval": value}
        yield (
            index,
            msgspec.structs.replace(
                task,
                name=f"{draft.name}:{index}",
                array=None,
                values=None,
                request=draft.requests[position] if draft.requests else task.request,
                command=None if task.command is None else [fill_early(text, variables) for text in task.command],
                script=None if task.script is None else fill(task.script, variables, script=True),
                env={fill_early(name, variables): fill_early(text, variables) for name, text in task.env.items()},
                **{
                    key: None if (text := getattr(task, key)) is None else fill_early(text, variables)
                    for key in ("cwd", "stdin", "stdout", "stderr")
                },
            ),
        )


def _omit_dependents(tasks: list[Task], omitted: dict[str, str]) -> None:
    """Add to ``omitted`` all that waits, over any number of steps, for something in it."""
    users: dict[str, list[str]] = defaultdict(list)
    names = {task.name for task in tasks}
    for task in tasks:
        for text in (*task.after, *task.after_each):
            users[text if text in names else text.rpartition(":")[0]].append(task.name or "")
    pending = list(omitted)
    while pending:
        name = pending.pop()
        for user in users[name]:
            if user not in omitted:
                omitted[user] = f"it waits for {name!r}, which is omitted"
                pending.append(user)
