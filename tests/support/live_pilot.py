"""Starts a real pilot on this machine for tests: server, dispatcher, workers and launchers, in its own directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotq.broker import Broker, Request, Task
from pilotq.broker.client.views import TaskView
from pilotq.broker.pilot.start import LocalNode, StartedPilot, SupervisorOptions, start_pilot
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.workers.machine.topology import usable_cpus, virtual_nodes
from pilotq.workers.process_tree import environment, processes
from tests.support.waiting import wait_until

WAIT_S = 60.0
# Short, but not so short that a busy machine changes what happens.
SETTINGS = {"kill_grace_s": 0.3, "journal_fsync_s": 0.05, "heartbeat_s": 0.2}


class LivePilot:
    """A pilot that runs, and a connection to it."""

    def __init__(self, pilot: StartedPilot, broker: Broker, nodes: list[str]) -> None:
        self.pilot = pilot
        self.broker = broker
        self.nodes = nodes

    def enqueue(self, *command: str, **fields: Any) -> str:
        return self.broker.enqueue(Task(command=list(command) or None, **fields))

    def python(self, code: str, **fields: Any) -> str:
        return self.enqueue(sys.executable, "-I", "-S", "-c", code, **fields)

    def ended(self, task_id: str, seconds: float = WAIT_S) -> TaskView:
        """What is known of the task when it has ended and stands in the journal."""
        self.broker.wait([task_id], timeout=seconds)
        wait_until(lambda: any(line.final for line in self.lines(task_id)), what=f"{task_id} in the journal")
        return self.broker.task(task_id)

    def lines(self, task_id: str) -> list[JournalEntry]:
        """Its executions as the journal has them, newest first."""
        return Journal(self.pilot.journal).find(task_id)

    def output(self, task_id: str, stream: str = "stdout") -> bytes:
        return b"".join(self.broker.output(task_id, stream))

    def pause(self) -> None:
        """Start nothing that is submitted from now on: the dispatcher has taken the event, and reads what it says
        before it hands out anything else."""
        self.broker.pause(True)
        wait_until(lambda: not self.broker.link.call("LLEN", keys.EVENTS), seconds=WAIT_S, what="the event is taken")

    def cli(self, *args: str) -> subprocess.CompletedProcess[bytes]:
        """`pilotq ARGS --dir ...`"""
        verb, *rest = args
        command = [sys.executable, "-m", "pilotq", verb, "--dir", self.pilot.directory, *rest]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_S)

    def of_tasks(self) -> list[str]:
        """The living processes of tasks, and zombies below the pilot: those have no environment any more."""
        home, task = f"\0PILOTQ_DIR={self.pilot.directory}\0".encode(), b"\0PILOTQ_TASK_ID="
        everybody = processes()
        marked = [p for p in everybody.values() if home in (env := environment(p.pid)) and task in env]
        ours = {self.pilot.process.pid}
        for process in sorted(everybody.values(), key=lambda p: p.start):
            if process.parent in ours:
                ours.add(process.pid)
        zombies = [p for p in everybody.values() if not p.alive and p.parent in ours]
        return [f"{'process' if p.alive else 'zombie'} {p.pid}, child of {p.parent}" for p in marked + zombies]

    def assert_calm(self) -> None:
        """Nothing of any task lives, and every core can be had."""
        wait_until(lambda: not self.of_tasks(), what="end of what tasks have left") if self.of_tasks() else None
        everything = Request(nodes=(len(self.nodes), len(self.nodes)), whole=True)
        assert self.ended(self.enqueue("true", request=everything)).status == "finished"
        wait_until(lambda: [n.used for n in self.broker.nodes()] == [0] * len(self.nodes), what="no core in use")


@contextmanager
def live_pilot(folder: Path, nodes: str = "n1:2,n2:2", **settings: Any) -> Iterator[LivePilot]:
    """A pilot in ``folder``/pilot; ``settings`` as in PILOTQ_SETTINGS. At the end nothing of it may be left."""
    plans = virtual_nodes(nodes, usable_cpus(), "here")
    options = SupervisorOptions(nodes=[LocalNode(*plan) for plan in plans])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILOTQ_SETTINGS", msgspec.json.encode({**SETTINGS, **settings}).decode())
        pilot = start_pilot(str(folder / "pilot"), options)
        try:
            with Broker.connect(pilot.directory) as broker:
                names = [plan.name for plan in plans]
                wait_until(lambda: [n.name for n in broker.nodes()] == names, what="the nodes")
                yield LivePilot(pilot, broker, names)
        finally:
            pilot.process.terminate()
            pilot.process.wait()
    assert pilot.process.returncode == 0, Path(pilot.log("supervisor")).read_text()
    assert not left_of(pilot.directory)


def left_of(directory: str) -> list[str]:
    """Processes of the pilot in this directory, by their command line or their environment."""
    mark = os.fsencode(directory)
    found = []
    for pid, process in processes().items():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if process.alive and (mark in command or b"PILOTQ_DIR=" + mark in environment(pid)) and pid != os.getpid():
            found.append(f"{pid} {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def worker_of(pilot: LivePilot, node: str) -> int:
    """The process of a node's worker."""
    words = f"\0worker\0--dir\0{pilot.pilot.directory}\0--node\0{node}\0".encode()
    for pid in processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if words in command:
            return pid
    raise AssertionError(f"node {node} has no worker")
