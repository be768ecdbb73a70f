"""What the dispatcher tells those who look: the cores in use, those it keeps free, and whether anything still runs."""

from __future__ import annotations

import math
import time

import msgspec

from pilotq.broker.scheduling.inventory import Floor
from pilotq.broker.scheduling.placement import Hold
from pilotq.broker.store import keys
from pilotq.broker.store.messages import format_allocation
from pilotq.broker.store.store import Store


class Held(msgspec.Struct):
    """Cores that are kept free for the first task of a class. Times in unix seconds; None: nobody knows."""

    class_name: str
    since: float
    cores: str  # allocation text
    frees_at: float | None


class Told:
    """Writes only what has changed since it was told last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._busy = -1
        self._used: dict[str, str] = {}
        self._hold: Hold | None = None
        self._fresh = True  # an earlier dispatcher may have left a hold

    def busy(self, floor: Floor) -> None:
        """Lanes and tasks handed ahead, for those who wait until nothing runs."""
        busy = len(floor.lanes) + sum(a.count for n in floor.nodes.values() for a in n.ahead.values())
        if busy != self._busy:
            self._store.write("HSET", keys.WISH, "busy", busy)
            self._busy = busy

    def used(self, floor: Floor) -> None:
        used = {name: f"{floor.cluster.used(name)} {len(node.lanes)}" for name, node in floor.nodes.items()}
        changed = [item for item in used.items() if self._used.get(item[0]) != item[1]]
        if changed:
            self._store.write("HSET", keys.USED, *(text for item in changed for text in item))
        self._used = used

    def hold(self, hold: Hold | None, now: float) -> None:
        """The cores that are kept free; ``now`` is monotonic, as the times of the hold."""
        if hold == self._hold and not self._fresh:
            return
        if hold is None:
            self._store.write("HDEL", keys.WISH, "hold")
        else:
            wall = time.time() - now
            frees_at = wall + max(hold.frees_at, now) if hold.frees_at < math.inf else None
            held = Held(hold.class_name, wall + hold.since, format_allocation(hold.parts), frees_at)
            self._store.write("HSET", keys.WISH, "hold", msgspec.json.encode(held))
        self._hold, self._fresh = hold, False
