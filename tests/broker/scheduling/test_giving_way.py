"""Which slots of nice tasks are vacated for tasks that wait."""

from __future__ import annotations

import math

import pytest

from pilotq.broker.scheduling.giving_way import make_room, plan_nice
from pilotq.broker.scheduling.inventory import Inventory
from pilotq.broker.scheduling.placement import BackfillState, Waiting, plan
from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import PartlyReleased, StateReport
from pilotq.broker.store.resources import NodeInfo, class_info
from pilotq.broker.store.store import Head
from pilotq.broker.tasks.model import NICE, Request, class_name

ONE, TWO = "default.p0.1c", "default.p0.2c"
GIB = 1 << 30


def nice(request: Request) -> str:
    return class_name("default", NICE, request)


@pytest.fixture
def inventory() -> Inventory:
    """Two nodes of two cores and 4 GiB each."""
    found = Inventory(Settings())
    for n, name in enumerate(("n1", "n2"), start=1):
        found.add_node(NodeInfo(name, n, "here", 1, [0, 1], memory=4 * GIB), StateReport(name, n, 1, [], {}, []), 0.0)
    return found


def begin(inventory: Inventory, number: int, name: str) -> Slot:
    info = class_info(name)
    assert info is not None
    shares = inventory.cluster.reserve(info.request)
    assert shares is not None
    slot = Slot(number, name, shares, 1e9)
    inventory.open_slot(slot)
    return slot


def waiting(*names: str, count: int = 1) -> dict[str, Head]:
    return {name: Head(count, ["1"] * count, 0) for name in names}


def test_only_those_in_the_way_end_and_they_are_asked_once(inventory: Inventory) -> None:
    slots = {n: begin(inventory, n, nice(Request())) for n in range(1, 5)}
    before = [(name, inventory.cluster.used(name)) for name in inventory.cluster.names]
    asked, in_the_way = make_room(inventory, waiting(ONE), [ONE])
    assert len(asked) == 1 and asked[0] in slots.values() and in_the_way
    assert make_room(inventory, waiting(ONE), [ONE]) == ([], True), "it is on its way"
    more, _ = make_room(inventory, waiting(ONE, count=3), [ONE])
    assert len(more) == 2
    assert [(name, inventory.cluster.used(name)) for name in inventory.cluster.names] == before
    assert inventory.cluster.reserve(Request()) is None


def test_a_larger_task_gets_one_node(inventory: Inventory) -> None:
    for n in range(1, 5):
        begin(inventory, n, nice(Request()))
    asked, _ = make_room(inventory, waiting(TWO), [TWO])
    assert len(asked) == 2 and len({slot.shares[0].node for slot in asked}) == 1


def test_nothing_ends_for_what_could_not_begin_all_the_same(inventory: Inventory) -> None:
    wide = "default.p0.1n2c"
    begin(inventory, 1, "default.p5.1c")
    begin(inventory, 2, nice(Request()))
    begin(inventory, 3, "default.p5.1c")
    assert {slot.shares[0].node for slot in inventory.slots.values()} == {"n1", "n2"}
    assert make_room(inventory, waiting(wide), [wide]) == ([], False)
    assert make_room(inventory, waiting(ONE), []) == ([], False)


def test_memory_has_no_name(inventory: Inventory) -> None:
    begin(inventory, 1, nice(Request(memory=3 * GIB)))
    begin(inventory, 2, nice(Request(memory=3 * GIB)))
    name = class_name("default", 0, Request(memory=2 * GIB))
    asked, in_the_way = make_room(inventory, waiting(name), [name])
    assert len(asked) == 1 and in_the_way


def test_those_that_are_not_nice_never_end(inventory: Inventory) -> None:
    for n in range(1, 5):
        begin(inventory, n, "default.p-1000.1c")
    assert make_room(inventory, waiting(ONE), [ONE]) == ([], False)


def test_the_node_that_runs_it_is_asked_though_no_share_is_left_there() -> None:
    inventory = Inventory(Settings())
    for n, name in enumerate(("n1", "n2", "n3"), start=1):
        inventory.add_node(NodeInfo(name, n, "here", 1, [0]), StateReport(name, n, 1, [], {}, []), 0.0)
    slot = begin(inventory, 1, nice(Request(nodes=(3, 3))))
    inventory.release_swept(PartlyReleased("n1", 1, 1, "n2[0],n3[0]"))
    begin(inventory, 2, "default.p5.1c")
    inventory.remove_node("n2")
    assert make_room(inventory, waiting(ONE), [ONE]) == ([slot], True)
    assert slot.shares[0].node == "n2" and inventory.owner(slot).info.name == "n1"
    assert make_room(inventory, waiting(ONE), [ONE]) == ([], True)


def test_cores_are_held_for_a_large_nice_task_against_nice_ones_only(inventory: Inventory) -> None:
    cluster, state = inventory.cluster, BackfillState()
    running = {core: cluster.reserve(Request()) or () for core in range(4)}
    lists = [Waiting("large", NICE, Request(cores=(2, 2)), [1], 1), Waiting("small", NICE, Request(), [2, 9], 2)]

    def place(now: float) -> list[str]:
        return [
            name for name, _ in plan_nice(cluster, lists, ((s, math.inf) for s in running.values()), state, now, 1, 9)
        ]

    cluster.release(running.pop(0))
    assert place(0.0) == ["small"], "it overtakes for a moment"
    cluster.release(running.pop(1))
    assert place(2.0) == [] and not cluster.holding, "the core is kept for the large one"
    other = Waiting("other", 0, Request(), [3], 1)
    ((_, taken),) = plan(cluster, [other], [], BackfillState(), 2.0)
    cluster.release(taken)
    assert place(3.0) == []
    cluster.hold(taken, Request())  # for a task that is not nice
    assert place(3.0) == [] and cluster.holding
    cluster.unhold()
    cluster.release(next(shares for shares in running.values() if shares[0].node != taken[0].node))
    assert place(4.0) == ["small"], "elsewhere they go on"
