"""The jobs of a service by name: which tasks they became, kept in the pilot's directory.

Every change is one line of JSON at the end of a file, and what is known is what its lines say: a service that is
started again, and another process of the same pilot, read them and know the same. Redis knows the tasks, this file
which job they are.

A submit is three lines: the jobs, the plan (which of them become tasks now, in which order), and, when the tasks are
there, the number of the first one. A plan without an end (the process was killed there) is settled by asking Redis
whether its tasks were committed: they are there, all of them, or none is.
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
from pilotq.broker.taskfiles.qcg_tasks import Draft, waits_for_same
from pilotq.broker.taskfiles.qcg_variables import fill
from pilotq.broker.tasks.model import id_of

FILE = "qcg-jobs.jsonl"


class Submitted(msgspec.Struct, tag="submit", tag_field="is"):
    """Jobs as they were given; ``words`` are those of the request.

    ``total`` cores and ``nodes`` are what schedulers share out.
    """

    at: float
    words: dict[str, str]
    total: int
    jobs: list[dict[str, Any]]
    key: str
    nodes: int = 0


class Planned(msgspec.Struct, tag="plan", tag_field="is"):
    """``jobs`` are names, and whether each element is a task; ``lost`` are elements that are none:
    name:index -> why."""

    key: str
    jobs: list[tuple[str, bool]]
    lost: dict[str, str] = {}


class Done(msgspec.Struct, tag="done", tag_field="is"):
    """The plan was committed: its tasks have the numbers from ``first`` on."""

    key: str
    first: int


class Refused(msgspec.Struct, tag="refused", tag_field="is"):
    """The plan was not committed, and the jobs that came with it are no jobs."""

    key: str


class Counted(msgspec.Struct, tag="counted", tag_field="is"):
    """A submit was refused; it has its number all the same."""


class Over(msgspec.Struct, tag="over", tag_field="is"):
    """A job that has ended without ever being a task."""

    name: str
    state: str
    why: str
    at: float


class Canceled(msgspec.Struct, tag="canceled", tag_field="is"):
    """A user canceled it; ``index``: one element of it."""

    name: str
    index: int | None = None


class Removed(msgspec.Struct, tag="removed", tag_field="is"):
    name: str


class Began(msgspec.Struct, tag="began", tag_field="is"):
    """A service begins, or begins again; ``wd`` is its directory, ``net``: programs may come to it."""

    wd: str
    net: bool


class Finish(msgspec.Struct, tag="finish", tag_field="is"):
    """The service is asked to end when all jobs have."""


Record = Submitted | Planned | Done | Refused | Counted | Over | Canceled | Removed | Began | Finish
_decode = msgspec.json.Decoder(Record).decode
_encode = msgspec.json.Encoder().encode


class Job:
    """A job. ``ids`` are its tasks: one, or (``single``) one for each element, empty where that is omitted."""

    __slots__ = (
        "at", "body", "canceled", "cwd", "draft", "dropped", "each", "ended", "ids", "indices", "key", "lost", "name",
        "program", "single", "state", "values", "why", "words",
    )  # fmt: skip

    def __init__(self, draft: Draft, body: dict[str, Any], at: float, key: str, words: dict[str, str]) -> None:
        task = draft.task
        self.name = draft.name
        self.body = _encode(body)
        self.at = at  # unix seconds of the submit
        self.key = key  # of the submission that brought it
        self.draft: Draft | None = draft  # until it has become tasks
        self.indices = draft.indices
        self.words = words  # of the request
        self.each = any(waits_for_same(text) for text in draft.after)  # it waits element by element
        self.cwd = task.cwd or ""
        self.program = fill(body["execution"].get("exec") or "bash", words | {"jname": draft.name})
        # Kept only where a name needs them.
        self.values = task.values if "itval" in self.cwd + self.program else None
        self.ids: list[str] = []
        self.single = False
        self.lost: dict[int, str] = {}  # elements that are omitted, and why
        self.state = ""  # once it has ended, as far as was seen
        self.why = ""
        self.ended = 0.0
        self.canceled = False
        self.dropped: set[int] = set()  # elements that were canceled one by one

    def tasks(self) -> list[tuple[str, str, int]]:
        """Its tasks: id, name, and how many elements that stands for."""
        if not self.single:
            return [(task_id, self.name, len(self.indices or (None,))) for task_id in self.ids]
        pairs = zip(self.ids, self.indices or (), strict=True)
        return [(task_id, f"{self.name}:{index}", 1) for task_id, index in pairs if task_id]

    def place(self, root: str, index: int | None, cores: int, nodes: list[str]) -> tuple[str, str]:
        """The directory where its task runs, or that element of it, and the name of the program."""
        words = {"root_wd": root, "ncores": str(cores), "nnodes": str(len(nodes)), "nlist": ",".join(nodes)}
        if index is not None:
            value = self.values[index] if self.values is not None else str(index)
            words |= {"it": str(index), "itval": value}
        directory = os.path.join(root, fill(self.cwd, words)) if self.cwd else root
        return directory, os.path.basename(fill(self.program, words))

    def description(self) -> dict[str, Any]:
        """The job as it was given, with the words of its request filled in."""
        words = self.words | {"jname": self.name}
        found: dict[str, Any] = filled(msgspec.json.decode(self.body), words)
        return found


def filled(value: Any, words: dict[str, str]) -> Any:
    """Decoded JSON with the words filled in wherever there is text."""
    if isinstance(value, str):
        return fill(value, words)
    if isinstance(value, list):
        return [filled(item, words) for item in value]
    if isinstance(value, dict):
        return {fill(key, words): filled(item, words) for key, item in value.items()}
    return value


def digest(jobs: list[Any]) -> bytes:
    """By which the same jobs are known again."""
    return hashlib.sha256(_encode(jobs)).digest()


class Registry:
    """``jobs`` by name, in the order of their submits. ``tasks`` has by the id of a task its job, removed ones too,
    and the index of the element that it is.

    ``committed`` tells the number of the first task of a submission, by its key; None when there is no such.
    """

    def __init__(self, path: str, committed: Callable[[str], int | None]) -> None:
        self.jobs: dict[str, Job] = {}
        self.tasks: dict[str, tuple[Job, int | None]] = {}
        self.held: dict[str, Job] = {}  # wait for a job that nobody has submitted yet
        self.over: list[Job] = []  # ended without ever being a task
        self.submissions: dict[str, tuple[bytes, list[str]]] = {}  # key -> digest of the jobs as given, their names
        self.open: set[str] = set()  # keys of submissions that have not ended, as far as was seen
        self.submits = 0
        self.wd = ""  # of the service; empty when there is none
        self.net = False
        self.earlier: list[tuple[bytes, list[str]]] = []  # as ``submissions``, from before the service began
        self.finish = False
        self._committed = committed
        self._plans: dict[str, Planned] = {}
        self._drafts: dict[str, Draft] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._read = 0
        with self.locked():
            pass

    def close(self) -> None:
        os.close(self._file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The only one who writes, and knowing all that was written."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self.refresh()
            # Nobody is at it: who began these plans was killed, or did not hear what became of them.
            for key in list(self._plans):
                first = self._committed(key)
                if first is None:
                    del self._plans[key]
                else:
                    self.write(Done(key, first))
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def refresh(self) -> None:
        """Take in what other processes have written."""
        size = os.fstat(self._file).st_size
        if size == self._read:
            return
        data = os.pread(self._file, size - self._read, self._read)
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                self._apply(_decode(line))
            except msgspec.DecodeError:
                continue  # the torn end of a write that a kill has cut off, closed by the newline of the next one
        self._read += len(whole)

    def write(self, *records: Record, drafts: list[Draft] | None = None) -> None:
        """Append and take in; only while `locked`. ``drafts`` are those of a Submitted, at hand already."""
        data = b"".join(_encode(record) + b"\n" for record in records)
        if os.fstat(self._file).st_size > self._read:
            data = b"\n" + data  # a torn end: its writer is dead, as we have the lock
        written = 0
        while written < len(data):
            written += os.write(self._file, data[written:])
        self._read = os.fstat(self._file).st_size
        self._drafts = {draft.name: draft for draft in drafts or ()}
        for record in records:
            self._apply(record)
        self._drafts = {}

    def _apply(self, record: Record) -> None:
        if isinstance(record, Submitted):
            self._submitted(record)
        elif isinstance(record, Counted):
            self.submits += 1
        elif isinstance(record, Planned):
            self._plans[record.key] = record
        elif isinstance(record, Done):
            self._done(self._plans.pop(record.key), record.first)
        elif isinstance(record, Refused):
            self._plans.pop(record.key, None)
            del self.submissions[record.key]
            self.jobs = {name: job for name, job in self.jobs.items() if job.ids or job.key != record.key}
            self.over = [job for job in self.over if job.key != record.key]
            self.held = {name: job for name, job in self.held.items() if job.key != record.key}
        elif isinstance(record, Began):
            self.wd, self.net, self.finish = record.wd, record.net, False
            self.earlier = list(self.submissions.values())
        elif isinstance(record, Finish):
            self.finish = True
        elif (job := self.jobs.get(record.name)) is None:
            pass  # removed meanwhile
        elif isinstance(record, Over):
            job.state, job.why, job.ended, job.draft = record.state, record.why, record.at, None
            self.over.append(self.held.pop(record.name))
        elif isinstance(record, Removed):
            del self.jobs[record.name]
        elif record.index is None:
            job.canceled = True
        else:
            job.dropped.add(record.index)

    def _submitted(self, record: Submitted) -> None:
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

    def _done(self, plan: Planned, first: int) -> None:
        self.open.add(plan.key)
        for name, single in plan.jobs:
            job = self.held.pop(name)
            job.single, job.draft = single, None
            for index in (job.indices or ()) if single else (None,):
                if index is not None and (why := plan.lost.get(f"{name}:{index}")) is not None:
                    job.lost[index] = why
                    job.ids.append("")
                    continue
                job.ids.append(id_of(first))
                self.tasks[job.ids[-1]] = job, index
                first += 1
