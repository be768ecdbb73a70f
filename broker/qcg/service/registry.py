"""`Registry`: the jobs of a service by name, and which tasks they became, in a file of the pilot's directory.

Every change is one line of JSON at the end of the file, and the state is what its lines say: a restarted service, and
another process of the same pilot, read them and have the same state. Redis has the tasks, this file which job they are.

A submit is three lines: the jobs, the plan (which of them become tasks now, in which order), and, when the tasks are
there, the number of the first one. A plan without an end (the process was killed there) is completed by reading from
Redis whether its tasks were committed: all of them, or none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from pilotq.broker.taskfiles.qcg import draft_of, job_of
from pilotq.broker.taskfiles.qcg_tasks import JobDraft, waits_elementwise
from pilotq.broker.taskfiles.qcg_variables import fill
from pilotq.broker.tasks.model import id_of

FILE = "qcg-jobs.jsonl"


class Submitted(msgspec.Struct, tag="submit", tag_field="is"):
    """Jobs as they were given; ``words`` are the variables of the request.

    ``total`` cores and ``nodes`` are what schedulers distribute.
    """

    at: float
    words: dict[str, str]
    total: int
    jobs: list[dict[str, Any]]
    key: str
    nodes: int = 0


class Planned(msgspec.Struct, tag="plan", tag_field="is"):
    """The jobs that become tasks now: ``jobs`` are their names, and whether each element is a task of its own.

    ``lost`` are elements that are omitted: name:index -> why.
    """

    key: str
    jobs: list[tuple[str, bool]]
    lost: dict[str, str] = {}


class Committed(msgspec.Struct, tag="done", tag_field="is"):
    """The plan was committed: its tasks have the numbers from ``first`` on."""

    key: str
    first: int


class Refused(msgspec.Struct, tag="refused", tag_field="is"):
    """The plan was not committed, and the jobs that came with it are no jobs."""

    key: str


class Counted(msgspec.Struct, tag="counted", tag_field="is"):
    """A submit was refused; it counts as a submit all the same."""


class NeverRan(msgspec.Struct, tag="over", tag_field="is"):
    """A job has ended without ever being a task."""

    name: str
    state: str
    why: str
    at: float


class Canceled(msgspec.Struct, tag="canceled", tag_field="is"):
    """A user canceled it; ``index``: one element of it."""

    name: str
    index: int | None = None


class Removed(msgspec.Struct, tag="removed", tag_field="is"):
    """A job was removed: its name is free again."""

    name: str


class ServiceBegan(msgspec.Struct, tag="began", tag_field="is"):
    """A service starts, or restarts; ``wd`` is its directory, ``net``: it takes requests of programs.

    ``system_cores`` are kept for the pilot itself: no node offers them, and they count as used.
    """

    wd: str
    net: bool
    system_cores: int = 0


class FinishRequested(msgspec.Struct, tag="finish", tag_field="is"):
    """The service is asked to end when all jobs have."""


Record = (
    Submitted | Planned | Committed | Refused | Counted | NeverRan | Canceled | Removed | ServiceBegan | FinishRequested
)
_decode = msgspec.json.Decoder(Record).decode
_encode = msgspec.json.Encoder().encode


class Job:
    """One job of a service.

    ``ids`` are its tasks: one, or (``per_element``) one for each element, empty where that is omitted.
    """

    __slots__ = (
        "body", "canceled", "canceled_elements", "cwd", "draft", "elementwise", "ended_at", "ids", "indices", "key",
        "name", "omitted", "per_element", "program", "state", "submitted_at", "values", "variables", "why",
    )  # fmt: skip

    def __init__(self, draft: JobDraft, body: dict[str, Any], at: float, key: str, variables: dict[str, str]) -> None:
        task = draft.task
        self.name = draft.name
        self.body = _encode(body)
        self.submitted_at = at  # unix seconds of the submit
        self.key = key  # of the submission that brought it
        self.draft: JobDraft | None = draft  # until it has become tasks
        self.indices = draft.indices
        self.variables = variables  # of the request
        self.elementwise = any(waits_elementwise(text) for text in draft.after)  # it waits element by element
        self.cwd = task.cwd or ""
        self.program = fill(body["execution"].get("exec") or "bash", variables | {"jname": draft.name})
        # Kept only where a name needs them.
        self.values = task.values if "itval" in self.cwd + self.program else None
        self.ids: list[str] = []
        self.per_element = False
        self.omitted: dict[int, str] = {}  # elements that are omitted, and why
        self.state = ""  # once it has ended, as far as was seen
        self.why = ""
        self.ended_at = 0.0
        self.canceled = False
        self.canceled_elements: set[int] = set()  # elements that were canceled one by one

    def tasks(self) -> list[tuple[str, str, int]]:
        """Its tasks: id, name, and how many elements that stands for."""
        if not self.per_element:
            return [(task_id, self.name, len(self.indices or (None,))) for task_id in self.ids]
        pairs = zip(self.ids, self.indices or (), strict=True)
        return [(task_id, f"{self.name}:{index}", 1) for task_id, index in pairs if task_id]

    def place(self, root: str, index: int | None, cores: int, nodes: list[str]) -> tuple[str, str]:
        """The directory where its task runs, or that element of it, and the name of the program."""
        variables = {"root_wd": root, "ncores": str(cores), "nnodes": str(len(nodes)), "nlist": ",".join(nodes)}
        if index is not None:
            value = self.values[index] if self.values is not None else str(index)
            variables |= {"it": str(index), "itval": value}
        directory = os.path.join(root, fill(self.cwd, variables)) if self.cwd else root
        return directory, os.path.basename(fill(self.program, variables))

    def description(self) -> dict[str, Any]:
        """The job as it was given, with the variables of its request filled in."""
        variables = self.variables | {"jname": self.name}
        found: dict[str, Any] = fill_json(msgspec.json.decode(self.body), variables)
        return found


def fill_json(value: Any, variables: dict[str, str], *, script: bool = False) -> Any:
    """Decoded JSON with the variables filled in wherever there is text; what stands under ``script`` is one."""
    if isinstance(value, str):
        return fill(value, variables, script=script)
    if isinstance(value, list):
        return [fill_json(item, variables) for item in value]
    if isinstance(value, dict):
        return {fill(key, variables): fill_json(item, variables, script=key == "script") for key, item in value.items()}
    return value


def digest(jobs: list[Any]) -> bytes:
    """The hash by which a repeated submit is recognised."""
    return hashlib.sha256(_encode(jobs)).digest()


class Registry:
    """The state that the file describes.

    ``jobs`` are by name, in the order of their submits. ``tasks`` has by the id of a task its job, removed ones too,
    and the index of the element that it is. ``committed`` returns the number of the first task of a submission, by its
    key; None when it was not committed.
    """

    def __init__(self, path: str, committed: Callable[[str], int | None]) -> None:
        self.jobs: dict[str, Job] = {}
        self.tasks: dict[str, tuple[Job, int | None]] = {}
        self.held: dict[str, Job] = {}  # wait for a job that was not submitted yet
        self.never_ran: list[Job] = []  # ended without ever being a task
        self.submissions: dict[str, tuple[bytes, list[str]]] = {}  # key -> digest of the jobs as given, their names
        self.open: set[str] = set()  # keys of submissions that have not ended, as far as was seen
        self.submits = 0
        self.wd = ""  # of the service; empty when there is none
        self.net = False
        self.system_cores = 0
        self.earlier: list[tuple[bytes, list[str]]] = []  # as ``submissions``, from before the service began
        self.finish = False
        self._committed = committed
        self._plans: dict[str, Planned] = {}
        self._drafts: dict[str, JobDraft] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._read_bytes = 0
        with self.locked():
            pass

    def close(self) -> None:
        os.close(self._file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the file for writing, with all read that was written."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self.refresh()
            # The process that began these plans was killed, or lost its connection before the reply.
            for key in list(self._plans):
                first = self._committed(key)
                if first is None:
                    del self._plans[key]
                else:
                    self.write(Committed(key, first))
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def refresh(self) -> None:
        """Read what other processes have written."""
        size = os.fstat(self._file).st_size
        if size == self._read_bytes:
            return
        data = os.pread(self._file, size - self._read_bytes, self._read_bytes)
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                self._apply(_decode(line))
            except ValueError:
                continue  # the end of a write that a kill has cut off, closed by the newline of the next one
        self._read_bytes += len(whole)

    def write(self, *records: Record, drafts: list[JobDraft] | None = None) -> None:
        """Append and apply records; only while `locked`. ``drafts`` are those of a Submitted, if read already."""
        data = b"".join(_encode(record) + b"\n" for record in records)
        if os.fstat(self._file).st_size > self._read_bytes:
            data = b"\n" + data  # an incomplete line: its writer is dead, as we have the lock
        written = 0
        while written < len(data):
            written += os.write(self._file, data[written:])
        self._read_bytes = os.fstat(self._file).st_size
        self._drafts = {draft.name: draft for draft in drafts or ()}
        for record in records:
            self._apply(record)
        self._drafts = {}

    def _apply(self, record: Record) -> None:
        if isinstance(record, Submitted):
            self._apply_submit(record)
        elif isinstance(record, Counted):
            self.submits += 1
        elif isinstance(record, Planned):
            self._plans[record.key] = record
        elif isinstance(record, Committed):
            self._apply_commit(self._plans.pop(record.key), record.first)
        elif isinstance(record, Refused):
            self._plans.pop(record.key, None)
            del self.submissions[record.key]
            self.jobs = {name: job for name, job in self.jobs.items() if job.ids or job.key != record.key}
            self.never_ran = [job for job in self.never_ran if job.key != record.key]
            self.held = {name: job for name, job in self.held.items() if job.key != record.key}
        elif isinstance(record, ServiceBegan):
            self.wd, self.net, self.finish = record.wd, record.net, False
            self.system_cores = record.system_cores
            self.earlier = list(self.submissions.values())
        elif isinstance(record, FinishRequested):
            self.finish = True
        elif (job := self.jobs.get(record.name)) is None:
            pass  # removed meanwhile
        elif isinstance(record, NeverRan):
            job.state, job.why, job.ended_at, job.draft = record.state, record.why, record.at, None
            self.never_ran.append(self.held.pop(record.name))
        elif isinstance(record, Removed):
            del self.jobs[record.name]
        elif record.index is None:
            job.canceled = True
        else:
            job.canceled_elements.add(record.index)

    def _apply_submit(self, record: Submitted) -> None:
        self.submits += 1
        names: list[str] = []
        for number, body in enumerate(record.jobs):
            path = f"jobs[{number}]"
            draft = self._drafts.get(fill(body["name"], record.words))
            if draft is None:
                draft = draft_of(job_of(body, FILE, path), FILE, path, record.words, record.total, record.nodes)
            self.jobs[draft.name] = self.held[draft.name] = Job(draft, body, record.at, record.key, record.words)
            names.append(draft.name)
        self.submissions[record.key] = digest(record.jobs), names

    def _apply_commit(self, plan: Planned, first: int) -> None:
        self.open.add(plan.key)
        for name, single in plan.jobs:
            job = self.held.pop(name)
            job.per_element, job.draft = single, None
            for index in (job.indices or ()) if single else (None,):
                if index is not None and (why := plan.lost.get(f"{name}:{index}")) is not None:
                    job.omitted[index] = why
                    job.ids.append("")
                    continue
                job.ids.append(id_of(first))
                self.tasks[job.ids[-1]] = job, index
                first += 1
