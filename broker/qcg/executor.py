"""`QCGPJExecutor`, QCG-PilotJob's executor: tasks from templates, and futures for them.

Imported by every task of some programs (EasyVVUQ's), so it loads nothing before an executor is made.
"""

from __future__ import annotations

import ast
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from string import Template
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotq.broker.qcg.manager import LocalManager, Manager

JOB_ID = "QCG_PM_EXEC_API_JOB_ID"
POLL_S = 0.05
REST_RATIO = 5  # the thread sleeps at least so many times as long as a poll took

Callback = Callable[["QCGPJFuture"], object]
Described = str | tuple[str, Mapping[str, Any]]


class QCGPJTemplate(ABC):
    """A template: a function that returns a description with ``${variables}`` in it, and their defaults."""

    @staticmethod
    @abstractmethod
    def template() -> tuple[str, dict[str, Any]]:
        """The description, a Python literal in the standard form of a job, and the defaults."""


class BasicTemplate(QCGPJTemplate):
    """A program on one core: name, exec, args, stdout, stderr."""

    @staticmethod
    def template() -> tuple[str, dict[str, Any]]:
        text = """
            {
                'name': '${name}',
                'execution': {'exec': '${exec}', 'args': ${args}, 'stdout': '${stdout}', 'stderr': '${stderr}'}
            }
        """
        return text, {"args": [], "stdout": "stdout", "stderr": "stderr"}


class QCGPJFuture:
    """Tasks that were submitted together; they have ended when all of them have."""

    def __init__(self, ids: Iterable[str], qcgpjm: Manager, callbacks: CallbackThread | None = None) -> None:
        self.ids = list(ids)
        self.qcgpjm = qcgpjm
        self._callbacks = callbacks or CallbackThread(qcgpjm)
        self._states: dict[str, str] | None = None
        self._cancelled = False

    def result(self, timeout: float | None = None) -> dict[str, str]:
        """Wait; returns name -> state, whatever the states are. Raises TimeoutElapsed after ``timeout`` seconds."""
        if self._states is None:
            self._states = self.qcgpjm.wait4(self.ids, timeout)
        return self._states

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait; returns None when all have succeeded, else an error that says which have not."""
        from pilotq.broker.qcg.errors import QCGPJMAError

        wrong = {name: state for name, state in self.result(timeout).items() if state != "SUCCEED"}
        return QCGPJMAError(", ".join(f"job {n} is {s}" for n, s in wrong.items())) if wrong else None

    def done(self) -> bool:
        return self._states is not None or self.has_ended_in(self.qcgpjm.status(self.ids)["jobs"])

    def has_ended_in(self, jobs: Mapping[str, Any]) -> bool:
        """Whether all have ended, by the ``jobs`` of a reply to jobStatus; raises ConnectionError for unknown ones."""
        from pilotq.broker.qcg.errors import ConnectionError as Refused

        for name in self.ids:
            if jobs[name]["status"] != 0:
                raise Refused(f"Request failed - {jobs[name]['message']}")
        states = {name: jobs[name]["data"]["status"] for name in self.ids}
        if not all(map(self.qcgpjm.is_status_finished, states.values())):
            return False
        self._states = states
        return True

    def running(self) -> bool:
        """Whether they have not all ended: those that wait are running, too."""
        return not self.done()

    def cancel(self) -> bool:
        """Cancel what has not ended, running or not; False when all have ended."""
        if not self._cancelled and not self.done():
            self.qcgpjm.cancel(self.ids)
            self._cancelled = True
        return self._cancelled

    def cancelled(self) -> bool:
        """Whether `cancel` was called, in time."""
        return self._cancelled

    def add_done_callback(self, fn: Callback) -> None:
        """Call ``fn(future)`` when all have ended, in another thread; at once and here when they have."""
        if self.done():
            fn(self)
        else:
            self._callbacks.add(self, fn)


class CallbackThread:
    """Polls futures and calls their callbacks; the thread exists while there are any."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._watched: list[tuple[QCGPJFuture, Callback]] = []
        self._thread: threading.Thread | None = None

    def add(self, future: QCGPJFuture, callback: Callback) -> None:
        with self._lock:
            self._watched.append((future, callback))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pilotq-futures", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until all callbacks were called."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            with self._lock:
                watched = list(self._watched)
                if not watched:
                    self._thread = None
                    return
            for entry in self._ended(watched):
                with self._lock:
                    self._watched.remove(entry)
                _call(*entry)
            time.sleep(max(POLL_S, REST_RATIO * (time.monotonic() - began)))

    def _ended(self, watched: list[tuple[QCGPJFuture, Callback]]) -> list[tuple[QCGPJFuture, Callback]]:
        """Those that have ended, and those whose state cannot be found out any more."""
        from pilotq.broker.qcg.errors import QCGPJMAError

        jobs = None
        with suppress(QCGPJMAError):
            jobs = self._manager.status(dict.fromkeys(name for future, _ in watched for name in future.ids))["jobs"]
        return [entry for entry in watched if _has_ended(entry[0], jobs)]


def _has_ended(future: QCGPJFuture, jobs: Mapping[str, Any] | None) -> bool:
    from pilotq.broker.qcg.errors import QCGPJMAError

    try:
        return future.done() if jobs is None else future.has_ended_in(jobs)
    except QCGPJMAError:
        return True  # it would be waited for without end; the callback gets this error when it asks


def _call(future: QCGPJFuture, callback: Callback) -> None:
    try:
        callback(future)
    except Exception:  # the boundary to the user's function: the other callbacks must be called
        logging.getLogger(__name__).exception("a callback of %s has failed", ", ".join(future.ids))


class QCGPJExecutor(Executor):
    """A private pilot that runs tasks made from templates; ends with `shutdown`, or with the ``with`` block.

    ``other_args`` are arguments of QCG-PilotJob's service; when the first is none (has no dash), they are wd,
    resources... in the order of the keywords. ``resources`` are the nodes (``"4"``, ``"n1:2,n2:2"``), ``reserve_core``
    leaves one core to the pilot. Statistics are always kept, so the options for them change nothing.
    """

    def __init__(
        self,
        *other_args: Any,
        wd: str | os.PathLike[str] = ".",
        resources: Any = None,
        reserve_core: bool = False,
        enable_rt_stats: bool = False,
        wrapper_rt_stats: Any = None,
        log_level: str = "info",
    ) -> None:
        from pilotq.broker.qcg.manager import LocalManager

        values = {"wd": wd, "resources": resources, "reserve_core": reserve_core, "enable_rt_stats": enable_rt_stats,
                  "wrapper_rt_stats": wrapper_rt_stats, "log_level": log_level}  # fmt: skip
        if other_args and not str(other_args[0]).startswith("-"):
            values |= dict(zip(values, other_args, strict=False))
            other_args = other_args[len(values) :]
        args = ["--wd", values["wd"], *other_args]
        if values["resources"]:
            args += ["--nodes", values["resources"]]
        if values["reserve_core"]:
            args += ["--system-core"]
        log = {"log_file": os.path.join(values["wd"], "api.log"), "log_level": values["log_level"]}
        self.finished = False
        self._qcgpjm = LocalManager(args, log)
        self._callbacks = CallbackThread(self._qcgpjm)

    def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> None:
        self.shutdown(wait=exc_type is None)

    @property
    def qcgpj_manager(self) -> LocalManager:
        """The manager of its pilot, for what an executor has no method for."""
        return self._qcgpjm

    # The variables of a template are keywords here, and `fn` is called without arguments, unlike in other executors.
    def submit(  # type: ignore[override]
        self, fn: Callable[[], Described], /, *args: Mapping[str, Any] | None, **kwargs: Any
    ) -> QCGPJFuture:
        """Submit what the template ``fn()`` describes: a text, or a text and the defaults of its variables.

        Variables ``${name}`` get their values from the defaults, then the mappings in ``args``, then ``kwargs``; the
        result must be a Python literal, a job in the standard form. Raises KeyError for a variable without a value,
        ValueError or SyntaxError for what is no literal, and as `Manager.submit`.
        """
        from pilotq.broker.qcg.jobs import Jobs

        described = fn()
        text, defaults = (described, {}) if isinstance(described, str) else described
        variables: dict[str, Any] = dict(defaults)
        for mapping in args:
            variables.update(mapping or {})
        job = ast.literal_eval(Template(text).substitute(variables | kwargs).strip())
        job["execution"].setdefault("env", {})[JOB_ID] = "${jname}"
        return QCGPJFuture(self._qcgpjm.submit(Jobs().add_std(job)), self._qcgpjm, self._callbacks)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the pilot; may be called again.

        With ``wait`` when all tasks have ended, else those that run have 10 s to do so. ``cancel_futures`` cancels
        them first.
        """
        if self.finished:
            return
        try:
            if cancel_futures:
                self._qcgpjm.cancel(self._qcgpjm.list())
            if wait:
                self._qcgpjm.wait4all()
                self._callbacks.join()
        finally:
            self.finished = True
            self._qcgpjm.finish()
