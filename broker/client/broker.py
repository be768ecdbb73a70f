"""`Broker`: the connection of a user's script, a task, or the command line to a running pilot."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pilotq.broker.client.submit import submit, submit_calls
from pilotq.broker.client.views import Counts, Explanation, NodeView, TaskView
from pilotq.broker.errors import InvalidInput, NoPilot, ServerUnavailable, UnknownTask, WaitTimedOut
from pilotq.broker.pilot.directory import Pilot, find, remember_total
from pilotq.broker.settings import load
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection, parse_url
from pilotq.broker.store.registry import unavailable_nodes
from pilotq.broker.store.requeue import never_again, requeue
from pilotq.broker.store.store import Store, pack
from pilotq.broker.tasks.model import Task
from pilotq.broker.tasks.states import ENDED, STATUSES
from pilotq.broker.tasks.submit_context import SubmitContext, capture_context, without_host_limits, without_secret

if TYPE_CHECKING:
    import redis

    from pilotq.broker.client.archive import Archive
    from pilotq.broker.client.output import Output
    from pilotq.broker.client.overview import Overview
    from pilotq.broker.client.overview_reader import OverviewReader
    from pilotq.broker.client.past import PastTasks
    from pilotq.broker.client.queries import TaskQueries

POLL_MIN_S, POLL_MAX_S = 0.005, 0.2  # between two polls of a wait
POLL_SHARE = 0.03  # of the time that it has waited: about so much later at most it knows of the end
SLICE = 500
STOP_MODES = ("drain", "stop", "walltime", "now")
READY_S = 30.0  # how long a pilot may take to become ready, or to end, before that is an error


class Broker:
    """A connection to one pilot. Not for several threads; may be used as a context manager.

    with Broker.connect() as broker:
        ids = broker.enqueue_many([Task(command=["./simulate", str(n)], name=f"n{n}") for n in range(10)])
        counts = broker.wait(ids)
        print(counts.finished, b"".join(broker.output(ids[0])))
    """

    def __init__(self, address: Address, queue_id: str, pilot: Pilot | None, *, timeout: float = 10.0) -> None:
        self.pilot = pilot
        self.link = Connection(address, timeout=timeout)
        self.store = Store(self.link, queue_id, load(os.environ.get("PILOTQ_SETTINGS")))
        self._redis: redis.Redis | None = None
        self._overview: OverviewReader | None = None
        self._elsewhere = False  # the pilot runs on another host than this process

    @cached_property
    def _queries(self) -> TaskQueries:
        from pilotq.broker.client.queries import TaskQueries  # who only submits need not load them
        from pilotq.broker.store.journal import Journal

        return TaskQueries(self.link, Journal(self.pilot.journal) if self.pilot is not None else None)

    def _past(self, ids: Sequence[str], link: Connection | None = None) -> PastTasks:
        from pilotq.broker.client.past import PastTasks

        return PastTasks(link, self._queries.journal, ids)

    @classmethod
    def connect(cls, dir: str | None = None, *, timeout: float = 10.0) -> Broker:
        """Find the pilot: ``dir``, else ``PILOTQ_DIR``, else ``.pilotq/current``. Raises NoPilot."""
        pilot = find(dir)
        connection = pilot.connection()
        broker = cls(connection.address, connection.queue_id, pilot, timeout=timeout)
        broker._elsewhere = connection.host != socket.gethostname()
        try:
            broker.link.connect()
        except ServerUnavailable:
            if pilot.alive():
                raise
            raise ServerUnavailable(
                f"no pilot runs in {pilot.directory}: it was killed; `pilotq start --resume "
                f"{shlex.quote(pilot.directory)}` goes on with what has not ended"
            ) from None
        return broker

    @classmethod
    def from_url(cls, url: str, *, timeout: float = 10.0) -> Broker:
        """The pilot on a server that was started by hand; its journal cannot be read here. Raises NoPilot."""
        address = parse_url(url)
        queue_id = Connection(address, timeout=timeout).call("GET", keys.QUEUE_ID)
        if queue_id is None:
            raise NoPilot(f"no pilot uses the server at {address}: start a dispatcher there with `pilotq dispatcher`")
        return cls(address, queue_id.decode(), None, timeout=timeout)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- submitting ---------------------------------------------------------------------------------------------

    def enqueue(self, task: Task) -> str:
        """Submit one task (or one array) and return its id; see `enqueue_many`."""
        return self.enqueue_many([task])[0]

    def enqueue_many(
        self,
        tasks: Sequence[Task],
        *,
        key: str | None = None,
        context: SubmitContext | None = None,
        learn: bool = False,
    ) -> list[str]:
        """Submit all or none; returns ids in order (an array is one id). The same ``key`` gives the same ids.

        ``context`` is the environment, directory... that the tasks get, by default that of this process (see
        `capture_context`). With ``learn`` tasks ask for what earlier ones of their name have used in this pilot, and a
        little more, but no more than they ask for themselves. Raises InvalidInput, NeverFits,
        UnknownTask (nothing was submitted) or ServerUnavailable (unknown: submit again with the same key).
        """
        tasks = list(tasks)
        if not tasks:
            return []
        if odd := [task for task in tasks if not isinstance(task, Task)]:
            raise InvalidInput(f"a submission is made of Task(...), not of {type(odd[0]).__name__}")
        if learn and self._queries.journal is not None:
            from pilotq.broker.client.usage import learned, usage  # most programs do not need it

            tasks = learned(tasks, usage(self._queries.journal.entries()))

        def of_tasks() -> SubmitContext:
            return self._sent(context or capture_context(functions=any(task.function is not None for task in tasks)))

        return submit(self.link, self.store, tasks, of_tasks, key, self._statuses_in_journal, self._submitter())

    def _submitter(self) -> str:
        """The task of this pilot within which this process runs; empty when there is none."""
        task_id, directory = os.environ.get("PILOTQ_TASK_ID", ""), os.environ.get("PILOTQ_DIR", "")
        if not task_id or not directory or self.pilot is None:
            return ""
        same = os.path.realpath(directory) == os.path.realpath(self.pilot.directory)
        return task_id if same else ""

    def enqueue_calls(self, base: Task, payloads: Sequence[bytes], *, key: str, context: SubmitContext) -> list[str]:
        """Submit many calls of functions, packed by `functions.pack_call`: each is a task like ``base``, whose own
        function counts for nothing. Otherwise as `enqueue_many`."""
        return submit_calls(self.link, self.store, base, payloads, self._sent(context), key, self._submitter())

    def _sent(self, context: SubmitContext) -> SubmitContext:
        """A submit context as the pilot gets it."""
        context = without_secret(context, self.link.address.password)
        return without_host_limits(context) if self._elsewhere else context

    def _statuses_in_journal(self, ids: Sequence[str]) -> dict[str, str]:
        """The statuses of those of these tasks that have ended, and whose records have expired."""
        found = self._past(ids).statuses(ids)
        return {task_id: status for task_id, status in found.items() if status in ENDED}

    # -- waiting and stopping -----------------------------------------------------------------------------------

    def wait(
        self,
        ids: Iterable[str] | None = None,
        *,
        timeout: float | None = None,
        on_poll: Callable[[], object] | None = None,
    ) -> Counts:
        """Wait until these tasks (default: all) have ended; raises WaitTimedOut after ``timeout`` seconds.

        ``on_poll`` is called meanwhile, up to 200 times a second at first, later five times; what it raises ends the
        wait.
        """
        began = time.monotonic()
        deadline = None if timeout is None else began + timeout
        left = None if ids is None else _unique(ids)
        past = self._past(left or (), self.link)
        counts = Counts(total=len(left or ()))
        while True:
            if left is None:
                counts = self.counts()
                missing = counts.left
                if missing <= 0 and (missing := self._queries.uncounted()) <= 0:
                    # What was being routed between the two reads is counted by now.
                    counts = self.counts()
                    missing = counts.left
            else:
                left = self._skip_ended(left, counts, past)
                missing = len(left)
            if missing <= 0:
                return counts
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise WaitTimedOut(f"{missing} of {counts.total} tasks had not ended after {timeout:g} s")
            if on_poll is not None:
                on_poll()
            time.sleep(poll_after(now - began))

    def _skip_ended(self, ids: list[str], counts: Counts, past: PastTasks) -> list[str]:
        """The ids without the ended ones at their front.

        Only a few are asked for while they have not ended: what a wait costs must not grow with what it waits for.
        """
        window, first = 8, 0
        while first < len(ids):
            pending = self._not_ended(ids[first : first + window], counts, past)
            first += window
            if pending:
                return pending + ids[first:]
            window = min(2 * window, SLICE)
        return []

    def _not_ended(self, ids: list[str], counts: Counts, past: PastTasks) -> list[str]:
        """The ids that have not ended yet; those that have are added to ``counts``."""
        views = dict(zip(ids, self._queries.views(ids), strict=True))
        statuses = past.statuses([task_id for task_id, view in views.items() if view is None])
        left = []
        for task_id, view in views.items():
            status = view.status if view is not None else statuses.get(task_id) or self.task(task_id).status
            if status in ENDED:
                counts.add(status)
            else:
                left.append(task_id)
        return left

    def result(self, task_id: str, *, timeout: float | None = None) -> Any:
        """What a function has returned; waits for it, and raises what it has raised.

        Raises WaitTimedOut after ``timeout`` seconds; FunctionFailed when the function did not return by itself
        (FunctionCanceled when it was canceled or stopped); InvalidInput when the task is no function; UnknownTask when
        there is no such task, or its record has expired. Reading a result unpickles it.
        """
        [value] = self.results([task_id], timeout=timeout)
        return value

    def results(self, ids: Iterable[str], *, timeout: float | None = None) -> Iterator[Any]:
        """What many functions have returned, in the order of their ids, read together; waits for all of them first.

        Raises in its turn what `result` would raise.

        >>> ids = broker.enqueue_many([Task(function=pow, args=(n, 2)) for n in range(2000)])  # doctest: +SKIP
        >>> sum(broker.results(ids))  # doctest: +SKIP
        2664667000
        """
        from pilotq.broker.client.results import OutputFiles, StoredValue, fetch

        wanted = list(ids)

        def read() -> Iterator[Any]:
            files = OutputFiles(self.pilot)
            for first in range(0, len(wanted), SLICE):
                for outcome in fetch(self.link, wanted[first : first + SLICE], files):
                    assert outcome is not None, "it has ended"
                    if outcome.error is not None:
                        raise outcome.error
                    yield outcome.value.load() if isinstance(outcome.value, StoredValue) else outcome.value

        self.wait(wanted, timeout=timeout)
        return read()

    def cancel(self, ids: Iterable[str], *, waiting: bool = False, failures: bool = False) -> dict[str, str]:
        """Cancel tasks, waiting or running, or with ``waiting`` only what waits; returns id -> what happened.

        'canceled' (it was waiting), 'stopping' (it runs: its worker ends it), its status when it had ended, or
        'unknown'. With ``waiting`` also 'started': it was handed to a node, which cancels it if it has not begun. With
        ``failures`` only what waits, too, and it is said that too many tasks have failed (reason "failures").
        """
        reason = "failures" if failures else "canceled"
        wanted = _unique(ids)
        answers: dict[str, str] = {}
        for first in range(0, len(wanted), SLICE):
            part = wanted[first : first + SLICE]
            answers.update(zip(part, self.store.cancel(part, waiting=waiting or failures, reason=reason), strict=True))
        return answers

    def retry(self, ids: Iterable[str]) -> dict[str, str]:
        """Run tasks again that have ended and did not finish; of an array those of its elements that did not finish.

        id -> what happened: 'queued', 'deferred' (a task it depends on has not ended), its status when there is nothing
        to run again, 'dependency' (a task it depends on did not end as required: retry that first, or with it),
        'never' (it runs only if a task does not finish that has finished),
        'ending' (it was canceled, and runs still), 'gone' (only the journal has it) or 'unknown'. Each gets one more
        execution, and those that its retries left.
        """
        return requeue(self.store, _unique(ids))

    def pause(self, paused: bool) -> None:
        """Start no more tasks (running ones go on), or, with False, start tasks again."""
        self.store.write(*(("HSET", keys.CONTROL, "paused", 1) if paused else ("HDEL", keys.CONTROL, "paused")))
        self._control_changed()

    def _control_changed(self) -> None:
        from pilotq.broker.store.messages import ControlChanged

        self.store.write("RPUSH", keys.EVENTS, pack(ControlChanged()))

    def close_nodes(self, names: Iterable[str], state: str, reason: str = "") -> None:
        """Assign nothing more to these nodes: ``drained``, or ``retired``, whose workers end when nothing runs."""
        pairs = [text for name in _unique(names) for text in (name, f"{state} {reason}".strip())]
        self.store.write("HSET", keys.DRAINED, *pairs)
        self._control_changed()

    def open_nodes(self, names: Iterable[str]) -> None:
        """Use these nodes again."""
        several = _unique(names)
        for key in (keys.DRAINED, keys.QUARANTINE):
            self.store.write("HDEL", key, *several)
        self._control_changed()

    def closed_nodes(self) -> dict[str, str]:
        """node -> its state (drained, retired, quarantined) and the reason."""
        return unavailable_nodes(self.link)

    def request_stop(self, mode: str) -> None:
        """Ask the supervisor to end the pilot: ``drain`` (when nothing runs), ``stop`` (TERM, grace, KILL), ``now``."""
        if mode not in STOP_MODES:
            raise InvalidInput(f"a pilot cannot be ended in the mode {mode!r}: give one of {', '.join(STOP_MODES)}")
        if self.pilot is not None:
            remember_total(self.pilot, self.counts().total)
        self.store.write("HSET", keys.CONTROL, "stop", mode)

    # -- reading ------------------------------------------------------------------------------------------------

    def counts(self, submission: str | None = None, *, ids: Sequence[str] | None = None) -> Counts:
        """Numbers of tasks, of the whole pilot, of one submission (by its key), or of these tasks.

        Elements of arrays count one each. Of ``ids`` each is read: what they cost grows with their number.
        """
        if ids is not None:
            return self._queries.counts(ids)
        key = keys.COUNTS if submission is None else keys.submission(submission)
        values = self.link.call("HMGET", key, "total", "finished", "failed", "canceled")
        total, finished, failed, canceled = (int(v or 0) for v in values)
        return Counts(total=total, finished=finished, failed=failed, canceled=canceled)

    def task(self, task_id: str) -> TaskView:
        """One task, from Redis or the journal. Raises UnknownTask."""
        view = self._queries.task(task_id)
        if view is None:
            raise UnknownTask(f"there is no task {task_id!r} in this pilot: `pilotq list` shows those it has")
        return view

    def statuses(self, ids: Iterable[str]) -> dict[str, str]:
        """id -> its status, or 'unknown'. One round trip for each 500, and the journal where records have expired."""
        wanted = _unique(ids)
        found = self._queries.statuses(wanted)
        if left := [task_id for task_id in wanted if task_id not in found]:
            found |= self._past(left, self.link).statuses(left)
        return {task_id: found.get(task_id, "unknown") for task_id in wanted}

    def explain(self, task_id: str) -> Explanation:
        """Why a task waits and when it may start, or why it ended as it did. Raises UnknownTask."""
        from pilotq.broker.client.explain import Explainer  # brings placement along, which a submit does not need

        directory = self.pilot.directory if self.pilot is not None else ""
        return Explainer(self.link, self._queries, directory, time.time()).explain(self.task(task_id))

    def tasks(self, *, status: str | None = None, limit: int = 1000) -> Iterator[TaskView]:
        """Tasks, newest first: those with a record in Redis (running, waiting, ended), then those of the journal."""
        if status is not None and status not in STATUSES:
            raise InvalidInput(f"there is no status {status!r}: give one of {', '.join(sorted(STATUSES))}")
        return self._queries.tasks(status, limit)

    def find(self, name: str) -> list[str]:
        """Ids of the tasks with this name that have a record in Redis or an entry in the journal."""
        return self._queries.find(name)

    def open_ids(self) -> list[str]:
        """Ids of what has not ended; an array stands for its elements, a bundle for its tasks."""
        return self._queries.open_ids()

    def bundles(self, ids: Iterable[str]) -> dict[str, int]:
        """Those of these ids that stand for a bundle, with the number of its tasks (their ids: ``<id>_0`` and on)."""
        return self._queries.bundles(list(ids))

    def retriable(self) -> list[str]:
        """Ids of what ended, did not finish and can run again, as far as Redis has a record; an array stands for its
        elements, a bundle for its tasks, and a task that joins for what was submitted within it."""
        ids = self._queries.retriable()
        from pilotq.broker.client.joins import submitted_again

        hopeless = never_again(self.link, ids) | submitted_again(self.link, ids)
        return [task_id for task_id in ids if task_id not in hopeless]

    def nodes(self) -> list[NodeView]:
        """The nodes that have joined, by name."""
        return self._queries.nodes()

    def running(self) -> int:
        """How many executions run, or are about to: what is only prefetched does not count."""
        return self._queries.running()

    def overview(self, *, seconds: float = 0.05) -> Overview:
        """The pilot at this moment, for who shows it again and again: a call keeps what the ones before have read.

        Its size and what it asks of the server are bounded, whatever waits. Of the journal as much is read as takes
        ``seconds``; ``behind`` says how much is left for the next call.
        """
        from pilotq.broker.client.overview_reader import OverviewReader  # brings placement along

        if self._overview is None:
            directory = self.pilot.directory if self.pilot is not None else ""
            self._overview = OverviewReader(self.link, self._queries, directory)
        return self._overview.update(seconds)

    def output(self, task_id: str, stream: str = "stdout") -> Iterator[bytes]:
        """The captured output of the last execution that has ended, in pieces; nothing if there is none.

        ``stream``: stdout or stderr. Waits some seconds for the journal; raises PilotFailed when it does not come.
        """
        return self._output(stream).last(task_id, stream)

    def follow(self, task_id: str, stream: str = "stdout") -> Iterator[bytes]:
        """The output of a task while it is written, from the beginning of its last execution until it has ended.

        Gives an empty piece whenever there is nothing new yet. Raises UnknownTask when somebody deletes the task,
        PilotFailed as `output`.
        """
        return self._output(stream).follow(task_id, stream)

    def follow_executions(self, task_id: str, stream: str = "stdout") -> Iterator[tuple[int, bytes]]:
        """The pieces of `follow`, each with the number of the execution that has written it; 0 with an empty one."""
        return self._output(stream).follow_executions(task_id, stream)

    def _output(self, stream: str) -> Output:
        if stream not in ("stdout", "stderr"):
            raise InvalidInput(f"there is no stream {stream!r}: give stdout or stderr")
        if self.pilot is None:
            raise NoPilot("captured output is read from the pilot's directory: give it with --dir")
        from pilotq.broker.client.output import Output
        from pilotq.broker.store.journal import Journal

        return Output(self._queries, self.pilot, Journal(self.pilot.journal))

    @property
    def redis(self) -> redis.Redis:
        """A redis-py client of the pilot's server."""
        if self._redis is None:
            import redis as redis_py

            self._redis = redis_py.Redis.from_url(self.url)
        return self._redis

    @property
    def url(self) -> str:
        """The server's URL with its password: for RQ_REDIS_URL and its like, never for a command line."""
        return self.link.address.url()

    def close(self) -> None:
        self.link.close()
        if self._redis is not None:
            self._redis.close()


def _unique(ids: Iterable[str]) -> list[str]:
    """Each id once, in order. One text is one id, not its letters."""
    return [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))


def poll_after(waited: float) -> float:
    """Seconds until the next poll of a wait that has taken so many."""
    return min(max(POLL_MIN_S, POLL_SHARE * waited), POLL_MAX_S)


def open_pilot(directory: str | None = None, *, timeout: float = 10.0) -> Broker | Archive:
    """The pilot of ``directory`` (as in `Broker.connect`): a Broker when it runs, an Archive when it has ended.

    A pilot that is starting or ending is waited for. Raises NoPilot when there has never been one, and
    ServerUnavailable when it runs but its server does not answer.
    """
    pilot = find(directory)
    deadline = time.monotonic() + READY_S
    while True:
        alive = pilot.alive()
        try:
            return Broker.connect(pilot.directory, timeout=timeout)
        except NoPilot:
            if not alive and not os.path.exists(pilot.journal):
                raise
            if alive and time.monotonic() > deadline:
                raise
        except ServerUnavailable:
            # A killed pilot leaves a connection that leads nowhere.
            if alive:
                raise
        if not alive:
            from pilotq.broker.client.archive import Archive

            return Archive(pilot)
        time.sleep(POLL_MAX_S)
