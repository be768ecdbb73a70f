"""`Report`: an entry for each job and each element that has ended, as QCG-PilotJob writes it.

It is made from the pilot's journal while that grows. A service that is resumed continues its file: what it contains is
not written again.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from pilotq.broker.qcg.service.job_info import runtime_facts
from pilotq.broker.qcg.service.lookup import JournalTail
from pilotq.broker.qcg.service.registry import Job, Registry
from pilotq.broker.qcg.service.states import (
    OMITTED,
    QUEUED,
    SUCCEED,
    TaskRecord,
    exit_code,
    history_of,
    job_state,
    local_time,
    message_of,
    state_of,
    timestamp,
)
from pilotq.broker.tasks.array_outcomes import indices_of

History = list[tuple[str, float]]
NAMED_MAX = 20  # failures that are described one by one
_TEXT_NAME = re.compile(r"^(\S+) \([A-Z]+\)", re.MULTILINE)


class Report:
    """Writes the entries of one service's jobs to ``path``, in one of REPORT_FORMATS.

    ``root`` is the directory of the service. ``jobs`` and ``tasks`` count states of what has ended: of jobs, and of
    elements and jobs without. ``failures`` are sentences about the first that did not succeed.
    """

    def __init__(self, registry: Registry, journal: str, root: str, *, path: str, form: str) -> None:
        self.jobs: Counter[str] = Counter()
        self.tasks: Counter[str] = Counter()
        self.failures: list[str] = []
        self._registry = registry
        self._tail = JournalTail(journal)
        self._root = root
        self._path = path
        self._form = form
        self._written = _names_in(path, form)
        self._unclaimed: list[TaskRecord] = []  # records of tasks that the registry does not have yet
        self._never_ran_written = 0  # entries of jobs that were never a task
        self._elements: dict[str, _EndedElements] = defaultdict(_EndedElements)
        self._entries: list[str] = []

    def write_ended(self) -> None:
        """Write what has ended since the last call."""
        self._registry.refresh()
        unknown, self._unclaimed = self._unclaimed, []
        for record in (*unknown, *self._tail.read_new()):
            if record.final:
                self._take(record)
        for job in self._registry.never_ran[self._never_ran_written :]:
            self._whole(job, job.state, job.ended_at, job.why)
            self.tasks.update({job.state: len(job.indices or (None,))})
        self._never_ran_written = len(self._registry.never_ran)
        if self._entries:
            self._write("".join(self._entries))
            self._entries.clear()

    def _take(self, record: TaskRecord) -> None:
        found = self._registry.tasks.get(record.array or record.id)
        if found is None:
            self._unclaimed.append(record)
            return
        job, index = found
        state = state_of(record.status, record.reason)
        if record.array:
            self._element(job, int(record.index or 0), record, state)
        elif index is not None:
            self._element(job, index, record, state)
            seen = self._elements[job.name]
            if len(seen.ended) == len(job.ids) - len(job.omitted):
                states = seen.states | ({OMITTED} if job.omitted else set())
                self.tasks.update({OMITTED: len(job.omitted)} if job.omitted else {})
                self._whole(job, job_state(states, canceled=job.canceled, elementwise=job.elementwise), seen.last)
                del self._elements[job.name]
        elif job.indices is not None:
            self._array(job, record, job_state({state}, canceled=job.canceled, elementwise=job.elementwise))
        else:
            self.tasks[state] += 1
            self._job(job, state, history_of(record), record)

    def _array(self, job: Job, record: TaskRecord, state: str) -> None:
        """The last entry of an array: elements that were canceled or omitted without ever running have no other."""
        seen = self._elements.pop(job.name, _EndedElements())
        for index in indices_of(record.elements.get("canceled", "")):
            if index not in seen.ended:
                reason = "canceled" if job.canceled or index in job.canceled_elements else "dependency"
                lost = TaskRecord(record.id, status="canceled", reason=reason, ended=record.ended)
                if state == OMITTED:
                    self.tasks[OMITTED] += 1  # as a whole: its elements have no entries
                else:
                    self._element(job, index, lost, state_of("canceled", reason))
        self._elements.pop(job.name, None)
        if state == OMITTED:
            self._fail(job.name, state, "")
        self._whole(job, state, record.ended or job.submitted_at)

    def _element(self, job: Job, index: int, record: TaskRecord, state: str) -> None:
        self._elements[job.name].add(index, state, record.ended or 0.0)
        self.tasks[state] += 1
        message = message_of(record)
        if state != SUCCEED:
            self._fail(f"{job.name}:{index}", state, message or _exit(record))
        facts = runtime_facts(job, index, record, self._root)
        self._entry(f"{job.name}:{index}", state, history_of(record, element=True), facts, message, {})

    def _whole(self, job: Job, state: str, ended: float, why: str = "") -> None:
        """A job without one task that is all of it."""
        self._job(job, state, [(QUEUED, job.submitted_at), (state, ended)], None, why)

    def _job(self, job: Job, state: str, history: History, record: TaskRecord | None, why: str = "") -> None:
        self.jobs[state] += 1
        message = message_of(record) if record is not None else why
        if state != SUCCEED and (job.indices is None or not job.ids):
            self._fail(job.name, state, message or (_exit(record) if record is not None else ""))
        facts = runtime_facts(job, None, record, self._root) if record is not None else {}
        self._entry(job.name, state, history, facts, message, _description(job))

    def _fail(self, name: str, state: str, why: str) -> None:
        if len(self.failures) < NAMED_MAX:
            self.failures.append(f"{name} {state}" + (f": {why}" if why else ""))

    def _entry(
        self, name: str, state: str, history: History, facts: dict[str, str], message: str, description: dict[str, Any]
    ) -> None:
        if self._written[name] > 0:
            self._written[name] -= 1
        elif self._form == "json":
            entry: dict[str, Any] = {
                "name": name,
                "state": state,
                "history": [{"state": step, "date": local_time(at).isoformat()} for step, at in history],
                "runtime": facts,
                **description,
            }
            if message:
                entry["messages"] = message
            self._entries.append(json.dumps(entry, separators=(",", ": ")) + "\n")
        elif self._form == "text":
            steps = "\n\t".join(f"{timestamp(at)}: {step}" for step, at in history)
            known = "\n\t".join(f"{key}: {value}" for key, value in facts.items())
            self._entries.append(f"{name} ({state}) {message}\n\t{steps}\n\t{known}\n")

    def _write(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


class _EndedElements:
    """The elements that have ended of an iteration that has not."""

    __slots__ = ("ended", "last", "states")

    def __init__(self) -> None:
        self.ended: set[int] = set()
        self.states: set[str] = set()
        self.last = 0.0

    def add(self, index: int, state: str, ended: float) -> None:
        self.ended.add(index)
        self.states.add(state)
        self.last = max(self.last, ended)


def _exit(record: TaskRecord) -> str:
    return f"exit code {exit_code(record)}" if record.cpus else ""


def _description(job: Job) -> dict[str, Any]:
    """The parts of the description that the report shows, with QCG-PilotJob's defaults."""
    body = job.description()
    given = {key: value for key, value in body["execution"].items() if value is not None}
    given |= {"args": [str(arg) for arg in given.get("args", ())]}
    if given.get("modules") and isinstance(given["modules"], str):
        given["modules"] = [given["modules"]]
    if "model" in given:
        given["model"] = given["model"].lower()
    execution = {"exec": None, "args": [], "env": {}, "script": None} | given
    resources = {
        key: {"exact": value} if key in ("numCores", "numNodes") and isinstance(value, int) else value
        for key, value in (body.get("resources") or {"numCores": 1}).items()
        if value is not None
    }
    if resources.get("nodeCrs"):
        resources["nodeCrs"] = {name.upper(): number for name, number in resources["nodeCrs"].items()}
    found = {"execution": {"model_opts": {}} | execution, "resources": resources}
    waits = body.get("dependencies")
    return found if waits is None else found | {"dependencies": {"after": waits.get("after") or []}}


def _names_in(path: str, form: str) -> Counter[str]:
    """How often each name occurs in a report; what a kill has cut off at its end is removed."""
    if form == "none" or not os.path.exists(path):
        return Counter()
    with open(path, "r+", encoding="utf-8", errors="backslashreplace") as file:
        text = file.read()
        names: Iterable[str]
        if form == "text":
            names = _TEXT_NAME.findall(text)
        else:
            whole_text, newline, torn = text.rpartition("\n")
            if torn:
                file.truncate(len((whole_text + newline).encode()))
            names = [json.loads(line)["name"] for line in whole_text.splitlines() if line.startswith("{")]
    return Counter(names)
