"""What the dispatcher publishes for readers: the cores in use, those it keeps free, and whether anything still runs."""

from __future__ import annotations

import math
import time

import msgspec

from pilotq.broker.scheduling.inventory import Inventory
from pilotq.broker.scheduling.placement import Hold
from pilotq.broker.store import keys
from pilotq.broker.store.resources import class_info, format_allocation
from pilotq.broker.store.store import Store


class HoldStatus(msgspec.Struct):
    """Cores that are kept free for the first task of a class. Times in unix seconds; None: unknown."""

    class_name: str
    since: float
    cores: str  # allocation text
    frees_at: float | None


def _is_full(class_name: str, slots: int) -> bool:
    """Whether as many tasks of a class run as may."""
    info = class_info(class_name)
    return info is not None and 0 < info.at_most <= slots


class StatusPublisher:
    """Writes the status to Redis; only what has changed since it was last written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._busy = -1
        self._used: dict[str, str] = {}
        self._slots = -1
        self._full: dict[str, int] | None = None
        self._hold: Hold | None = None
        self._hold_unknown = True  # an earlier dispatcher may have left one

    def publish_busy(self, inventory: Inventory) -> None:
        """The number of slots and prefetched tasks, for those who wait until nothing runs."""
        busy = inventory.busy
        if busy != self._busy:
            self._store.write("HSET", keys.STATUS, "busy", busy)
            self._busy = busy

    def publish_usage(self, inventory: Inventory) -> None:
        """The cores reserved and the slots of each node, all slots, and the classes that have all they may have."""
        used = {name: f"{inventory.cluster.used(name)} {len(node.slots)}" for name, node in inventory.nodes.items()}
        changed = [item for item in used.items() if self._used.get(item[0]) != item[1]]
        if changed:
            self._store.write("HSET", keys.USAGE, *(text for item in changed for text in item))
        self._used = used
        if len(inventory.slots) != self._slots:
            self._slots = len(inventory.slots)
            self._store.write("HSET", keys.STATUS, "slots", self._slots)
        full = {name: number for name, number in inventory.slots_of.items() if _is_full(name, number)}
        if full != self._full:
            self._full = full
            self._store.write("HSET", keys.STATUS, "full", msgspec.json.encode(full))

    def publish_hold(self, hold: Hold | None, now: float) -> None:
        """The cores that are kept free; ``now`` is monotonic, as the times of the hold."""
        if hold == self._hold and not self._hold_unknown:
            return
        if hold is None:
            self._store.write("HDEL", keys.STATUS, "hold")
        else:
            wall = time.time() - now
            frees_at = wall + max(hold.frees_at, now) if hold.frees_at < math.inf else None
            held = HoldStatus(hold.class_name, wall + hold.since, format_allocation(hold.shares), frees_at)
            self._store.write("HSET", keys.STATUS, "hold", msgspec.json.encode(held))
        self._hold, self._hold_unknown = hold, False
