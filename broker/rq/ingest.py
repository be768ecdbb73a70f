"""Moves jobs of RQ's own producers to the class lists, and does for them what RQ's workers would do otherwise.

Producers push ids to ``rq:queue:<queue>``. The server notifies the dispatcher of that on a channel (the private server
is configured so; on another one the dispatcher finds them within `POLL_S`), and a script moves them to the list of
their class. Nothing is popped before it has a place there: a dispatcher that dies in between has changed nothing.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from pilotq.broker.errors import InvalidInput, ServerUnavailable
from pilotq.broker.log import log
from pilotq.broker.rq.job_requests import JobRequest, job_request_of, own_description, rq_error_text
from pilotq.broker.rq.jobs import is_own_data
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection, ReplyError
from pilotq.broker.store.registry import user_queues
from pilotq.broker.store.requeue import requeue
from pilotq.broker.store.store import Store, iso, pack
from pilotq.broker.tasks.submit_context import SubmitContext

POLL_S = 0.25  # interval at which all lists are read, as a notification may have been lost
LIMITS_S = 60.0  # interval at which slots of RQ's rate limits are freed
LIMIT_CALLS_MAX = 10  # calls for that in a row: then the rest of the dispatcher runs
BATCH = 500  # jobs routed in one call
BATCHES_MAX = 40  # calls in a row: then the rest of the dispatcher runs
RELEASE_STEP_S = 2.0  # a process of RQ's may take so long between two steps of a release
# Answers of requeue.lua that mean that a task runs again, or has not ended at all.
NOT_ENDED = ("queued", "deferred", "started", "scheduled")
WHY_NOT_REQUEUED: Final = {
    "dependency": "a task it depends on did not end as required: requeue that first",
    "damaged": "its record on the server is damaged: submit it again",
    "gone": "what it needs is not kept any more: submit it again",
    "ending": "it was canceled, and still runs: requeue it when it has ended",
}
Refuse = Callable[[JobRequest], str | None]


class RqIngest:
    """Reads the lists of RQ's queues and routes their jobs.

    It has connections of its own, as the dispatcher's is blocked by its wait for events.
    """

    def __init__(self, address: Address, store: Store, shared: SubmitContext) -> None:
        self.store = Store(Connection(address), store.queue_id, store.settings, term=store.term)
        self.listener = Connection(address)
        self.context = shared
        self.queues: list[str] = []
        self.next_refresh = 0.0
        self.next_limits = 0.0
        self._limits_cursor = b"0"  # of the walk through all rate limits
        self._reading = 0  # number of the last reading
        self._notified = 0  # ... whose notification has arrived
        self._front_pushes: Counter[str] = Counter()  # channel -> pushes to the front since the last reading
        self._last_front_pushes: Counter[str] = Counter()  # ... between the last two
        self._to_route = False  # the lists may hold jobs
        self._cannot_listen = False  # this user may not subscribe
        self._channels: set[str] = set()  # subscribed to

    def start(self, term: int) -> None:
        """Work for the dispatcher of this term from now on."""
        key = self.context.key()
        self.store.term = term
        self.store.write("SET", keys.shared(key), pack(self.context))
        self.store.write("HINCRBY", keys.SHARED_REFS, key, 1)  # never given back: the pilot itself uses it
        self.refresh(time.monotonic())

    def close(self) -> None:
        """Close the connections; the next `refresh` opens them again."""
        self.listener.close()
        self.store.link.close()
        self._channels = set()
        self._cannot_listen = False
        self._front_pushes.clear()

    # -- notifications ------------------------------------------------------------------------------------------------

    def pipeline(self, connection: Connection, commands: Sequence[tuple[Any, ...]], refuse: Refuse) -> list[Any]:
        """As ``connection.pipeline(commands)``, but route jobs that arrive meanwhile; that wakes the dispatcher.

        Errors are returned as exceptions, not raised.
        """
        connection.post_all(commands)
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        poll.register(self.listener.fileno(), select.POLLIN)
        replies: list[Any] = []
        deadline = time.monotonic() + connection.timeout
        while len(replies) < len(commands):
            ready = dict(poll.poll(max(deadline - time.monotonic(), 0.0) * 1000))
            if self.listener.fileno() in ready:
                self._receive()
                if not self.next_refresh:
                    self.refresh(time.monotonic())
                if self._to_route:
                    self.route(refuse)
            if connection.fileno() in ready:
                replies += connection.replies()
            if not ready:
                connection.close()
                raise ServerUnavailable(f"the server at {connection.address} does not answer")
        return replies

    def _receive(self) -> int:
        """Read the notifications that have arrived; returns how many subscriptions the server has confirmed."""
        confirmed = 0
        for reply in self.listener.replies():
            if isinstance(reply, ReplyError):
                self._cannot_listen = True  # this user may not subscribe: only `refresh` finds jobs
                continue
            if isinstance(reply, Exception):
                raise reply
            kind, channel, message = reply
            if kind != b"message":
                confirmed += 1
            elif channel == keys.RQ_READ.encode():
                self._notified, self._last_front_pushes, self._front_pushes = (
                    int(message),
                    self._front_pushes,
                    Counter(),
                )
            elif channel == self._channel(keys.QUEUES).encode():
                self.next_refresh = 0.0  # there may be a queue whose channel is not subscribed to
            else:
                self._to_route = True
                self._front_pushes[channel.decode()] += message == b"lpush"
        return confirmed

    def _channel(self, key: str) -> str:
        return keys.keyspace_channel(key, self.listener.address.db)

    def poll(self, now: float, refuse: Refuse) -> None:
        """Refresh and route, if POLL_S have passed."""
        if now >= self.next_refresh:
            self.refresh(now)
            self.route(refuse)

    def refresh(self, now: float) -> None:
        """Read which queues there are, and do what no notification comes for. ``now`` is monotonic."""
        self.next_refresh = now + POLL_S
        if not self.listener.connected:
            self._channels = set()
        self.queues = user_queues(self.store.link)
        wanted = {keys.RQ_READ, self._channel(keys.QUEUES), *(self._channel(keys.queue(name)) for name in self.queues)}
        self._listen(wanted)
        stamp = (f"{time.time():.6f}", iso(time.time()))
        if self.queues:
            self.store.run(
                "enqueue_due",
                self.store.term,
                *stamp,
                BATCH,
                RELEASE_STEP_S,
                self.store.settings.failed_ttl_s,
                *self.queues,
            )
        if now >= self.next_limits:
            for _ in range(LIMIT_CALLS_MAX):
                self._limits_cursor = self.store.run("free_rate_slots", self.store.term, *stamp, self._limits_cursor)
                if self._limits_cursor == b"0":
                    self.next_limits = now + LIMITS_S
                    break
        self._to_route = True

    def _listen(self, wanted: set[str]) -> None:
        """Subscribe to these channels only; returns when the server has confirmed that."""
        if old := self._channels - wanted:
            self.listener.post("UNSUBSCRIBE", *sorted(old))
        if new := wanted - self._channels:
            self.listener.post("SUBSCRIBE", *sorted(new))
        deadline = time.monotonic() + self.listener.timeout
        missing = len(new) + len(old)
        while missing > 0 and not self._cannot_listen:
            self._await_message(deadline)
            missing -= self._receive()
        self._channels = wanted

    def _await_message(self, deadline: float) -> None:
        if not select.select([self.listener.fileno()], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            self.listener.close()
            raise ServerUnavailable(f"the server at {self.listener.address} does not answer")

    # -- routing ------------------------------------------------------------------------------------------------------

    def route(self, refuse: Refuse) -> int:
        """Route the jobs that are in the lists; returns their number.

        ``refuse`` returns why a request can never be placed, or None.
        """
        total = 0
        self._to_route = False
        for _ in range(BATCHES_MAX):
            rows, fronts = self._read()
            if rows:
                total += self._move(rows, fronts, refuse)
            if len(rows) < BATCH:
                return total
        self._to_route = True
        return total

    def _read(self) -> tuple[list[Any], Counter[str]]:
        """The jobs in the lists, and how many at the front of each list were pushed there."""
        self._reading += 1
        rows = self.store.run("read_rq", self.store.term, BATCH, self._reading, *self.queues) if self.queues else []
        # Notifications of pushes before this reading arrive before that of its number.
        deadline = time.monotonic() + self.listener.timeout
        while rows and self._notified < self._reading and not self._cannot_listen:
            self._await_message(deadline)
            self._receive()
        return rows, Counter() if self._cannot_listen else self._last_front_pushes

    def _move(self, rows: list[Any], fronts: Counter[str], refuse: Refuse) -> int:
        rows = self._part([row for row in rows if row[4]], rows)
        requests: dict[JobRequest, int] = {}
        jobs: list[Any] = []
        again = requeue(self.store, [row[1].decode(errors="replace") for row in rows if row[4]])
        for queue, job, listed, _, submission, timeout, meta, webhooks in rows:
            name, request, why = queue.decode(), None, ""
            channel = self._channel(keys.queue(name))
            first = int(bool(listed) and fronts[channel] > 0)
            fronts[channel] -= first
            if submission:
                answer = again[job.decode(errors="replace")]
                if answer not in NOT_ENDED:
                    why = f"it was requeued, but cannot run again: {WHY_NOT_REQUEUED.get(answer, f'it is {answer}')}"
            else:
                try:
                    request = self._job_request(name, timeout or b"", meta or b"", webhooks or b"", refuse)
                except InvalidInput as error:
                    why = str(error)
            number = requests.setdefault(request, len(requests) + 1) if request is not None else 0
            jobs += (queue, job, listed, first, number, why, rq_error_text(f"{why}\n") if why else "")
        now = time.time()
        described = [text for request in requests for text in (request.class_name, request.spec)]
        return int(self.store.run(
            "route_rq", self.store.term, f"{now:.6f}", iso(now), self.store.settings.failed_ttl_s, self.context.key(),
            len(requests), *described, *jobs,
        ))  # fmt: skip

    def _part(self, ours: list[Any], rows: list[Any]) -> list[Any]:
        """Give an id of its own to each job that a producer has enqueued under that of one of our tasks.

        RQ writes it over our record. Returns the other rows.
        """
        records = self.store.link.read_hashes(
            [keys.job(row[1].decode(errors="replace")) for row in ours], "data", "pq_spec"
        )
        jobs: list[Any] = []
        for row, (data, spec) in zip(ours, records, strict=True):
            if data is not None and not is_own_data(data):
                jobs += (row[0], row[1], row[2], own_description(spec or b""))
        if not jobs:
            return rows
        now, ttl = f"{time.time():.6f}", self.store.settings.failed_ttl_s
        answers = self.store.run("part_rq", self.store.term, now, ttl, *jobs)
        parted = {job: new.decode() for job, new in zip(jobs[1::4], answers, strict=True) if new}
        for job, new in parted.items():
            text = job.decode(errors="replace")
            log(
                f"a producer of RQ has enqueued a job with the id {text} of a task: it runs as {new}",
                level="warning",
                task=new,
            )
        self._to_route = self._to_route or bool(parted)
        return [row for row in rows if row[1] not in parted]

    def _job_request(self, queue: str, timeout: bytes, meta: bytes, webhooks: bytes, refuse: Refuse) -> JobRequest:
        if webhooks not in (b"", b"[]"):
            raise InvalidInput("it has webhooks, and nobody here would send them: enqueue it without")
        request = job_request_of(queue, timeout, meta)
        if (why := refuse(request)) is not None:
            raise InvalidInput(f"it can never run here: {why}")
        return request
