"""Runs many nodes with pretended launchers in one process: each has the session, the node and the loop of a worker.

    python -m benchmarks.pretended.host --dir <pilot directory> --nodes 1000 --cores 56

It ends when all of its nodes have left, and on SIGTERM. For each line that it reads it prints one of JSON: messages
that its nodes have got, tasks launched, turns taken, CPU seconds of the process, and how many of them were pretence.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import resource
import select
import signal
import sys
import time

from benchmarks.pretended.launcher import FIRST_NUMBER, PretendedPool
from pilotq.broker.pilot.directory import find
from pilotq.broker.settings import load
from pilotq.broker.store.connection import Address
from pilotq.broker.store.messages import Leave, ToWorker
from pilotq.broker.store.resources import NodeInfo
from pilotq.workers.session import Session
from pilotq.workers.worker import Descriptors, _Loop, _Signals, make_node

READY_S = 60.0
LEAVE_S = 20.0


class _NoSignals(_Signals):
    """Signals reach the process, not each of its nodes."""

    def __init__(self) -> None:
        self.fileno = FIRST_NUMBER - 1


class VirtualNode(_Loop):
    """A worker without processes; `turn` is a turn of its loop, which does not wait."""

    def __init__(self, directory: str, address: Address, queue_id: str, name: str, cores: int) -> None:
        settings = load(os.environ.get("PILOTQ_SETTINGS"))
        session = Session(address, queue_id, settings)
        info = NodeInfo(name, 0, name, os.getpid(), list(range(cores)), shared_cores=True, cpus=list(range(cores)))
        info.incarnation = session.register(info)
        pump = session.pump

        def counted(now: float) -> list[ToWorker]:
            found = pump(now)
            self.messages += len(found)
            return found

        self.messages = 0
        session.pump = counted  # type: ignore[method-assign]
        self.pool = PretendedPool(directory, name, info.cores, settings, "python")
        node = make_node(session, self.pool, directory, info, {}, settings)
        super().__init__(session, self.pool, node, _NoSignals(), settings, directory)
        self.descriptors: Descriptors = {}  # it waits for these
        self.next = 0.0  # monotonic: when it wants a turn though none of them is ready
        self._own_next = 0.0  # the same, without what its launchers want
        self._ready: Descriptors = {}
        self.prepare()

    @property
    def over(self) -> bool:
        return self._over()

    def turn(self, ready: Descriptors) -> None:
        now = time.monotonic()
        for launcher in self.pool.pretended():
            if launcher.advance(now):
                ready[launcher.wake] = select.POLLIN
        if ready or self._own_next <= now:
            self._ready = ready
            self._step()
        self.prepare()

    def prepare(self) -> None:
        """Send what the turn has brought about, as the next one would do first, and say what is waited for."""
        now = time.monotonic()
        if self._online:
            self._session.listen()
            self._node.report(now)
        wanted, self._own_next = self.wanted(now)
        self.descriptors = {fd: events for fd, events in wanted.items() if fd < FIRST_NUMBER - 1}
        self.next = min([self._own_next, *(launcher.due() for launcher in self.pool.pretended())])

    def leave(self) -> None:
        self._node.leave(Leave(0.0), time.monotonic())
        self._leave_by = time.monotonic() + LEAVE_S

    def _wait(self) -> Descriptors:
        return self._ready

    def end(self) -> None:
        self._session.deregister()
        self._node.close()
        self._session.close()


class Host:
    """Gives each of many nodes its turns."""

    def __init__(self) -> None:
        self.nodes: list[VirtualNode] = []
        self.turns = 0
        self._poll = select.epoll()
        self._poll.register(0, select.EPOLLIN)
        self._owner: dict[int, VirtualNode] = {}
        self._registered: dict[VirtualNode, Descriptors] = {}
        self._due: list[tuple[float, int, VirtualNode]] = []
        self._counted: dict[VirtualNode, float] = {}
        self._number = 0

    def add(self, node: VirtualNode) -> None:
        self.nodes.append(node)
        self._registered[node] = {}
        self._note(node)

    def run(self) -> None:
        while self._registered:
            now = time.monotonic()
            pause = max(self._due[0][0] - now, 0.0) if self._due else 1.0
            ready: dict[VirtualNode, Descriptors] = {}
            for fd, events in self._poll.poll(pause, 1024):
                if fd == 0:
                    self._asked()
                    continue
                ready.setdefault(self._owner[fd], {})[fd] = events
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                at, _, node = heapq.heappop(self._due)
                if self._counted.get(node) == at:
                    ready.setdefault(node, {})
            for node, descriptors in ready.items():
                self.turns += 1
                node.turn(descriptors)
                self._note(node)

    def _asked(self) -> None:
        if not os.read(0, 4096):  # nobody will ask any more
            self._poll.unregister(0)
            return
        launchers = [launcher for node in self.nodes for launcher in node.pool.pretended()]
        report = {
            "messages": sum(node.messages for node in self.nodes),
            "launched": sum(launcher.launched for launcher in launchers),
            "turns": self.turns,
            "cpu": time.process_time(),
            "pretence": sum(launcher.seconds for launcher in launchers),
        }
        print(json.dumps(report), flush=True)

    def _note(self, node: VirtualNode) -> None:
        registered = self._registered[node]
        wanted = {} if node.over else node.descriptors
        if wanted != registered:
            for fd in registered.keys() - wanted.keys():
                del self._owner[fd]
                self._unregister(fd)
            for fd in wanted:
                if fd in registered:
                    self._poll.modify(fd, wanted[fd])
                else:
                    self._poll.register(fd, wanted[fd])
                self._owner[fd] = node
            self._registered[node] = wanted
        if node.over:
            del self._registered[node]
            self._counted.pop(node, None)
            node.end()
        elif self._counted.get(node) != node.next:
            self._number += 1
            self._counted[node] = node.next
            heapq.heappush(self._due, (node.next, self._number, node))

    def _unregister(self, fd: int) -> None:
        try:
            self._poll.unregister(fd)
        except OSError:
            pass  # it was closed


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretended.host")
    parser.add_argument("--dir", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--cores", type=int, required=True)
    options = parser.parse_args(argv)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    connection = find(options.dir).await_connection(READY_S)
    host = Host()

    def leave(_signal: int, _frame: object) -> None:
        for node in host.nodes:
            node.leave()
            node.next = 0.0

    signal.signal(signal.SIGTERM, leave)
    for number in range(options.nodes):
        where = connection.directory, connection.address, connection.queue_id
        host.add(VirtualNode(*where, f"v{number}", options.cores))
    print("ready", flush=True)
    host.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
