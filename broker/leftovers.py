"""What RQ's buttons leave behind: dependents of deleted jobs, ids without records, lists of a compact that broke off.

A part of the reconciler: some of it is looked at in each turn, all of it again and again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pilotq.broker import keys
from pilotq.broker.store import Store

log = logging.getLogger("pilotq.reconciler")
SLICE = 500
SCAN = 1000  # keys of the server looked at in one turn, for lists that a compact has left
STILL_S = 5.0  # a list of RQ's compact that has not changed for so long is put back


class Leftovers:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.link = store.link
        self._parents = 0  # where the walks stand
        self._deferred: dict[str, int] = {}
        self._keys = 0
        self._compacted: dict[str, tuple[int, float]] = {}  # list -> its length, since when (monotonic)

    def turn(self, queues: Sequence[str], now: float) -> None:
        self._orphans()
        for queue in queues:
            self._ghosts(queue)
        self._look_for_compacted(now)

    def _orphans(self) -> None:
        """What waits for a deleted record. An array that waits element by element is canceled: some of it may run."""
        cursor, members = self.link.call("SSCAN", keys.PARENTS, self._parents, "COUNT", SLICE)
        self._parents = int(cursor)
        if members:
            found = self.store.run("orphans", self.store.term, *members)
            if found:
                log.warning("an array that others wait for was deleted: they are canceled")
                self.store.cancel([array.decode() for array in found])

    def _ghosts(self, queue: str) -> None:
        """Ids of what waits for others, and whose record is gone."""
        registry = keys.registry("deferred", queue)
        cursor, flat = self.link.call("ZSCAN", registry, self._deferred.get(queue, 0), "COUNT", SLICE)
        self._deferred[queue] = int(cursor)
        ids = flat[::2]
        there = self.link.pipeline([("EXISTS", keys.job(i.decode())) for i in ids]) if ids else []
        gone = [i for i, found in zip(ids, there, strict=True) if not found]
        if gone:
            self.link.call("ZREM", registry, *gone)

    def _look_for_compacted(self, now: float) -> None:
        cursor, found = self.link.call("SCAN", self._keys, "MATCH", keys.COMPACTED, "COUNT", SCAN, "TYPE", "list")
        self._keys = int(cursor)
        for name in {*self._compacted, *(key.decode() for key in found)}:
            length = int(self.link.call("LLEN", name))
            known, since = self._compacted.get(name, (-1, now))
            if not length:
                self._compacted.pop(name, None)
            elif length != known:
                self._compacted[name] = (length, now)
            elif now - since > STILL_S:
                self._put_back(name)

    def _put_back(self, name: str) -> None:
        """Each id to its list: twice is no matter, as a task is claimed by its status."""
        ids = self.link.call("LRANGE", name, 0, SLICE - 1)
        rows = self.link.pipeline([("HMGET", keys.job(i.decode()), "pq_class", "origin") for i in ids])
        homes = [(row[0] or row[1], i) for row, i in zip(rows, ids, strict=True) if row[0] or row[1]]
        log.warning("%d ids that RQ's compact had left in %s are put back", len(homes), name)
        pushes = [("RPUSH", keys.queue(home.decode()), i) for home, i in homes]
        self.link.pipeline([*pushes, ("LTRIM", name, len(ids), -1)])
