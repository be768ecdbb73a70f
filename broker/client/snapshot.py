"""What runs where, by when it will have ended, and what that leaves free: read from Redis by those who look.

The dispatcher knows it exactly; here it is made again from the nodes and the records of what runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from pilotq.broker.scheduling.availability import Gate
from pilotq.broker.scheduling.cluster import Cluster, with_counted
from pilotq.broker.scheduling.inventory import ClassInfo
from pilotq.broker.scheduling.placement import drain
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Link
from pilotq.broker.store.messages import NodeInfo, Part, parse_allocation
from pilotq.broker.store.store import from_iso
from pilotq.broker.tasks.model import Request

SLICE = 500
Running = list[tuple[tuple[Part, ...], float]]


class Picture(NamedTuple):
    """``running`` has each reservation and the unix time by which it is free, math.inf if nobody knows."""

    cluster: Cluster
    running: Running

    def room_by(self, request: Request) -> float | None:
        """When there is room for it at the latest (unix time); None if nobody knows, or never."""
        found = drain(self.cluster, request, self.running)
        return found[1] if found is not None and found[1] < math.inf else None


def picture(link: Link, nodes: Sequence[NodeInfo], executions: Iterator[str], now: float) -> Picture:
    """What stands on these nodes at ``now`` (unix time); ``executions`` as `Listing.executions` gives them."""
    cluster = Cluster()
    cluster.at(now)
    gate = Gate(link)
    gate.read()
    for node in nodes:
        cluster.add_node(node)
        gate.show(cluster, node, now, now)
    running: Running = []
    for parts, end in _reservations(link, (e.rpartition(":")[0] for e in executions if not e.endswith(":0"))):
        mine = tuple(part for part in parts if part.node in cluster.names)
        try:
            cluster.take(mine)
        except ValueError:
            continue  # two tasks of one lane, one of which ended between our reads
        running.append((mine, end))
    # What has just begun has not said yet where: some of the cores that the dispatcher counts as used.
    used = link.call("HMGET", keys.USED, *cluster.names) if nodes else []
    for name, text in zip(cluster.names, used, strict=True):
        cluster.fill(name, (int(text.split()[0]) if text else 0) - cluster.used(name))
    return Picture(cluster, running)


def class_info(link: Link, name: str) -> ClassInfo | None:
    """The record of a class; None when it has none (any more)."""
    record = link.call("HGET", keys.CLASSES, name) if name else None
    return msgspec.json.decode(record, type=ClassInfo) if record else None


def _reservations(link: Link, ids: Iterator[str]) -> Iterator[tuple[tuple[Part, ...], float]]:
    classes: dict[str, ClassInfo | None] = {}
    fields = ("pq_cpus", "pq_class", "started_at", "pq_running")
    while part := list(islice(ids, SLICE)):
        for cpus, raw, started, launched in link.pipeline([("HMGET", keys.job(i), *fields) for i in part]):
            if not (cpus and raw and launched):
                continue
            name = raw.decode()
            if name not in classes:
                classes[name] = class_info(link, name)
            info, parts, begun = classes[name], parse_allocation(cpus.decode()), from_iso(started.decode())
            if info is None or begun is None:
                yield parts, math.inf
                continue
            limit = info.request.limit
            yield with_counted(parts, info.request), math.inf if limit is None else begun + limit
