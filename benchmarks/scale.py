"""Measures what grows: very many tasks of each shape are planted, and the longest script call and the time are taken.

    python -m benchmarks scale                       # PILOTQ_SCALE=N: with N tasks instead of 1,000,000
    PILOTQ_BASELINE=COMMIT python -m benchmarks scale    # each shape also with the code of that commit, in turns

No script call may hold up the server for more than 50 ms, as nobody is served meanwhile: the figure is the longest one,
as the server's slow log has it. Times are those of the caller. Each shape has a process and a server of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, table
from benchmarks.pilots import keep_records
from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.server import start_server
from pilotq.broker.scheduling.dispatcher import Dispatcher
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.messages import EndReport, StateReport
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.store import ClaimTarget, iso, pack
from pilotq.broker.tasks.model import ArrayRange, Request, Task

ROOT = Path(__file__).parents[1]
LONGEST_MS = 50.0  # of a script call
ONE = "default.p0.1c"
NODE = "n1:1"
GIB = 2**30
MEASURE = "import sys; from benchmarks import scale; scale.measure(sys.argv[1], int(sys.argv[2]))"


class Lab:
    """A server, and a pilot without processes on it."""

    def __init__(self, directory: str, admin: Connection, broker: Broker) -> None:
        self.pilot = Pilot(directory)
        self.admin = admin
        self.broker = broker
        self.store = broker.store
        self.seconds = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What happens inside counts."""
        self.admin.call("SLOWLOG", "RESET")
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def longest_ms(self) -> float:
        entries = self.admin.call("SLOWLOG", "GET", 10_000)
        return max((int(e[2]) for e in entries if e[3][0] == b"FCALL"), default=0) / 1e3

    def dispatcher(self) -> Dispatcher:
        found = Dispatcher(self.broker.link.address, self.store.queue_id, Settings())
        found._take_over()
        self.store.term = found.store.term
        return found

    def claim(self, count: int) -> list[Any]:
        self.store.take_term()
        return self.store.claim([(ONE, [ClaimTarget(NODE, n + 1, "n1[0]") for n in range(count)])])

    def complete(self, task_id: str) -> None:
        words = ("finished", "", iso(time.time()), "0", iso(time.time()), "n1[0]")
        self.store.report_lost([EndReport(task_id, 1, *words, pack({"id": task_id}))])

    def release(self) -> None:
        """Until nothing is left of what was left to the dispatcher."""
        while self.store.release_dependents(200)[1]:
            pass

    def journal(self, count: int, line: Callable[[int], dict[str, Any]]) -> None:
        with open(self.pilot.journal, "w") as file:
            file.write('{"pilotq_journal": 1}\n')
            for n in range(count):
                file.write(json.dumps(line(n), separators=(",", ":")) + "\n")

    def half_finished(self, count: int) -> str:
        """An array that runs again, and of which every other element has finished."""
        array = self.broker.enqueue(Task(command=["true"], array=ArrayRange(0, count - 1)))
        self.admin.call("SET", keys.outcomes(array), b"\x11" * (count // 4))
        self.admin.call("HSET", keys.job(array), "pq_has_gaps", 1, "pq_left", count // 2)
        return array


def _tasks(count: int, **fields: Any) -> list[Task]:
    return [Task(command=["true"], **fields) for _ in range(count)]


def submit_independent(lab: Lab, count: int) -> None:
    tasks = _tasks(count)
    with lab.watched():
        lab.broker.enqueue_many(tasks)


def submit_dependents(lab: Lab, count: int) -> None:
    tasks = [Task(command=["true"], name="first"), *_tasks(count, after=["first"])]
    with lab.watched():
        lab.broker.enqueue_many(tasks)


def submit_kinds(lab: Lab, count: int) -> None:
    """A tenth as many kinds of requests; a dispatcher takes over, and looks at them ten times."""
    tasks = [Task(command=["true"], request=Request(memory=1 + n)) for n in range(count // 10)]
    with lab.watched():
        lab.broker.enqueue_many(tasks)
        dispatcher = lab.dispatcher()
        for _ in range(10):
            dispatcher.next_check = dispatcher.reconciler.next_turn = 0.0
            dispatcher._turn()


def release_dependents(lab: Lab, count: int) -> None:
    first, *_ = lab.broker.enqueue_many([Task(command=["true"], name="first"), *_tasks(count // 10, after=["first"])])
    dispatcher = lab.dispatcher()
    lab.release()
    lab.claim(1)
    with lab.watched():
        lab.complete(first)
        lab.release()
    dispatcher.close()


def cancel_half_finished(lab: Lab, count: int) -> None:
    array = lab.half_finished(count)
    with lab.watched():
        lab.broker.cancel([array])


def retry_half_finished(lab: Lab, count: int) -> None:
    array = lab.half_finished(count)
    lab.broker.cancel([array])
    with lab.watched():
        lab.broker.retry([array])


def claim_half_finished(lab: Lab, count: int) -> None:
    lab.half_finished(count)
    with lab.watched():
        lab.claim(500)


def claim_deleted(lab: Lab, count: int) -> None:
    ids = [f"v{n}" for n in range(count)]
    for first in range(0, count, 5000):
        lab.admin.call("RPUSH", keys.queue(ONE), *ids[first : first + 5000])
    with lab.watched():
        lab.claim(500)


def cancel_all(lab: Lab, count: int) -> None:
    ids = lab.broker.enqueue_many(_tasks(count // 10))
    with lab.watched():
        lab.broker.cancel(ids)


def after_expired(lab: Lab, count: int) -> None:
    lab.journal(count, _finished)
    tasks = [Task(command=["true"], after=[f"v{n:x}"]) for n in range(0, count, max(count // 2000, 1))]
    with lab.watched():
        lab.broker.enqueue_many(tasks)


def wait_expired(lab: Lab, count: int) -> None:
    lab.journal(count, _finished)
    with lab.watched():
        lab.broker.wait([f"v{n:x}" for n in range(0, count, max(count // 2000, 1))])


def count_retried(lab: Lab, count: int) -> None:
    """Of every 125 elements of an array one was retried by itself: 8,000 of 1,000,000."""

    def line(n: int) -> dict[str, Any]:
        entry = {"id": f"v_{n}", "status": "failed", "execution": 1, "array": "v", "index": n}
        return {"id": f"v_{n - 1}", "status": "queued", "final": False, "array": "v"} if n % 125 == 1 else entry

    lab.journal(count, line)
    with lab.watched():
        Archive(lab.pilot).counts()


def reconcile_canceled(lab: Lab, count: int) -> None:
    """Twenty turns behind the cancel of as many tasks as records are kept of."""
    ids = lab.broker.enqueue_many(_tasks(min(count // 10, 100_000)))
    dispatcher = lab.dispatcher()
    lab.broker.cancel(ids)
    with lab.watched():
        for _ in range(20):
            dispatcher.reconciler.next_turn = 0.0
            dispatcher._run_periodic_work(time.monotonic())


def kinds_too_large(lab: Lab, count: int) -> None:
    """A tenth as many kinds of requests that the one node cannot hold; all are examined, and looked at ten times."""
    tasks = [Task(command=["true"], request=Request(memory=GIB + n)) for n in range(count // 10)]
    lab.broker.enqueue_many(tasks)
    dispatcher = lab.dispatcher()
    info = NodeInfo("n1", 1, "here", 1, [0], memory=GIB // 2)
    dispatcher.inventory.add_node(info, StateReport("n1", 1, lab.store.term, [], {}), time.monotonic())
    with lab.watched():
        for _ in range(10):
            dispatcher._start_tasks(time.monotonic())
            while dispatcher.backlog.more:
                dispatcher._start_tasks(time.monotonic())


def release_arrays(lab: Lab, count: int) -> None:
    """A hundredth as many arrays of two that wait element by element for one."""
    pair = ArrayRange(0, 1)
    first, *_ = lab.broker.enqueue_many(
        [
            Task(command=["true"], array=pair, name="first"),
            *_tasks(count // 100, array=pair, after_each=["first"]),
        ]
    )
    dispatcher = lab.dispatcher()
    lab.release()
    lab.claim(2)
    with lab.watched():
        for n in range(2):
            lab.complete(f"{first}_{n}")
        lab.release()
    dispatcher.close()


def _fan(lab: Lab, tasks: list[Task]) -> list[str]:
    """These tasks have been canceled, and what waited for them."""
    ids = lab.broker.enqueue_many(tasks)
    dispatcher = lab.dispatcher()
    lab.release()
    lab.broker.cancel(ids)
    lab.release()
    dispatcher.close()
    return ids


def retry_dependents(lab: Lab, count: int) -> None:
    ids = _fan(lab, [Task(command=["true"], name="first"), *_tasks(count // 10, after=["first"])])
    with lab.watched():
        lab.broker.retry(ids)


def retry_with_parents(lab: Lab, count: int) -> None:
    parents = [Task(command=["true"], name=f"t{n}") for n in range(count // 10)]
    ids = _fan(lab, [*parents, Task(command=["true"], after=[f"t{n}" for n in range(count // 10)])])
    with lab.watched():
        lab.broker.retry(ids)
        lab.release()


def count_vanished(lab: Lab, count: int) -> None:
    tasks = [Task(command=["true"], request=Request(memory=1 + n)) for n in range(count // 10)]
    ids = lab.broker.enqueue_many(tasks)
    lists = [keys.queue(name.decode()) for name in lab.admin.call("HKEYS", keys.CLASSES)]
    for first in range(0, len(ids), 5000):
        lab.admin.call("DEL", *map(keys.job, ids[first : first + 5000]), *lists[first : first + 5000])
    lab.admin.call("DEL", keys.CHANGED_CLASSES)
    dispatcher = lab.dispatcher()
    lab.release()
    with lab.watched():
        lab.store.count_vanished(["default"])
    dispatcher.close()
    assert lab.broker.counts().left == 0


def free_rate_slots(lab: Lab, count: int) -> None:
    """A tenth as many limits, each held by a job that is gone, and one with as many holders and jobs that wait."""
    names = [f"limit {n}" for n in range(count // 10)]
    for first in range(0, len(names), 5000):
        part = names[first : first + 5000]
        lab.admin.call("SADD", "rq:rl-keys", *part)
        lab.admin.pipeline([("HSET", f"rq:rl:{n}", "concurrency", len(names)) for n in part])
        lab.admin.pipeline([("ZADD", f"rq:rl:{n}:allowed", 1, "gone") for n in part])
        for kind in ("allowed", "rate_limited"):
            lab.admin.call("ZADD", f"rq:rl:limit 0:{kind}", *(text for n in part for text in (1, f"{kind} {n}")))
        lab.admin.pipeline(
            [("HSET", keys.job(f"rate_limited {n}"), "status", "rate_limited", "origin", "default") for n in part]
        )
    dispatcher, cursor = lab.dispatcher(), b""
    with lab.watched():
        while cursor != b"0":
            cursor = lab.store.run("free_rate_slots", lab.store.term, "1", "now", cursor or "0")
    dispatcher.close()


def _finished(n: int) -> dict[str, Any]:
    return {"id": f"v{n:x}", "status": "finished", "execution": 1, "node": "n1", "cpus": "n1[0]", "stdout": "x" * 200}


SHAPES: dict[str, Callable[[Lab, int], None]] = {
    "submit of independent tasks": submit_independent,
    "submit of tasks that wait for one": submit_dependents,
    "a tenth as many kinds of requests": submit_kinds,
    "a tenth as many kinds of requests too large for the nodes": kinds_too_large,
    "release of a tenth as many that waited for one": release_dependents,
    "release of a hundredth as many arrays, element by element": release_arrays,
    "cancel of an array, every other element finished": cancel_half_finished,
    "retry of that array": retry_half_finished,
    "retry of a tenth as many that wait for one": retry_dependents,
    "retry of one that waits for a tenth as many": retry_with_parents,
    "claim of that array": claim_half_finished,
    "claim where all records were deleted": claim_deleted,
    "a tenth as many kinds whose records were deleted": count_vanished,
    "a tenth as many rate limits of RQ": free_rate_slots,
    "cancel of a tenth as many tasks": cancel_all,
    "2,000 tasks after expired ones": after_expired,
    "wait for 2,000 expired ones": wait_expired,
    "counts of an ended pilot, 1 of 125 retried": count_retried,
    "20 turns behind a cancel of a tenth as many": reconcile_canceled,
}


def measure(shape: str, count: int) -> None:
    """Measure one shape with the code that this process imports; prints JSON."""
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as directory:
        running = start_server(directory, durability="none")
        admin = Connection(running.admin, timeout=600.0)
        try:
            admin.call("SET", keys.QUEUE_ID, "bench")
            admin.call("CONFIG", "SET", "slowlog-log-slower-than", 100)
            admin.call("CONFIG", "SET", "slowlog-max-len", 10_000)
            broker = Broker(running.address, "bench", Pilot(directory), timeout=600.0)
            keep_records(broker)
            lab = Lab(directory, admin, broker)
            try:
                SHAPES[shape](lab, count)
                result: dict[str, Any] = {"seconds": lab.seconds, "longest_ms": lab.longest_ms()}
            except Exception as error:  # noqa: BLE001 - an older version may refuse a shape: that is its figure
                result = {"error": f"{type(error).__name__}: {error}"[:120]}
            broker.close()
        finally:
            admin.close()
            running.stop()
    print(json.dumps(result))


def _in_tree(tree: str, shape: str, count: int) -> dict[str, Any]:
    """Measure with the package that lies in this folder ('' = the present code)."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{ROOT}" if tree else str(ROOT)}
    command = [sys.executable, "-c", MEASURE, shape, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tree or ROOT)
    if done.returncode:
        return {"error": done.stderr.strip().rpartition("\n")[2][:120]}
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return found


@contextlib.contextmanager
def _tree_of(commit: str) -> Iterator[str]:
    """A folder with the package as it was at this commit."""
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        os.mkdir(source := os.path.join(folder, "source"))
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
        os.makedirs(package := os.path.join(folder, "tree", "pilotq"))
        for part in (
            *(Path(source, name) for name in ("broker", "workers", "cli")),
            *Path(source, "package").iterdir(),
        ):
            os.symlink(part, os.path.join(package, part.name))
        yield os.path.join(folder, "tree")


def run() -> list[Figure]:
    count = int(os.environ.get("PILOTQ_SCALE", "1000000"))
    baseline = os.environ.get("PILOTQ_BASELINE", "")
    figures = []
    with _tree_of(baseline) if baseline else contextlib.nullcontext("") as tree:
        for shape in SHAPES:
            before = _in_tree(tree, shape, count) if tree else None
            found = _in_tree("", shape, count)
            figures += _figures(f"{shape} ({count:,})", found, before)
            print(table(figures[-1:]).rpartition("\n")[2], file=sys.stderr, flush=True)
    return figures


def _figures(name: str, found: dict[str, Any], before: dict[str, Any] | None) -> Iterator[Figure]:
    if "error" in found:
        yield Figure(f"{name}: {found['error']}", float("inf"), "ms", LONGEST_MS, False)
        return
    detail = f"in all {found['seconds']:.2f} s"
    if before is not None and "error" in before:
        detail += f"; before: {before['error']}"
    elif before is not None:
        slower = before["seconds"] / max(found["seconds"], 1e-6)
        detail += f"; before: {before['longest_ms']:,.1f} ms, {before['seconds']:.2f} s: {slower:.1f} times as long"
    yield Figure(f"{name}, longest script", found["longest_ms"], "ms", LONGEST_MS, False, detail)
