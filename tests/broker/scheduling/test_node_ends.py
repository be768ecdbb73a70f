"""Nodes whose allocation ends: what cannot have ended by then is not begun there, and holds up nobody."""

from __future__ import annotations

import math

import pytest

from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.scheduling.placement import BackfillState, Waiting, plan
from pilotq.broker.store.resources import NodeInfo, format_allocation
from pilotq.broker.tasks.model import Request


def cluster_of(**ends: float) -> Cluster:
    """Nodes of two cores, by when they end."""
    cluster = Cluster()
    for name, end in ends.items():
        cluster.add_node(NodeInfo(name, 1, "host", 1, [0, 1], gpus=["0", "1"]))
        cluster.set_end(name, end)
    return cluster


def placed(cluster: Cluster, request: Request, now: float, count: int = 1) -> list[str]:
    waiting = [Waiting("a", 0, request, list(range(count)), count)]
    return [format_allocation(shares) for _, shares in plan(cluster, waiting, (), BackfillState(), now)]


SHORT = Request(limit=10)
FORMS = {
    "plain": SHORT, "gpus": Request(limit=10, gpus=1), "two nodes": Request(limit=10, nodes=(2, 2)),
    "whole": Request(limit=10, nodes=(2, 2), whole=True), "spread": Request(limit=10, cores=(3, 3), spread=True),
}  # fmt: skip


@pytest.mark.parametrize("request_", FORMS.values(), ids=FORMS)
def test_it_must_end_before_its_nodes_do(request_: Request) -> None:
    assert placed(cluster_of(n1=110.0, n2=110.0), request_, now=100.0)
    assert not placed(cluster_of(n1=109.0, n2=109.0), request_, now=100.0)
    if request_.nodes is not None or request_.spread:
        assert not placed(cluster_of(n1=110.0, n2=109.0), request_, now=100.0)
    else:
        assert [text[:2] for text in placed(cluster_of(n1=109.0, n2=110.0), request_, now=100.0, count=4)] == ["n2"] * 2


def test_without_a_limit_nothing_is_known_and_nothing_held_back() -> None:
    assert placed(cluster_of(n1=101.0), Request(), now=100.0) == ["n1[0]"]


def test_what_is_too_late_neither_blocks_nor_gets_a_hold() -> None:
    state = BackfillState()
    late = Waiting("late", 5, Request(limit=60, cores=(2, 2)), [1], 1)
    small = Waiting("small", 0, SHORT, [2], 1)
    for now in (100.0, 101.5, 103.0):
        assert [name for name, _ in plan(cluster_of(n1=150.0), [late, small], (), state, now)] == ["small"]
        assert state.hold is None


def test_a_hold_is_not_made_on_nodes_that_end_too_early() -> None:
    cluster, state = cluster_of(n1=150.0, n2=math.inf), BackfillState()
    running = [(shares, 1000.0) for shares in cluster.reserve_many(Request(cores=(2, 2)), 2)]
    large = Waiting("large", 0, Request(limit=60, cores=(2, 2)), [1], 1)
    others = Waiting("others", 0, Request(), [2], 1)
    for now in (100.0, 101.5):
        plan(cluster, [large, others], running, state, now)
    assert state.hold is not None
    assert [share.node for share in state.hold.shares] == ["n2"]


def test_an_end_that_moves_opens_the_node_again() -> None:
    cluster = cluster_of(n1=105.0)
    assert not placed(cluster, SHORT, now=100.0)
    cluster.set_end("n1", 205.0)
    assert placed(cluster, SHORT, now=100.0) == ["n1[0]"]


def test_it_is_said_why_it_waits() -> None:
    cluster = cluster_of(n1=130.0, n2=120.0)
    cluster.set_time(100.0)
    assert cluster.waits_for(Request(limit=60)) == (
        "it may take 60 s, but the nodes that could hold it take nothing new in 30 s, when their allocation ends: "
        "it starts in the next one"
    )
    cluster.set_open("n1", False)
    cluster.set_open("n2", False)
    assert cluster.waits_for(SHORT).startswith("all nodes are closed")
