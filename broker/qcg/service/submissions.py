"""`Submissions`: which jobs of a submit request are refused, which are held, and which become tasks now."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.qcg.service.error_texts import WRONG_SUBMIT, check_form, with_original_text
from pilotq.broker.qcg.service.lookup import JobLookup
from pilotq.broker.qcg.service.registry import (
    Committed,
    Counted,
    NeverRan,
    Planned,
    Record,
    Refused,
    Registry,
    Submitted,
)
from pilotq.broker.qcg.service.states import FAILED, OMITTED, local_time
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.store.registry import read_nodes
from pilotq.broker.taskfiles.qcg import draft_of, job_of, request_variables
from pilotq.broker.taskfiles.qcg_tasks import EarlierJob, JobDraft, UnmetDependency, tasks_of
from pilotq.broker.tasks.model import Request, order_of
from pilotq.broker.tasks.submit_context import SubmitContext


class UnrunnableJob:
    """A job that cannot run here, in the form in which others may wait for it."""

    def __init__(self, draft: JobDraft) -> None:
        self._name = draft.name
        self.indices = draft.indices
        self.array = None

    def parents(self, index: int | None) -> NoReturn:
        name = self._name if index is None else f"{self._name}:{index}"
        raise UnmetDependency(f"{name!r}, which is {FAILED}")


class Submissions:
    """Handles the submits of one service; ``totals`` are the cores and nodes that schedulers distribute."""

    def __init__(
        self, broker: Broker, registry: Registry, lookup: JobLookup, *, context: SubmitContext, totals: tuple[int, int]
    ) -> None:
        self._broker = broker
        self._registry = registry
        self._lookup = lookup
        self._context = context
        self._totals = totals

    def submit(self, bodies: Sequence[Any]) -> list[str]:
        """Accept these jobs, all or none, and return their names; raises InvalidInput.

        A job that waits for one which was not submitted yet is held until it is, or until `omit_unmet`.
        """
        with self._registry.locked():
            number = self._registry.submits + 1
            try:
                return self._take(bodies, number)
            except InvalidInput:
                if bodies and self._registry.submits < number:
                    self._registry.write(Counted())
                raise

    def _take(self, bodies: Sequence[Any], number: int) -> list[str]:
        check_form(bodies)
        now = time.time()
        variables = request_variables(number, local_time(now))
        drafts = self._drafts(bodies, variables)
        unrunnable = self._unrunnable(drafts)
        ready = self._ready([*self._held(), *(draft for draft in drafts if draft.name not in unrunnable)], unrunnable)
        key = f"qcg-{secrets.token_hex(8)}"
        submitted = Submitted(now, variables, self._totals[0], list(bodies), key, self._totals[1])
        never_ran = [NeverRan(name, FAILED, why, now) for name, why in unrunnable.items()]
        known = {draft.name: UnrunnableJob(draft) for draft in drafts if draft.name in unrunnable}
        self._commit(key, ready, known, [submitted, *never_ran], drafts)
        return [draft.name for draft in drafts]

    def _drafts(self, bodies: Sequence[Any], variables: Mapping[str, str]) -> list[JobDraft]:
        drafts: dict[str, JobDraft] = {}
        for number, body in enumerate(bodies):
            path = f"jobs[{number}]"
            try:
                draft = draft_of(job_of(body, WRONG_SUBMIT, path), WRONG_SUBMIT, path, variables, *self._totals)
            except InvalidInput as error:
                raise with_original_text(error) from None
            if draft.name in self._registry.jobs or draft.name in drafts:
                raise InvalidInput(f"Job {draft.name} already exist")
            drafts[draft.name] = draft
        return list(drafts.values())

    def omit_unmet(self) -> dict[str, str]:
        """Omit jobs that wait for unknown ones; returns their names, with the reason."""
        with self._registry.locked():
            held = self._held()
            if not held:
                return {}
            before = len(self._registry.never_ran)
            key = f"qcg-{secrets.token_hex(8)}"
            try:
                self._commit(key, held, {}, [], [])
            except InvalidInput as error:
                # The nodes have changed since the submit: only the report can say so.
                now = time.time()
                self._registry.write(*(NeverRan(draft.name, FAILED, str(error), now) for draft in held))
            return {job.name: job.why for job in self._registry.never_ran[before:]}

    def _held(self) -> list[JobDraft]:
        return [job.draft for job in self._registry.held.values() if job.draft is not None]

    def _unrunnable(self, drafts: Sequence[JobDraft]) -> dict[str, str]:
        """Jobs that ask for a resource which no node has, with the reason; other impossible requests are refused.

        QCG-PilotJob accepts them, too, as it checks numbers of cores and nodes only: then they fail, and the others of
        the submit run.
        """
        cluster: Cluster | None = None
        unrunnable: dict[str, str] = {}
        fits: dict[Request, str | None] = {}
        for draft in drafts:
            if draft.unrunnable:
                unrunnable[draft.name] = draft.unrunnable
                continue
            for request in _requests(draft):
                if request not in fits:
                    cluster = cluster or self._cluster()
                    plain = msgspec.structs.replace(request, gpus=0, use=())
                    if why := cluster.never_fits(plain):
                        raise InvalidInput(f"Not enough resources for job {draft.name}: {why}")
                    fits[request] = cluster.never_fits(request)
                if why := fits[request]:
                    unrunnable[draft.name] = f"Not enough resources: {why}"
        return unrunnable

    def _cluster(self) -> Cluster:
        cluster = Cluster()
        for info in read_nodes(self._broker.link):
            cluster.add_node(info)
        return cluster

    def _ready(self, drafts: Sequence[JobDraft], unrunnable: Mapping[str, str]) -> list[JobDraft]:
        """The drafts that do not depend on an unknown job, over any number of steps."""
        found = {draft.name for draft in drafts} | unrunnable.keys()
        jobs, waiting = self._registry.jobs, self._registry.held
        users: dict[str, list[str]] = defaultdict(list)
        pending: list[str] = []
        for draft in drafts:
            for name in _parents(draft):
                users[name].append(draft.name)
                if name not in found and (name not in jobs or name in waiting):
                    pending.append(draft.name)
        held: set[str] = set()
        while pending:
            name = pending.pop()
            if name not in held:
                held.add(name)
                pending += users[name]
        return [draft for draft in drafts if draft.name not in held]

    def _commit(
        self,
        key: str,
        ready: Sequence[JobDraft],
        unrunnable: Mapping[str, EarlierJob],
        records: list[Record],
        fresh: list[JobDraft],
    ) -> None:
        """Turn the ready jobs into tasks, and record all of it."""
        wanted = {name for draft in ready for name in _parents(draft)} - {draft.name for draft in ready}
        jobs = self._registry.jobs
        parents = self._lookup.parents(jobs[name] for name in sorted(wanted) if name in jobs)
        tasks, omitted = tasks_of(ready, WRONG_SUBMIT, {**parents, **unrunnable})
        planned = dict(_base_name(task.name or "") for task in tasks)
        reasons = {_base_name(name)[0]: why for name, why in omitted.items()}
        now = time.time()
        records += (
            NeverRan(draft.name, OMITTED, reasons[draft.name], now) for draft in ready if draft.name not in planned
        )
        if tasks:
            omitted_elements = {name: why for name, why in omitted.items() if planned.get(_base_name(name)[0])}
            records.append(Planned(key, list(planned.items()), omitted_elements))
        self._registry.write(*records, drafts=fresh)
        if not tasks:
            return
        try:
            ids = self._broker.enqueue_many(tasks, key=key, context=self._context)
        except InvalidInput:
            self._registry.write(Refused(key))
            raise
        self._registry.write(Committed(key, order_of(ids[0])))


def _base_name(name: str) -> tuple[str, bool]:
    """The job's name, and whether it is one element of it that has this name."""
    job, colon, _ = name.partition(":")
    return job, bool(colon)


def _parents(draft: JobDraft) -> Iterable[str]:
    return {text.partition(":")[0] for text in draft.after}


def _requests(draft: JobDraft) -> Iterable[Request]:
    return [draft.task.request] if draft.requests is None else set(draft.requests)
