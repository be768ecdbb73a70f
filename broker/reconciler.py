"""What no bell rings for: RQ's buttons, records that vanished, nodes that fell silent, records that grew old.

Each finding becomes the event it would have been: a Stop to the worker, a loss, a removal. Part of the dispatcher's
process, in slices, so that no turn takes long.
"""

from __future__ import annotations

import logging
import time

import msgspec

from pilotq.broker import keys
from pilotq.broker.records import Line, NodeInfo, Stop
from pilotq.broker.store import Store, iso, pack

log = logging.getLogger("pilotq.reconciler")
SLICE = 500
CONTACT_S = 120.0  # a node whose beat has not moved for so long by our clock is given up


class Reconciler:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.link = store.link
        self.next_turn = 0.0
        self.next_trim = 0.0
        self.beats: dict[str, tuple[bytes, float]] = {}  # address -> last beat, when it last moved (monotonic)
        self.cursor: dict[str, int] = {}

    def due(self, now: float) -> bool:
        return now >= self.next_turn

    def turn(self, now: float, nodes: dict[str, NodeInfo]) -> list[NodeInfo]:
        """One round; returns the nodes that are to be given up."""
        self.next_turn = now + self.store.settings.reconcile_s
        queues = self._queues()
        self._stop_canceled(queues, nodes)
        self._stop_vanished(queues, nodes)
        if now >= self.next_trim:
            self.next_trim = now + 10 * self.store.settings.reconcile_s
            self._trim(queues)
            self._tidy()
        return self._silent(now, nodes)

    def _queues(self) -> list[str]:
        names = {name.decode().partition(".")[0] for name in self.link.call("HKEYS", keys.CLASSES)}
        return sorted(names)

    # -- RQ's own job.cancel() and delete ------------------------------------------------------------------------

    def _stop_canceled(self, queues: list[str], nodes: dict[str, NodeInfo]) -> None:
        """RQ's cancel of a running job sets its status and tells nobody (the score is the second of the cancel)."""
        for queue in queues:
            recent = self.link.call("ZRANGEBYSCORE", keys.registry("canceled", queue), time.time() - 3, "+inf")
            for first in range(0, len(recent), SLICE):
                ids = [i.decode() for i in recent[first : first + SLICE]]
                rows = self.link.pipeline([("HMGET", keys.job(i), "status", "pq_node", "pq_exec") for i in ids])
                for task_id, (status, node, execution) in zip(ids, rows, strict=True):
                    if status == b"canceled" and node is not None and node.decode() in nodes:
                        self._tell(nodes[node.decode()], Stop(task_id, int(execution), "canceled"))

    def _stop_vanished(self, queues: list[str], nodes: dict[str, NodeInfo]) -> None:
        """Running tasks whose record was deleted: nobody knows where they are, so every node is told."""
        for queue in queues:
            wip = keys.registry("wip", queue)
            cursor, flat = self.link.call("ZSCAN", wip, self.cursor.get(queue, 0), "COUNT", SLICE)
            self.cursor[queue] = int(cursor)
            members = [m.decode() for m in flat[::2]]
            if not members:
                continue
            ids = [m.rpartition(":")[0] for m in members]
            alive = self.link.pipeline([("EXISTS", keys.job(i)) for i in ids])
            for member, task_id, exists in zip(members, ids, alive, strict=True):
                if not exists and self.link.call("ZSCORE", wip, member) is not None:
                    log.warning("the record of running task %s is gone: it is stopped", task_id)
                    for info in nodes.values():
                        self._tell(info, Stop(task_id, 0, "canceled"))
                    self.link.call("ZREM", wip, member)

    def _tell(self, info: NodeInfo, stop: Stop) -> None:
        self.link.call("RPUSH", keys.inbox(info.name, info.incarnation), pack(stop))

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _silent(self, now: float, nodes: dict[str, NodeInfo]) -> list[NodeInfo]:
        """Judged by a beat that does not move, on our own monotonic clock: wall clocks may jump."""
        found = []
        for address, info in nodes.items():
            beat = self.link.call("HGET", keys.worker(info.name), "last_heartbeat") or b""
            last, since = self.beats.get(address, (b"", now))
            if beat != last:
                since = now
            self.beats[address] = (beat, since)
            if now - since > CONTACT_S:
                found.append(info)
        return found

    def requeue_orphans(self, alive: set[str]) -> int:
        """Tasks that were handed to incarnations of nodes which are no more (asked once by a new dispatcher)."""
        gone: set[str] = set()
        for queue in self._queues():
            for _, node, _ in self._running(queue):
                if node and node not in alive:
                    gone.add(node)
        return sum(self.requeue_node(node, "the pilot was started again") for node in sorted(gone))

    def requeue_node(self, address: str, why: str) -> int:
        """End all executions of a dead incarnation as lost; their tasks go back to the head of their lists."""
        number = 0
        for queue in self._queues():
            mine = [(i, e) for i, node, e in self._running(queue) if node == address]
            mine.sort(key=lambda pair: (len(pair[0]), pair[0]))
            for first in range(0, len(mine), SLICE):
                part = mine[first : first + SLICE]
                now = time.time()
                reports, lines = [], []
                for task_id, execution in part:
                    reports.append((task_id, execution, "lost", "worker lost", iso(now), "", iso(now), "", "", 0, "", "", 0))
                    line = Line(id=task_id, execution=execution, node=address.rpartition(":")[0], ended=now, message=why)
                    lines.append(msgspec.msgpack.encode(line))
                self.store.lose(address, reports, lines)
                number += len(part)
        return number

    def _running(self, queue: str) -> list[tuple[str, str, int]]:
        """(id, node:incarnation, execution) of all members of the queue's wip registry; arrays have no node."""
        members = [m.decode() for m in self.link.call("ZRANGE", keys.registry("wip", queue), 0, -1)]
        found = []
        for first in range(0, len(members), SLICE):
            part = members[first : first + SLICE]
            ids = [m.rpartition(":")[0] for m in part]
            nodes = self.link.pipeline([("HGET", keys.job(i), "pq_node") for i in ids])
            for member, task_id, node in zip(part, ids, nodes, strict=True):
                found.append((task_id, node.decode() if node else "", int(member.rpartition(":")[2])))
        return found

    # -- the short memory ----------------------------------------------------------------------------------------

    def _trim(self, queues: list[str]) -> None:
        """Records whose time has come, and the oldest above the bound, leave the registries with their hashes."""
        now = time.time()
        keep = self.store.settings.keep_records
        for queue in queues:
            self.link.call("ZREMRANGEBYSCORE", keys.registry("finished", queue), "-inf", now)
            self.link.call("ZREMRANGEBYSCORE", keys.registry("failed", queue), "-inf", now)
            canceled_before = now - self.store.settings.failed_ttl_s
            self.link.call("ZREMRANGEBYSCORE", keys.registry("canceled", queue), "-inf", canceled_before)
            for kind in ("finished", "canceled", "failed"):
                key = keys.registry(kind, queue)
                excess = int(self.link.call("ZCARD", key)) - keep
                for _ in range(0, max(excess, 0), SLICE):
                    ids = self.link.call("ZRANGE", key, 0, SLICE - 1)
                    self.store.run("trim", self.store.term, kind, queue, *ids)

    def _tidy(self) -> None:
        classes = [name.decode() for name in self.link.call("HKEYS", keys.CLASSES)]
        if classes:
            self.store.run("tidy", self.store.term, *classes)
