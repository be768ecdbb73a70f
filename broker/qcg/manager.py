"""`Manager` and `LocalManager`: QCG-PilotJob's connection to a pilot, one request at a time."""

from __future__ import annotations

import builtins
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pilotq.broker.errors import PilotqError, ServerUnavailable
from pilotq.broker.qcg import errors
from pilotq.broker.qcg.jobinfo import JobInfo
from pilotq.broker.qcg.jobs import Jobs
from pilotq.broker.qcg.polling import JobEnds, PollInterval
from pilotq.broker.qcg.service.address import ADDRESS, address_of, directory_of
from pilotq.broker.qcg.service.states import FINAL

if TYPE_CHECKING:
    from pilotq.broker.client.broker import Broker
    from pilotq.broker.qcg.service.requests import Requests

T = TypeVar("T")
Names = str | Iterable[str]
Path = str | os.PathLike[str]

READ_REQUESTS = frozenset(
    {"listJobs", "jobStatus", "jobInfo", "resourcesInfo", "status"}
)  # change nothing: they may be repeated
RETRY_S = 30.0  # for these, while the pilot restarts its server
RETRY_INTERVAL_S = 0.05
SLICE = 500
POLL_DELAY_S = 5.0
INIT_TIMEOUT_S = 300.0
FINISH_S = 10.0  # time to end for what still runs at `LocalManager.finish`


class Manager:
    """A connection to a pilot that runs. Several threads may use it.

    ``address`` is the pilot's directory, alone or as ``pilotq:DIRECTORY``; by default what QCG_PM_ZMQ_ADDRESS or else
    PILOTQ_DIR names: in a task, the pilot that runs it. ``cfg`` may have poll_delay (the longest interval of waits, in
    seconds), log_file, log_level, wdir (where the log goes by default); other keys are ignored.

    A request that is refused, and one that is not answered, raises ConnectionError. Requests that change nothing are
    repeated for 30 s while the pilot restarts its server.
    """

    DEFAULT_ADDRESS_ENV = ADDRESS

    def __init__(self, address: Path | None = None, cfg: Mapping[str, Any] | None = None) -> None:
        self._prepare(cfg or {})
        self._connect(address or os.environ.get(self.DEFAULT_ADDRESS_ENV) or None)

    def _prepare(self, cfg: Mapping[str, Any]) -> None:
        self.default_poll_delay = float(cfg.get("poll_delay", POLL_DELAY_S))
        self._lock = threading.RLock()  # requests of several threads take turns; waits sleep outside of it
        self._job_ends = JobEnds()
        self._broker: Broker | None = None
        self._requests: Requests | None = None
        self._log, self.log_handler = _open_log(cfg)

    def _connect(self, address: Path | None) -> None:
        from pilotq.broker.client.broker import Broker
        from pilotq.broker.qcg.service.requests import Requests

        try:
            broker = self._broker = Broker.connect(None if address is None else _directory(os.fspath(address)))
            assert broker.pilot is not None, "connect always finds a directory"
            self._pilot = broker.pilot
            self._requests = Requests(broker)
        except PilotqError as error:
            self._log.error("cannot connect: %s", error)
            self.cleanup()
            raise errors.ConnectionError(f"Failed to connect to {address or 'a pilot'} - {error}") from error
        self._log.info("connected to %s", self._pilot.directory)

    # -- requests ---------------------------------------------------------------------------------------------------

    def send_request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The whole reply to any request."""
        return self._ask(request)

    def submit(self, jobs: Jobs) -> builtins.list[str]:
        """Submit all jobs or, when one of them is refused, none; returns their names."""
        data = self._data({"request": "submit", "jobs": jobs.ordered_jobs()})
        if "submitted" not in data or "jobs" not in data:
            raise errors.InternalError("Missing response data")
        names: builtins.list[str] = data["jobs"]
        with self._lock:
            self._job_ends.submitted(names)
        # No request says that the last submit was made: what waits for a job that does not exist is omitted now.
        self._call(lambda requests: requests.omit_unmet(), retried=True)
        return names

    def list(self) -> dict[str, Any]:
        """name -> {status, messages?, inQueue?} of all jobs."""
        data = self._data({"request": "listJobs"})
        if "jobs" not in data:
            raise errors.InternalError("Request failed - missing jobs data")
        jobs: dict[str, Any] = data["jobs"]
        return jobs

    def status(self, names: Names) -> dict[str, Any]:
        """{"jobs": {name: {"status": 0, "data": {"jobName": name, "status": state}}}}; a name may be ``job:it``."""
        return self._job_request("jobStatus", names)

    def info(self, names: Names, **params: Any) -> dict[str, Any]:
        """As `status`, with all details of each job; ``withChilds=True`` adds its iterations."""
        return self._job_request("jobInfo", names, **({"params": params} if params else {}))

    def info_parsed(self, names: Names, **params: Any) -> dict[str, JobInfo]:
        """What `info` returns, as name -> JobInfo."""
        return {name: JobInfo.from_job(job.get("data", {})) for name, job in self.info(names, **params)["jobs"].items()}

    def resources(self) -> dict[str, Any]:
        """{total_nodes, total_cores, used_cores, free_cores}."""
        return self._data({"request": "resourcesInfo"})

    def system_status(self) -> dict[str, Any]:
        """{System, Resources, JobStats, IterationStats} of the service."""
        return self._data({"request": "status"})

    def remove(self, names: Names) -> None:
        """Remove jobs that have ended, so that their names can be used again; others stay, without an error."""
        self._job_request("removeJob", names)

    def cancel(self, names: Names) -> None:
        """Cancel jobs, waiting or running, or iterations (``job:it``); unknown names are ignored."""
        self._job_request("cancelJob", names)

    def _job_request(self, request: str, names: Names, **more: Any) -> dict[str, Any]:
        """The data of a reply to a request about jobs; no request is made for no jobs."""
        wanted = _name_list(names)
        return self._data({"request": request, "jobNames": wanted, **more}) if wanted else {"jobs": {}}

    @staticmethod
    def is_status_finished(status: str) -> bool:
        """Whether a job in this state has ended, in whatever way."""
        return status in FINAL

    # -- waiting ----------------------------------------------------------------------------------------------------

    def wait4(self, names: Names, timeout: float | None = None) -> dict[str, str]:
        """Wait until these jobs have ended; returns name -> state. Raises TimeoutElapsed after ``timeout`` seconds."""
        wanted = _name_list(names)
        pace = self._interval(timeout)
        states: dict[str, str] = {}
        # All of them once: a name that does not exist is refused at once.
        left = self._not_ended(wanted, states, pace)
        while left:
            pace.sleep(f"{len(left)} of {len(wanted)} jobs have not ended")
            left = self._skip_ended(left, states, pace)
        with self._lock:
            self._job_ends.forget(wanted)
        return {name: states[name] for name in wanted}

    def _skip_ended(self, names: builtins.list[str], states: dict[str, str], pace: PollInterval) -> builtins.list[str]:
        """The names without those at their front whose jobs have ended.

        Only a few are asked for while they have not: what a wait costs must not grow with what it waits for.
        """
        window = 8
        while names:
            pending = self._not_ended(names[:window], states, pace)
            names = names[window:]
            if pending:
                return pending + names
            window = min(2 * window, SLICE)
        return names

    def _not_ended(self, names: builtins.list[str], states: dict[str, str], pace: PollInterval) -> builtins.list[str]:
        """The names whose jobs have not ended yet; the states of the others are added to ``states``."""
        for first in range(0, len(names), SLICE):
            request = {"request": "jobStatus", "jobNames": names[first : first + SLICE]}
            for name, job in self._data(request, pace.deadline)["jobs"].items():
                if job["status"] != 0:
                    raise errors.ConnectionError(f"Request failed - {job['message']}")
                if job["data"]["status"] in FINAL:
                    states[name] = job["data"]["status"]
        return [name for name in names if name not in states]

    def wait4all(self, timeout_secs: float | None = None) -> None:
        """Wait until every job of the pilot has ended. Raises TimeoutElapsed after ``timeout_secs`` seconds."""
        pace = self._interval(timeout_secs)
        request = {"request": "status", "options": {"allJobsFinished": True}}
        while not self._data(request, pace.deadline).get("AllJobsFinished", False):
            pace.sleep("not all jobs have ended")
        with self._lock:
            self._job_ends.forget()

    def wait4_any_job_finish(self, timeout_secs: float | None = None) -> tuple[str, str]:
        """Wait for the next end of a job or iteration; returns (name or ``job:it``, state), each end once.

        Not returned are ends that another wait has returned, and those of jobs that others had submitted and that ended
        before the first call.
        Raises TimeoutElapsed after ``timeout_secs`` seconds.
        """
        pace = self._interval(timeout_secs)
        while True:
            with self._lock:
                end = self._job_ends.next(lambda request: self._data(request, pace.deadline))
            if end is not None:
                return end
            pace.sleep("no job has ended")

    def _interval(self, timeout: float | None) -> PollInterval:
        return PollInterval(timeout, self.default_poll_delay)

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Ask the service to end when its jobs have ended, and close the connection.

        Only a service does (`pilotq-qcg-service --net`): another's pilot is not ended from here.
        """
        self._data({"request": "finish"})
        self.cleanup()

    def cleanup(self) -> None:
        """Close the connection and the log; may be called again."""
        with self._lock:
            if self._requests is not None:
                self._requests.close()
            if self._broker is not None:
                self._broker.close()
            self._broker = self._requests = None
            self._log.removeHandler(self.log_handler)
            self.log_handler.close()

    # -- one request ------------------------------------------------------------------------------------------------

    def _data(self, request: Mapping[str, Any], deadline: float | None = None) -> dict[str, Any]:
        data = self._ask(request, deadline).get("data")
        if not isinstance(data, dict):
            raise errors.InternalError("Invalid reply from the service")
        return data

    def _ask(self, request: Mapping[str, Any], deadline: float | None = None) -> dict[str, Any]:
        # A copy by way of JSON, as over a wire: what the caller changes afterwards has no effect.
        wire = json.loads(json.dumps(request, default=os.fspath))
        name = wire.get("request")
        reply = self._call(lambda requests: requests.handle(wire), retried=name in READ_REQUESTS, deadline=deadline)
        level = logging.DEBUG if name in READ_REQUESTS else logging.INFO
        self._log.log(level, "%s: code %s, %s", name, reply.get("code"), reply.get("message", ""))
        if "code" not in reply:
            raise errors.InternalError("Invalid reply from the service")
        if reply["code"] != 0:
            raise errors.ConnectionError(
                f"Request failed - {reply['message']}" if "message" in reply else "Request failed"
            )
        return reply

    def _call(self, what: Callable[[Requests], T], *, retried: bool, deadline: float | None = None) -> T:
        """Call ``what``; when ``retried``, repeat it while the server restarts, until ``deadline`` (monotonic)."""
        until = time.monotonic() + RETRY_S if deadline is None else deadline
        while True:
            try:
                with self._lock:
                    return self._once(what, deadline)
            except ServerUnavailable as error:
                if deadline is not None and time.monotonic() >= deadline:
                    raise errors.TimeoutElapsed(f"the pilot has not answered in time: {error}") from error
                if not retried or time.monotonic() >= until or not self._pilot.alive():
                    raise errors.ConnectionError(f"Request failed - {error}") from error
            except errors.ConnectionError:
                raise
            except PilotqError as error:
                raise errors.ConnectionError(f"Request failed - {error}") from error
            time.sleep(RETRY_INTERVAL_S)

    def _once(self, what: Callable[[Requests], T], deadline: float | None) -> T:
        if self._requests is None or self._broker is None:
            raise errors.ConnectionError("Not connected")
        link = self._broker.link
        usual = link.timeout
        if deadline is not None:
            link.timeout = min(usual, max(deadline - time.monotonic(), RETRY_INTERVAL_S))
        try:
            return what(self._requests)
        finally:
            link.timeout = usual


class LocalManager(Manager):
    """A Manager with a private pilot, which ends at `finish`, `cleanup`, or at the latest with this process.

        manager = LocalManager(["--nodes", "4"])
        names = manager.submit(Jobs().add(name="a", exec="date", stdout="a.txt"))
        print(manager.wait4(names))
        manager.finish()

    ``server_args`` are the arguments of QCG-PilotJob's service (``["--nodes", 4, "--wd", path]``). ``cfg`` is that of
    Manager, with init_timeout (seconds for the pilot to be ready, default 300). Raises ServiceError when the pilot
    cannot be started.
    """

    def __init__(self, server_args: Iterable[Any] | None = None, cfg: Mapping[str, Any] | None = None) -> None:
        from pilotq.broker.qcg.service_process import ServiceProcess

        cfg = cfg or {}
        self._prepare(cfg)
        try:
            self._service = ServiceProcess(server_args or [], float(cfg.get("init_timeout", INIT_TIMEOUT_S)))
        except BaseException as error:
            self._log.error("no service: %s", error)
            super().cleanup()
            raise
        self._connect(self._service.pilot.directory)

    def finish(self) -> None:
        """End the pilot and wait until it is gone; does nothing when it is gone already.

        Jobs that have not ended get 10 s to do so; then all of their processes are ended.
        """
        try:
            if self._requests is not None and self._service.alive():
                # The service may be ending by itself: then requests are not answered any more.
                with suppress(errors.TimeoutElapsed, errors.ConnectionError):
                    self.wait4all(FINISH_S)
        finally:
            self.cleanup()

    def kill_manager_process(self) -> None:
        """End the pilot and what runs in it, without waiting for jobs; ``--resume`` goes on with them."""
        self._service.stop()

    def cleanup(self) -> None:
        """End the pilot if it is still there, close the connection and the log; may be called again."""
        super().cleanup()
        self._service.stop()


def _name_list(names: Names) -> builtins.list[str]:
    return [names] if isinstance(names, str) else builtins.list(dict.fromkeys(names))


def _directory(address: str) -> str:
    directory = directory_of(address)
    if directory is None:
        raise errors.WrongArgumentsError(
            f"a pilot of pilotq is named by its directory: give that, or {address_of('DIRECTORY')}"
        )
    return directory


def _open_log(cfg: Mapping[str, Any]) -> tuple[logging.Logger, logging.Handler]:
    """A log of our own, by default .qcgpjm-client/api.log below ``wdir``, written anew. Raises FileError."""
    path = os.path.abspath(cfg.get("log_file") or os.path.join(cfg.get("wdir", "."), ".qcgpjm-client", "api.log"))
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise errors.FileError(
            f"the log {path} cannot be written: {error.strerror}; name another with log_file"
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)-15s: %(message)s"))
    # Not one of logging's tree: two managers of one program must not write each other's log.
    log = logging.Logger(__name__)  # noqa: LOG001
    log.setLevel(logging.DEBUG if str(cfg.get("log_level")).lower() == "debug" else logging.INFO)
    log.addHandler(handler)
    return log, handler
