"""`JobQueries`: the data of `jobStatus`, `jobInfo`, `listJobs` and the report, in QCG-PilotJob's forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pilotq.broker.qcg.service.lookup import JobLookup
from pilotq.broker.qcg.service.registry import Job
from pilotq.broker.qcg.service.states import (
    CANCELED,
    FAILED,
    FINAL,
    OMITTED,
    QUEUED,
    SUCCEED,
    TaskRecord,
    history_of,
    message_of,
    runtime_of,
    timestamp,
)
from pilotq.broker.store.resources import parse_allocation

Data = dict[str, Any]
History = list[tuple[str, float]]


class UnknownJob(Exception):
    """Raised for a job, or an element of it, that does not exist; the text is QCG-PilotJob's."""


class JobReference(NamedTuple):
    """A job, or (``element``, as its user counts) one element of it."""

    job: Job
    element: int | None

    @property
    def name(self) -> str:
        return self.job.name if self.element is None else f"{self.job.name}:{self.element}"

    @property
    def place(self) -> int:
        """The position of the element in its job."""
        assert self.element is not None and self.job.indices is not None
        return self.job.indices.index(self.element)

    @property
    def id(self) -> str:
        """The id of its one task, or of its array; empty when it has none."""
        if not self.job.ids:
            return ""
        if self.element is None:
            return "" if self.job.per_element else self.job.ids[0]
        return self.job.ids[self.place] if self.job.per_element else f"{self.job.ids[0]}_{self.element}"


def find_job(jobs: Mapping[str, Job], text: str) -> JobReference:
    """The job, or ``job:it`` the element, of this name. Raises UnknownJob."""
    name, colon, number = text.partition(":")
    job = jobs.get(name)
    if job is None or (colon and not number.isdecimal()):
        raise UnknownJob(f"Job '{text}' doesn't exist")
    if not colon:
        return JobReference(job, None)
    if job.indices is None or int(number) not in job.indices:
        raise UnknownJob(f"Unknown iteration {number} for job {name}")
    return JobReference(job, int(number))


def runtime_facts(job: Job, index: int | None, record: TaskRecord, root: str) -> dict[str, str]:
    """Where and how long a task ran; of one that runs only its cores and its directory."""
    if not record.cpus:
        return {}
    parts = parse_allocation(record.cpus)
    nodes = [part.node for part in parts]
    found = runtime_of(record, *job.place(root, index, sum(len(part.cores) for part in parts), nodes))
    return found if record.ended is not None else {key: found[key] for key in ("allocation", "wd")}


class JobQueries:
    """Queries of the jobs of one service; ``root`` is its directory."""

    def __init__(self, lookup: JobLookup, root: str) -> None:
        self._lookup = lookup
        self._root = root

    def states(self, wanted: Sequence[JobReference]) -> list[str]:
        """The state of each job or element."""
        found = self._lookup.states([item.job for item in wanted])
        elements: dict[str, list[str]] = {}
        for place, (job, index) in enumerate(wanted):
            if index is not None:
                if job.name not in elements:
                    elements[job.name] = self._elements(job)
                found[place] = elements[job.name][wanted[place].place]
        return found

    def _elements(self, job: Job) -> list[str]:
        if job.ids:
            return self._lookup.elements(job)
        return [job.state or QUEUED] * len(job.indices or ())

    def list_jobs(self, jobs: Sequence[Job]) -> dict[str, Data]:
        """`listJobs`'s data: the name of each job -> its state, its message, its place."""
        states = self._lookup.states(jobs)
        failed = [job.ids[0] for job, state in zip(jobs, states, strict=True) if _single_task_failed(job, state)]
        records = self._lookup.records(failed, set(failed))
        found: dict[str, Data] = {}
        for place, (job, state) in enumerate(zip(jobs, states, strict=True)):
            data: Data = {"status": state}
            message = (
                message_of(records[job.ids[0]])
                if _single_task_failed(job, state) and job.ids[0] in records
                else job.why
            )
            if message:
                data["messages"] = message
            found[job.name] = data | {"inQueue": place}
        return found

    def details(self, wanted: Sequence[JobReference], *, childs: bool) -> list[Data]:
        """`jobInfo`'s data for each."""
        states = self.states(wanted)
        ended = {item.id for item, state in zip(wanted, states, strict=True) if item.id and state in FINAL}
        # Elements that were canceled or omitted before they ran have no entry of their own.
        surely = {
            item.id for item, state in zip(wanted, states, strict=True)
            if item.id in ended and (item.element is None or state in (SUCCEED, FAILED))
        }  # fmt: skip
        records = self._lookup.records([item.id for item in wanted if item.id], surely)
        return [
            self._detail(item, state, records.get(item.id), childs) for item, state in zip(wanted, states, strict=True)
        ]

    def _detail(self, item: JobReference, state: str, record: TaskRecord | None, childs: bool) -> Data:
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
                "finished": sum(numbers[final] for final in FINAL),
                "failed": sum(numbers[final] for final in (FAILED, CANCELED, OMITTED)),
            }
            if childs:
                data["childs"] = self._childs(job, elements)
            history = [(QUEUED, job.submitted_at)]
            if state in FINAL:
                history.append((state, self._end(job, record)))
        elif record is not None:
            history = history_of(record, element=index is not None)
            if found := runtime_facts(job, index, record, self._root):
                data["runtime"] = found
        elif index is None:
            history = [(QUEUED, job.submitted_at)] + ([(state, job.ended_at)] if state in FINAL else [])
        if message := (message_of(record) if record is not None else job.why):
            data["messages"] = message
        if history:
            data["history"] = "".join(f"\n{timestamp(at)}: {step}" for step, at in history)
        return data

    def _end(self, job: Job, record: TaskRecord | None) -> float:
        """When an iteration ended: as the entry of its array says, or with its last element."""
        if record is not None:
            return record.ended or job.submitted_at
        if job.per_element and job.ids:
            ids = [task_id for task_id in job.ids if task_id]
            return max(
                (record.ended or job.submitted_at for record in self._lookup.records(ids, set(ids)).values()),
                default=job.submitted_at,
            )
        return job.ended_at or job.submitted_at

    def _childs(self, job: Job, states: Sequence[str]) -> list[Data]:
        items = [JobReference(job, index) for index in job.indices or ()]
        by_state = dict(zip([item.id for item in items], states, strict=True))
        ended = {task_id for task_id, state in by_state.items() if task_id and state in (SUCCEED, FAILED)}
        records: dict[str, TaskRecord] = {}
        if job.ids:
            records = (
                self._lookup.element_records(job, ended)
                if not job.per_element
                else self._lookup.records(list(ended), ended)
            )
            active = [task_id for task_id, state in by_state.items() if task_id and state not in {*FINAL, QUEUED}]
            records |= self._lookup.records(active, set())
        found = []
        for item, state in zip(items, states, strict=True):
            child: Data = {"iteration": item.element, "state": state}
            record = records.get(item.id) if item.id else None
            if record is not None and (facts := runtime_facts(job, item.element, record, self._root)):
                child["runtime"] = facts
            found.append(child)
        return found

    def count_by_state(self, jobs: Sequence[Job]) -> tuple[Counter[str], Counter[str]]:
        """How many jobs, and how many tasks (elements, and jobs without), are in each state."""
        states = self._lookup.states(jobs)
        tasks: Counter[str] = Counter()
        for job, state in zip(jobs, states, strict=True):
            tasks.update([state] if job.indices is None else self._elements(job))
        return Counter(states), tasks


def _single_task_failed(job: Job, state: str) -> bool:
    return state == FAILED and job.indices is None and bool(job.ids)
