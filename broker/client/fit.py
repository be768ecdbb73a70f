"""Whether what waits can run on the nodes of a pilot at all.

A submission is checked against the nodes as far as they are known. In an allocation nodes may join later, and a pilot
that is resumed may have smaller ones than before.
"""

from __future__ import annotations

from collections.abc import Iterable

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.registry import nodes_and_missing
from pilotq.broker.store.resources import NodeInfo, class_info
from pilotq.broker.tasks.model import Request


def fit_is_known(link: Connection, requests: Iterable[Request]) -> bool:
    """Whether all of these fit the nodes that have joined, or no node is missing any more."""
    nodes, missing = nodes_and_missing(link)
    cluster = _cluster(nodes)
    return not missing or all(cluster.never_fits(request) is None for request in requests)


def nothing_left_fits(link: Connection) -> str:
    """Why no task that is left can run on the nodes of the pilot; empty if one runs, or may run, or nothing is left.

    Tasks that wait for others are left out: they cannot run before these.
    """
    nodes, missing = nodes_and_missing(link)
    queries = TaskQueries(link, None)
    names = [name.decode() for name in link.call("HKEYS", keys.CLASSES)]
    on_the_way = sum(link.pipeline([("LLEN", keys.EVENTS), ("LLEN", keys.RELEASE)])) + queries.to_be_queued()
    if missing or not names or on_the_way or next(queries.executions(), None) is not None:
        return ""
    why, cluster = "", _cluster(nodes)
    for name, first in zip(names, link.pipeline([("LINDEX", keys.queue(name), 0) for name in names]), strict=True):
        info = class_info(name) if first is not None else None
        if info is not None:
            never = cluster.never_fits(info.request)
            if never is None:
                return ""
            why = why or f"task {first.decode()} can never run here: {never}"
    return why


def _cluster(nodes: Iterable[NodeInfo]) -> Cluster:
    cluster = Cluster()
    for node in nodes:
        cluster.add_node(node)
    return cluster
