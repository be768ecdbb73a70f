"""From the jobs of a QCG-PilotJob file to tasks: elements, dependencies between them, and what can never run. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import msgspec

from pilotq.broker.batch import check_names
from pilotq.broker.errors import InvalidInput
from pilotq.broker.qcg_words import RUN_WORDS, fill, split
from pilotq.broker.task import Request, Task

_SAME = re.compile(r"(.+):\$(?:\{it\}|it)")
SINGLES_LIMIT = 100_000
_ONE = re.compile(r"(.+):([0-9]{1,15})")


class _Missing(Exception):
    """A dependency that no request brings."""


class Draft(msgspec.Struct):
    """A job that was read. ``after`` is as written; ``cores`` has the plan of a scheduler, one number an element."""

    name: str
    path: str
    task: Task
    after: list[str]
    cores: list[int] | None = None

    @property
    def indices(self) -> range | None:
        """What ``${it}`` counts through; None when the job is no iteration."""
        if self.task.values is not None:
            return range(len(self.task.values))
        if self.task.array is not None:
            return range(self.task.array.start, self.task.array.stop + 1)
        return None


def tasks_of(drafts: list[Draft], file: str) -> tuple[list[Task], dict[str, str]]:
    """The tasks, and the names of jobs and elements that are omitted, with a sentence why.

    Omitted is what waits for a job or element that no request brings, and all that waits for it.
    """
    names: dict[str, Draft] = {}
    for draft in drafts:
        other = names.setdefault(draft.name, draft)
        if other is not draft:
            raise InvalidInput(f"{file}: {draft.path}.name: {draft.name!r} is the name of {other.path} already")
    single = _singles(drafts, names)
    tasks: list[Task] = []
    paths: dict[str, str] = {}
    omitted: dict[str, str] = {}
    for draft in drafts:
        found = _elements(draft, file) if draft.name in single else [(None, draft.task)]
        for index, task in found:
            name = task.name or ""
            try:
                after, after_each = _resolve(draft, index, names, single)
            except _Missing as missing:
                omitted[name] = f"it waits for {str(missing)!r}, which no request of this file brings"
                after, after_each = [], []
            tasks.append(msgspec.structs.replace(task, after=after, after_each=after_each))
            paths[name] = draft.path
    _omit_dependents(tasks, omitted)
    tasks = [task for task in tasks if task.name not in omitted]
    check_names(tasks, lambda number: f"{file}: {paths[tasks[number].name or '']}")
    return tasks, omitted


def _singles(drafts: list[Draft], names: Mapping[str, Draft]) -> set[str]:
    """The iteration jobs that need a task per element, and those that name such elements one by one."""
    users: dict[str, list[str]] = defaultdict(list)
    found = [draft.name for draft in drafts if draft.cores is not None]
    for draft in drafts:
        for text in draft.after if draft.indices is not None else ():
            if (match := _SAME.fullmatch(text)) and (other := names.get(match[1])) and other.indices is not None:
                users[other.name].append(draft.name)
                if other.indices != draft.indices:
                    found.append(draft.name)
    single: set[str] = set()
    while found:
        name = found.pop()
        if name not in single:
            single.add(name)
            found += users[name]
    return single


def _elements(draft: Draft, file: str) -> Iterator[tuple[int, Task]]:
    """A task per element, with ``it`` and ``itval`` filled in."""
    task, indices = draft.task, draft.indices or range(0)
    if len(indices) > SINGLES_LIMIT:
        raise InvalidInput(f"{file}: {draft.path}: its {len(indices):,} elements differ; {SINGLES_LIMIT:,} may")
    for position, index in enumerate(indices):
        value = str(index) if task.values is None else task.values[position]
        # The other words of the texts are filled in at launch, where these would be taken for the file's own.
        if len(split(value, RUN_WORDS, False)) > 1:
            raise InvalidInput(f"{file}: {draft.path}.iteration.values[{position}]: {value!r} has a word in it")
        words = {"it": str(index), "itval": value}
        yield (
            index,
            msgspec.structs.replace(
                task,
                name=f"{draft.name}:{index}",
                array=None,
                values=None,
                request=Request((n := draft.cores[position], n), spread=n > 1) if draft.cores else task.request,
                command=None if task.command is None else [fill(text, words) for text in task.command],
                script=None if task.script is None else fill(task.script, words, script=True),
                env={name: fill(text, words) for name, text in task.env.items()},
                **{
                    key: None if (text := getattr(task, key)) is None else fill(text, words)
                    for key in ("cwd", "stdin", "stdout", "stderr")
                },
            ),
        )


def _resolve(
    draft: Draft, index: int | None, names: Mapping[str, Draft], single: set[str]
) -> tuple[list[str], list[str]]:
    """(after, after_each) of a job, or of one element of it. Raises _Missing with the dependency that is nowhere."""
    after: list[str] = []
    after_each: list[str] = []
    for text in draft.after:
        same, one = _SAME.fullmatch(text), _ONE.fullmatch(text)
        if text in names:
            other = names[text]
            after += [f"{text}:{i}" for i in other.indices or ()] if text in single else [text]
            continue
        found = names.get((same or one or [text, text])[1])
        indices = None if found is None else found.indices
        if found is None or indices is None or (same and draft.indices is None):
            raise _Missing(text)
        if same and index is None:
            after_each.append(found.name)
            continue
        wanted = int(one[2]) if one else index
        if wanted not in indices:
            raise _Missing(f"{found.name}:{wanted}")
        after.append(f"{found.name}:{wanted}")
    return after, after_each


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
