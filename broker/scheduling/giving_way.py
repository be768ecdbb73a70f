"""How nice tasks give way: which of their slots are vacated for others that wait, and whether more may begin. Pure.

A nice task begins only when nothing else waits that could have its cores, and runs where others leave room: also on
cores that are idle until a larger task can begin. Among themselves they are placed as all others are. As soon as one
that is not nice could begin if nice tasks were gone, those of them that are in its way end, and wait again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.scheduling.inventory import Inventory
from pilotq.broker.scheduling.placement import BackfillState, Shares, Waiting, plan
from pilotq.broker.scheduling.slot import Slot
from pilotq.broker.store.resources import class_info
from pilotq.broker.store.store import Head
from pilotq.broker.tasks.model import NICE, Request

TASKS_MAX = 100  # of one class, for which room is made at once


def is_nice(class_name: str) -> bool:
    """Whether tasks of this class give way to all others."""
    info = class_info(class_name)
    return info is not None and info.priority == NICE


def make_room(
    inventory: Inventory, heads: Mapping[str, Head], blocked: Collection[str], held: str = ""
) -> tuple[list[Slot], bool]:
    """The slots of nice tasks that are in the way of ``blocked`` classes, in this order; and whether any are.

    Each slot is returned once, and marked as ``vacated``; one that is vacated, and still there, counts as in the way.
    ``held`` is the class for which cores are held.
    """
    nice = {name for name in inventory.slots_of if is_nice(name)}
    if not nice or not blocked:
        return [], False
    slots = [slot for slot in inventory.slots.values() if slot.class_name in nice]
    cluster, shares = inventory.cluster, [inventory.present(slot.shares) for slot in slots]
    wanted: list[tuple[Request, Shares]] = []
    for part in shares:
        cluster.release(part)
    for name in blocked:
        info = class_info(name)
        if info is not None and name in heads:
            number = min(heads[name].waiting, TASKS_MAX)
            number = min(number, inventory.room(info, name)) if info.at_most else number
            found = cluster.reserve_many(info.request, number, held=name == held)
            wanted += [(info.request, each) for each in found]
    for _, each in wanted:
        cluster.release(each)
    for part in shares:
        cluster.take(part)
    in_the_way = [
        slot for slot, part in zip(slots, shares, strict=True) if any(_overlap(part, *each) for each in wanted)
    ]
    new = [slot for slot in in_the_way if not slot.vacated]
    for slot in new:
        slot.vacated = True
    return new, bool(in_the_way)


def plan_nice(
    cluster: Cluster,
    waiting: Iterable[Waiting],
    running: Iterable[tuple[Shares, float]],
    state: BackfillState,
    now: float,
    wait_s: float,
    limit: int,
) -> list[tuple[str, Shares]]:
    """`plan` for nice tasks, with a hold that only they see: it is in the cluster during this call.

    While cores are held for a task that is not nice there is no other hold, and nothing is known of what is blocked.
    """
    if cluster.holding:
        return plan(cluster, waiting, running, BackfillState(), now, math.inf, limit)
    if (hold := state.hold) is not None:
        nodes = {node.name for node in cluster.open_nodes}
        if all(share.node in nodes for share in hold.shares):
            cluster.hold(hold.shares, hold.request)
    found = plan(cluster, waiting, running, state, now, wait_s, limit)
    cluster.unhold()
    return found


def _overlap(own: Shares, request: Request, wanted: Shares) -> bool:
    """Whether a nice task has something that a task which waits would get. Memory and counters have no names: all of
    a node that has some of it are in the way."""
    for share in own:
        for other in wanted:
            if share.node == other.node and (set(share.cores) & set(other.cores) or set(share.gpus) & set(other.gpus)):
                return True
            if share.node == other.node and share.memory and request.memory:
                return True
    names = {name for name, _ in request.use}
    return any(name in names for share in own for name, _ in share.use)
