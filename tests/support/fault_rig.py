"""A pilot into which faults are injected: points are armed, work is submitted, and judged by what the tasks wrote."""

from __future__ import annotations

import math
import os
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from pilotq.broker import ArrayRange, Broker, Request, Task
from pilotq.broker.errors import NoPilot, PilotFailed, PilotqError, ServerUnavailable
from pilotq.broker.failpoints import Fault
from pilotq.broker.pilot.start import LocalNode, StartedPilot, SupervisorOptions, start_pilot
from pilotq.broker.settings import Settings
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.workers.machine.topology import usable_cpus, virtual_nodes
from pilotq.workers.process_tree import environment, processes
from tests.chaos.judge import Expected, History, judge
from tests.support import fault_probe
from tests.support.live_pilot import left_of
from tests.support.waiting import SHARED, wait_until

PROBE = str(Path(__file__).with_name("fault_probe.py"))
NODES = "n1:2,n2:2"
CHILDREN = "children-of-"  # and the id of the task that submits them: the key of these
SUBMIT = f"""
import os
from pilotq.broker import ArrayRange, Broker, Task
with Broker.connect() as broker:
    children = Task(command=["sleep", "0.1"], array=ArrayRange(0, 1))
    broker.enqueue_many([children], key="{CHILDREN}" + os.environ["PILOTQ_TASK_ID"])
"""
END_S = 60.0
# The tasks that one core may hold when all processes that know of it die at once: one that runs, and those that were
# prefetched, a fifth of a second's worth of tasks of at least 10 ms (prefetch_s). Any number of them may have ended
# without a report to the server: launchers go through chains by themselves, and ends are reported in batches
# (report_batch_s). What was not sent to a node cannot run twice.
HELD = 1 + round(Settings().prefetch_s / 0.01)
STOPPED_S = 1.0  # how long what was stopped stays so
SETTINGS = {
    "kill_grace_s": 0.3, "journal_fsync_s": 0.05, "heartbeat_s": 0.2, "reconcile_s": 0.1, "restart_limit": 1000,
    "keep_records": 10, "initial_nodes_wait_s": 1.0,
}  # fmt: skip


class Work(NamedTuple):
    """A submission: its key, its ids in order (an array is one), and how many tasks it is."""

    key: str
    ids: list[str]
    tasks: list[Task]

    @property
    def size(self) -> int:
        return sum(task.size for task in self.tasks)


class Rig:
    """``folder`` holds pilot/, points/, ledger and locks/. Settings as in PILOTQ_SETTINGS."""

    def __init__(self, folder: Path, nodes: str = NODES, **settings: float) -> None:
        self.folder = folder
        self.points = folder / "points"
        self.plans = virtual_nodes(nodes, usable_cpus(), "here")
        self.settings = {**SETTINGS, **settings}
        for name in ("points", "locks"):
            (folder / name).mkdir()
        self.pilot: StartedPilot | None = None
        self.broken = False
        self._options: dict[str, Any] = {}  # of SupervisorOptions: those of its first start
        self._restarting = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._wake_stopped)
        self._thread.start()

    # -- its life ---------------------------------------------------------------------------------------------------

    def start(self, **options: Any) -> None:
        """Start it, or go on with it with the same options."""
        self._options = options or self._options
        made = SupervisorOptions(nodes=[LocalNode(*plan) for plan in self.plans], **self._options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PILOTQ_SETTINGS", msgspec.json.encode(self.settings).decode())
            patch.setenv("PILOTQ_FAILPOINTS", str(self.points))
            self.pilot = start_pilot(str(self.folder / "pilot"), made)
        SHARED.add(str(self.pilot.process.pid))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self.pilot is not None:
            self.pilot.process.terminate()
            self.pilot.process.wait()
        left = left_of(str(self.folder / "pilot"))
        assert not left, left

    def broker(self) -> Broker:
        assert self.pilot is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PILOTQ_SETTINGS", msgspec.json.encode(self.settings).decode())
            return Broker.connect(self.pilot.directory)

    def restart(self) -> None:
        """Start the pilot again if its supervisor is dead; that may fail once more, by the next fault."""
        assert self.pilot is not None
        with self._restarting:  # submitting restarts it, too: the second of two starts would be refused
            if self.pilot.process.poll() is not None:
                with suppress(PilotFailed):
                    self.start()

    def process(self, part: str) -> int:
        """The number of a part's process: server, dispatcher, worker, n1 (the worker of that node), launcher."""
        assert self.pilot is not None
        return wait_until(lambda: next(iter(self.processes(part)), 0), what=f"a process of the {part}")

    def processes(self, part: str) -> list[int]:
        assert self.pilot is not None
        words = {"server": "server.conf", "launcher": "workers.launcher", "n1": "--node n1", "n2": "--node n2"}
        word, found = words.get(part, f"pilotq {part}"), dict[int, int]()
        for pid, process in processes().items():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                fits = word in command and (part[0] != "n" or "pilotq worker" in command)
                if process.alive and fits and self.pilot.directory in command:
                    found[pid] = process.parent
        # A task that its launcher has just forked has the launcher's command line until its exec.
        return sorted(pid for pid, parent in found.items() if part != "launcher" or parent not in found)

    def kill_supervisor(self) -> None:
        assert self.pilot is not None
        with self._restarting:
            self.pilot.process.kill()
            self.pilot.process.wait()

    def kill_all(self) -> None:
        """SIGKILL to every part at one moment: none can end what the others leave."""
        assert self.pilot is not None
        parts = ("server", "dispatcher", "worker", "launcher")
        with self._restarting:
            pids = [self.pilot.process.pid, *(pid for part in parts for pid in self.processes(part))]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            self.pilot.process.wait()

    # -- faults -----------------------------------------------------------------------------------------------------

    def arm(self, role: str, point: str, kind: str, **fields: Any) -> Callable[[], bool]:
        """Arm a point; the returned function tells whether the fault has struck."""
        for old in self.points.glob(f"{role}.{point}.*"):
            if old.suffix in (".fired", ".struck", ".woken"):
                old.unlink()
        fault = Fault(kind, token=secrets.token_hex(4), **fields)
        fresh = self.points / "fresh"
        fresh.write_bytes(msgspec.json.encode(fault))
        fresh.rename(self.points / f"{role}.{point}")
        return (self.points / f"{role}.{point}.fired").exists

    def disarm(self) -> None:
        for path in self.points.iterdir():
            if path.suffix not in (".seen", ".fired", ".struck", ".woken"):
                path.unlink(missing_ok=True)

    def seen(self) -> set[str]:
        return {path.stem for path in self.points.glob("*.seen")}

    def _wake_stopped(self) -> None:
        """SIGCONT to whatever a point has stopped, after STOPPED_S."""
        since: dict[Path, float] = {}
        while not self._stopping.wait(0.05):
            for path in self.points.glob("*.fired"):
                struck = path.with_suffix(".struck")
                if path.with_suffix(".woken").exists():
                    continue
                with suppress(OSError, ValueError):
                    if msgspec.json.decode(struck.read_bytes(), type=Fault).kind != "stop":
                        path.with_suffix(".woken").touch()
                        continue
                    if time.monotonic() - since.setdefault(path, time.monotonic()) > STOPPED_S:
                        os.kill(int(path.read_text()), signal.SIGCONT)
                        path.with_suffix(".woken").touch()
                        del since[path]

    # -- work -------------------------------------------------------------------------------------------------------

    def call(self, seconds: float = 0.01, **fields: Any) -> Task:
        """The same as a function."""
        return Task(function=fault_probe.main, args=(str(self.folder), str(seconds)), **fields)

    def probe(self, seconds: float | str = 0.01, code: int = 0, **fields: Any) -> Task:
        words = [sys.executable, "-I", "-S", PROBE, str(self.folder), str(seconds), str(code)]
        return Task(command=words, **fields)

    def joining(self) -> Task:
        """One that submits two others, whose key names it, and ends when these have ended."""
        words = [sys.executable, "-I", "-S", PROBE, str(self.folder), "0.01"]
        submit = shlex.join([sys.executable, "-c", SUBMIT])
        return Task(script=f"{shlex.join(words)} || exit\nuntil {submit}; do sleep 0.1; done", join=True)

    def mixed(self, number: int = 12) -> list[Task]:
        """Short and longer ones, two cores, two nodes, a retried one, a chain, arrays, also element by element,
        one that joins others.

        Where ``bundle_above`` is 6 and ``number`` 12 or more, some are a bundle.
        """
        tasks = [self.probe(priority=int(n > 4)) for n in range(number)]
        tasks += [self.probe(0.3), self.probe(0.25, request=Request(cores=(2, 2)))]
        tasks += [self.probe(request=Request(nodes=(2, 2))) for _ in range(2)]
        tasks += [self.probe(code=7, retries=1), self.probe(name="first"), self.probe(name="second", after=["first"])]
        tasks += [self.probe(name="many", array=ArrayRange(0, 5)), self.probe(after=["many", "second"])]
        return [*tasks, self.probe(name="each", array=ArrayRange(0, 5), after_each=["many"]), self.joining()]

    def submit(self, tasks: list[Task]) -> Work:
        """Submit, again with the same key while the server does not answer: that is what keys are for."""
        key = secrets.token_hex(8)

        def accepted() -> list[str]:
            self.restart()
            with suppress(ServerUnavailable, NoPilot), self.broker() as broker:
                return broker.enqueue_many(tasks, key=key)
            return []

        return Work(key, wait_until(accepted, seconds=END_S, what="a server that accepts"), tasks)

    def ended(self, work: Work, *, free: bool = True) -> bool:
        """Whether all of it has ended, and all nodes are ``free`` again; restarts the pilot if need be."""
        self.restart()
        try:
            with self.broker() as broker:
                counts, nodes = broker.counts(work.key), broker.nodes()
        except PilotqError:
            return False
        calm = len(nodes) == len(self.plans) and not any(node.used for node in nodes)
        return counts.total == work.size and counts.left == 0 and (calm or not free)

    def all_finished(self, key: str, number: int) -> bool:
        with suppress(PilotqError), self.broker() as broker:
            counts = broker.counts(key)
            return (counts.total, counts.finished) == (number, number)
        return False

    def lines(self, work: Work) -> dict[str, list[JournalEntry]]:
        """The journal's lines of the tasks of a submission, those of arrays as a whole left out."""
        assert self.pilot is not None
        return by_task(line for line in Journal(self.pilot.journal).entries() if line.submission == work.key)

    def ledger(self) -> Iterator[list[str]]:
        with suppress(FileNotFoundError):
            for line in (self.folder / "ledger").read_text().splitlines():
                yield line.split(" ")

    def expected(self, work: Work) -> dict[str, int]:
        """Id of each task or element -> how often it may run without any fault."""
        found = {}
        for task_id, task in zip(work.ids, work.tasks, strict=True):
            names = [f"{task_id}_{n}" for n in range(task.size)] if task.is_array else [task_id]
            found.update(dict.fromkeys(names, 1 + task.retries))
        return found

    def of_tasks(self) -> list[int]:
        """Living processes of tasks of this pilot, on the whole machine, by their mark."""
        assert self.pilot is not None
        home, task = f"\0PILOTQ_DIR={self.pilot.directory}\0".encode(), b"\0PILOTQ_TASK_ID="
        return [p.pid for p in processes().values() if p.alive and home in (e := environment(p.pid)) and task in e]

    def settle(self, work: Work, *, free: bool = True, seconds: float = END_S) -> None:
        """Wait until a submission has ended and stands in the journal, and all nodes are ``free``."""
        expected = self.expected(work)

        def recorded() -> bool:
            lines = self.lines(work)
            return all(any(line.final for line in lines.get(i, ())) for i in expected)

        wait_until(lambda: self.ended(work, free=free), seconds=seconds, what="all ended and no core in use")
        wait_until(recorded, seconds=END_S, what="all in the journal")

    def judge(self, work: Work, faults: int = 0, *, alone: bool = True, held: int = 1) -> list[str]:
        """What is wrong with a submission that has settled, one sentence each; ``faults`` were done to it (``held`` as
        in History), and unless it is ``alone`` others may still run."""
        if alone:
            with suppress(AssertionError):
                wait_until(lambda: not self.of_tasks(), seconds=5.0)
        expected = self.expected(work)
        accepted = {me: Expected(most) for me, most in expected.items()}
        ledger = (words for words in self.ledger() if words[0] in expected)
        cores = sum(len(plan.cores) for plan in self.plans)
        left = self.of_tasks() if alone else []
        wrong = judge(History(accepted, self.lines(work), ledger, faults, cores, left, held))
        return [*wrong, *self.ended_before_children(work)]

    def ended_before_children(self, work: Work) -> Iterator[str]:
        """A sentence for each task that joins others, and that ended while one of these had not."""
        assert self.pilot is not None
        keys = {CHILDREN + task_id: task_id for task_id, task in zip(work.ids, work.tasks, strict=True) if task.join}
        ended = {line.id: line.ended for line in Journal(self.pilot.journal).entries() if line.final}
        children: dict[str, set[str]] = {key: set() for key in keys}
        for line in Journal(self.pilot.journal).entries():
            if line.submission in keys and not line.elements:
                children[line.submission].add(line.id)
        for key, task_id in keys.items():
            late = [child for child in children[key] if ended.get(child, math.inf) > ended.get(task_id, math.inf)]
            if late or len(children[key]) != 2:
                yield f"{task_id}: it ended before {late} of {children[key]}, which it joins"


def by_task(lines: Iterable[JournalEntry]) -> dict[str, list[JournalEntry]]:
    """One line for each execution of a task or element, by its id, in their order."""
    found: dict[str, list[JournalEntry]] = {}
    for line in lines:
        if line.elements:
            continue
        own = found.setdefault(line.id, [])
        if line.joining is not None and not line.execution and own:  # the end of the one whose process ended before
            line = msgspec.structs.replace(
                own.pop(), status=line.status, reason=line.reason, final=True, ended=line.ended
            )
        own.append(line)
    return found


@contextmanager
def rig(folder: Path, **settings: Any) -> Iterator[Rig]:
    """A rig whose pilot runs; at the end nothing of it is left."""
    made = Rig(folder, **settings)
    try:
        made.start()
        yield made
    finally:
        made.stop()
