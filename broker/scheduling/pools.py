"""Pools: counters that all nodes of a pilot share, such as licences. Pure.

A task takes units of a pool once, however many nodes it has; they are counted with its share of the first one.
"""

from __future__ import annotations

import msgspec

from pilotq.broker.store.resources import NodeInfo, NodeShare
from pilotq.broker.tasks.model import Request


class Pools:
    """How many units there are of each pool, and how many of them are taken."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self._told: dict[str, dict[str, int]] = {}  # node -> what it says; where nodes differ the largest number counts
        self._used: dict[str, dict[str, int]] = {}  # node -> pool -> units of tasks whose first node it is

    def add(self, info: NodeInfo) -> None:
        """A node has joined."""
        if info.pools:
            self._told[info.name] = info.pools
            self._sum_up()

    def remove(self, node: str) -> None:
        """A node has gone, and with it what its tasks have taken."""
        self._used.pop(node, None)
        if self._told.pop(node, None) is not None:
            self._sum_up()

    def _sum_up(self) -> None:
        self.total.clear()  # not a new one: nodes refer to it
        for pools in self._told.values():
            for name, count in pools.items():
                self.total[name] = max(count, self.total.get(name, 0))

    def count(self, share: NodeShare, sign: int) -> None:
        """Take the units of a share (1), or give them back (-1)."""
        if self.total:
            for name, count in share.use:
                if name in self.total:
                    used = self._used.setdefault(share.node, {})
                    used[name] = used.get(name, 0) + sign * count

    def free(self, name: str) -> int:
        return self.total[name] - sum(used.get(name, 0) for used in self._used.values())

    def room(self, request: Request, most: int) -> int:
        """How many of ``most`` equal requests the pools have units for now."""
        for name, count in request.use:
            if count and name in self.total:
                most = min(most, max(self.free(name), 0) // count)
        return most

    def names(self, request: Request) -> set[str]:
        """The pools that a request takes units of."""
        return {name for name, _ in request.use if name in self.total} if self.total else set()

    def without(self, request: Request) -> Request:
        """What a request asks of the nodes themselves."""
        if not self.names(request):
            return request
        return msgspec.structs.replace(request, use=tuple(u for u in request.use if u[0] not in self.total))

    def shortage(self, request: Request, *, now: bool) -> str | None:
        """Why the pools do not have, or have free ``now``, what a request asks for; None if they do."""
        for name, count in request.use:
            if name in self.total and (self.free(name) if now else self.total[name]) < count:
                total = self.total[name]
                if now:
                    return f"needs {count} of {name} free in the pilot; {self.free(name)} of {total} are free"
                return f"needs {count} of {name} in the pilot; it has {total}"
        return None
