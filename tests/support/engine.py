"""The broker's engine for tests: a real server, scripts called one by one, raw readers, nodes without processes.

A test module takes from `fixtures`: `engine` (an empty queue), `server` (the module's server), `node` (makes nodes).
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from pilotq.broker.client.submit import submit
from pilotq.broker.pilot.server import RunningServer, start_server
from pilotq.broker.scheduling.dispatcher import Dispatcher
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Link
from pilotq.broker.store.messages import (
    End,
    EndReport,
    Handed,
    Hello,
    Leave,
    Line,
    NodeInfo,
    NodeState,
    Recall,
    Stop,
    ToWorker,
)  # fmt: skip
from pilotq.broker.store.store import Slot, Store
from pilotq.broker.tasks.model import ArrayRange, Request, Shared, Task
from pilotq.workers.session import NodeLink, iso

EPOCH = "epoch-of-tests"
SHARED = Shared({}, "/", 0o022, {})
ONE = "default.p0.1c"  # the class of a task that asks for nothing
NODE = "n1:1"
_messages = msgspec.msgpack.Decoder(list[ToWorker])


def task(*argv: str, **fields: Any) -> Task:
    return Task(command=list(argv or ("true",)), **fields)


def array(count: int, **fields: Any) -> Task:
    return task(array=ArrayRange(0, count - 1), **fields)


def wide(cores: int, **fields: Any) -> Task:
    """A task of so many cores."""
    return task(request=Request(cores=(cores, cores)), **fields)


def ids(handed: Sequence[Handed]) -> list[str]:
    return [h.id for h in handed]


class Engine:
    """One queue on one server, with the term of a dispatcher."""

    def __init__(self, running: RunningServer) -> None:
        self.running = running
        self.admin = Link(running.admin)
        self.link = Link(running.address)
        self.calls = 0
        self.reset()

    def reset(self, **settings: Any) -> None:
        """An empty queue."""
        self.admin.call("FLUSHALL")
        self.admin.call("SET", keys.EPOCH, EPOCH)
        self.settings = Settings(**settings)
        self.store = Store(self.link, EPOCH, self.settings)
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
        self.store.run("register", name, incarnation, record, b"mail", 480, "birth", iso(time.time()))

    def claim(self, count: int = 1, class_name: str = ONE, *, node: str = NODE, lane: int = 1) -> list[Handed]:
        """Claim for ``count`` slots (lane 0: ahead), and take what was handed out of the inbox."""
        slots = [Slot(node, lane and lane + n, "n1[0]" if lane else "") for n in range(count)]
        self.store.claim([(class_name, slots)])
        return [m for m in self.inbox(node) if isinstance(m, Handed)]

    def end(
        self, tasks: Sequence[Handed], wish: str = "finished", reason: str = "", *, call: int | None = None,
        text: str = "", mail: bytes = b"mail", node: str = NODE,
    ) -> list[str]:  # fmt: skip
        """Report the end of executions, as a worker does; returns the verdicts."""
        reports = [end_report(h, wish, reason) for h in tasks]
        for report in reports:
            report.text = text
        arguments = self.store.end_arguments(node, call or self.next_call(), mail, reports)
        return [v.decode() for v in self.store.run("end", *arguments)]

    def lose(self, tasks: Sequence[Handed]) -> list[str]:
        """End executions of a dead node, as the dispatcher does."""
        now = iso(time.time())
        words = ("lost", "worker lost", now, "", "", "")
        return self.store.lose([EndReport(h.id, h.execution, *words, end_line(h)) for h in tasks])

    def give_back(self, tasks: Sequence[Handed], *, call: int | None = None) -> int:
        now = time.time()
        packed = msgspec.msgpack.encode([(h.id, h.execution) for h in tasks])
        late = (f"{now:.6f}", iso(now), self.settings.failed_ttl_s)
        return int(self.store.run("give_back", NODE, call or self.next_call(), b"mail", packed, *late))

    def cancel(self, *ids: str) -> list[str]:
        return self.store.cancel(ids)

    def release(self) -> int:
        """Until nothing is left; returns the number of calls."""
        calls = 0
        while self.link.call("LLEN", keys.RELEASE):
            self.store.release(200)
            calls += 1
        return calls

    def next_call(self) -> int:
        self.calls += 1
        return self.calls

    def run_all(self, class_name: str = ONE, wish: str = "finished") -> list[str]:
        """Claim and end until the list is empty; returns the ids in the order they ran."""
        ran: list[str] = []
        while handed := self.claim(10, class_name):
            self.end(handed, wish)
            self.release()
            ran += [h.id for h in handed]
        return ran

    # -- raw readers ------------------------------------------------------------------------------------------------

    def inbox(self, node: str = NODE) -> list[ToWorker]:
        """Take all messages out of a node's inbox."""
        name, _, incarnation = node.rpartition(":")
        inbox = keys.inbox(name, int(incarnation))
        found = [m for _, (_, packed) in self.link.call("XRANGE", inbox, "-", "+") for m in _messages.decode(packed)]
        self.link.call("DEL", inbox)
        return found

    def hash(self, task_id: str) -> dict[str, str]:
        flat = self.link.call("HGETALL", keys.job(task_id))
        return {k.decode(): v.decode("utf-8", "replace") for k, v in zip(flat[::2], flat[1::2], strict=True)}

    def status(self, task_id: str) -> str | None:
        value = self.link.call("HGET", keys.job(task_id), "status")
        return value.decode() if value is not None else None

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
        """Lines with the script's verdict laid over them, oldest first."""
        entries = self.link.call("XRANGE", keys.JOURNAL, "-", "+")
        # Lua packs bytes as text: two bits an element need not be UTF-8.
        items = [item for _, (_, packed) in entries for item in _loose(packed)]
        return [{**line, **verdict} for line, verdict in items]

    def final_line(self, task_id: str) -> dict[str, Any]:
        """The one final line of the journal about a task."""
        (line,) = (line for line in self.journal() if line["id"] == task_id and line["final"])
        return line

    def nothing_left(self) -> bool:
        """No list, no registry of what has not ended, nothing to release; and everything was counted."""
        total = self.counts()["total"]
        lists = [k for k in self.all_keys() if k.startswith(("rq:queue:", "rq:wip:", "rq:deferred:", keys.RELEASE))]
        return not lists and sum(self.counts().values()) == 2 * total

    def mail(self) -> list[bytes]:
        return list(self.link.call("LRANGE", keys.MAIL, 0, -1))

    def bits(self, array_id: str, count: int) -> str:
        """The outcomes of an array's elements, a digit each."""
        data = self.link.call("GET", keys.bits(array_id)) or b""
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


def end_line(h: Handed) -> bytes:
    return msgspec.msgpack.encode(Line(id=h.id, execution=h.execution, node="n1", array=h.array))


def end_report(h: Handed, wish: str, reason: str) -> EndReport:
    now = iso(time.time())
    return EndReport(
        h.id, h.execution, wish, reason, now, "0" if wish == "finished" else "1", now, h.allocation or "n1[0]",
        end_line(h), array=h.array, position=h.position, class_name=h.class_name, submission=h.submission,
        retries=h.retries,
    )  # fmt: skip


def _loose(packed: bytes) -> list[Any]:
    """Msgpack whose strings need not be UTF-8 (they become bytes then)."""
    from pilotq.broker.store.journal_writer import _items

    decoded = []
    for line, verdict in _items.decode(packed):
        found = {n: getattr(verdict, n) for n in ("status", "reason", "final")}
        if verdict.bits is not msgspec.UNSET:
            from pilotq.broker.store.journal_writer import _bytes_of, _elements

            found["elements"] = _elements(_bytes_of(verdict.bits), verdict.start, verdict.step)
        decoded.append(
            ({"id": line.id, "name": line.name, "execution": line.execution, "submission": line.submission}, found)
        )
    return decoded


# -- nodes and dispatchers --------------------------------------------------------------------------------------------


class FakeNode:
    """A worker without processes: what it is handed runs until `finish`, or ends at once with ``quick``."""

    def __init__(self, engine: Engine, name: str = "n1", cores: int = 2, *, quick: bool = False, job: str = "") -> None:
        self.link = NodeLink(engine.running.address, EPOCH, engine.settings)
        self.info = NodeInfo(name, 0, "here", 1, list(range(cores)), job=job)
        self.quick = quick
        self.running: dict[str, tuple[Handed, int, str]] = {}  # id -> task, lane, allocation
        self.ahead: dict[str, deque[Handed]] = defaultdict(deque)
        self.started: list[str] = []  # ids in the order they got a lane
        self.most_ahead = 0
        self.stops: list[Stop] = []
        self.recalls: list[Recall] = []
        self.verdicts: list[tuple[str, int, str]] = []
        self.left = False
        self._reports: list[EndReport] = []
        self._ends: list[End] = []

    def register(self) -> FakeNode:
        self.link.register(self.info)
        return self

    def turn(self, seconds: float = 0.0) -> None:
        """Wait at most so long for something to arrive, and deal with it."""
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

    def finish(self, task_id: str, wish: str = "finished", *, report: bool = True) -> None:
        handed, lane, allocation = self.running.pop(task_id)
        row = self.ahead[handed.class_name]
        self._end(handed, lane, wish, kept=bool(row))
        if row:
            self._start(row.popleft(), lane, allocation)
        if report:
            self.report()

    def report(self) -> None:
        if self._reports:
            self.link.post_ends(self._reports, self._ends)
            self._reports, self._ends = [], []

    def close(self) -> None:
        self.link.close()

    def _receive(self, message: ToWorker) -> None:
        if isinstance(message, Handed):
            if message.lane:
                self._start(message, message.lane, message.allocation)
            else:
                self.ahead[message.class_name].append(message)
                self.most_ahead = max(self.most_ahead, sum(map(len, self.ahead.values())))
        elif isinstance(message, Hello):
            self.report()
            lanes = [(lane, allocation, h.class_name) for h, lane, allocation in self.running.values()]
            ahead = {name: len(row) for name, row in self.ahead.items() if row}
            self.link.post_state(NodeState(self.info.name, self.info.incarnation, message.term, lanes, ahead))
        elif isinstance(message, Recall):
            self.recalls.append(message)
            row = self.ahead[message.class_name]
            back = [row.pop() for _ in range(min(len(row), message.count))][::-1]
            self.link.post_give_back([(h.id, h.execution) for h in back], {message.class_name: len(back)})
        elif isinstance(message, Stop):
            self._stop(message)
        elif isinstance(message, Leave):
            self.left = True

    def _stop(self, stop: Stop) -> None:
        self.stops.append(stop)
        if stop.id in self.running:
            self.finish(stop.id, stop.reason)
        for row in self.ahead.values():
            for handed in [h for h in row if h.id == stop.id]:
                row.remove(handed)
                self._end(handed, 0, stop.reason, kept=False)

    def _start(self, handed: Handed, lane: int, allocation: str) -> None:
        self.running[handed.id] = (handed, lane, allocation)
        self.started.append(handed.id)

    def _end(self, h: Handed, lane: int, wish: str, *, kept: bool) -> None:
        reason = {"finished": "", "failed": "exit"}.get(wish, wish)
        self._reports.append(end_report(h, wish, reason))
        self._ends.append(End(lane, h.class_name, 0.001 if lane else -1.0, kept))


class RunningDispatcher:
    """The real dispatcher, in a thread; ``error`` is what ended it."""

    def __init__(self, engine: Engine) -> None:
        self.dispatcher = Dispatcher(engine.running.address, EPOCH, engine.settings)
        self.error: Exception | None = None
        self._engine = engine
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> RunningDispatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.dispatcher.stop = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.dispatcher.run()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: the test looks at it
            self.error = error
        finally:
            self.dispatcher.close()


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
