"""Whether what waits can run on the nodes of a pilot at all.

A submission is checked against the nodes as far as they are known. In an allocation nodes may join later, and a pilot
that is resumed may have smaller ones than before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.registry import nodes_and_missing
from pilotq.broker.store.resources import NodeInfo, class_info
from pilotq.broker.tasks.model import Request

NAMED = 5  # kinds of tasks that are named where many can never run


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
    on_the_way = sum(link.pipeline([("LLEN", keys.EVENTS), ("LLEN", keys.RELEASE)])) + queries.to_be_queued()
    if missing or on_the_way or next(queries.executions(), None) is not None:
        return ""
    why = ""
    for one in _waiting(link, nodes):
        if not one.why:
            return ""
        why = why or f"task {one.first} can never run here: {one.why}"
    return why


def never_here(link: Connection) -> list[str]:
    """A sentence for each of the first kinds of tasks that wait and can never run on the nodes of the pilot, once these
    are known, and one for all others."""
    nodes, missing = nodes_and_missing(link)
    found = [] if missing else [one for one in _waiting(link, nodes) if one.why]
    said = [
        f"task {one.first}{f' and {one.number - 1:,} like it' if one.number > 1 else ''} can never run here: {one.why}"
        for one in found[:NAMED]
    ]
    more = sum(one.number for one in found[NAMED:])
    return [*said, f"nor can {more:,} more"] if more else said


class _Kind(NamedTuple):
    """Tasks that wait and ask for the same."""

    first: str  # id
    number: int
    why: str  # they can never run; empty: they may


def _waiting(link: Connection, nodes: Iterable[NodeInfo]) -> Iterator[_Kind]:
    cluster = _cluster(nodes)
    names = [name.decode() for name in link.call("HKEYS", keys.CLASSES)]
    read = [command for name in names for command in (("LINDEX", keys.queue(name), 0), ("LLEN", keys.queue(name)))]
    replies = link.pipeline(read) if read else []
    for name, first, number in zip(names, replies[::2], replies[1::2], strict=True):
        info = class_info(name) if first is not None else None
        if info is not None:
            yield _Kind(first.decode(), number, cluster.never_fits(info.request) or "")


def _cluster(nodes: Iterable[NodeInfo]) -> Cluster:
    cluster = Cluster()
    for node in nodes:
        cluster.add_node(node)
    return cluster
