"""The backlog: what waits in the class lists, as the dispatcher has read it, in the order of placement.

There may be very many classes (tasks that each ask for another amount of memory): the scripts note those whose lists
have got something, and only these are read again. Those that the open nodes cannot hold are set aside until the nodes
change.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pilotq.broker.scheduling.placement import Waiting
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument
from pilotq.broker.store.resources import ClassInfo, class_info
from pilotq.broker.store.store import Head, Store
from pilotq.broker.tasks.model import Request, order_of

CLASSES_MAX = 256  # classes that one pass of placement looks at: the first in the order
EXAMINED_MAX = 1000  # classes of which one pass finds out whether the nodes can hold them
SLICE = 250  # class lists read in one script call
TURN_MAX = 5_000  # changed lists read in one turn of the dispatcher

# How many more tasks of a class may begin now, where that has a limit.
Room = Callable[[ClassInfo, str], int]
Key = tuple[int, int, str]  # minus priority, place of the first task, class name


class Backlog:
    """The heads of all class lists that are not empty."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.heads: dict[str, Head] = {}
        self._order: list[Key] = []  # without those that are set aside
        self._keys: dict[str, Key] = {}
        self._aside: set[str] = set()  # what the open nodes cannot hold
        self._widenings = 0  # of the cluster, when these were set aside
        self._unread = self._unexamined = False
        self._cursor = 0

    @property
    def more(self) -> bool:
        """Whether some lists that have changed are still to be read, or some classes to be examined."""
        return self._unread or self._unexamined

    # -- reading ----------------------------------------------------------------------------------------------------

    def read_all(self) -> None:
        """Read the lists of all classes: for a new dispatcher."""
        self.read_some()
        while not self.walked:
            self.read_some()

    def read_some(self) -> list[str]:
        """Read the lists of some classes again, all in turn: RQ's tools, too, take something from them.

        Returns the names of these classes.
        """
        cursor, flat = self.store.link.call("HSCAN", keys.CLASSES, self._cursor, "COUNT", 2 * SLICE)
        self._cursor = int(cursor)
        names = [name.decode() for name in flat[::2]]
        self.read(names)
        return names

    @property
    def walked(self) -> bool:
        """Whether the last `read_some` was the end of a walk through all."""
        return self._cursor == 0

    def read_changed(self) -> None:
        """Read the lists that have got something since they were read last, of very many only some."""
        for _ in range(TURN_MAX // SLICE):
            heads = self.store.changed_heads(SLICE)
            for name, head in heads.items():
                self.set(name, head)
            if len(heads) < SLICE:
                self._unread = False
                return
        self._unread = True

    def command(self) -> tuple[Argument, ...]:
        """A command that reads what has changed, to be sent with others; its reply goes to `take`."""
        return self.store.changed_heads_command(SLICE)

    def take(self, reply: Any) -> bool:
        """Take the reply to `command`; False where that was an error, or there is more to be read."""
        if isinstance(reply, Exception):
            return False
        heads = self.store.read_changed_heads(reply)
        for name, head in heads.items():
            self.set(name, head)
        return len(heads) < SLICE

    def read(self, names: Sequence[str]) -> None:
        for first in range(0, len(names), SLICE):
            part = names[first : first + SLICE]
            for name, head in zip(part, self.store.heads(part), strict=True):
                self.set(name, head)

    def set(self, name: str, head: Head) -> None:
        """What waits in one list now."""
        info = class_info(name)
        known = self._keys.pop(name, None)
        if known is not None and name not in self._aside:
            del self._order[bisect_left(self._order, known)]
        if info is None or not head.length:
            self.heads.pop(name, None)
            self._aside.discard(name)
            return
        self.heads[name] = head
        self._keys[name] = (-info.priority, order_of(head.places[0]), name)
        if name not in self._aside:
            insort(self._order, self._keys[name])

    # -- for placement ----------------------------------------------------------------------------------------------

    def first(self, is_possible: Callable[[Request], bool], widenings: int, room: Room) -> dict[str, Head]:
        """The classes that placement looks at: the first ones in its order that the nodes could hold.

        ``widenings``: as long as it is the same, what is not possible stays so. Beside these classes the first ones of
        which as many tasks run at a time as may: they can only be prefetched.
        """
        if widenings != self._widenings:
            self._widenings = widenings
            self._order = sorted([*self._order, *(self._keys[name] for name in self._aside)])
            self._aside.clear()
        found: dict[str, Head] = {}
        kept: list[Key] = []
        passed = examined = full = 0
        for key in self._order:
            if examined == EXAMINED_MAX or len(found) - full == CLASSES_MAX:
                break
            passed += 1
            name = key[2]
            info = class_info(name)
            if info is not None and info.at_most and not room(info, name):
                # It costs little, and hides nothing behind it.
                kept.append(key)
                if full < CLASSES_MAX and is_possible(info.request):
                    full += 1
                    found[name] = self.heads[name]
                continue
            examined += 1
            if info is None or not is_possible(info.request):
                self._aside.add(name)
                continue
            kept.append(key)
            found[name] = self.heads[name]
        # Only where some have left the order there is more to see the next time.
        self._unexamined = len(found) - full < CLASSES_MAX and len(kept) < passed < len(self._order)
        if len(kept) < passed:
            self._order[:passed] = kept
        return found


def waiting_tasks(heads: dict[str, Head], limit: int, room: Room) -> Iterable[Waiting]:
    """The waiting tasks of these classes as placement takes them; ``limit``: how many it places at most."""
    for name, head in heads.items():
        info = class_info(name)
        if info is None:
            continue
        first, count = order_of(head.places[0]), head.waiting
        if head.elements >= limit:
            orders, count = [first, first], head.elements  # what stands behind an array has an order of its own
        else:
            orders = [first] * head.elements + [order_of(place) for place in head.places[bool(head.elements) :]]
        if info.at_most:
            count = min(count, room(info, name))
        if count:
            yield Waiting(name, info.priority, info.request, orders, count)
