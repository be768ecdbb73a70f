"""`Executor`: a pilot behind the interface of `concurrent.futures`.

It has two threads. One submits: calls that came meanwhile go in one submission. The other one reads from the server
which tasks have ended (a list that complete.lua fills) and then their results; it also polls the oldest tasks, in case
an entry of the list was lost.
"""

from __future__ import annotations

import atexit
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import msgspec

from pilotq.broker.client import private_pilot
from pilotq.broker.client.broker import Broker
from pilotq.broker.client.results import Outcome, fetch, portions
from pilotq.broker.errors import FunctionCanceled, PilotFailed, PilotqError, ServerUnavailable
from pilotq.broker.store import keys
from pilotq.broker.tasks.functions import Packed, pack_call, target_of
from pilotq.broker.tasks.model import Request, Task
from pilotq.broker.tasks.quantities import request_of
from pilotq.broker.tasks.submit_context import capture_context
from pilotq.broker.tasks.validation import validate

BATCH_MAX = 2000  # tasks in one submission
READ_MAX = 500  # results that are read at once
WAIT_S = 1.0  # how long one blocking read of the list of completions waits
POLL_S = 5.0  # how often the oldest tasks are polled though the list does not name them
GONE_S = 60.0  # a server that does not answer for so long is considered gone


class TaskFuture(futures.Future[Any]):
    """A future of one task. It is pending until the task has ended; ``task_id`` is None until it is submitted."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self._executor = executor
        self.task_id: str | None = None

    def cancel(self) -> bool:
        """Cancel the task, also one that runs: it is interrupted. False when it has ended."""
        if self.done() and not self.cancelled():
            return False
        if not self.cancelled():
            if not super().cancel():
                return False
            with suppress(RuntimeError):  # the other thread has just done it
                self.set_running_or_notify_cancel()  # wakes those who wait for several futures
            self._executor._on_cancel(self)
        return True


class Options:
    """An executor whose tasks ask for resources, or have other fields of `Task` set: made by `Executor.options`."""

    def __init__(self, executor: Executor, task: Task) -> None:
        self._executor = executor
        self._task = task

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TaskFuture:
        """As `Executor.submit`."""
        return self._executor._submit(self._task, fn, args, kwargs)

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[Any]:
        """As `Executor.map`."""
        return self._executor._map(self._task, fn, iterables, timeout, chunksize)


class Executor(futures.Executor):
    """Runs Python functions on a pilot: that of ``dir`` (found as by `Broker.connect`), else a private one.

    A private pilot has the nodes of ``nodes`` (as of `pilotq start`; default: all cores here). It ends with
    `shutdown`, or with this process. Raises NoPilot when ``dir`` names a pilot that does not run, and whatever
    `pilotq start` says. May be used by several threads.

        with Executor() as pool:
            future = pool.submit(math.sqrt, 2)
            print(future.result(), list(pool.map(math.factorial, range(10))))
            pool.options(cores=4, time_limit=600.0).submit(simulate)
    """

    def __init__(self, dir: str | None = None, *, nodes: str | None = None) -> None:
        pilot = None if nodes is not None and dir is None else private_pilot.running(dir)
        self._private = pilot is None
        pilot = pilot or private_pilot.start(nodes)
        self._broker = Broker.connect(pilot.directory)
        self._reader = Broker.connect(pilot.directory)
        self._pilot = pilot
        self._name = secrets.token_hex(6)
        self._lock = threading.Lock()
        self._submit_queue: queue.SimpleQueue[tuple[TaskFuture, Task] | TaskFuture | None] = queue.SimpleQueue()
        self._waiting: dict[str, TaskFuture] = {}  # by id, oldest first
        self._committing = False  # a submission is under way
        self._completed_early: set[str] = set()  # ended before the submission returned their ids
        self._open: set[TaskFuture] = set()  # those that are not done
        self._closing = False
        self._all_done = threading.Event()
        self._all_done.set()
        self._threads = [threading.Thread(target=t, daemon=True, name="pilotq") for t in (self._send, self._collect)]
        for thread in self._threads:
            thread.start()
        self._pid = os.getpid()
        atexit.register(self._at_exit)

    # -- what concurrent.futures has -------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TaskFuture:
        """Run ``fn(*args, **kwargs)`` on one core. Raises InvalidInput when the call cannot be pickled."""
        return self._submit(_PLAIN, fn, args, kwargs)

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[Any]:
        """Results in order; one task for ``chunksize`` calls. The rest is canceled when one raises, or after
        ``timeout`` seconds (TimeoutError)."""
        return self._map(_PLAIN, fn, iterables, timeout, chunksize)

    def options(
        self,
        *,
        cores: int | str | None = None,
        nodes: int | str | None = None,
        gpus: int | None = None,
        memory: int | str | None = None,
        use: Mapping[str, int] | None = None,
        **fields: Any,
    ) -> Options:
        """`submit` and `map` for tasks that ask for resources, as task files write them, or set ``fields`` of Task."""
        request = request_of(Request(), cores=cores, nodes=nodes, gpus=gpus, memory=memory, use=use)
        task = msgspec.structs.replace(_PLAIN, request=request, **fields)
        validate(msgspec.structs.replace(task, function=_run_each), "options")  # any function: it comes later
        return Options(self, task)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those that were taken, or cancel them. A private pilot ends after them.

        A ``with`` block that ends by Ctrl-C, or by another exception that is no Exception, cancels them.
        """
        with self._lock:
            closed, self._closing = self._closing, True
            pending = list(self._open) if cancel_futures else []
        for future in pending:
            future.cancel()
        if not closed:
            self._submit_queue.put(None)
        if wait and threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()
        if not closed:
            atexit.unregister(self._at_exit)

    # -- submitting ------------------------------------------------------------------------------------------------

    def _submit(self, task: Task, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskFuture:
        if not callable(fn):
            raise TypeError(f"submit takes a function and its arguments, not {type(fn).__name__}")
        return self._put(msgspec.structs.replace(task, function=Packed(pack_call(fn, args, kwargs))))

    def _map(
        self, task: Task, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], timeout: float | None, size: int
    ) -> Iterator[Any]:
        if size < 1:
            raise ValueError("chunksize must be at least 1")
        if not callable(fn):
            raise TypeError(f"map takes a function and iterables, not {type(fn).__name__}")
        end_at = None if timeout is None else time.monotonic() + timeout
        calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        if size > 1:
            several = iter(lambda: list(islice(calls, size)), [])
            found = self._map(task, _run_each, (iter(lambda: fn, None), several), timeout, 1)
            return chain.from_iterable(found)
        target = target_of(fn)  # once for all
        replace = msgspec.structs.replace
        made = [self._put(replace(task, function=Packed(pack_call(target, args, {})))) for args in calls]
        return _results(made, end_at)

    def _put(self, task: Task) -> TaskFuture:
        future = TaskFuture(self)
        with self._lock:
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._open.add(future)
            self._all_done.clear()
        self._submit_queue.put((future, task))
        return future

    def _on_cancel(self, future: TaskFuture) -> None:
        self._forget(future)
        self._submit_queue.put(future)

    def _forget(self, future: TaskFuture) -> None:
        with self._lock:
            self._open.discard(future)
            if not self._open:
                self._all_done.set()

    def _send(self) -> None:
        """Submit and cancel: the first thread."""
        number = 0
        ending = False
        while not ending:
            items = [self._submit_queue.get()]
            while len(items) < BATCH_MAX and not self._submit_queue.empty():
                items.append(self._submit_queue.get())
            ending = None in items
            fresh = [item for item in items if isinstance(item, tuple) and not item[0].cancelled()]
            ids = [item.task_id for item in items if isinstance(item, TaskFuture) and item.task_id is not None]
            for first in range(0, len(fresh), BATCH_MAX):
                number += 1
                self._enqueue(fresh[first : first + BATCH_MAX], f"@{self._name}.{number}")
            self._cancel(ids)
        # Cancels of what is still waiting come until the last one is done.
        while not self._all_done.is_set():
            try:
                item = self._submit_queue.get(timeout=WAIT_S)
            except queue.Empty:
                continue
            if isinstance(item, TaskFuture) and item.task_id is not None:
                self._cancel([item.task_id])
        self._broker.close()

    def _enqueue(self, batch: list[tuple[TaskFuture, Task]], key: str) -> None:
        tasks = [task for _, task in batch]
        self._committing = True
        try:
            context = capture_context(functions=True)
            ids = self._until_answered(lambda: self._broker.enqueue_many(tasks, key=key, context=context))
        except Exception as error:  # noqa: BLE001  # whatever it was, nobody may wait for ever for these futures
            if len(batch) > 1 and not isinstance(error, ServerUnavailable):
                for number, item in enumerate(batch):  # some of them are wrong
                    self._enqueue([item], f"{key}.{number}")
                return
            for future, _ in batch:
                self._set_outcome(future, Outcome(error=error))
            return
        ended = []
        with self._lock:
            for (future, _), task_id in zip(batch, ids, strict=True):
                future.task_id = task_id
                self._waiting[task_id] = future
                if task_id in self._completed_early:
                    ended.append(task_id)
            self._committing = False
            self._completed_early.clear()
        self._cancel([future.task_id for future, _ in batch if future.cancelled() and future.task_id is not None])
        if ended:
            # The other thread has the connection for reading: the ends are put on its list again, or it polls.
            with suppress(PilotqError):
                self._until_answered(lambda: self._broker.link.call("RPUSH", keys.completions(self._name), *ended))

    def _cancel(self, ids: list[str]) -> None:
        with suppress(PilotqError):  # the pilot is gone: what it ran ends with it
            if ids:
                self._until_answered(lambda: self._broker.cancel(ids))

    def _until_answered(self, action: Callable[[], Any]) -> Any:
        """Repeat an action while the server does not answer: a submission with the same key is made once."""
        give_up_at = time.monotonic() + GONE_S
        while True:
            try:
                return action()
            except ServerUnavailable:
                if time.monotonic() > give_up_at or not self._pilot.alive():
                    raise
                time.sleep(0.1)

    # -- collecting ------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Read results: the second thread."""
        look_at = time.monotonic() + POLL_S
        answered_at = time.monotonic()
        while not (self._closing and self._all_done.is_set()):
            try:
                ids = self._completed()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + POLL_S
                    with self._lock:
                        ids += list(islice(self._waiting, READ_MAX))
                for first in range(0, len(ids), READ_MAX):
                    self._read(ids[first : first + READ_MAX])
                answered_at = time.monotonic()
            except (PilotqError, OSError) as error:
                if time.monotonic() > answered_at + GONE_S or not self._pilot.alive():
                    self._fail_all(PilotFailed(f"the pilot in {self._pilot.directory} is gone: {error}"))
                time.sleep(0.1)
        self._reader.close()
        if self._private:
            private_pilot.end(self._pilot)

    def _completed(self) -> list[str]:
        """Ids of tasks that have ended, from the list of completions; waits for the first one."""
        key = keys.completions(self._name)
        reply = self._reader.link.call("BLMPOP", WAIT_S, 1, key, "LEFT", "COUNT", READ_MAX)
        return [item.decode() for item in reply[1]] if reply else []

    def _read(self, ids: list[str]) -> None:
        with self._lock:
            known = [task_id for task_id in ids if task_id in self._waiting]
            if self._committing:
                self._completed_early.update(task_id for task_id in ids if task_id not in self._waiting)
        link = self._reader.link
        for part in portions(link, known):
            for task_id, outcome in zip(part, fetch(link, part), strict=True):
                if outcome is not None:
                    with self._lock:
                        future = self._waiting.pop(task_id, None)
                    if future is not None:
                        self._set_outcome(future, outcome)

    def _set_outcome(self, future: TaskFuture, outcome: Outcome) -> None:
        try:
            if future.cancelled() or not future.set_running_or_notify_cancel():
                return
        except RuntimeError:
            return  # it was canceled at this moment, and those who wait were woken
        if isinstance(outcome.error, FunctionCanceled):
            future.set_exception(futures.CancelledError(str(outcome.error)))
        elif outcome.error is not None:
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome.value)
        self._forget(future)

    def _fail_all(self, error: PilotqError) -> None:
        with self._lock:
            left = list(self._waiting.values())
            self._waiting.clear()
        for future in left:
            self._set_outcome(future, Outcome(error=error))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A user who presses Ctrl-C does not want to wait for thousands of calls.
        self.shutdown(cancel_futures=kind is not None and not issubclass(kind, Exception))

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            # What ended the program; at a prompt it may be long ago.
            last = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)
            self.shutdown(cancel_futures=last is KeyboardInterrupt)


_PLAIN = Task()


def _run_each(fn: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    return [fn(*args) for args in calls]


def _results(made: list[TaskFuture], end_at: float | None) -> Iterator[Any]:
    made.reverse()  # so that a result that was yielded is not kept
    try:
        while made:
            yield made.pop().result(None if end_at is None else max(end_at - time.monotonic(), 0.0))
    finally:
        for future in made:
            future.cancel()
