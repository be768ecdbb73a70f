"""What RQ's buttons leave behind: dependents of deleted jobs, ids without records, arrays that wait for such elements,
lists of a compact that broke off.

A part of the reconciler: some of it is looked at in each turn, all of it again and again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from pilotq.broker.store import keys
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.array_outcomes import open_positions, outcome_at

log = logging.getLogger("pilotq.reconciler")
SLICE = 500
SCAN = 1000  # keys of the server looked at in one turn, for lists that a compact has left
LOOK_MAX = 20_000  # elements of an array that waits element by element looked at in one turn: the first that are left
STILL_S = 5.0  # a list of RQ's compact that has not changed for so long is put back


class Leftovers:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.link = store.link
        self._parents = 0  # where the walks stand
        self._deferred: dict[str, int] = {}
        self._arrays: dict[str, int] = {}
        self._keys = 0
        self._compacted: dict[str, tuple[int, float]] = {}  # list -> its length, since when (monotonic)

    def turn(self, queues: Sequence[str], now: float) -> None:
        self._orphans()
        for queue in queues:
            self._ghosts(queue)
            self._elements(queue)
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

    def _elements(self, queue: str) -> None:
        """Elements that waited, of arrays all of which was handed out or released, and whose records were deleted."""
        wip = keys.registry("wip", queue)
        cursor, flat = self.link.call("ZSCAN", wip, self._arrays.get(queue, 0), "MATCH", "*:0", "COUNT", SLICE)
        self._arrays[queue] = int(cursor)
        arrays = [member.decode().removesuffix(":0") for member in flat[::2]]
        if not arrays:
            return
        left = self.link.pipeline([("HGET", keys.job(i), "pq_left") for i in arrays])
        running = self.link.pipeline([("ZLEXCOUNT", wip, f"[{i}_", f"({i}`") for i in arrays])
        # Most often all that are left run. Else some wait: for their turn, for others, or without a record for ever.
        for array in [i for i, own, there in zip(arrays, left, running, strict=True) if own and int(own) > there]:
            gone = self._without_record(array)
            if gone:
                number = self.store.cancel(gone).count("canceled")
                log.warning("%d elements of array %s were deleted while they waited: they are canceled", number, array)

    def _without_record(self, array: str) -> list[str]:
        """Some elements that nothing can come of any more; cancel.lua looks again whether they have not ended.

        One that waits for other arrays' elements has no record before these have finished, and before release.lua has
        queued it because of that. So these are read first, then what is to be released, then the records.
        """
        (row, bits) = self.link.pipeline([
            ("HMGET", keys.job(array), "pq_array", "pq_next", "pq_parents", "pq_after"), ("GET", keys.bits(array)),
        ])  # fmt: skip
        if row[0] is None:
            return []
        span, following, each, after = (text.decode() if text else "" for text in row)
        parents = [keys.bits(parent) for parent in after.split()] if each else []
        finished = [found for found in self.link.pipeline([("GET", key) for key in parents]) if found is not None]
        if parents and self.link.call("EXISTS", keys.RELEASE):
            return []
        start, step, _ = map(int, span.split(":"))
        waiting = (
            f"{array}_{start + position * step}"
            for position in islice(open_positions(bits or b"", int(following)), LOOK_MAX)
            if all(outcome_at(found, position, 0) == "finished" for found in finished)
        )
        ids = list(islice(waiting, SLICE))
        there = self.link.pipeline([("EXISTS", keys.job(i)) for i in ids]) if ids else []
        return [i for i, found in zip(ids, there, strict=True) if not found]

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
