"""What the dispatcher does about executions over several nodes when one of these goes, and when it is new itself."""

from __future__ import annotations

import pytest

from pilotq.broker.scheduling.inventory import Floor, Lane
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Gone, NodeInfo, NodeState, Sweep, Swept, Withheld, parse_allocation

CLASS = "default.p0.2n1c"
BOTH = "n1[0],n2[0]"
Guests = list[tuple[str, str]]


def arrive(
    floor: Floor, name: str, incarnation: int, *, lanes: list[tuple[int, str, str]] | None = None,
    guests: Guests | None = None,
) -> None:  # fmt: skip
    info = NodeInfo(name, incarnation, "here", 1, [0, 1])
    floor.arrive(info, NodeState(name, incarnation, 1, lanes or [], {}, guests or []), {}, 0.0)


def used(floor: Floor) -> list[int]:
    return [floor.cluster.used(name) for name in floor.cluster.names]


@pytest.fixture
def floor() -> Floor:
    """Two nodes of two cores, and a lane over a core of each."""
    floor = Floor(Settings())
    arrive(floor, "n1", 1)
    arrive(floor, "n2", 2)
    parts = parse_allocation(BOTH)
    floor.cluster.take(parts)
    floor.open_lane(Lane(7, CLASS, parts, 1e9))
    return floor


def test_the_first_node_goes_and_the_others_are_free_when_they_have_swept(floor: Floor) -> None:
    assert [(node.info.name, word) for node, word in floor.depart("n1", "n1:1")] == [("n2", Sweep("n1:1"))]
    assert used(floor) == [1]
    floor.settle(Swept("n2", 2, "n1:9", 0))  # of another host
    assert used(floor) == [1]
    floor.settle(Swept("n2", 2, "n1:1", 0))
    floor.settle(Swept("n2", 2, "n1:1", 0))  # said twice
    assert used(floor) == [0]


def test_another_node_goes_and_the_host_is_told(floor: Floor) -> None:
    told = floor.depart("n2", "n2:2", clean=True)
    assert [(node.info.name, word) for node, word in told] == [("n1", Gone("n2:2", clean=True))]
    assert used(floor) == [1]
    # The same node as it comes back has the lane's core taken until the host has ended the lane.
    arrive(floor, "n2", 3)
    assert used(floor) == [1, 1]
    floor.close_lane(floor.nodes["n1"], floor.lanes[7])
    assert used(floor) == [0, 0]


def test_what_is_withheld_stays_taken(floor: Floor) -> None:
    floor.settle(Withheld("n1", 1, 7, "n2[0]"))
    floor.settle(Withheld("n1", 1, 7, "n2[0]"))  # said twice
    assert used(floor) == [0, 1]
    floor.close_lane(floor.nodes["n1"], floor.lanes[7])
    assert used(floor) == [0, 0]


@pytest.mark.parametrize("first", ["n1", "n2"])
def test_a_new_dispatcher_learns_it_in_any_order(first: str) -> None:
    floor = Floor(Settings())
    told = {"n1": ([(7, BOTH, CLASS)], []), "n2": ([], [("n1:1", BOTH)])}
    for name in sorted(told, key=lambda name: name != first):
        lanes, guests = told[name]
        arrive(floor, name, int(name[1]), lanes=lanes, guests=guests)
    assert used(floor) == [1, 1]
    assert not floor.remains
    floor.close_lane(floor.nodes["n1"], floor.lanes[7])
    assert used(floor) == [0, 0]


def test_a_new_dispatcher_never_hears_of_the_first_node() -> None:
    """It died while there was no dispatcher: its guests tell of it."""
    floor = Floor(Settings())
    arrive(floor, "n2", 2, guests=[("n1:1", BOTH)])
    assert used(floor) == [1]
    assert [(node.info.name, word) for node, word in floor.depart("n1", "n1:1")] == [("n2", Sweep("n1:1"))]
    floor.settle(Swept("n2", 2, "n1:1", 0))
    assert used(floor) == [0]
