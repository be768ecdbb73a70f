"""`Requests`: handles the requests of QCG-PilotJob, and returns their replies; `handle` is the whole interface.

    requests = Requests(broker, wd="/data/run")
    reply = requests.handle({"request": "submit", "jobs": [{"name": "a", "execution": {"exec": "date"}}]})
    # {"code": 0, "message": "1 jobs submitted", "data": {"submitted": 1, "jobs": ["a"]}}
    requests.omit_unmet()   # jobs that wait for unknown jobs are omitted
    requests.handle({"request": "status", "options": {"allJobsFinished": True}})

Forms of replies, states and messages are QCG-PilotJob's. Deliberately different: of several names of which some are
unknown ``jobStatus`` and ``jobInfo`` return the others, as its documentation promises; a job that waits for an
unknown one is held until `Requests.omit_unmet`.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput, NoPilot
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.qcg.service.address import ADDRESS, AUXILIARY, address_of
from pilotq.broker.qcg.service.error_texts import WRONG_SUBMIT
from pilotq.broker.qcg.service.job_info import JobQueries, JobReference, UnknownJob, find_job
from pilotq.broker.qcg.service.lookup import JobLookup
from pilotq.broker.qcg.service.registry import (
    FILE,
    Canceled,
    FinishRequested,
    NeverRan,
    Registry,
    Removed,
    ServiceBegan,
    digest,
)
from pilotq.broker.qcg.service.states import CANCELED, FINAL, GROUPS, duration, timestamp
from pilotq.broker.qcg.service.submissions import Submissions
from pilotq.broker.store import keys
from pilotq.broker.tasks.submit_context import capture_context

Reply = dict[str, Any]
FINISH_WHEN_DONE = "finishAfterAllTasksDone"
FINISH_S = 2  # QCG-PilotJob's pause between the request to finish and the end


class Requests:
    """The requests of one service. Not for several threads; several processes may serve the same pilot.

    The jobs are recorded in the pilot's directory (``qcg-jobs.jsonl``), so a restarted service has them all; a submit
    that is equal to one from before the restart gets the same reply, and submits nothing.
    ``wd`` is the directory that jobs' relative paths are below (default: that of the service, else the current one),
    ``env_policy`` as in `capture_context`. All nodes must have joined.
    """

    def __init__(self, broker: Broker, *, wd: str | None = None, env_policy: str = "submit") -> None:
        if broker.pilot is None:
            raise NoPilot("QCG-PilotJob's requests need the pilot's directory: connect with Broker.connect(DIR)")
        self.pilot = broker.pilot
        self.begin = time.time()
        self.broker = broker
        self.lookup = JobLookup(broker, broker.pilot.journal)
        self.registry = open_registry(broker, broker.pilot)
        self.wd = os.path.abspath(wd or self.registry.wd or os.getcwd())
        self.queries = JobQueries(self.lookup, self.wd)
        nodes = broker.nodes()
        totals = sum(node.cores for node in nodes), len(nodes)
        context = capture_context(env_policy)
        # An empty environment stands for the worker's own, and must stay empty.
        env = context.env
        if self.registry.net and env:
            env = env | {ADDRESS.encode(): os.fsencode(address_of(self.pilot.directory))}
        context = msgspec.structs.replace(context, cwd=os.fsencode(self.wd), env=env)
        self._submissions = Submissions(broker, self.registry, self.lookup, context=context, totals=totals)

    def close(self) -> None:
        """Close the file of the registry."""
        self.registry.close()

    def handle(self, request: Any) -> Reply:
        """The reply: ``code`` (0 done, 1 refused), and ``message`` and ``data`` as that request has them.

        Never raises for what a request says; raises ServerUnavailable and StateLost as Broker does.
        """
        if not isinstance(request, dict) or not isinstance(request.get("request"), str):
            return _refusal("Invalid request: Invalid request")
        handler = _HANDLERS.get(request["request"])
        if handler is None:
            return _refusal(f"Invalid request: Unknown request name: {request['request']}")
        try:
            self.registry.refresh()
            return handler(self, request)
        except InvalidInput as error:
            return _refusal(str(error))
        except RecursionError:
            return _refusal("Invalid request: lists and tables are nested too deeply")

    def omit_unmet(self) -> Mapping[str, str]:
        """Omit jobs that wait for unknown ones: no more submits come for now. Returns name -> why.

        Until then such jobs are held (QUEUED): a job may be submitted before the one it waits for. An interactive
        service calls it after each submit, which is QCG-PilotJob's way (unknown is omitted).
        """
        return self._submissions.omit_unmet()

    @property
    def all_finished(self) -> bool:
        """Whether every job has ended. It costs one read for each submission that has not, whatever its size."""
        registry = self.registry
        registry.open -= {key for key in registry.open if self.broker.counts(key).left <= 0}
        return not registry.open and not registry.held

    # -- one for each request -----------------------------------------------------------------------------------------

    def _submit(self, request: Mapping[str, Any]) -> Reply:
        jobs = request.get("jobs")
        if not isinstance(jobs, list):
            raise InvalidInput(f"Invalid request: {WRONG_SUBMIT} - missing jobs data")
        names = self._names_of_equal_submit(jobs) or self._submissions.submit(jobs)
        return _answer(f"{len(names)} jobs submitted", submitted=len(names), jobs=names)

    def _names_of_equal_submit(self, jobs: list[Any]) -> list[str]:
        """The names of the jobs of an equal submit to an earlier service; each such submit is found once."""
        earlier = self.registry.earlier
        mark = digest(jobs) if earlier else b""
        for place, (known, names) in enumerate(earlier):
            if known == mark:
                del earlier[place]
                return names
        return []

    def _list_jobs(self, _request: Mapping[str, Any]) -> Reply:
        jobs = self.queries.list_jobs(list(self.registry.jobs.values()))
        return _answer(length=len(jobs), jobs=jobs)

    def _job_status(self, request: Mapping[str, Any]) -> Reply:
        def states_of(wanted: Sequence[JobReference]) -> list[Reply]:
            states = self.queries.states(wanted)
            return [{"jobName": item.name, "status": state} for item, state in zip(wanted, states, strict=True)]

        return self._about_jobs(_names(request, "job status"), states_of)

    def _job_info(self, request: Mapping[str, Any]) -> Reply:
        params = request.get("params")
        childs = bool(params.get("withChilds")) if isinstance(params, dict) else False
        return self._about_jobs(_names(request, "job info"), lambda wanted: self.queries.details(wanted, childs=childs))

    def _about_jobs(self, names: Sequence[str], details: Callable[[Sequence[JobReference]], list[Reply]]) -> Reply:
        found: dict[str, JobReference] = {}
        unknown: dict[str, str] = {}
        for name in names:
            try:
                found[name] = find_job(self.registry.jobs, name)
            except UnknownJob as error:
                unknown[name] = str(error)
        if unknown and not found:
            return _refusal(next(iter(unknown.values())))
        known = dict(zip(found, details(list(found.values())), strict=True))
        return _answer(jobs={
            name: {"status": 0, "data": known[name]} if name in known else {"status": 1, "message": unknown[name]}
            for name in names
        })  # fmt: skip

    def _cancel_job(self, request: Mapping[str, Any]) -> Reply:
        canceled = 0
        errors: dict[str, str] = {}
        for name in _names(request, "cancel job"):
            try:
                self._cancel(name)
                canceled += 1
            except UnknownJob as error:
                missing = f"Job/iteration {name} doesn't exist"
                errors[name] = missing if "exist" in str(error) else str(error)
            except InvalidInput as error:
                errors[name] = str(error)
        return _counted("canceled", canceled, errors)

    def _cancel(self, name: str) -> None:
        item = find_job(self.registry.jobs, name)
        job, index = item
        if self.queries.states([item])[0] in FINAL:
            raise InvalidInput(f"Job/iteration {name} already finished - can not be canceled")
        with self.registry.locked():
            if job.canceled:
                raise InvalidInput(f"Job {name} already canceled")
            self.registry.write(Canceled(job.name, index))
            if job.name in self.registry.held:
                # No single element of a held job can be canceled.
                self.registry.write(NeverRan(job.name, CANCELED, "", time.time()))
        if job.ids:
            self.broker.cancel([item.id] if index is not None or not job.per_element else filter(None, job.ids))

    def _remove_job(self, request: Mapping[str, Any]) -> Reply:
        removed = 0
        errors: dict[str, str] = {}
        for name in _names(request, "remove job"):
            with self.registry.locked():
                job = self.registry.jobs.get(name)
                if job is None:
                    errors[name] = f"Job '{name}' doesn't exist"
                elif self.lookup.states([job])[0] not in FINAL:
                    errors[name] = f"Job '{name}' not finished - can not be removed"
                else:
                    self.registry.write(Removed(name))
                    removed += 1
        return _counted("removed", removed, errors)

    def _control(self, request: Mapping[str, Any]) -> Reply:
        command = request.get("command")
        if not isinstance(command, str):
            raise InvalidInput("Invalid request: Wrong control request - missing command")
        if command != FINISH_WHEN_DONE:
            raise InvalidInput(f'Invalid request: Wrong control request - unknown command "{command}"')
        self._request_finish()
        return _answer(f"{command} command accepted")

    def _finish(self, _request: Mapping[str, Any]) -> Reply:
        self._request_finish()
        return _answer(when=f"{FINISH_S}s")

    def _request_finish(self) -> None:
        with self.registry.locked():
            if self.registry.finish:
                raise InvalidInput("Finish request already requested")
            self.registry.write(FinishRequested())

    def _resources_info(self, _request: Mapping[str, Any]) -> Reply:
        total_nodes, total, used = self._resources()
        return _answer(total_nodes=total_nodes, total_cores=total, used_cores=used, free_cores=total - used)

    def _resources(self) -> tuple[int, int, int]:
        nodes = self.broker.nodes()
        kept = self.registry.system_cores
        return len(nodes), sum(node.cores for node in nodes) + kept, sum(node.used for node in nodes) + kept

    def _status(self, request: Mapping[str, Any]) -> Reply:
        options = request.get("options")
        if isinstance(options, dict) and options.get("allJobsFinished"):
            return _answer(AllJobsFinished=self.all_finished)
        jobs, tasks = self.queries.count_by_state(list(self.registry.jobs.values()))
        return {"code": 0, "data": self.status_of(self._resources(), jobs, tasks)}

    def status_of(
        self, resources: tuple[int, int, int], jobs: Mapping[str, int], tasks: Mapping[str, int]
    ) -> dict[str, Any]:
        """The long form of `status`: ``resources`` are nodes, cores and used cores, the others numbers by state."""
        now = time.time()
        nodes, total, used = resources
        return {
            "System": {
                "InstanceId": self.pilot.id.removeprefix(AUXILIARY),
                "Started": timestamp(self.begin),
                "Generated": timestamp(now),
                "Uptime": duration(now - self.begin),
                "Zmqaddress": address_of(self.pilot.directory) if self.registry.net else None,
                "Ifaces": ["ZMQ"] if self.registry.net else ["FILE"],
                "StatusPublisher": None,
                "Host": socket.gethostname(),
                "Account": _account(),
                "Wd": self.wd,
                "PythonVersion": sys.version.replace("\n", " "),
                "Python": sys.executable,
                "Platform": sys.platform,
            },
            "Resources": {"TotalNodes": nodes, "TotalCores": total, "UsedCores": used, "FreeCores": total - used},
            "JobStats": _groups(jobs, "Jobs"),
            "IterationStats": _groups(tasks, "Iterations"),
        }

    def _unsupported(self, request: Mapping[str, Any]) -> Reply:
        """Requests that managers of QCG-PilotJob send each other: they are not supported here, right or wrong."""
        name = request["request"]
        entity, wanted = _OF_MANAGERS[name]
        if request.get("entity") != entity:
            raise InvalidInput(f"Invalid request: Wrong {name} request - missing/unknown entity")
        if "params" not in request:
            raise InvalidInput(f"Invalid request: Wrong {name} request - missing register parameters")
        if not isinstance(request["params"], dict) or not wanted <= request["params"].keys():
            raise InvalidInput(f"Invalid request: Wrong {name} request - missing key {name} parameters")
        if name == "register":
            return _refusal("Register manager request not supported in this kind of manager (direct)")
        return _refusal("Operation not supported")


_OF_MANAGERS = {
    "register": ("manager", {"id", "address", "resources"}),
    "notify": ("job", {"name", "state", "attributes"}),
}
_HANDLERS: dict[str, Callable[[Requests, Mapping[str, Any]], Reply]] = {
    "submit": Requests._submit,
    "listJobs": Requests._list_jobs,
    "jobStatus": Requests._job_status,
    "jobInfo": Requests._job_info,
    "cancelJob": Requests._cancel_job,
    "removeJob": Requests._remove_job,
    "control": Requests._control,
    "finish": Requests._finish,
    "resourcesInfo": Requests._resources_info,
    "status": Requests._status,
    "register": Requests._unsupported,
    "notify": Requests._unsupported,
}


def open_registry(broker: Broker, pilot: Pilot) -> Registry:
    """The jobs of this pilot."""

    def committed(key: str) -> int | None:
        first = broker.link.call("HGET", keys.submission(key), "first")
        return None if first is None else int(first)

    return Registry(pilot.path(FILE), committed)


def begin(broker: Broker, pilot: Pilot, wd: str, *, net: bool, system_cores: int = 0) -> None:
    """Record that a service starts on this pilot: `Requests` of any process read it."""
    registry = open_registry(broker, pilot)
    try:
        with registry.locked():
            registry.write(ServiceBegan(wd, net, system_cores))
    finally:
        registry.close()


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have no name
        return str(os.getuid())


def _names(request: Mapping[str, Any], what: str) -> list[str]:
    names = request.get("jobNames")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"Invalid request: Wrong {what} request - missing job names")
    return list(dict.fromkeys(names))


def _groups(states: Mapping[str, int], what: str) -> dict[str, int]:
    found = {f"Total{what}": sum(states.values())}
    found |= {f"{group}{what}": 0 for group in ("InSchedule", "Failed", "Finished", "Executing")}
    for state, number in states.items():
        found[f"{GROUPS[state]}{what}"] += number
    return found


def _answer(message: str | None = None, **data: Any) -> Reply:
    reply: Reply = {"code": 0}
    if message is not None:
        reply["message"] = message
    if data:
        reply["data"] = data
    return reply


def _counted(what: str, number: int, errors: dict[str, str]) -> Reply:
    return {"code": 0, "data": {what: number} | ({"errors": errors} if errors else {})}


def _refusal(message: str) -> Reply:
    return {"code": 1, "message": message}
