"""Everything that uses RQ's Python package: the function of command tasks, jobs of RQ's producers, the current job.

A command task is a valid RQ job whose function is `run` below, so RQ's tools can fetch and show it. An `rq worker` that
took one would fail it with a sentence. Functions run in interpreters (`workers/launcher/interpreter.py`), which call
the rest of this module. RQ is imported only when it is needed, as that takes long.
"""

from __future__ import annotations

import os
import sys
import traceback
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from pilotq.broker.tasks.functions import failure_text, result_text

if TYPE_CHECKING:
    from redis import Redis
    from rq.job import Job

# pickle of ("pilotq.broker.rq.jobs.run", None, (), {}): the `data` of every command task. RQ reads it uncompressed.
COMMAND_DATA = b"(\x8c\x19pilotq.broker.rq.jobs.runN)}t."
STOPPED_CALLBACK_S = 20  # the most that a callback gets after its job was killed, whatever its own timeout is
Ending = tuple[str, str, str, str]  # outcome, reason, message, text: as of protocol.Returned


def is_own_data(data: bytes) -> bool:
    """Whether this is the `data` of a task of ours; RQ compresses it when it saves the record."""
    if data == COMMAND_DATA:
        return True
    try:
        return zlib.decompress(data) == COMMAND_DATA
    except zlib.error:
        return False


def run() -> NoReturn:
    raise RuntimeError("this is a command task of a pilotq pilot: only pilotq's workers can run it")


def preload() -> None:
    """Import the modules that jobs of RQ's producers need."""
    import rq.callbacks
    import rq.job
    import rq.timeouts  # noqa: F401


def time_is_over() -> Exception:
    """The exception raised in a function whose time limit has passed: RQ's own."""
    from rq.timeouts import JobTimeoutException

    return JobTimeoutException("Task exceeded maximum timeout value")


# -- jobs of RQ's own producers --------------------------------------------------------------------------------------


class RqJob:
    """A job of RQ's own producers, made from the fields of its record: runs its function and its callbacks.

    It writes nothing to Redis. The job's connection is made when the function, or a callback, uses it.
    """

    def __init__(self, job_id: str, fields: dict[bytes, bytes]) -> None:
        from rq.job import Job

        self.job = Job(job_id, connection=connection(), serializer=_serializer(fields.get(b"data", b"")))
        self.job.restore(fields)

    def perform(self) -> Any:
        return self.job.perform()

    def returned(self, value: Any) -> Ending:
        """Run the success callback, and return what is to be reported. May raise: then the job has failed."""
        from rq.callbacks import execute_success_callback
        from rq.job import JobStatus, Retry
        from rq.timeouts import UnixSignalDeathPenalty

        if isinstance(value, Retry):
            interval = Retry.get_interval(self.job.number_of_retries or 0, value.intervals)
            place = ":front" if value.enqueue_at_front else ""
            return "retried", "", f"It asks to be run again: {value!r}.", f"{value.max}:{interval}{place}"
        self.job._status = JobStatus.FINISHED
        execute_success_callback(self.job, UnixSignalDeathPenalty, value)
        try:
            data = self.job.serializer.dumps(value)
        except Exception:  # noqa: BLE001  # as in RQ: the job has finished all the same
            data = self.job.serializer.dumps("Unserializable return value")
        return "finished", "", "", result_text(data)

    def raised(self, error: BaseException) -> Ending:
        """Run the failure callback after the function, or the success callback, has raised; what is to be reported."""
        from rq.callbacks import execute_failure_callback
        from rq.job import JobStatus
        from rq.timeouts import UnixSignalDeathPenalty

        self.job._status = JobStatus.FAILED
        try:
            execute_failure_callback(self.job, UnixSignalDeathPenalty, type(error), error, error.__traceback__)
        except BaseException as other:  # noqa: BLE001  # it replaces the job's own exception, as in RQ
            error = other
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        last = text.strip().splitlines()[-1]
        return "failed", "exception", last[:500], failure_text(text, "")

    def stopped(self) -> Ending:
        """Run the callback of a job that was stopped; what that raises is printed."""
        from rq.callbacks import execute_stopped_callback
        from rq.timeouts import UnixSignalDeathPenalty

        self.job._stopped_callback_timeout = min(self.job.stopped_callback_timeout, STOPPED_CALLBACK_S)
        try:
            execute_stopped_callback(self.job, UnixSignalDeathPenalty)
        except BaseException:  # noqa: BLE001  # the job stays stopped
            traceback.print_exc()
        return "failed", "stopped", "", ""


def _serializer(data: bytes) -> str:
    """Which of RQ's serializers has written a job's ``data``: no field tells."""
    try:
        data = zlib.decompress(data)
    except zlib.error:
        pass  # it need not be compressed
    return "json" if data.startswith(b"[") else "pickle"


@cache
def connection() -> Redis:
    """A client of the pilot whose task this process runs; it connects when it is used."""
    import redis

    from pilotq.broker.pilot.directory import find

    return redis.Redis.from_url(find(os.environ["PILOTQ_DIR"]).connection().address.url())


# -- get_current_job() in functions of ours --------------------------------------------------------------------------


class CurrentJob:
    """Makes `rq.get_current_job()` return the task while a function of pilotq runs.

    RQ is not imported for that. Where a function imports it in its own body, this object notices: it is an import hook
    in front of `sys.meta_path`.
    """

    def __init__(self) -> None:
        self._task = ""
        sys.meta_path.insert(0, self)

    @property
    def known(self) -> bool:
        """Whether a function may have seen its job: then it may have noted something in the record of that."""
        return "rq.job" in sys.modules

    def begin(self, task_id: str) -> None:
        self._task = task_id
        if (module := sys.modules.get("rq.job")) is not None:
            self._set(module)

    def end(self) -> None:
        self._task = ""
        if (module := sys.modules.get("rq.job")) is not None and hasattr(module, "_current_job"):
            module._current_job.set(None)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != "rq.job":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            original = spec.loader.exec_module

            def load(module: ModuleType) -> None:
                original(module)
                if self._task:
                    self._set(module)

            spec.loader.exec_module = load  # type: ignore[method-assign]
        return spec

    def _set(self, module: Any) -> None:
        job: Job = module.Job(self._task, connection=connection())
        module._current_job.set(job)
