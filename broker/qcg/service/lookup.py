"""`JobLookup`: states of jobs, read from Redis while it has the records of their tasks, from the journal afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.client.views import TaskView
from pilotq.broker.os_strings import from_json
from pilotq.broker.qcg.service.registry import Job
from pilotq.broker.qcg.service.states import (
    CANCELED,
    FAILED,
    FINAL,
    OMITTED,
    QUEUED,
    SUCCEED,
    TaskRecord,
    job_state,
    state_of,
)
from pilotq.broker.store import keys
from pilotq.broker.store.journal import HEADER, Journal, warn_of_line
from pilotq.broker.taskfiles.qcg_tasks import UnmetDependency
from pilotq.broker.tasks.array_outcomes import element_ranges, indices_of

# Redis shows the end of a task before its entry is in the journal: usually some 0.1 s.
JOURNAL_WAIT_S = 5.0
POLL_S = 0.02
FIND_MAX = 50  # entries that are searched one by one; more are found in one pass over the journal


class JournalTail:
    """Reads the entries of a journal as they are written, each once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = self._lines = 0

    def read_new(self) -> Iterator[TaskRecord]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        return
                    self._offset += len(raw)
                    self._lines += 1
                    if raw.startswith(HEADER):
                        continue
                    try:
                        record = from_json(raw, TaskRecord)
                    except ValueError as error:
                        warn_of_line(self._path, self._lines, error)
                    else:
                        yield record
        except FileNotFoundError:
            return


class JobLookup:
    """Reads the states of the jobs of one pilot. ``journal`` is the path of its journal."""

    def __init__(self, broker: Broker, journal: str) -> None:
        self._link = broker.link
        self._path = journal
        self._journal = Journal(journal)
        self._queries = TaskQueries(broker.link, self._journal)

    # -- states -----------------------------------------------------------------------------------------------------

    def states(self, jobs: Sequence[Job]) -> list[str]:
        """The state of each job; one that has ended is not read again."""
        asked = [job for job in jobs if not job.state and job.ids]
        ids = [task_id for job in asked for task_id in job.ids if task_id]
        views = dict(zip(ids, self._views(ids), strict=True))
        for job in asked:
            job.state = self._final(job, [views[task_id] for task_id in job.ids if task_id])
        running = {job.name: views[job.ids[0]] for job in asked if job.indices is None and not job.state}
        return [job.state or _open_state(running.get(job.name)) for job in jobs]

    def _views(self, ids: Sequence[str]) -> list[TaskView | None]:
        found = self._queries.views(ids)
        return [view or self._queries.task(task_id) for task_id, view in zip(ids, found, strict=True)]

    def _final(self, job: Job, views: Sequence[TaskView | None]) -> str:
        """The state of a job whose tasks have all ended, else nothing. A task that somebody deleted was canceled."""
        if not all(view is None or view.ended for view in views):
            return ""
        states = {CANCELED if view is None else state_of(view.status, view.reason) for view in views}
        return job_state(
            states | ({OMITTED} if job.omitted else set()), canceled=job.canceled, elementwise=job.elementwise
        )

    def elements(self, job: Job) -> list[str]:
        """The states of a submitted iteration's elements, in their order."""
        indices = job.indices or range(0)
        if not job.per_element:
            return self._of_array(job, indices)
        views = iter(self._views([task_id for task_id in job.ids if task_id]))
        return [_state_or_canceled(next(views)) if task_id else OMITTED for task_id in job.ids]

    def _of_array(self, job: Job, indices: range) -> list[str]:
        array = job.ids[0]
        row, bits = self._link.pipeline(
            [("HMGET", keys.job(array), "pq_array", "pq_next", "pq_cancel"), ("GET", keys.outcomes(array))]
        )
        if row[0] is not None:
            ranges = element_ranges(bits or b"", row[0].decode(), int(row[1] or 0))
        else:
            entries = self._journal.find(array)
            ranges = entries[0].elements if entries else {}
        states = dict.fromkeys(indices, QUEUED)
        states.update(dict.fromkeys(indices_of(ranges.get("finished", "")), SUCCEED))
        states.update(dict.fromkeys(indices_of(ranges.get("failed", "")), FAILED))
        for index in indices_of(ranges.get("canceled", "")):
            states[index] = CANCELED if job.canceled or index in job.canceled_elements else OMITTED
        started = list(indices_of(ranges.get("started", "")))
        views = self._queries.views([f"{array}_{index}" for index in started])
        states.update((index, state_of(v.status, v.reason)) for index, v in zip(started, views, strict=True) if v)
        return list(states.values())

    # -- entries ----------------------------------------------------------------------------------------------------

    def records(self, ids: Sequence[str], ended: set[str]) -> dict[str, TaskRecord]:
        """The records of these tasks; ``ended`` are those whose last entry is in the journal, or will be."""
        if len(ids) > FIND_MAX:
            wanted = set(ids)
            found = self._collect(lambda record: record.id if record.id in wanted else "", ended)
        else:
            found = self._find(ids, ended)
        missing = [task_id for task_id in ids if task_id not in found]
        views = zip(missing, self._views(missing), strict=True)
        return found | {task_id: _record_of_view(view) for task_id, view in views if view is not None}

    def element_records(self, job: Job, ended: set[str]) -> dict[str, TaskRecord]:
        """The records of an array's elements, by id; ``ended`` as in `records`."""
        array = job.ids[0]
        return self._collect(lambda record: record.id if record.array == array else "", ended)

    def _find(self, ids: Sequence[str], ended: set[str]) -> dict[str, TaskRecord]:
        found: dict[str, TaskRecord] = {}
        deadline = time.monotonic() + JOURNAL_WAIT_S
        for task_id in ids:
            while task_id in ended:
                entries = [entry for entry in self._journal.find(task_id) if entry.final]
                if entries:
                    found[task_id] = msgspec.convert(entries[0], TaskRecord, from_attributes=True)
                    break
                if time.monotonic() > deadline:
                    break  # then what Redis has must do
                time.sleep(POLL_S)
        return found

    def _collect(self, key: Callable[[TaskRecord], str], ended: set[str]) -> dict[str, TaskRecord]:
        tail = JournalTail(self._path)
        found: dict[str, TaskRecord] = {}
        deadline = time.monotonic() + JOURNAL_WAIT_S
        while True:
            found.update((key(record), record) for record in tail.read_new() if record.final and key(record))
            if ended <= found.keys() or time.monotonic() > deadline:
                return found
            time.sleep(POLL_S)

    # -- dependencies -------------------------------------------------------------------------------------------------

    def parents(self, jobs: Iterable[Job]) -> dict[str, SubmittedJob]:
        """Submitted jobs in the form in which new ones may wait for them."""
        wanted = list(jobs)
        self.states(wanted)
        return {job.name: SubmittedJob(job, self) for job in wanted}

    def has_record(self, task_id: str) -> bool:
        """Whether the task has a record: only then it can be waited for."""
        return bool(self._link.call("EXISTS", keys.job(task_id)))


class SubmittedJob:
    """A job that was submitted before, for qcg_tasks.tasks_of. Valid while one submit is handled."""

    def __init__(self, job: Job, lookup: JobLookup) -> None:
        self._job = job
        self._lookup = lookup
        self._elements: dict[int, tuple[str, str]] | None = None  # index -> id, state
        self._has_no_record = (
            bool(job.ids) and not job.per_element and bool(job.state) and not lookup.has_record(job.ids[0])
        )

    @property
    def indices(self) -> range | None:
        return self._job.indices

    @property
    def array(self) -> str | None:
        job = self._job
        return (
            job.ids[0]
            if job.indices is not None and job.ids and not job.per_element and not self._has_no_record
            else None
        )

    def parents(self, index: int | None) -> Sequence[str]:
        job = self._job
        if job.state == SUCCEED:
            return []
        if index is not None and job.ids:
            return self._parents_of(index)
        if job.state or job.omitted:
            raise UnmetDependency(f"{job.name!r}, which is {job.state or OMITTED}")
        return job.ids

    def _parents_of(self, index: int) -> Sequence[str]:
        job = self._job
        if self._elements is None:
            ids = job.ids if job.per_element else [f"{job.ids[0]}_{i}" for i in job.indices or ()]
            pairs = zip(ids, self._lookup.elements(job), strict=True)
            self._elements = dict(zip(job.indices or (), pairs, strict=True))
        task_id, state = self._elements[index]
        if state in FINAL and state != SUCCEED:
            raise UnmetDependency(f"'{job.name}:{index}', which is {state}")
        return [] if state == SUCCEED else [task_id]


def _open_state(view: TaskView | None) -> str:
    return QUEUED if view is None else state_of(view.status, view.reason)


def _state_or_canceled(view: TaskView | None) -> str:
    return CANCELED if view is None else state_of(view.status, view.reason)


def _record_of_view(view: TaskView) -> TaskRecord:
    """What Redis has of a task, in the form of an entry of the journal."""
    times = view.times
    started = times.get("started")
    return TaskRecord(
        id=view.id, status=view.status, reason=view.reason, final=view.ended, cpus=view.cores,
        queued=times.get("queued"), handed=times.get("handed") or started, started=started, ended=times.get("ended"),
        exit_code=view.exit_code, signal=view.signal, array=view.array, index=view.index, message=view.message,
        elements=view.elements,
    )  # fmt: skip
