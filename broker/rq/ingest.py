"""Jobs of RQ's own producers on their way to the class lists, and all that RQ's workers would do for them beside.

Producers push ids to ``rq:queue:<queue>``. The server says so on a channel (the private server is set up for that; on
another one the dispatcher finds them within `LOOK_S`), and `route.lua` moves them on. Nothing is popped before it has
its place: a dispatcher that dies in the middle has changed nothing.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from pilotq.broker.errors import InvalidInput, ServerUnavailable
from pilotq.broker.rq.job_requests import Way, shown, way_of
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link, ReplyError
from pilotq.broker.store.requeue import retry
from pilotq.broker.store.store import Store, iso, pack
from pilotq.broker.tasks.model import CLASS_LIMIT, Shared

LOOK_S = 0.25  # all lists are looked at, whatever was heard: a word may have been lost
LIMITS_S = 60.0
SHOW = 500  # jobs routed in one call
TIMES = 40  # calls in a row: then the rest of the dispatcher has its turn
STEP_S = 2.0  # how long a process of RQ's may take between two steps of a release
# Answers of retry.lua that mean that a task runs again, or has not ended at all.
GOES_ON = ("queued", "deferred", "started", "scheduled")
UNDONE: Final = {
    "dependency": "a task it depends on did not finish: requeue that first",
    "gone": "what it needs is not kept any more: submit it again",
    "ending": "it was canceled, and still runs: requeue it when it has ended",
}
Refuse = Callable[[Way], str | None]


class Inbound:
    """Reads and routes over links of its own: the dispatcher's is blocked by its wait for mail."""

    def __init__(self, address: Address, store: Store, shared: Shared) -> None:
        self.store = Store(Link(address), store.epoch, store.settings, term=store.term)
        self.ear = Link(address)
        self.shared = shared
        self.queues: list[str] = []
        self.classes: Collection[str] = ()
        self.next_look = 0.0
        self.next_limits = 0.0
        self._number = 0  # of the last reading
        self._read_to = 0  # ... that we have heard of
        self._pushed: Counter[str] = Counter()  # channel -> pushes to the front since the last reading
        self._fronts: Counter[str] = Counter()  # ... between the last two
        self._heard = False
        self._deaf = False
        self._listening: set[str] = set()

    def begin(self, term: int) -> None:
        """For the dispatcher of this term, from now on."""
        key = self.shared.key()
        self.store.term = term
        self.store.write("SET", keys.shared(key), pack(self.shared))
        self.store.write("HINCRBY", keys.SHARES, key, 1)  # never given back: the pilot itself uses it
        self.look(time.monotonic())

    def close(self) -> None:
        """To be used again after the next `look`."""
        self.ear.close()
        self.store.link.close()
        self._listening = set()
        self._deaf = False
        self._pushed.clear()

    # -- hearing ------------------------------------------------------------------------------------------------------

    def wait(self, link: Link, commands: Sequence[tuple[Any, ...]], refuse: Refuse) -> list[Any]:
        """As ``link.pipeline(commands)``, but jobs that come meanwhile are routed; that rings the bell."""
        link.post_all(commands)
        poll = select.poll()
        poll.register(link.fileno(), select.POLLIN)
        poll.register(self.ear.fileno(), select.POLLIN)
        replies: list[Any] = []
        deadline = time.monotonic() + link.timeout
        while len(replies) < len(commands):
            ready = dict(poll.poll(max(deadline - time.monotonic(), 0.0) * 1000))
            if self.ear.fileno() in ready:
                self._hear()
                if not self.next_look:
                    self.look(time.monotonic())
                if self._heard:
                    self.route(refuse)
            if link.fileno() in ready:
                replies += link.replies()
            if not ready:
                link.close()
                raise ServerUnavailable(f"the server at {link.address} does not answer")
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _hear(self) -> int:
        """Take in what was said on our channels; returns how many subscriptions the server has confirmed."""
        confirmed = 0
        for reply in self.ear.replies():
            if isinstance(reply, ReplyError):
                self._deaf = True  # this user may not listen there: what `look` finds is all
                continue
            if isinstance(reply, Exception):
                raise reply
            kind, channel, word = reply
            if kind != b"message":
                confirmed += 1
            elif channel == keys.READ.encode():
                self._read_to, self._fronts, self._pushed = int(word), self._pushed, Counter()
            elif channel == self._channel(keys.QUEUES).encode():
                self.next_look = 0.0  # there may be a queue that we do not listen to
            else:
                self._heard = True
                self._pushed[channel.decode()] += word == b"lpush"
        return confirmed

    def _channel(self, key: str) -> str:
        return keys.said_of(key, self.ear.address.db)

    def turn(self, now: float, refuse: Refuse) -> None:
        """Look and route, if it is time for it."""
        if now >= self.next_look:
            self.look(now)
            self.route(refuse)

    def look(self, now: float) -> None:
        """Which queues there are, and what has happened to them that nobody told us of. ``now`` is monotonic."""
        self.next_look = now + LOOK_S
        if not self.ear.connected:
            self._listening = set()
        members, classes = self.store.link.pipeline([("SMEMBERS", keys.QUEUES), ("HKEYS", keys.CLASSES)])
        self.classes = {name.decode() for name in classes}
        self.queues = keys.queue_names(members, classes)
        wanted = {keys.READ, self._channel(keys.QUEUES), *(self._channel(keys.queue(name)) for name in self.queues)}
        self._listen(wanted)
        stamp = (f"{time.time():.6f}", iso(time.time()))
        if self.queues:
            self.store.run("due", self.store.term, *stamp, SHOW, STEP_S, *self.queues)
        if now >= self.next_limits:
            self.next_limits = now + LIMITS_S
            self.store.run("limits", self.store.term, *stamp)
        self._heard = True

    def _listen(self, wanted: set[str]) -> None:
        """Returns when the server has confirmed: what is said from now on is heard."""
        if old := self._listening - wanted:
            self.ear.post("UNSUBSCRIBE", *sorted(old))
        if new := wanted - self._listening:
            self.ear.post("SUBSCRIBE", *sorted(new))
        deadline = time.monotonic() + self.ear.timeout
        missing = len(new) + len(old)
        while missing > 0 and not self._deaf:
            self._await_word(deadline)
            missing -= self._hear()
        self._listening = wanted

    def _await_word(self, deadline: float) -> None:
        if not select.select([self.ear.fileno()], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            self.ear.close()
            raise ServerUnavailable(f"the server at {self.ear.address} does not answer")

    # -- routing ------------------------------------------------------------------------------------------------------

    def route(self, refuse: Refuse) -> int:
        """Route what is there; returns how many jobs were. ``refuse`` says why a request can never be held, or None."""
        total = 0
        self._heard = False
        for _ in range(TIMES):
            rows, fronts = self._read()
            if rows:
                total += self._move(rows, fronts, refuse)
            if len(rows) < SHOW:
                return total
        self._heard = True
        return total

    def _read(self) -> tuple[list[Any], Counter[str]]:
        """What stands in the lists, and how many at the front of each were pushed there."""
        self._number += 1
        rows = self.store.run("inbound", self.store.term, SHOW, self._number, *self.queues) if self.queues else []
        # What was pushed before this reading was said before its number.
        deadline = time.monotonic() + self.ear.timeout
        while rows and self._read_to < self._number and not self._deaf:
            self._await_word(deadline)
            self._hear()
        return rows, Counter() if self._deaf else self._fronts

    def _move(self, rows: list[Any], fronts: Counter[str], refuse: Refuse) -> int:
        ways: dict[Way, int] = {}
        jobs: list[Any] = []
        again = retry(self.store, [row[1].decode() for row in rows if row[4]])
        for queue, job, listed, _, submission, timeout, meta, webhooks in rows:
            name, way, why = queue.decode(), None, ""
            channel = self._channel(keys.queue(name))
            first = int(bool(listed) and fronts[channel] > 0)
            fronts[channel] -= first
            if submission:
                answer = again[job.decode()]
                if answer not in GOES_ON:
                    why = f"it was requeued, but cannot run again: {UNDONE.get(answer, f'it is {answer}')}"
            else:
                try:
                    way = self._way(name, timeout or b"", meta or b"", webhooks or b"", refuse)
                except InvalidInput as error:
                    why = str(error)
            number = ways.setdefault(way, len(ways) + 1) if way is not None else 0
            jobs += (queue, job, listed, first, number, why, shown(f"{why}\n") if why else "")
        now = time.time()
        described = [text for way in ways for text in (way.class_name, way.record, way.spec)]
        return int(self.store.run(
            "route", self.store.term, f"{now:.6f}", iso(now), self.store.settings.failed_ttl_s, self.shared.key(),
            len(ways), *described, *jobs,
        ))  # fmt: skip

    def _way(self, queue: str, timeout: bytes, meta: bytes, webhooks: bytes, refuse: Refuse) -> Way:
        if webhooks not in (b"", b"[]"):
            raise InvalidInput("it has webhooks, and nobody here would send them: enqueue it without")
        way = way_of(queue, timeout, meta)
        if (why := refuse(way)) is not None:
            raise InvalidInput(f"it can never run here: {why}")
        self._count(queue, way)
        return way

    def _count(self, queue: str, way: Way) -> None:
        if way.class_name in self.classes:
            return
        self.classes = {*self.classes, way.class_name}
        count = sum(keys.queue_of(name) == queue for name in self.classes)
        if count > CLASS_LIMIT:
            self.classes = set(self.classes) - {way.class_name}
            raise InvalidInput(
                f"queue {queue!r} would have {count} different kinds of request (priority, cores, timeout...), at most "
                f"{CLASS_LIMIT} are possible: make some of them equal"
            )
