"""What became of jobs: from Redis while it remembers their tasks, from the journal afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.queries import Listing
from pilotq.broker.client.views import TaskView
from pilotq.broker.qcg.service.registry import Job
from pilotq.broker.qcg.service.states import CANCELED, FAILED, FINAL, OMITTED, QUEUED, SUCCEED, Ended, state_of, whole
from pilotq.broker.store import keys
from pilotq.broker.store.journal_writer import Journal
from pilotq.broker.taskfiles.qcg_tasks import Unmet
from pilotq.broker.tasks.array_outcomes import element_ranges, indices_of

# Redis says that a task has ended before its line stands in the journal: usually some 0.1 s.
JOURNAL_WAIT_S = 5.0
LOOK_S = 0.02
FEW = 50  # lines that are searched for one by one; more are picked out in one pass over the journal
_line = msgspec.json.Decoder(Ended).decode


class Tail:
    """The lines of a journal, each once, as they come."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[Ended]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        return
                    self._offset += len(raw)
                    if not raw.startswith(b'{"pilotq_journal"'):
                        yield _line(raw)
        except FileNotFoundError:
            return


class Look:
    """Reads of one pilot. ``journal`` is the path of its journal."""

    def __init__(self, broker: Broker, journal: str) -> None:
        self._link = broker.link
        self._path = journal
        self._journal = Journal(journal)
        self._listing = Listing(broker.link, self._journal)

    # -- states -----------------------------------------------------------------------------------------------------

    def states(self, jobs: Sequence[Job]) -> list[str]:
        """The state of each job; one that has ended is asked for no more."""
        asked = [job for job in jobs if not job.state and job.ids]
        ids = [task_id for job in asked for task_id in job.ids if task_id]
        views = dict(zip(ids, self._views(ids), strict=True))
        for job in asked:
            job.state = self._final(job, [views[task_id] for task_id in job.ids if task_id])
        running = {job.name: views[job.ids[0]] for job in asked if job.indices is None and not job.state}
        return [job.state or _open_state(running.get(job.name)) for job in jobs]

    def _views(self, ids: Sequence[str]) -> list[TaskView | None]:
        found = self._listing.views(ids)
        return [view or self._listing.task(task_id) for task_id, view in zip(ids, found, strict=True)]

    def _final(self, job: Job, views: Sequence[TaskView | None]) -> str:
        """The state of a job whose tasks have all ended, else nothing. A task that somebody deleted was canceled."""
        if not all(view is None or view.ended for view in views):
            return ""
        states = {CANCELED if view is None else state_of(view.status, view.reason) for view in views}
        return whole(states | ({OMITTED} if job.lost else set()), canceled=job.canceled, each=job.each)

    def elements(self, job: Job) -> list[str]:
        """The states of a submitted iteration's elements, in their order."""
        indices = job.indices or range(0)
        if not job.single:
            return self._of_array(job, indices)
        views = iter(self._views([task_id for task_id in job.ids if task_id]))
        return [_state_or_canceled(next(views)) if task_id else OMITTED for task_id in job.ids]

    def _of_array(self, job: Job, indices: range) -> list[str]:
        array = job.ids[0]
        row, bits = self._link.pipeline(
            [("HMGET", keys.job(array), "pq_array", "pq_next", "pq_cancel"), ("GET", keys.bits(array))]
        )
        if row[0] is not None:
            ranges = element_ranges(bits or b"", row[0].decode(), int(row[1] or 0))
        else:
            lines = self._journal.find(array)
            ranges = lines[0].elements if lines else {}
        states = dict.fromkeys(indices, QUEUED)
        states.update(dict.fromkeys(indices_of(ranges.get("finished", "")), SUCCEED))
        states.update(dict.fromkeys(indices_of(ranges.get("failed", "")), FAILED))
        for index in indices_of(ranges.get("canceled", "")):
            states[index] = CANCELED if job.canceled or index in job.dropped else OMITTED
        started = list(indices_of(ranges.get("started", "")))
        views = self._listing.views([f"{array}_{index}" for index in started])
        states.update((index, state_of(v.status, v.reason)) for index, v in zip(started, views, strict=True) if v)
        return list(states.values())

    # -- lines ------------------------------------------------------------------------------------------------------

    def line(self, task_id: str, *, ended: bool) -> Ended | None:
        """What is known of one task; waits a moment for the journal when it has ``ended``. None: it is deleted."""
        return self.lines([task_id], {task_id} if ended else set()).get(task_id)

    def lines(self, ids: Sequence[str], ended: set[str]) -> dict[str, Ended]:
        """What is known of these tasks; ``ended`` are those whose last line must come or be there."""
        if len(ids) > FEW:
            wanted = set(ids)
            found = self._collect(lambda line: line.id if line.id in wanted else "", ended)
        else:
            found = self._find(ids, ended)
        missing = [task_id for task_id in ids if task_id not in found]
        views = zip(missing, self._views(missing), strict=True)
        return found | {task_id: _of_view(view) for task_id, view in views if view is not None}

    def element_lines(self, job: Job, ended: set[str]) -> dict[str, Ended]:
        """The lines of an array's elements, by id; ``ended`` as in `lines`."""
        array = job.ids[0]
        return self._collect(lambda line: line.id if line.array == array else "", ended)

    def _find(self, ids: Sequence[str], ended: set[str]) -> dict[str, Ended]:
        found: dict[str, Ended] = {}
        deadline = time.monotonic() + JOURNAL_WAIT_S
        for task_id in ids:
            while task_id in ended:
                lines = [line for line in self._journal.find(task_id) if line.final]
                if lines:
                    found[task_id] = msgspec.convert(lines[0], Ended, from_attributes=True)
                    break
                if time.monotonic() > deadline:
                    break  # what Redis says must do
                time.sleep(LOOK_S)
        return found

    def _collect(self, key: Callable[[Ended], str], ended: set[str]) -> dict[str, Ended]:
        tail = Tail(self._path)
        found: dict[str, Ended] = {}
        deadline = time.monotonic() + JOURNAL_WAIT_S
        while True:
            found.update((key(line), line) for line in tail.new() if line.final and key(line))
            if ended <= found.keys() or time.monotonic() > deadline:
                return found
            time.sleep(LOOK_S)

    # -- what others wait for -----------------------------------------------------------------------------------------

    def parents(self, jobs: Iterable[Job]) -> dict[str, Parent]:
        """Submitted jobs as what a new one may wait for."""
        wanted = list(jobs)
        self.states(wanted)
        return {job.name: Parent(job, self) for job in wanted}

    def remembered(self, task_id: str) -> bool:
        """Whether Redis knows the task: only then it can be waited for."""
        return bool(self._link.call("EXISTS", keys.job(task_id)))


class Parent:
    """A submitted job, for qcg_jobs.tasks_of. True as long as one submit lasts."""

    def __init__(self, job: Job, look: Look) -> None:
        self._job = job
        self._look = look
        self._elements: dict[int, tuple[str, str]] | None = None  # index -> id, state
        self._gone = bool(job.ids) and not job.single and bool(job.state) and not look.remembered(job.ids[0])

    @property
    def indices(self) -> range | None:
        return self._job.indices

    @property
    def array(self) -> str | None:
        job = self._job
        return job.ids[0] if job.indices is not None and job.ids and not job.single and not self._gone else None

    def parents(self, index: int | None) -> Sequence[str]:
        job = self._job
        if job.state == SUCCEED:
            return []
        if index is not None and job.ids:
            return self._parents_of(index)
        if job.state or job.lost:
            raise Unmet(f"{job.name!r}, which is {job.state or OMITTED}")
        return job.ids

    def _parents_of(self, index: int) -> Sequence[str]:
        job = self._job
        if self._elements is None:
            ids = job.ids if job.single else [f"{job.ids[0]}_{i}" for i in job.indices or ()]
            pairs = zip(ids, self._look.elements(job), strict=True)
            self._elements = dict(zip(job.indices or (), pairs, strict=True))
        task_id, state = self._elements[index]
        if state in FINAL and state != SUCCEED:
            raise Unmet(f"'{job.name}:{index}', which is {state}")
        return [] if state == SUCCEED else [task_id]


def _open_state(view: TaskView | None) -> str:
    return QUEUED if view is None else state_of(view.status, view.reason)


def _state_or_canceled(view: TaskView | None) -> str:
    return CANCELED if view is None else state_of(view.status, view.reason)


def _of_view(view: TaskView) -> Ended:
    """What Redis knows, in the form of a line."""
    times = view.times
    started = times.get("started")
    return Ended(
        id=view.id, status=view.status, reason=view.reason, final=view.ended, cpus=view.cores,
        queued=times.get("queued"), handed=times.get("handed") or started, started=started, ended=times.get("ended"),
        exit_code=view.exit_code, signal=view.signal, array=view.array, index=view.index, message=view.message,
        elements=view.elements,
    )  # fmt: skip
