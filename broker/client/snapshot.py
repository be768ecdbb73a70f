"""`Snapshot`: what runs where, when it will have ended, and what is free, read from Redis at one moment.

The dispatcher has the exact state in memory; here it is rebuilt from the records of the nodes and of running tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from pilotq.broker.scheduling.availability import NodeLimits
from pilotq.broker.scheduling.cluster import Cluster, with_counted
from pilotq.broker.scheduling.placement import drain
from pilotq.broker.scheduling.pools import Pools
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.resources import NodeInfo, NodeShare, class_info, parse_allocation
from pilotq.broker.store.store import from_iso
from pilotq.broker.tasks.model import Request

SLICE = 500
Running = list[tuple[tuple[NodeShare, ...], float]]


class Snapshot(NamedTuple):
    """The cores of the pilot and their reservations.

    ``running`` has each reservation and the unix time at which it is free at the latest, math.inf if nobody knows.
    """

    cluster: Cluster
    running: Running

    def free_by(self, request: Request) -> float | None:
        """When the resources of a request are free at the latest (unix time); None if nobody knows, or never."""
        found = drain(self.cluster, request, self.running)
        return found[1] if found is not None and found[1] < math.inf else None


def take_snapshot(link: Connection, nodes: Sequence[NodeInfo], executions: Iterator[str], now: float) -> Snapshot:
    """The state of these nodes at ``now`` (unix time); ``executions`` as `TaskQueries.executions` gives them."""
    ids = (e.rpartition(":")[0] for e in executions if not e.endswith(":0"))
    return snapshot_of(link, nodes, _reservations(link, ids), now)


def snapshot_of(
    link: Connection, nodes: Sequence[NodeInfo], reservations: Iterable[tuple[str, str, float | None]], now: float
) -> Snapshot:
    """The same with executions that were read before: the allocation text, the class, and the launch (unix time)."""
    cluster = Cluster()
    cluster.set_time(now)
    limits = NodeLimits(link)
    limits.read()
    for node in nodes:
        cluster.add_node(node)
        limits.apply(cluster, node, node.name not in limits.quarantined, now, now)
    running: Running = []
    for parts, end in (_until(cluster.pools, *reservation) for reservation in reservations):
        mine = tuple(part for part in parts if part.node in cluster.names)
        try:
            cluster.take(mine)
        except ValueError:
            continue  # two tasks of one slot, one of which ended between our reads
        running.append((mine, end))
    # What has just started has not reported its cores yet: they are some of those that the dispatcher counts as used.
    used = link.call("HMGET", keys.USAGE, *cluster.names) if nodes else []
    for name, text in zip(cluster.names, used, strict=True):
        cluster.fill(name, (int(text.split()[0]) if text else 0) - cluster.used(name))
    return Snapshot(cluster, running)


def _reservations(link: Connection, ids: Iterator[str]) -> Iterator[tuple[str, str, float | None]]:
    fields = ("pq_cpus", "pq_class", "started_at", "pq_running")
    while part := list(islice(ids, SLICE)):
        for cpus, raw, started, launched in link.pipeline([("HMGET", keys.job(i), *fields) for i in part]):
            if cpus and raw and launched:
                yield cpus.decode(), raw.decode(), from_iso(started.decode())


def _until(pools: Pools, cpus: str, class_name: str, begun: float | None) -> tuple[tuple[NodeShare, ...], float]:
    info, parts = class_info(class_name), parse_allocation(cpus)
    if info is None or begun is None:
        return parts, math.inf
    limit = info.request.limit
    return with_counted(parts, info.request, pools), math.inf if limit is None else begun + limit
