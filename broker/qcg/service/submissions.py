"""From the jobs of a submit request to tasks: what is refused, what is held back, what becomes a task now."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.broker.qcg.service.error_texts import WRONG, check_form, in_old_words
from pilotq.broker.qcg.service.lookup import Look
from pilotq.broker.qcg.service.registry import Counted, Done, Over, Planned, Record, Refused, Registry, Submitted
from pilotq.broker.qcg.service.states import FAILED, OMITTED, moment
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.store import keys
from pilotq.broker.store.messages import NodeInfo
from pilotq.broker.taskfiles.qcg import draft_of, job_of, request_words
from pilotq.broker.taskfiles.qcg_tasks import Draft, Known, Unmet, tasks_of
from pilotq.broker.tasks.model import Request, Shared, order_of


class Never:
    """A job that cannot run here, as what others wait for."""

    def __init__(self, draft: Draft) -> None:
        self._name = draft.name
        self.indices = draft.indices
        self.array = None

    def parents(self, index: int | None) -> NoReturn:
        name = self._name if index is None else f"{self._name}:{index}"
        raise Unmet(f"{name!r}, which is {FAILED}")


class Submits:
    """Submits of one service; ``totals`` are the cores and nodes that iteration schedulers share out."""

    def __init__(
        self, broker: Broker, registry: Registry, look: Look, *, shared: Shared, totals: tuple[int, int]
    ) -> None:
        self._broker = broker
        self._registry = registry
        self._look = look
        self._shared = shared
        self._totals = totals

    def submit(self, bodies: Sequence[Any]) -> list[str]:
        """Take these jobs, all or none, and return their names; raises InvalidInput.

        A job that waits for one which nobody has submitted yet is held until somebody does, or until `settle`.
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
        words = request_words(number, moment(now))
        drafts = self._drafts(bodies, words)
        never = self._never(drafts)
        ready = self._ready([*self._held(), *(draft for draft in drafts if draft.name not in never)], never)
        key = f"qcg-{secrets.token_hex(8)}"
        submitted = Submitted(now, words, self._totals[0], list(bodies), key, self._totals[1])
        overs = [Over(name, FAILED, why, now) for name, why in never.items()]
        known = {draft.name: Never(draft) for draft in drafts if draft.name in never}
        self._commit(key, ready, known, [submitted, *overs], drafts)
        return [draft.name for draft in drafts]

    def _drafts(self, bodies: Sequence[Any], words: Mapping[str, str]) -> list[Draft]:
        drafts: dict[str, Draft] = {}
        for number, body in enumerate(bodies):
            path = f"jobs[{number}]"
            try:
                draft = draft_of(job_of(body, WRONG, path), WRONG, path, words, *self._totals)
            except InvalidInput as error:
                raise in_old_words(error) from None
            if draft.name in self._registry.jobs or draft.name in drafts:
                raise InvalidInput(f"Job {draft.name} already exist")
            drafts[draft.name] = draft
        return list(drafts.values())

    def settle(self) -> dict[str, str]:
        """Omit what waits for jobs that nobody has submitted; returns the names of those jobs, with the reason."""
        with self._registry.locked():
            held = self._held()
            if not held:
                return {}
            before = len(self._registry.over)
            key = f"qcg-{secrets.token_hex(8)}"
            try:
                self._commit(key, held, {}, [], [])
            except InvalidInput as error:
                # The nodes have changed since they were submitted: nobody is there to be told but their report.
                now = time.time()
                self._registry.write(*(Over(draft.name, FAILED, str(error), now) for draft in held))
            return {job.name: job.why for job in self._registry.over[before:]}

    def _held(self) -> list[Draft]:
        return [job.draft for job in self._registry.held.values() if job.draft is not None]

    def _never(self, drafts: Sequence[Draft]) -> dict[str, str]:
        """Jobs that ask for a resource which no node has, with the reason; other requests that cannot be are refused.

        QCG-PilotJob accepts them, too, when it looks at numbers of cores and nodes only: then they fail, and the
        others that came with them run.
        """
        cluster: Cluster | None = None
        never: dict[str, str] = {}
        fits: dict[Request, str | None] = {}
        for draft in drafts:
            if draft.never:
                never[draft.name] = draft.never
                continue
            for request in _requests(draft):
                if request not in fits:
                    cluster = cluster or self._cluster()
                    plain = msgspec.structs.replace(request, gpus=0, use=())
                    if why := cluster.never_fits(plain):
                        raise InvalidInput(f"Not enough resources for job {draft.name}: {why}")
                    fits[request] = cluster.never_fits(request)
                if why := fits[request]:
                    never[draft.name] = f"Not enough resources: {why}"
        return never

    def _cluster(self) -> Cluster:
        cluster = Cluster()
        for record in self._broker.link.call("HVALS", keys.NODES):
            cluster.add_node(msgspec.json.decode(record, type=NodeInfo))
        return cluster

    def _ready(self, drafts: Sequence[Draft], never: Mapping[str, str]) -> list[Draft]:
        """Those that wait for nothing unknown, over any number of steps."""
        found = {draft.name for draft in drafts} | never.keys()
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
        self, key: str, ready: Sequence[Draft], never: Mapping[str, Known], records: list[Record], fresh: list[Draft]
    ) -> None:
        """Make tasks of what is ready, and write down all of it."""
        wanted = {name for draft in ready for name in _parents(draft)} - {draft.name for draft in ready}
        jobs = self._registry.jobs
        parents = self._look.parents(jobs[name] for name in sorted(wanted) if name in jobs)
        tasks, lost = tasks_of(ready, WRONG, {**parents, **never})
        planned = dict(_base_name(task.name or "") for task in tasks)
        whys = {_base_name(name)[0]: why for name, why in lost.items()}
        now = time.time()
        records += (Over(draft.name, OMITTED, whys[draft.name], now) for draft in ready if draft.name not in planned)
        if tasks:
            gone = {name: why for name, why in lost.items() if planned.get(_base_name(name)[0])}
            records.append(Planned(key, list(planned.items()), gone))
        self._registry.write(*records, drafts=fresh)
        if not tasks:
            return
        try:
            ids = self._broker.enqueue_many(tasks, key=key, shared=self._shared)
        except InvalidInput:
            self._registry.write(Refused(key))
            raise
        self._registry.write(Done(key, order_of(ids[0])))


def _base_name(name: str) -> tuple[str, bool]:
    """The job's name, and whether it is one element of it that has this name."""
    job, colon, _ = name.partition(":")
    return job, bool(colon)


def _parents(draft: Draft) -> Iterable[str]:
    return {text.partition(":")[0] for text in draft.after}


def _requests(draft: Draft) -> Iterable[Request]:
    return [draft.task.request] if draft.requests is None else set(draft.requests)
