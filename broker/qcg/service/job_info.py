"""What `jobStatus`, `jobInfo`, `listJobs` and the report tell of jobs, in QCG-PilotJob's shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pilotq.broker.qcg.service.lookup import Look
from pilotq.broker.qcg.service.registry import Job
from pilotq.broker.qcg.service.states import (
    CANCELED,
    FAILED,
    FINAL,
    OMITTED,
    QUEUED,
    SUCCEED,
    Ended,
    history_of,
    message_of,
    runtime_of,
    stamp,
)
from pilotq.broker.store.messages import parse_allocation

Data = dict[str, Any]
History = list[tuple[str, float]]


class UnknownJob(Exception):
    """There is no such job, or no such element of it; the text is QCG-PilotJob's."""


class Named(NamedTuple):
    """A job, or (``element``, as its user counts) one element of it."""

    job: Job
    element: int | None

    @property
    def name(self) -> str:
        return self.job.name if self.element is None else f"{self.job.name}:{self.element}"

    @property
    def place(self) -> int:
        """Where the element stands in its job."""
        assert self.element is not None and self.job.indices is not None
        return self.job.indices.index(self.element)

    @property
    def id(self) -> str:
        """The id of its one task, or of its array; empty when it has none."""
        if not self.job.ids:
            return ""
        if self.element is None:
            return "" if self.job.single else self.job.ids[0]
        return self.job.ids[self.place] if self.job.single else f"{self.job.ids[0]}_{self.element}"


def named(jobs: Mapping[str, Job], text: str) -> Named:
    """The job, or ``job:it`` the element, of this name. Raises UnknownJob."""
    name, colon, number = text.partition(":")
    job = jobs.get(name)
    if job is None or (colon and not number.isdecimal()):
        raise UnknownJob(f"Job '{text}' doesn't exist")
    if not colon:
        return Named(job, None)
    if job.indices is None or int(number) not in job.indices:
        raise UnknownJob(f"Unknown iteration {number} for job {name}")
    return Named(job, int(number))


def runtime(job: Job, index: int | None, line: Ended, root: str) -> dict[str, str]:
    """Of a task that has ended all of it; of one that runs what is known: its cores and its directory."""
    if not line.cpus:
        return {}
    parts = parse_allocation(line.cpus)
    nodes = [part.node for part in parts]
    found = runtime_of(line, *job.place(root, index, sum(len(part.cores) for part in parts), nodes))
    return found if line.ended is not None else {key: found[key] for key in ("allocation", "wd")}


class Info:
    """Answers about the jobs of one service; ``root`` is its directory."""

    def __init__(self, look: Look, root: str) -> None:
        self._look = look
        self._root = root

    def states(self, wanted: Sequence[Named]) -> list[str]:
        found = self._look.states([item.job for item in wanted])
        elements: dict[str, list[str]] = {}
        for place, (job, index) in enumerate(wanted):
            if index is not None:
                if job.name not in elements:
                    elements[job.name] = self._elements(job)
                found[place] = elements[job.name][wanted[place].place]
        return found

    def _elements(self, job: Job) -> list[str]:
        if job.ids:
            return self._look.elements(job)
        return [job.state or QUEUED] * len(job.indices or ())

    def listing(self, jobs: Sequence[Job]) -> dict[str, Data]:
        states = self._look.states(jobs)
        failed = [job.ids[0] for job, state in zip(jobs, states, strict=True) if _one_failed(job, state)]
        lines = self._look.lines(failed, set(failed))
        found: dict[str, Data] = {}
        for place, (job, state) in enumerate(zip(jobs, states, strict=True)):
            data: Data = {"status": state}
            message = message_of(lines[job.ids[0]]) if _one_failed(job, state) and job.ids[0] in lines else job.why
            if message:
                data["messages"] = message
            found[job.name] = data | {"inQueue": place}
        return found

    def details(self, wanted: Sequence[Named], *, childs: bool) -> list[Data]:
        """`jobInfo`'s data for each."""
        states = self.states(wanted)
        ended = {item.id for item, state in zip(wanted, states, strict=True) if item.id and state in FINAL}
        # Elements that were canceled or omitted before they ran have no line of their own.
        surely = {
            item.id for item, state in zip(wanted, states, strict=True)
            if item.id in ended and (item.element is None or state in (SUCCEED, FAILED))
        }  # fmt: skip
        lines = self._look.lines([item.id for item in wanted if item.id], surely)
        return [
            self._detail(item, state, lines.get(item.id), childs) for item, state in zip(wanted, states, strict=True)
        ]

    def _detail(self, item: Named, state: str, line: Ended | None, childs: bool) -> Data:
        job, index = item
        data: Data = {"jobName": item.name, "status": state}
        history: History = []
        if job.indices is not None and index is None:
            elements = self._elements(job)
            numbers = Counter(elements)
            data["iterations"] = {
                "start": job.indices.start,
                "stop": job.indices.stop,
                "total": len(elements),
                "finished": sum(numbers[word] for word in FINAL),
                "failed": sum(numbers[word] for word in (FAILED, CANCELED, OMITTED)),
            }
            if childs:
                data["childs"] = self._childs(job, elements)
            history = [(QUEUED, job.at)]
            if state in FINAL:
                history.append((state, self._end(job, line)))
        elif line is not None:
            history = history_of(line, element=index is not None)
            if found := runtime(job, index, line, self._root):
                data["runtime"] = found
        elif index is None:
            history = [(QUEUED, job.at)] + ([(state, job.ended)] if state in FINAL else [])
        if message := (message_of(line) if line is not None else job.why):
            data["messages"] = message
        if history:
            data["history"] = "".join(f"\n{stamp(at)}: {word}" for word, at in history)
        return data

    def _end(self, job: Job, line: Ended | None) -> float:
        """When an iteration ended: as its array's line says, or with its last element."""
        if line is not None:
            return line.ended or job.at
        if job.single and job.ids:
            ids = [task_id for task_id in job.ids if task_id]
            return max((line.ended or job.at for line in self._look.lines(ids, set(ids)).values()), default=job.at)
        return job.ended or job.at

    def _childs(self, job: Job, states: Sequence[str]) -> list[Data]:
        items = [Named(job, index) for index in job.indices or ()]
        by_state = dict(zip([item.id for item in items], states, strict=True))
        ended = {task_id for task_id, state in by_state.items() if task_id and state in (SUCCEED, FAILED)}
        lines: dict[str, Ended] = {}
        if job.ids:
            lines = self._look.element_lines(job, ended) if not job.single else self._look.lines(list(ended), ended)
            active = [task_id for task_id, state in by_state.items() if task_id and state not in {*FINAL, QUEUED}]
            lines |= self._look.lines(active, set())
        found = []
        for item, state in zip(items, states, strict=True):
            child: Data = {"iteration": item.element, "state": state}
            line = lines.get(item.id) if item.id else None
            if line is not None and (facts := runtime(job, item.element, line, self._root)):
                child["runtime"] = facts
            found.append(child)
        return found

    def numbers(self, jobs: Sequence[Job]) -> tuple[Counter[str], Counter[str]]:
        """How many jobs, and how many tasks (elements, and jobs without), are in each state."""
        states = self._look.states(jobs)
        tasks: Counter[str] = Counter()
        for job, state in zip(jobs, states, strict=True):
            tasks.update([state] if job.indices is None else self._elements(job))
        return Counter(states), tasks


def _one_failed(job: Job, state: str) -> bool:
    return state == FAILED and job.indices is None and bool(job.ids)
