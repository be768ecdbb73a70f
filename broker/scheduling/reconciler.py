"""Periodic reconciliation of changes for which no event arrives: tasks that RQ's tools cancel or delete, records that
vanished, nodes that are out of touch, records that are too old.

Each finding is handled as its event would have been: a Stop to the worker, a loss, a removal. Part of the dispatcher's
process, in slices, so that no round takes long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from pilotq.broker.log import log
from pilotq.broker.process_identity import machine_id, start_time
from pilotq.broker.rq.repair import RqRepair
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.leases import holder_of, leased_elements, number_leased, read_holders, read_leases
from pilotq.broker.store.messages import EndReport, Stop
from pilotq.broker.store.registry import user_queues
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.store import Store, iso, pack, to_worker
from pilotq.broker.tasks.array_indices import Indices

T = TypeVar("T")
SLICE = 500
TIMED = (0, "(inf")  # scores of what expires: RQ writes -1 or inf for what is kept for ever
CANCELED_PAGE = 5000  # members of a registry of canceled tasks that are read at once
CLOCKS_S = 5.0  # how far clocks of clients may differ before a cancel of RQ's is found late, in _check_running
POLL_S = 3.0  # of the time between two polls of the heartbeats more does not count: we, or the server, were away
UNKNOWN = ":"  # the address of a node whose number somebody has removed
LOST_S = 120.0  # a worker without a heartbeat for so long, and without a process on this machine, is lost


class Reconciler:
    """Compares what Redis holds with what should be there, once every `reconcile_s`, and repairs the difference."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.link = store.link
        self.next_turn = 0.0
        self.next_trim = 0.0
        self.tidying = False  # a walk through all classes goes on, to drop those whose lists are empty
        self.repair = RqRepair(store)
        self.bundles = Bundles(store.link)
        self.polled_at = 0.0
        self.heartbeats: dict[str, tuple[bytes | None, float]] = {}  # address -> the last one, seconds since it changed
        self.cursor: dict[str, int] = {}  # queue -> where the walk through its running tasks stands
        self.canceled: dict[str, tuple[float, frozenset[str]]] = {}  # queue -> score to read from, ids seen from there
        self.canceled_read_at = 0.0  # unix seconds
        self.canceled_kept: dict[str, int] = {}  # queue -> how many of the oldest were found to have a record

    def due(self, now: float) -> bool:
        return now >= self.next_turn

    def turn(
        self, now: float, nodes: dict[str, NodeInfo], classes: Sequence[str], *, walked: bool, idle: bool
    ) -> list[NodeInfo]:
        """One round; returns the nodes that are lost.

        ``classes``: some of all, in turn; ``walked``: the last. ``idle``: no node holds a task, and none is known to
        wait.
        """
        self.next_turn = now + self.store.settings.reconcile_s
        queues = self._queues()
        self._adopt_canceled(queues, classes)
        for queue in queues:
            self._check_running(queue, nodes)
        self._stop_deleted_arrays(nodes)
        self.repair.turn(queues, now)
        # RQ's delete of what runs takes it out of the registry, too: nothing seems to run, its end is still to come.
        if idle and self.store.count_vanished(queues):
            log("tasks whose records were deleted while they waited count as canceled", level="warning")
        if now >= self.next_trim:
            self.next_trim = now + 10 * self.store.settings.reconcile_s
            self._trim(queues)
            self.tidying = True
        if self.tidying and classes:
            stamp = f"{time.time():.6f}"
            self.store.run("drop_idle_classes", self.store.term, stamp, self.store.settings.idle_class_s, *classes)
        self.tidying = self.tidying and not walked
        return self._out_of_touch(now, nodes)

    def _queues(self) -> list[str]:
        return user_queues(self.link)

    # -- RQ's own job.cancel() and delete ------------------------------------------------------------------------

    def _adopt_canceled(self, queues: list[str], classes: Sequence[str]) -> None:
        """RQ's cancel sets the status and informs nobody: cancel.lua makes the usual event of it.

        RQ's score is a whole second, by the clock of whoever canceled; ours have fractions, and are skipped. What is
        older than the last time we read is not read again, but for the difference of the clocks.
        """
        now = time.time()
        read_at, self.canceled_read_at = min(self.canceled_read_at or now, now), now
        for queue in queues:
            since, before = self.canceled.get(queue, (float("-inf"), frozenset()))
            met = frozenset(self._canceled_by_rq(queue, since))
            for batch in _slices(sorted(met - before)):
                self.store.cancel(batch)
            self.canceled[queue] = (read_at - CLOCKS_S, met)
        # The origin of what waits in a class list is that list: RQ takes it for a queue with a registry of its own.
        lists = [keys.registry("canceled", name) for name in classes]
        found = self.link.pipeline([("ZRANGE", r, 0, -1) for r in lists]) if lists else []
        for registry, members in zip(lists, found, strict=True):
            for batch in _slices([m.decode() for m in members]):
                self.store.cancel(batch)
                self.link.call("ZREM", registry, *batch)

    def _canceled_by_rq(self, queue: str, since: float) -> Iterator[str]:
        """The ids that RQ's cancel has put into the registry since then."""
        key, first = keys.registry("canceled", queue), 0
        while True:
            flat = self.link.call("ZRANGEBYSCORE", key, since, "+inf", "WITHSCORES", "LIMIT", first, CANCELED_PAGE)
            yield from (i.decode() for i, score in zip(flat[::2], flat[1::2], strict=True) if score.isdigit())
            first += CANCELED_PAGE
            if len(flat) < 2 * CANCELED_PAGE:
                return

    def _check_running(self, queue: str, nodes: dict[str, NodeInfo]) -> None:
        """A slice of what runs: what RQ canceled unseen, elements of a deleted array, records that were deleted."""
        wip = keys.registry("wip", queue)
        cursor, flat = self.link.call("ZSCAN", wip, self.cursor.get(queue, 0), "COUNT", SLICE)
        self.cursor[queue] = int(cursor)
        members = [m.decode() for m in flat[::2]]
        if not members:
            return
        ids = [m.rpartition(":")[0] for m in members]
        rows = self.link.read_hashes([keys.job(i) for i in ids], "status", "pq_cancel", "pq_array_of")
        arrays = sorted({array.decode() for _, _, array in rows if array is not None})
        there = dict(zip(arrays, self.link.pipeline([("EXISTS", keys.job(a)) for a in arrays]), strict=True))
        unwanted = [
            task_id
            for task_id, (status, cancel, array) in zip(ids, rows, strict=True)
            if cancel is None and (status == b"canceled" or (array is not None and not there[array.decode()]))
        ]
        for batch in _slices(unwanted):
            self.store.cancel(batch)
        vanished = [m for m, (status, _, _) in zip(members, rows, strict=True) if status is None]
        # An element that finished between the two reads has lost its record and its place here in one script.
        for member in vanished:
            if self.link.call("ZSCORE", wip, member) is not None:
                self._end_vanished(queue, member, nodes)

    def _stop_deleted_arrays(self, nodes: dict[str, NodeInfo]) -> None:
        """Elements without a record, of an array that somebody has deleted, are stopped. Their ends count them."""
        arrays = sorted(number_leased(self.link))
        there = self.link.pipeline([("EXISTS", keys.job(a)) for a in arrays]) if arrays else []
        deleted = {array for array, found in zip(arrays, there, strict=True) if not found}
        leases = read_leases(self.link) if deleted else []
        for array, address in sorted({(lease.array, lease.address) for lease in leases if lease.array in deleted}):
            if (info := nodes.get(address)) is not None:
                self.store.write(*to_worker(info.name, info.incarnation, Stop(array, 0, "canceled")))

    def _end_vanished(self, queue: str, member: str, nodes: dict[str, NodeInfo]) -> None:
        """The record of a running task was deleted. It is not known where it runs, so every node is told."""
        task_id, _, execution = member.rpartition(":")
        log(f"the record of running task {task_id} is gone: it is stopped", level="warning", task=task_id)
        if execution == "0":  # an array: its elements are ended one by one
            self.link.call("ZREM", keys.registry("wip", queue), member)
            return
        for info in nodes.values():
            self.store.write(*to_worker(info.name, info.incarnation, Stop(task_id, 0, "canceled")))
        now = time.time()
        array, _, index = task_id.partition("_")
        span = self.link.read_hashes([keys.job(array)], "pq_array")[0][0] if index.isdigit() else None
        try:
            position = Indices.read(span).position(int(index)) if span else None
        except ValueError:
            position = None  # a damaged array: what becomes of its elements counts no more
        entry = pack(JournalEntry(id=task_id, execution=int(execution), ended=now, message="its record was deleted"))
        report = EndReport(
            task_id, int(execution), "canceled", "canceled", iso(now), "", "", "", entry, class_name=queue
        )
        if position is not None:
            report.array, report.position = array, position
        self.store.report_lost([report])

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _out_of_touch(self, now: float, nodes: dict[str, NodeInfo]) -> list[NodeInfo]:
        """Nodes that are out of touch: their heartbeat has not changed, by our monotonic clock, while the server
        answers us.

        Their workers have ended their tasks by then, by their own clocks. Where the supervisor has set ``contact`` to
        0, none is ever out of touch.
        """
        settings = self.store.settings
        contact, *heartbeats = self.link.pipeline(
            [
                ("HGET", keys.CONTROL, "contact"),
                *(("HGET", keys.worker(i.name), "last_heartbeat") for i in nodes.values()),
            ]
        )
        contact_s = settings.node_timeout_s if contact is None else float(contact)
        passed, self.polled_at = min(now - self.polled_at, POLL_S), now
        current: dict[str, tuple[bytes | None, float]] = {}
        for address, heartbeat in zip(nodes, heartbeats, strict=True):
            last, unchanged_s = self.heartbeats.get(address, (None, 0.0))
            current[address] = (heartbeat, unchanged_s + passed if heartbeat == last else 0.0)
        self.heartbeats = current
        bound = contact_s + settings.kill_grace_s + settings.node_timeout_margin_s
        return [
            info
            for address, info in nodes.items()
            if (current[address][1] > bound if contact_s else current[address][1] > LOST_S and _has_no_process(info))
        ]

    def requeue_orphans(self, alive: set[str]) -> int:
        """Queue again the tasks of incarnations that are not registered any more; called once by a new dispatcher."""
        lost: set[str] = set()
        for queue in self._queues():
            for _, node, _ in self._running(queue):
                if node and node not in alive:
                    lost.add(node)
        lost |= {lease.address for lease in read_leases(self.link)} - alive
        lost |= set(read_holders(self.link).values()) - alive
        return sum(self.requeue_node(node, "the pilot was started again") for node in sorted(lost))

    def requeue_node(self, address: str, why: str, *, clean: bool = False) -> int:
        """End all executions of a lost incarnation as lost; their tasks go back to the head of their lists.

        ``clean``: it had left, so none of them had started, and no task is charged.
        """
        outcome, reason = ("requeue", "pilot ended") if clean else ("lost", "worker lost")
        # What has no record yet is younger: it goes to the head first.
        number = self._requeue_leased(address, outcome, reason, why)
        for queue in self._queues():
            mine = [(i, e) for i, node, e in self._running(queue) if node == address]
            mine.sort(key=_order)
            # The last ones first, as each slice goes to the head of its list.
            for batch in reversed(_slices(mine)):
                now = time.time()
                node = address.rpartition(":")[0]
                fields = ("pq_name", "pq_sub", "pq_array_of", "pq_cpus")
                rows = self.link.read_hashes([keys.job(i) for i, _ in batch], *fields)
                reports = []
                for (task_id, execution), row in zip(batch, rows, strict=True):
                    name, submission, array, cpus = (text.decode() if text else "" for text in row)
                    entry = JournalEntry(
                        id=task_id, execution=execution, node=node, ended=now, message=why, name=name, cpus=cpus
                    )
                    entry.submission, entry.array = submission, array
                    entry.index = int(task_id.rpartition("_")[2]) if array else None
                    self._describe(entry)
                    reports.append(EndReport(task_id, execution, outcome, reason, iso(now), "", "", "", pack(entry)))
                self.store.report_lost(reports)
                number += len(batch)
        if holder := self.link.call("HGET", keys.HOLDERS, address):
            self.link.call("HDEL", keys.HOLDERS, address, holder)
        return number

    def _requeue_leased(self, address: str, outcome: str, reason: str, why: str) -> int:
        """End what leases of a lost incarnation hold; returns how many elements."""
        leases = [lease for lease in read_leases(self.link) if lease.address == address]
        held = list(leased_elements(self.link, leases))
        node = address.rpartition(":")[0]
        names = {lease.array: "" for lease in leases}
        rows = self.link.read_hashes([keys.job(array) for array in names], "pq_name", "pq_sub", "pq_class")
        fields = {
            array: tuple(text.decode() if text else "" for text in row) for array, row in zip(names, rows, strict=True)
        }
        for batch in reversed(_slices(held)):
            now = time.time()
            reports = []
            for element in batch:
                array, execution = element.lease.array, element.lease.execution
                name, submission, class_name = fields[array]
                entry = JournalEntry(
                    id=element.id, execution=execution, node=node, ended=now, message=why, name=name, array=array,
                    submission=submission, index=int(element.id.rpartition("_")[2]),
                )  # fmt: skip
                self._describe(entry)
                reports.append(
                    EndReport(
                        element.id,
                        execution,
                        outcome,
                        reason,
                        iso(now),
                        "",
                        "",
                        "",
                        pack(entry),
                        array=array,
                        position=element.position,
                        class_name=class_name,
                        submission=submission,
                    )
                )
            self.store.report_lost(reports)
        return len(held)

    def _describe(self, entry: JournalEntry) -> None:
        """A task of a bundle has a name of its own, and no index."""
        if entry.index is not None and self.bundles.is_bundle(entry.array):
            member = self.bundles.member(entry.array, entry.index)
            entry.name, entry.index = member.name if member is not None else "", None

    def _running(self, queue: str) -> list[tuple[str, str, int]]:
        """(id, node:incarnation, execution) of all members of the queue's wip registry; arrays have no node."""
        flat = self.link.call("ZRANGE", keys.registry("wip", queue), 0, -1, "WITHSCORES")
        holders = read_holders(self.link)
        found = []
        for first in range(0, len(flat), 2 * SLICE):
            batch = flat[first : first + 2 * SLICE]
            members = [m.decode() for m in batch[::2]]
            ids = [m.rpartition(":")[0] for m in members]
            nodes = self.link.read_hashes([keys.job(i) for i in ids], "pq_node")
            for member, score, task_id, (node,) in zip(members, batch[1::2], ids, nodes, strict=True):
                number = holder_of(score)
                # A lease says it; the record may name the node of an earlier execution.
                address = (node or b"").decode() if number is None else holders.get(number, UNKNOWN)
                found.append((task_id, address, int(member.rpartition(":")[2])))
        return found

    # -- old records ----------------------------------------------------------------------------------------

    def _trim(self, queues: list[str]) -> None:
        """Remove records whose time to live is over, and the oldest above the bound, with their registry entries."""
        now = time.time()
        keep = self.store.settings.keep_records
        for queue in queues:
            self.link.call("ZREMRANGEBYSCORE", keys.registry("finished", queue), 0, now)
            self.link.call("ZREMRANGEBYSCORE", keys.registry("failed", queue), 0, now)
            self._trim_canceled(queue, now - self.store.settings.failed_ttl_s)
            for kind in ("finished", "canceled", "failed"):
                key = keys.registry(kind, queue)
                excess = int(self.link.call("ZCOUNT", key, *TIMED)) - keep
                while excess > 0:
                    ids = self.link.call("ZRANGEBYSCORE", key, *TIMED, "LIMIT", 0, min(excess, SLICE))
                    self.store.run("trim", self.store.term, kind, queue, *ids)
                    excess -= SLICE

    def _trim_canceled(self, queue: str, before: float) -> None:
        """Remove entries whose records are gone: RQ keeps its jobs for ever, others have expired by then."""
        key, first = keys.registry("canceled", queue), self.canceled_kept.get(queue, 0)
        while ids := self.link.call("ZRANGEBYSCORE", key, "-inf", before, "LIMIT", first, SLICE):
            there = self.link.pipeline([("EXISTS", keys.job(i.decode())) for i in ids])
            gone = [i for i, found in zip(ids, there, strict=True) if not found]
            first += len(ids) - len(gone)
            if not gone:
                break
            self.link.call("ZREM", key, *gone)
        self.canceled_kept[queue] = first if ids else 0


def _has_no_process(info: NodeInfo) -> bool:
    """Whether no process of this machine is that worker.

    One of another machine belonged to a pilot that was resumed here: nobody reaches a unix socket from there.
    """
    return info.machine != machine_id() or start_time(info.pid) != info.start


def _slices(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[first : first + SLICE] for first in range(0, len(items), SLICE)]


def _order(running: tuple[str, int]) -> tuple[int, str, int, str]:
    """Sorts by submission, elements of an array by index."""
    task_id, _, index = running[0].partition("_")
    return len(task_id), task_id, len(index), index
