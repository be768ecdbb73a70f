"""The broker's engine for tests: a real server, scripts called one by one, raw readers, nodes without processes.

A test module takes from `fixtures`: `engine` (an empty queue), `server` (the module's server), `node` (makes nodes).
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from pilotq.broker.client.submit import submit
from pilotq.broker.os_strings import from_json
from pilotq.broker.pilot.server import RunningServer, start_server
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.journal import JournalEntry, PackedEntry
from pilotq.broker.store.leases import leased_elements, read_leases, with_leases
from pilotq.broker.store.messages import (
    UNKNOWN,
    EndReport,
    ExecutionEnd,
    Lease,
    Leave,
    Reopen,
    RetractTasks,
    Run,
    StateReport,
    StateRequest,
    Stop,
    ToWorker,
    decode_inbox,
)
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.store import ClaimTarget, Store
from pilotq.broker.tasks.model import ArrayRange, Request, Task
from pilotq.broker.tasks.submit_context import SubmitContext
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.leased_ends import LeasedEnd, runs_of
from pilotq.workers.protocol import NO_OUTPUT, Exited
from pilotq.workers.session import Session, iso

QUEUE_ID = "queue-of-tests"
SHARED = SubmitContext({}, b"/", 0o022, {})
ONE = "default.p0.1c"  # the class of a task that asks for nothing
NODE = "n1:1"


def task(*argv: str, **fields: Any) -> Task:
    return Task(command=list(argv or ("true",)), **fields)


def array(count: int, **fields: Any) -> Task:
    return task(array=ArrayRange(0, count - 1), **fields)


def wide(cores: int, **fields: Any) -> Task:
    """A task of so many cores."""
    return task(request=Request(cores=(cores, cores)), **fields)


def ids(handed: Sequence[Run]) -> list[str]:
    return [h.id for h in handed]


class Engine:
    """One queue on one server, with the term of a dispatcher."""

    def __init__(self, running: RunningServer) -> None:
        self.running = running
        self.admin = Connection(running.admin)
        self.link = Connection(running.address)
        self.calls = 0
        self.reset()

    def reset(self, **settings: Any) -> None:
        """An empty queue."""
        self.admin.call("FLUSHALL")
        self.admin.call("SET", keys.QUEUE_ID, QUEUE_ID)
        self.settings = Settings(**settings)
        self.store = Store(self.link, QUEUE_ID, self.settings)
        self.store.take_term()

    def close(self) -> None:
        self.admin.close()
        self.link.close()

    # -- events -----------------------------------------------------------------------------------------------------

    def submit(self, *tasks: Task, key: str | None = None) -> list[str]:
        return submit(self.link, self.store, tasks, SHARED, key)

    def register(self, name: str = "n1", incarnation: int = 1, cores: int = 4) -> None:
        """A node as its worker registers it, without the worker."""
        record = msgspec.json.encode(NodeInfo(name, incarnation, "here", 1, list(range(cores))))
        self.store.run("register", name, incarnation, record, b"event", 480, "birth", iso(time.time()))

    def beat(self, running: bytes, incarnation: int = 1, *fields: str) -> int:
        """The heartbeat of node n1; ``running``: packed, as heartbeat.lua has it."""
        record = self.link.call("HGET", keys.NODES, "n1") or b""
        digest = hashlib.sha1(record, usedforsecurity=False).hexdigest()
        return int(self.store.run("heartbeat", "n1", incarnation, 480, running, digest, *fields))

    def claim(self, count: int = 1, class_name: str = ONE, *, node: str = NODE, slot: int = 1) -> list[Run]:
        """Claim for ``count`` targets (slot 0: prefetched), and take what was handed out of the inbox."""
        slots = [ClaimTarget(node, slot and slot + n, "n1[0]" if slot else "") for n in range(count)]
        self.store.claim([(class_name, slots)])
        return [m for m in self.inbox(node) if isinstance(m, Run)]

    def complete(
        self, tasks: Sequence[Run], outcome: str = "finished", reason: str = "", *, call: int | None = None,
        text: str = "", message: bytes = b"event", node: str = NODE,
    ) -> list[str]:  # fmt: skip
        """Report the end of executions, as a worker does; returns the answers."""
        reports = [end_report(h, outcome, reason) for h in tasks]
        for report in reports:
            report.text = text
        arguments = self.store.complete_arguments(node, call or self.next_call(), message, reports)
        return [v.decode() for v in self.store.run("complete", *arguments)]

    def complete_runs(self, tasks: Sequence[Run], *, node: str = NODE, values: Sequence[bytes] = ()) -> list[str]:
        """Report elements that finished, with ``values``, as a worker does: as runs, or by themselves."""
        ends = [leased_end(h, value) for h, value in zip(tasks, values or [b""] * len(tasks), strict=True)]
        runs = list(runs_of(ends, node.rpartition(":")[0]))
        arguments = self.store.complete_arguments(node, self.next_call(), b"event", [], [run for run, _ in runs])
        verdicts = [v.decode() for v in self.store.run("complete", *arguments)]
        found: dict[str, str] = {}
        for (run, make), verdict in zip(runs, verdicts, strict=True):
            reports = make()
            answers = [verdict] * run.number
            if verdict == "apart":
                arguments = self.store.complete_arguments(node, self.next_call(), b"event", reports)
                answers = [v.decode() for v in self.store.run("complete", *arguments)]
            found |= zip([r.id for r in reports], answers, strict=True)
        return [found[h.id] for h in tasks]

    def report_started(self, h: Run) -> None:
        """An execution lives longer than a moment."""
        self.store.run("report_started", h.id, h.execution, h.allocation or "n1[0]", iso(time.time()), b"", b"")

    def leased(self) -> list[str]:
        """What leases hold, as ``<id>:<execution>``."""
        return [f"{e.id}:{e.lease.execution}" for e in leased_elements(self.link, read_leases(self.link))]

    def report_lost(self, tasks: Sequence[Run]) -> list[str]:
        """End executions of a dead node, as the dispatcher does."""
        now = iso(time.time())
        words = ("lost", "worker lost", now, "", "", "")
        return self.store.report_lost([EndReport(h.id, h.execution, *words, end_entry(h)) for h in tasks])

    def return_unstarted(self, tasks: Sequence[Run], *, call: int | None = None) -> int:
        now = time.time()
        packed = msgspec.msgpack.encode([(h.id, h.execution, h.class_name, h.array, h.position) for h in tasks])
        late = (f"{now:.6f}", iso(now), self.settings.failed_ttl_s)
        return int(self.store.run("return_unstarted", NODE, call or self.next_call(), b"event", packed, *late))

    def drop_classes(self, *names: str, at: float) -> int:
        """What the reconciler does with the classes whose lists are empty; ``at``: unix seconds."""
        return int(self.store.run("drop_idle_classes", self.store.term, at, 60, *names))

    def cancel(self, *ids: str) -> list[str]:
        return self.store.cancel(ids)

    def release_dependents(self) -> int:
        """Until nothing is left; returns the number of calls."""
        calls = 0
        while self.link.call("LLEN", keys.RELEASE):
            self.store.release_dependents(200)
            calls += 1
        return calls

    def next_call(self) -> int:
        self.calls += 1
        return self.calls

    def run_all(self, class_name: str = ONE, outcome: str = "finished") -> list[str]:
        """Claim and end until the list is empty; returns the ids in the order they ran."""
        ran: list[str] = []
        while handed := self.claim(10, class_name):
            self.complete(handed, outcome)
            self.release_dependents()
            ran += [h.id for h in handed]
        return ran

    # -- raw readers ------------------------------------------------------------------------------------------------

    def inbox(self, node: str = NODE) -> list[ToWorker]:
        """Take all messages out of a node's inbox."""
        name, _, incarnation = node.rpartition(":")
        inbox = keys.inbox(name, int(incarnation))
        found = [m for _, (_, packed) in self.link.call("XRANGE", inbox, "-", "+") for m in decode_inbox(packed)[0]]
        found = [one for m in found for one in (map(m.run, range(m.number)) if isinstance(m, Lease) else (m,))]
        self.link.call("DEL", inbox)
        return found

    def hash(self, task_id: str) -> dict[str, str]:
        flat = self.link.call("HGETALL", keys.job(task_id))
        return {k.decode(): v.decode("utf-8", "replace") for k, v in zip(flat[::2], flat[1::2], strict=True)}

    def status(self, task_id: str) -> str | None:
        """The status of a task as it is by leases."""
        fields = ("status", "pq_class", "pq_exec")
        [row] = with_leases(self.link, [task_id], fields, [self.link.call("HMGET", keys.job(task_id), *fields)])
        return row[0].decode() if row[0] is not None else None

    def statuses(self, *ids: str) -> list[str | None]:
        return [self.status(i) for i in ids]

    def list(self, class_name: str = ONE) -> list[str]:
        return [i.decode() for i in self.link.call("LRANGE", keys.queue(class_name), 0, -1)]

    def registry(self, kind: str, queue: str = "default") -> list[str]:
        return [m.decode() for m in self.link.call("ZRANGE", keys.registry(kind, queue), 0, -1)]

    def counts(self, key: str = keys.COUNTS) -> dict[str, int]:
        """Those of total, finished, failed, canceled that are not 0."""
        names = ("total", "finished", "failed", "canceled")
        values = self.link.call("HMGET", key, *names)
        return {n: int(v) for n, v in zip(names, values, strict=True) if v is not None and int(v)}

    def journal(self) -> list[dict[str, Any]]:
        """Entries with what the script decided laid over them, oldest first."""
        entries = self.link.call("XRANGE", keys.JOURNAL, "-", "+")
        # Lua packs bytes as text: the outcomes of elements need not be UTF-8.
        items = [item for _, fields in entries for item in _loose(*fields)]
        return [{**entry, **ending} for entry, ending in items]

    def final_entry(self, task_id: str) -> dict[str, Any]:
        """The one final entry of the journal about a task."""
        (entry,) = (entry for entry in self.journal() if entry["id"] == task_id and entry["final"])
        return entry

    def nothing_left(self) -> bool:
        """No list, no registry of what has not ended, nothing to release; and everything was counted."""
        total = self.counts()["total"]
        open_keys = ("rq:queue:", "rq:wip:", "rq:deferred:", keys.RELEASE, keys.LEASES)
        lists = [k for k in self.all_keys() if k.startswith(open_keys)]
        return not lists and sum(self.counts().values()) == 2 * total

    def events(self) -> list[bytes]:
        return list(self.link.call("LRANGE", keys.EVENTS, 0, -1))

    def outcomes(self, array_id: str, count: int) -> str:
        """The outcomes of an array's elements, a digit each."""
        data = self.link.call("GET", keys.outcomes(array_id)) or b""
        text = "".join(f"{byte >> 6 & 3}{byte >> 4 & 3}{byte >> 2 & 3}{byte & 3}" for byte in data)
        return text.ljust(count, "0")[:count]

    def all_keys(self) -> list[str]:
        return sorted(k.decode() for k in self.admin.call("KEYS", "*"))

    def ttl(self, key: str) -> int:
        return int(self.link.call("TTL", key))

    def dump(self, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """Every key with its content and whether it has a TTL, but for keys that begin so."""
        found = {}
        for key in self.all_keys():
            if not key.startswith(tuple(without)):
                kind = self.link.call("TYPE", key)
                read = {
                    b"string": ("GET", key), b"hash": ("HGETALL", key), b"list": ("LRANGE", key, 0, -1),
                    b"zset": ("ZRANGE", key, 0, -1, "WITHSCORES"), b"set": ("SMEMBERS", key),
                    b"stream": ("XRANGE", key, "-", "+"),
                }[kind]  # fmt: skip
                content = self.link.call(*read)
                found[key] = (sorted(content) if kind == b"set" else content, self.ttl(key) >= 0)
        return found


def end_entry(h: Run) -> bytes:
    return msgspec.msgpack.encode(JournalEntry(id=h.id, execution=h.execution, node="n1", array=h.array))


def end_report(h: Run, outcome: str, reason: str) -> EndReport:
    now = iso(time.time())
    return EndReport(
        h.id, h.execution, outcome, reason, now, "0" if outcome == "finished" else "1", now, h.allocation or "n1[0]",
        end_entry(h), array=h.array, position=h.position, class_name=h.class_name, submission=h.submission,
        retries=h.retries,
    )  # fmt: skip


def leased_end(h: Run, value: bytes = b"") -> LeasedEnd:
    """The end of an element that has run for a millisecond."""
    e = Execution(1, h)
    now = time.time()
    e.allocation, e.started = h.allocation or "n1[0]", now
    e.exited = Exited(1, 1, 0, now, now, 0.001, 0.0, 0, 0, NO_OUTPUT, NO_OUTPUT)
    return LeasedEnd(e, now, "true", {}, value, lambda e, ended: end_report(e.run, "finished", ""))


def _loose(field: bytes, packed: bytes) -> list[Any]:
    """Msgpack whose strings need not be UTF-8 (they become bytes then)."""
    from pilotq.broker.store.journal_writer import _bytes_of, _items_of
    from pilotq.broker.tasks.array_outcomes import element_ranges

    decoded = []
    for item, ending in _items_of(field, packed):
        entry = from_json(item + b"}", PackedEntry) if isinstance(item, bytes) else item
        found = {n: getattr(ending, n) for n in ("status", "reason", "final", "released")}
        found = {n: getattr(entry, n) if value is msgspec.UNSET else value for n, value in found.items()}
        if ending.outcomes is not msgspec.UNSET:
            found["elements"] = element_ranges(_bytes_of(ending.outcomes), ending.array)
        named = ("id", "name", "execution", "submission", "array", "index")
        decoded.append(({n: getattr(entry, n) for n in named}, found))
    return decoded


# -- nodes and dispatchers --------------------------------------------------------------------------------------------


class FakeNode:
    """A worker without processes: what it is handed runs until `finish`, or ends at once with ``quick``."""

    def __init__(self, engine: Engine, name: str = "n1", cores: int = 2, *, quick: bool = False, job: str = "") -> None:
        self.link = Session(engine.running.address, QUEUE_ID, engine.settings)
        self.info = NodeInfo(name, 0, "here", 1, list(range(cores)), job=job)
        self.quick = quick
        self.running: dict[str, tuple[Run, int, str]] = {}  # id -> task, slot, allocation
        self.prefetched: dict[str, deque[Run]] = defaultdict(deque)
        self.started: list[str] = []  # ids in the order they got a slot
        self.most_prefetched = 0
        self.stops: list[Stop] = []
        self.retractions: list[RetractTasks] = []
        self.reopened: list[Reopen] = []
        self.verdicts: list[tuple[str, int, str]] = []
        self.left = False
        self._reports: list[EndReport] = []
        self._ends: list[ExecutionEnd] = []

    def register(self) -> FakeNode:
        self.link.register(self.info)
        return self

    def turn(self, seconds: float = 0.0) -> None:
        """Wait at most so long for something to arrive, and deal with it."""
        self.link.listen()
        select.select(self.link.filenos(), [], [], seconds)
        for message in self.link.pump(time.monotonic()):
            self._receive(message)
        self.verdicts += self.link.verdicts()
        while self.quick and self.running:
            for task_id in list(self.running):
                self.finish(task_id, report=False)
            if len(self._reports) >= 64:
                self.report()
        self.report()

    def finish(self, task_id: str, outcome: str = "finished", *, report: bool = True) -> None:
        handed, slot, allocation = self.running.pop(task_id)
        waiting = self.prefetched[handed.class_name]
        self._end(handed, slot, outcome, kept=bool(waiting))
        if waiting:
            self._start(waiting.popleft(), slot, allocation)
        if report:
            self.report()

    def report_started(self, task_id: str) -> None:
        handed, _, allocation = self.running[task_id]
        self.link.post_starts([(task_id, handed.execution, allocation, iso(time.time()), b"", b"")])

    def report(self) -> None:
        if self._reports:
            self.link.post_ends(self._reports, self._ends)
            self._reports, self._ends = [], []

    def close(self) -> None:
        self.link.close()

    def _receive(self, message: ToWorker) -> None:
        if isinstance(message, Lease):
            for run in map(message.run, range(message.number)):
                self._receive(run)
        elif isinstance(message, Run):
            if message.slot:
                self._start(message, message.slot, message.allocation)
            else:
                self.prefetched[message.class_name].append(message)
                self.most_prefetched = max(self.most_prefetched, sum(map(len, self.prefetched.values())))
        elif isinstance(message, StateRequest):
            self.report()
            slots = [(slot, allocation, h.class_name) for h, slot, allocation in self.running.values()]
            prefetched = {name: len(waiting) for name, waiting in self.prefetched.items() if waiting}
            self.link.post_state(StateReport(self.info.name, self.info.incarnation, message.term, slots, prefetched))
        elif isinstance(message, Reopen):
            self._reopen(message)
        elif isinstance(message, RetractTasks):
            self.retractions.append(message)
            waiting = self.prefetched[message.class_name]
            back = [waiting.pop() for _ in range(min(len(waiting), message.count))][::-1]
            self.link.post_returned(back, {message.class_name: len(back)})
        elif isinstance(message, Stop):
            self._stop(message)
        elif isinstance(message, Leave):
            self.left = True

    def _reopen(self, message: Reopen) -> None:
        self.reopened.append(message)
        waiting, ends = self.prefetched[message.class_name], []
        for slot, allocation in message.slots:
            ends.append(ExecutionEnd(slot, message.class_name, -1.0, kept=bool(waiting), health=UNKNOWN))
            if waiting:
                self._start(waiting.popleft(), slot, allocation)
        self.link.post_ends([], ends)

    def _stop(self, stop: Stop) -> None:
        self.stops.append(stop)
        for task_id in [i for i, (h, _, _) in self.running.items() if stop.id in (i, h.array)]:
            self.finish(task_id, stop.reason)
        for waiting in self.prefetched.values():
            for handed in [h for h in waiting if stop.id in (h.id, h.array)]:
                waiting.remove(handed)
                self._end(handed, 0, stop.reason, kept=False)

    def _start(self, handed: Run, slot: int, allocation: str) -> None:
        self.running[handed.id] = (handed, slot, allocation)
        self.started.append(handed.id)

    def _end(self, h: Run, slot: int, outcome: str, *, kept: bool) -> None:
        reason = {"finished": "", "failed": "exit"}.get(outcome, outcome)
        self._reports.append(end_report(h, outcome, reason))
        self._ends.append(ExecutionEnd(slot, h.class_name, 0.001 if slot else -1.0, kept))


def pump(nodes: Sequence[FakeNode], condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Let the nodes work until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        for node in nodes:
            node.turn(0.01 / len(nodes))


# -- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(str(tmp_path_factory.mktemp("server")), durability="none")
    yield running
    running.stop()


@pytest.fixture
def engine(server: RunningServer) -> Iterator[Engine]:
    found = Engine(server)
    yield found
    found.close()


@pytest.fixture
def node(engine: Engine) -> Iterator[Callable[..., FakeNode]]:
    """Makes nodes that have registered; the arguments are FakeNode's."""
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **options: Any) -> FakeNode:
            made = FakeNode(engine, *args, **options)
            stack.callback(made.close)
            return made.register()

        yield make


# An imported name that is a parameter too is a mistake to a linter: modules say `engine, server, node = fixtures`.
fixtures = (engine, server, node)
