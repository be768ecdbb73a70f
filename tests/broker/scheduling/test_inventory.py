"""What the dispatcher does about executions over several nodes when one of these goes, and when it is new itself."""

from __future__ import annotations

import pytest

from pilotq.broker.scheduling.inventory import Inventory
from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Gone, PartlyReleased, StateReport, Sweep, Swept
from pilotq.broker.store.resources import NodeInfo, class_info, parse_allocation

CLASS = "default.p0.2n1c"
BOTH = "n1[0],n2[0]"
Remote = list[tuple[str, str]]


def add_node(
    inventory: Inventory, name: str, incarnation: int, *, slots: list[tuple[int, str, str]] | None = None,
    remote: Remote | None = None,
) -> None:  # fmt: skip
    info = NodeInfo(name, incarnation, "here", 1, [0, 1])
    inventory.add_node(info, StateReport(name, incarnation, 1, slots or [], {}, remote or []), 0.0)


def used(inventory: Inventory) -> list[int]:
    return [inventory.cluster.used(name) for name in inventory.cluster.names]


@pytest.fixture
def inventory() -> Inventory:
    """Two nodes of two cores, and a slot over a core of each."""
    inventory = Inventory(Settings())
    add_node(inventory, "n1", 1)
    add_node(inventory, "n2", 2)
    parts = parse_allocation(BOTH)
    inventory.cluster.take(parts)
    inventory.open_slot(Slot(7, CLASS, parts, 1e9))
    return inventory


def test_the_first_node_goes_and_the_others_are_free_when_they_have_swept(inventory: Inventory) -> None:
    assert [(node.info.name, word) for node, word in inventory.remove_node("n1", "n1:1")] == [("n2", Sweep("n1:1"))]
    assert used(inventory) == [1]
    inventory.release_swept(Swept("n2", 2, "n1:9", 0))  # of another host
    assert used(inventory) == [1]
    inventory.release_swept(Swept("n2", 2, "n1:1", 0))
    inventory.release_swept(Swept("n2", 2, "n1:1", 0))  # said twice
    assert used(inventory) == [0]


def test_another_node_goes_and_the_host_is_told(inventory: Inventory) -> None:
    told = inventory.remove_node("n2", "n2:2", clean=True)
    assert [(node.info.name, word) for node, word in told] == [("n1", Gone("n2:2", clean=True))]
    assert used(inventory) == [1]
    # The same node as it comes back has the slot's core taken until the host has ended the slot.
    add_node(inventory, "n2", 3)
    assert used(inventory) == [1, 1]
    inventory.close_slot(inventory.nodes["n1"], inventory.slots[7])
    assert used(inventory) == [0, 0]


def test_a_slot_counts_for_its_limit_until_all_its_nodes_have_swept(inventory: Inventory) -> None:
    name = f"{CLASS}-2at1f"
    info = class_info(name)
    assert info is not None and inventory.room(info, name) == 2
    parts = parse_allocation("n1[1],n2[1]")
    inventory.cluster.take(parts)
    inventory.open_slot(Slot(8, name, parts, 1e9))
    assert inventory.room(info, name) == 1
    inventory.remove_node("n1", "n1:1")
    assert inventory.room(info, name) == 1
    inventory.release_swept(Swept("n2", 2, "n1:1", 0))
    assert inventory.room(info, name) == 2


def test_what_is_withheld_stays_taken(inventory: Inventory) -> None:
    inventory.release_swept(PartlyReleased("n1", 1, 7, "n2[0]"))
    inventory.release_swept(PartlyReleased("n1", 1, 7, "n2[0]"))  # said twice
    assert used(inventory) == [0, 1]
    inventory.close_slot(inventory.nodes["n1"], inventory.slots[7])
    assert used(inventory) == [0, 0]


@pytest.mark.parametrize("first", ["n1", "n2"])
def test_a_new_dispatcher_learns_it_in_any_order(first: str) -> None:
    inventory = Inventory(Settings())
    told = {"n1": ([(7, BOTH, CLASS)], []), "n2": ([], [("n1:1", BOTH)])}
    for name in sorted(told, key=lambda name: name != first):
        slots, remote = told[name]
        add_node(inventory, name, int(name[1]), slots=slots, remote=remote)
    assert used(inventory) == [1, 1]
    assert not inventory.unswept
    inventory.close_slot(inventory.nodes["n1"], inventory.slots[7])
    assert used(inventory) == [0, 0]


def test_a_new_dispatcher_never_hears_of_the_first_node() -> None:
    """It died while there was no dispatcher: its remote tell of it."""
    inventory = Inventory(Settings())
    add_node(inventory, "n2", 2, remote=[("n1:1", BOTH)])
    assert used(inventory) == [1]
    assert [(node.info.name, word) for node, word in inventory.remove_node("n1", "n1:1")] == [("n2", Sweep("n1:1"))]
    inventory.release_swept(Swept("n2", 2, "n1:1", 0))
    assert used(inventory) == [0]
