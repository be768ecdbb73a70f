"""`Executor`: a pilot behind the interface of `concurrent.futures`.

It has two threads. One submits: calls that came meanwhile go in one submission. The other one reads from the server
how tasks have ended, and their results (a stream that complete.lua fills); it also polls the records of what is open,
in case one was deleted.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from pilotq.broker.client import private_pilot
from pilotq.broker.client.broker import Broker
from pilotq.broker.client.call_batches import Batch, Put, batches, submit
from pilotq.broker.client.calls import Calls, PackedCall, Waiting, when_done
from pilotq.broker.client.completions import Completions
from pilotq.broker.client.mapping import run_each
from pilotq.broker.client.resource_dict import task_of
from pilotq.broker.client.results import Ended, Outcome, OutputFiles, StoredValue, discard, outcome_of
from pilotq.broker.errors import (
    FunctionCanceled,
    FunctionFailed,
    InvalidInput,
    PilotFailed,
    PilotqError,
    ServerUnavailable,
)
from pilotq.broker.tasks.model import Task
from pilotq.broker.tasks.quantities import request_of
from pilotq.broker.tasks.validation import validate

BATCH_MAX = 2000  # tasks in one submission
POLL_S = 5.0  # how often the records of open tasks are polled though nothing was said of them
POLL_MAX = 2000  # of them at a time, in turn
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

    def result(self, timeout: float | None = None) -> Any:
        """The value of the function. A large one is read from its file now, and not kept here."""
        self._executor._check_process(self)
        value = self._unless_interrupted(super().result, timeout)
        return value.load() if isinstance(value, StoredValue) else value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the function has raised, or why its value cannot be had."""
        self._executor._check_process(self)
        error: BaseException | None = self._unless_interrupted(super().exception, timeout)
        if error is None and isinstance(value := super().result(0), StoredValue):
            try:
                value.load()
            except FunctionFailed as failed:
                return failed
        return error

    def _unless_interrupted(self, wait: Callable[[float | None], Any], timeout: float | None) -> Any:
        """What ``wait`` returns. There are moments at which Ctrl-C leaves the lock of a future held, which nobody else
        could take then, or raises RuntimeError for a lock that is not held."""
        try:
            return wait(timeout)
        except KeyboardInterrupt:
            with suppress(RuntimeError):  # as a rule it is not held
                self._condition.release()
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, KeyboardInterrupt) and error is not self._exception:
                raise error.__context__ from None
            raise

    def _get_snapshot(self) -> Any:
        """What asyncio reads from Python 3.14 on, in place of the methods above."""
        done, cancelled, value, error = super()._get_snapshot()  # type: ignore[misc]
        if isinstance(value, StoredValue):
            value, error = None, self.exception(0)
            value = self.result(0) if error is None else None
        return done, cancelled, value, error


class Options(Calls):
    """An executor whose tasks ask for resources, or have other fields of `Task` set: made by `Executor.options`."""

    def __init__(self, executor: Executor, base: Task) -> None:
        self._executor = executor
        self._base = base
        self._resources = executor._resources
        self._max_workers = max(executor._max_workers // base.request.cores[0], 1)

    @property
    def directory(self) -> str:
        """As `Executor.directory`."""
        return self._executor.directory

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the executor that it is of."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def _put(self, calls: list[PackedCall]) -> list[TaskFuture]:
        return self._executor._put(calls)

    def _put_after(self, waited: Sequence[futures.Future[Any]], make: Callable[[], PackedCall]) -> TaskFuture:
        return self._executor._put_after(waited, make)


class Executor(Calls):
    """Runs Python functions on a pilot: that of ``dir`` (found as by `Broker.connect`), else a private one.

    A private pilot has the nodes of ``nodes`` (as of `pilotq start`; default: all cores here). It ends with
    `shutdown`, or with this process. Raises NoPilot when ``dir`` names a pilot that does not run, and whatever
    `pilotq start` says. May be used by several threads. With a ``resource_dict``, which may be empty, it takes calls as
    executorlib does: ``submit(fn, resource_dict={"threads_per_core": 4})``.

        with Executor() as pool:
            future = pool.submit(math.sqrt, 2)
            print(future.result(), list(pool.map(math.factorial, range(10))))
            pool.options(cores=4, time_limit=600.0).submit(simulate)
    """

    def __init__(
        self,
        dir: str | None = None,
        *,
        nodes: str | int | None = None,
        resource_dict: Mapping[str, Any] | None = None,
    ) -> None:
        self._base = Task() if resource_dict is None else task_of(Task(), resource_dict)
        self._resources = resource_dict
        pilot = None if nodes is not None and dir is None else private_pilot.running(dir)
        self._private = pilot is None
        pilot = pilot or private_pilot.start(nodes)
        self._broker = Broker.connect(pilot.directory)
        self._reader = Broker.connect(pilot.directory)
        self._max_workers = max(sum(node.cores for node in self._reader.nodes() if node.state == "up"), 1)
        self._pilot = pilot
        self._files = OutputFiles(pilot)
        self._name = secrets.token_hex(6)
        self._completions = Completions(self._reader.link, self._name)
        self._lock = threading.Lock()
        self._submit_queue: queue.SimpleQueue[Put | Waiting | TaskFuture | None] = queue.SimpleQueue()
        self._waiting: dict[str, TaskFuture] = {}  # by id, oldest first
        self._committing = False  # a submission is under way
        self._ended_early: list[Ended] = []  # before the submission returned their ids
        self._open: set[TaskFuture] = set()  # those that are not done
        self._closing = False
        self._pid = os.getpid()
        # Each has an event for its end: before Python 3.13 a `join` that Ctrl-C interrupts takes the thread for ended.
        self._ends = {role: threading.Event() for role in (self._send, self._collect)}
        self._threads = [
            threading.Thread(target=self._guarded, args=(role,), daemon=True, name="pilotq") for role in self._ends
        ]
        _living.add(self)
        for thread in self._threads:
            thread.start()

    # -- what users call -------------------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """The directory of its pilot, which all nodes of the pilot see."""
        return self._pilot.directory

    def options(
        self,
        *,
        cores: int | str | None = None,
        nodes: int | str | None = None,
        gpus: float | str | None = None,
        memory: int | str | None = None,
        use: Mapping[str, int] | None = None,
        numa: str | None = None,
        **fields: Any,
    ) -> Options:
        """An executor for tasks that ask for resources, as task files write them, or set ``fields`` of Task."""
        request = request_of(self._base.request, cores=cores, nodes=nodes, gpus=gpus, memory=memory, use=use, numa=numa)
        if fields.get("array") is not None or fields.get("values") is not None:
            raise InvalidInput("options: a future is of one call: submit an array with Broker.enqueue")
        task = msgspec.structs.replace(self._base, request=request, **fields)
        validate(msgspec.structs.replace(task, function=run_each), "options")  # any function: it comes later
        return Options(self, task)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those that were taken, or cancel them. A private pilot ends after them.

        Calls that were taken run in any case: without ``wait`` the program's end waits for them. A ``with`` block that
        ends by Ctrl-C, also while it waits, cancels them.
        """
        if os.getpid() != self._pid:
            return  # a process that was forked: calls, threads and pilot are its parent's
        with self._lock:
            self._closing = True
            pending = list(self._open) if cancel_futures else []
        for future in pending:
            future.cancel()
        self._submit_queue.put(None)
        if wait and threading.current_thread() not in self._threads:
            for end in self._ends.values():
                end.wait()
            for thread in self._threads:
                thread.join()

    def _finish(self, cancel: bool) -> None:
        """Shut down; who presses Ctrl-C while it waits does not want to wait for thousands of calls."""
        try:
            self.shutdown(cancel_futures=cancel)
        except BaseException:
            self.shutdown(cancel_futures=True)
            raise

    # -- submitting ------------------------------------------------------------------------------------------------

    def _put(self, calls: list[PackedCall]) -> list[TaskFuture]:
        made = self._new_futures(len(calls))
        for future, call in zip(made, calls, strict=True):
            self._submit_queue.put(Put(future, *call))
        return made

    def _put_after(self, waited: Sequence[futures.Future[Any]], make: Callable[[], PackedCall]) -> TaskFuture:
        [future] = self._new_futures(1)
        when_done(waited, lambda: self._submit_queue.put(Waiting(future, make)))
        return future

    def _new_futures(self, number: int) -> list[TaskFuture]:
        made = [TaskFuture(self) for _ in range(number)]
        self._check_process(made[0])
        with self._lock:
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._open.update(made)
        return made

    def _check_process(self, future: TaskFuture) -> None:
        """A process that was forked has none of the threads that would ever make a future done."""
        if os.getpid() != self._pid and not future.done():
            raise RuntimeError(
                f"this executor belongs to process {self._pid}, and this one was forked from it: make an Executor here"
            )

    def _on_cancel(self, future: TaskFuture) -> None:
        # First this: the thread that cancels ends when nothing is open and its queue is empty.
        self._submit_queue.put(future)
        self._forget(future)

    def _forget(self, *done: TaskFuture) -> None:
        with self._lock:
            self._open.difference_update(done)
            last = self._closing and not self._open
        if last:
            self._submit_queue.put(None)

    def _all_done(self) -> bool:
        with self._lock:
            return self._closing and not self._open

    def _guarded(self, role: Callable[[], None]) -> None:
        """One of the two threads: whatever ends it, nobody may wait for ever for a future."""
        try:
            role()
        except BaseException as error:
            with self._lock:
                self._closing = True
                left = list(self._open)
            self._fail(left, PilotFailed(f"a thread of the executor has failed: {error!r}"))
            self._submit_queue.put(None)
            raise
        finally:
            self._ends[role].set()

    def _send(self) -> None:
        """Submit and cancel: the first thread."""
        number = 0
        while not (self._all_done() and self._submit_queue.empty()):
            items = [self._submit_queue.get()]
            while len(items) < BATCH_MAX and not self._submit_queue.empty():
                items.append(self._submit_queue.get())
            number = self._send_items(items, number)
            del items  # else the last future stays while there is nothing to do
        with suppress(PilotqError):
            self._completions.wake(self._broker.link)
        self._broker.close()

    def _send_items(self, items: list[Put | Waiting | TaskFuture | None], number: int) -> int:
        """Submit calls, and cancel the tasks of futures; returns the number of the last submission."""
        fresh = [item for item in items if isinstance(item, (Put, Waiting)) and not item.future.cancelled()]
        for batch in batches(self._packed(fresh), self._broker.store.settings.bundle_calls_above):
            number += 1
            self._enqueue(batch, f"@{self._name}.{number}")
        self._cancel([item.task_id for item in items if isinstance(item, TaskFuture) and item.task_id is not None])
        return number

    def _packed(self, calls: list[Put | Waiting]) -> list[Put]:
        """Calls with all of their arguments; the futures of those that waited for one that failed are done then."""
        found = []
        for call in calls:
            try:
                found.append(call if isinstance(call, Put) else Put(call.future, *call.make()))
            except BaseException as error:  # noqa: BLE001  # what another call has raised
                self._set_outcome(call.future, Outcome(error=error))
                self._forget(call.future)
        return found

    def _enqueue(self, batch: Batch, key: str) -> None:
        with self._lock:
            self._committing = True
        try:
            ids = self._until_answered(lambda: submit(self._broker, batch, key))
        except Exception as error:  # noqa: BLE001  # whatever it was, nobody may wait for ever for these futures
            self._end_commit([], [])
            if len(batch.puts) > 1 and not isinstance(error, ServerUnavailable):
                for number, put in enumerate(batch.puts):  # some of them are wrong
                    self._enqueue(Batch([put], alike=False), f"{key}.{number}")
                return
            self._fail([put.future for put in batch.puts], error)
            return
        futures_of = [put.future for put in batch.puts]
        self._end_commit(futures_of, ids)
        self._cancel([future.task_id for future in futures_of if future.cancelled() and future.task_id is not None])

    def _end_commit(self, submitted: list[TaskFuture], ids: list[str]) -> None:
        """A submission has ended: its ids are known, and those that have ended before that."""
        with self._lock:
            for future, task_id in zip(submitted, ids, strict=True):
                future.task_id = task_id
                self._waiting[task_id] = future
            self._committing = False
            early, self._ended_early = self._ended_early, []
        self._take(early)

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
        poll_at = time.monotonic() + POLL_S
        answered_at = time.monotonic()
        while not self._all_done():
            try:
                self._take(self._completions.read())
                if time.monotonic() >= poll_at:
                    poll_at = time.monotonic() + POLL_S
                    self._completions.poll(self._next_to_poll(), self._files)
                for task_id, outcome in self._completions.missed():
                    self._set_outcome_of(task_id, outcome)
                answered_at = time.monotonic()
            except (PilotqError, OSError) as error:
                if time.monotonic() > answered_at + GONE_S or not self._pilot.alive():
                    self._fail_all(PilotFailed(f"the pilot in {self._pilot.directory} is gone: {error}"))
                time.sleep(0.1)
        with suppress(PilotqError):
            self._completions.remove()
        self._reader.close()
        # What large values still need of the pilot's directory is known by who refers to its files.
        files, self._files = self._files, OutputFiles(None)
        if self._private:
            private_pilot.end(self._pilot, files)
        _living.discard(self)

    def _next_to_poll(self) -> list[str]:
        """Ids of open tasks, in turn."""
        with self._lock:
            ids = list(islice(self._waiting, POLL_MAX))
            for task_id in ids:
                self._waiting[task_id] = self._waiting.pop(task_id)
        return ids

    def _take(self, ends: list[Ended]) -> None:
        found: list[tuple[TaskFuture, Ended]] = []
        late: list[Ended] = []  # of a canceled future it comes late, and nobody asks for its value
        with self._lock:
            for ended in ends:
                if (future := self._waiting.pop(ended.id, None)) is not None:
                    found.append((future, ended))
                else:
                    (self._ended_early if self._committing else late).append(ended)
        for future, ended in found:
            if future.cancelled():
                late.append(ended)
            else:
                self._set_outcome(future, outcome_of(ended, self._files))
        self._forget(*(future for future, _ in found))
        for ended in late:
            discard(ended, self._files)

    def _set_outcome_of(self, task_id: str, outcome: Outcome) -> None:
        with self._lock:
            future = self._waiting.pop(task_id, None)
        if future is not None:
            self._set_outcome(future, outcome)
            self._forget(future)

    def _set_outcome(self, future: TaskFuture, outcome: Outcome) -> None:
        """Whoever calls this also calls `_forget`."""
        try:
            if isinstance(outcome.error, FunctionCanceled):
                future.set_exception(futures.CancelledError(str(outcome.error)))
            elif outcome.error is not None:
                future.set_exception(outcome.error)
            else:
                future.set_result(outcome.value)
        except futures.InvalidStateError:
            pass  # it was canceled at this moment
        except BaseException:  # what a callback of the user raises, an exit too, does not end our thread
            logging.getLogger("concurrent.futures").exception("exception calling callback for %r", future)

    def _fail(self, left: Iterable[TaskFuture], error: Exception) -> None:
        for future in left:
            self._set_outcome(future, Outcome(error=error))
            self._forget(future)

    def _fail_all(self, error: PilotqError) -> None:
        with self._lock:
            left = list(self._waiting.values())
            self._waiting.clear()
        self._fail(left, error)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._finish(cancel=kind is not None and issubclass(kind, KeyboardInterrupt))


_living: set[Executor] = set()  # those whose calls have not all ended


@atexit.register
def _finish_all() -> None:
    """The end of the program waits for the calls of all executors, as those of the standard library do."""
    # What ended the program; at a prompt it may be long ago.
    last = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)
    cancel = last is KeyboardInterrupt
    interrupted: BaseException | None = None
    for executor in list(_living):
        try:
            executor._finish(cancel)
        except KeyboardInterrupt as error:
            interrupted, cancel = error, True
    private_pilot.remove_kept()
    if interrupted is not None:
        raise interrupted
