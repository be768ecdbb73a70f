"""Repairs what RQ's tools leave behind: dependents of deleted jobs, ids whose records are missing, arrays that wait for
such elements, and lists of a `compact` that was interrupted.

It is a part of the reconciler: each turn examines a slice of everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from pilotq.broker.log import log
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, ReplyError
from pilotq.broker.store.leases import leased_elements, number_leased, read_leases
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import open_positions, outcome_at

BATCH = 500
ORPHAN_CALLS_MAX = 10  # calls in one turn, each of which may find BATCH arrays that wait for deleted ones
RECORD_PAGES = 20  # of SCAN records, examined in one turn for tasks whose class list was damaged
RESTORED = "restored"
SCAN = 1000  # keys examined in one turn for lists that a compact has left
ELEMENTS_MAX = 20_000  # elements examined in one turn of an array that waits element by element: the first open ones
UNCHANGED_S = 5.0  # ids in a list of RQ's compact that has not changed for so long return to their lists


class RqRepair:
    """Examines the records of a queue in turns, and repairs them; ``now`` is monotonic."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.connection = store.link
        self._orphan_cursor = 0  # cursors of the scans
        self._deferred_cursors: dict[str, int] = {}
        self._array_cursors: dict[str, int] = {}
        self._key_cursor = 0
        self._restoring: frozenset[str] = frozenset()  # classes whose tasks are looked for
        self._restored: list[str] = []  # those that were found
        self._record_cursor = 0
        self._compacted: dict[str, tuple[int, float]] = {}  # list -> its length, since when (monotonic)

    def turn(self, queues: Sequence[str], now: float) -> None:
        self._cancel_orphans()
        for queue in queues:
            self._drop_missing_records(queue)
            self._cancel_deleted_elements(queue)
        self._find_compacted(now)
        self._restore_lists()

    def _cancel_orphans(self) -> None:
        """Cancel what waits for a deleted record; an array that waits element by element, too: some of it may run."""
        cursor, members = self.connection.call("SSCAN", keys.PARENTS, self._orphan_cursor, "COUNT", BATCH)
        self._orphan_cursor = int(cursor)
        for _ in range(ORPHAN_CALLS_MAX if members else 0):
            found = self.store.run("cancel_orphans", self.store.term, *members)
            if not found:
                break
            log("an array that others wait for was deleted: they are canceled", level="warning")
            self.store.cancel([array.decode() for array in found])

    def _drop_missing_records(self, queue: str) -> None:
        """Remove ids of deferred tasks whose record is missing."""
        registry = keys.registry("deferred", queue)
        cursor, flat = self.connection.call("ZSCAN", registry, self._deferred_cursors.get(queue, 0), "COUNT", BATCH)
        self._deferred_cursors[queue] = int(cursor)
        ids = flat[::2]
        there = self.connection.pipeline([("TYPE", keys.job(i.decode())) for i in ids]) if ids else []
        missing = [i for i, kind in zip(ids, there, strict=True) if kind != b"hash"]
        if missing:
            self.connection.call("ZREM", registry, *missing)

    def _cancel_deleted_elements(self, queue: str) -> None:
        """Cancel elements whose records were deleted while they waited, of arrays wholly started or released."""
        wip = keys.registry("wip", queue)
        cursor, flat = self.connection.call(
            "ZSCAN", wip, self._array_cursors.get(queue, 0), "MATCH", "*:0", "COUNT", BATCH
        )
        self._array_cursors[queue] = int(cursor)
        arrays = [member.decode().removesuffix(":0") for member in flat[::2]]
        if not arrays:
            return
        left = [row[0] for row in self.connection.read_hashes([keys.job(i) for i in arrays], "pq_left")]
        # What is no lease has this score.
        own = self.connection.call("ZRANGEBYSCORE", wip, "+inf", "+inf")
        running = Counter(member.decode().rpartition("_")[0] for member in own)
        leased = number_leased(self.connection)
        # Most often all open elements run. Otherwise some wait: queued, for other tasks, or for ever without a record.
        waiting = [
            array
            for array, open_ones in zip(arrays, left, strict=True)
            if open_ones and open_ones.isdigit() and int(open_ones) > running[array] + leased[array]
        ]
        for array in waiting:
            try:
                missing = self._elements_without_record(array)
            except (ReplyError, ValueError) as error:
                log(f"the records of array {array} are damaged: {error}", level="error", task=array)
                continue
            if missing:
                number = self.store.cancel(missing).count("canceled")
                log(
                    f"{number} elements of array {array} were deleted while they waited: they are canceled",
                    level="warning",
                    task=array,
                )

    def _elements_without_record(self, array: str) -> list[str]:
        """Some elements that can never run; the cancel script checks again whether they have not ended.

        An element that waits for other arrays' elements has no record before these have finished, and before the
        script that releases dependents has queued it. So these are read first, then what is to be released, then the
        leases of what runs without a record, then the records.
        """
        (row, bits) = self.connection.pipeline([
            ("HMGET", keys.job(array), "pq_array", "pq_next", "pq_parents", "pq_after"), ("GET", keys.outcomes(array)),
        ])  # fmt: skip
        if row[0] is None:
            return []
        span, following, each, after = (text.decode() if text else "" for text in row)
        parents = [keys.outcomes(parent) for parent in after.split()] if each else []
        finished = [found for found in self.connection.pipeline([("GET", key) for key in parents]) if found is not None]
        if parents and self.connection.call("EXISTS", keys.RELEASE):
            return []
        leases = [lease for lease in read_leases(self.connection) if lease.array == array]
        held = {element.id for element in leased_elements(self.connection, leases)}
        indices = Indices.read(span)
        waiting = (
            f"{array}_{indices[position]}"
            for position in islice(open_positions(bits or b"", int(following)), ELEMENTS_MAX)
            if all(outcome_at(found, position, 0) == "finished" for found in finished)
        )
        ids = list(islice((i for i in waiting if i not in held), BATCH))
        there = self.connection.pipeline([("EXISTS", keys.job(i)) for i in ids]) if ids else []
        return [i for i, found in zip(ids, there, strict=True) if not found]

    def _restore_lists(self) -> None:
        """Queue the tasks again that stood in class lists in whose places somebody has put something else.

        All records are read for that, some in each turn. An id that is in its list already does not matter, as a task
        is claimed by its status.
        """
        if not self._restoring:
            flat = self.connection.call("HGETALL", keys.DAMAGED_CLASSES)
            found = {name.decode(): kind.decode() for name, kind in zip(flat[::2], flat[1::2], strict=True)}
            self._restoring = frozenset(name for name, kind in found.items() if not kind.endswith(RESTORED))
            for name in sorted(self._restoring):
                log(
                    f"a {found[name]} stood in the place of the list of class {name}: its tasks are looked for",
                    level="error",
                )
        for _ in range(RECORD_PAGES if self._restoring else 0):
            cursor, names = self.connection.call("SCAN", self._record_cursor, "MATCH", keys.job("*"), "COUNT", SCAN)
            self._record_cursor = int(cursor)
            self._restored += self._queued_in(self._restoring, [name.decode() for name in names])
            if not self._record_cursor:
                self._queue_restored()
                return

    def _queued_in(self, classes: frozenset[str], names: Sequence[str]) -> list[str]:
        """The ids of those records whose tasks are queued in one of these classes, and are not staged."""
        there = self.connection.pipeline([("TYPE", name) for name in names]) if names else []
        hashes = [name for name, kind in zip(names, there, strict=True) if kind == b"hash"]
        rows = self.connection.read_hashes(hashes, "status", "pq_class", "pq_sub")
        found = [
            (name, submission)
            for name, (status, own, submission) in zip(hashes, rows, strict=True)
            if status == b"queued" and own is not None and own.decode(errors="replace") in classes
        ]
        ttls = self.connection.pipeline([("TTL", name) for name, _ in found]) if found else []
        prefix = len(keys.job(""))
        return [name[prefix:] for (name, sub), ttl in zip(found, ttls, strict=True) if ttl < 0 or not sub]

    def _queue_restored(self) -> None:
        ids = sorted(self._restored, key=lambda i: (len(i), i))
        homes = self.connection.read_hashes([keys.job(i) for i in ids], "pq_class") if ids else []
        queued = [(home, i) for (home,), i in zip(homes, ids, strict=True) if home is not None]
        classes = {home for home, _ in queued}
        log(f"{len(queued)} tasks of {len(self._restoring)} classes are in their lists again", level="warning")
        for first in range(0, len(queued), BATCH):
            part = queued[first : first + BATCH]
            self.connection.pipeline([("RPUSH", keys.queue(home.decode()), i) for home, i in part])
        marks = [("HSET", keys.DAMAGED_CLASSES, name, f"what was no list, {RESTORED}") for name in self._restoring]
        self.connection.pipeline([*marks, *_known(classes)])
        self._restoring, self._restored = frozenset(), []

    def _find_compacted(self, now: float) -> None:
        cursor, found = self.connection.call(
            "SCAN", self._key_cursor, "MATCH", keys.COMPACTED, "COUNT", SCAN, "TYPE", "list"
        )
        self._key_cursor = int(cursor)
        for name in {*self._compacted, *(key.decode() for key in found)}:
            length = int(self.connection.call("LLEN", name))
            known, since = self._compacted.get(name, (-1, now))
            if not length:
                self._compacted.pop(name, None)
            elif length != known:
                self._compacted[name] = (length, now)
            elif now - since > UNCHANGED_S:
                self._return_compacted(name)

    def _return_compacted(self, name: str) -> None:
        """Return each id to its list; twice does not matter, as a task is claimed by its status."""
        ids = self.connection.call("LRANGE", name, 0, BATCH - 1)
        rows = self.connection.read_hashes([keys.job(i.decode()) for i in ids], "pq_class", "origin")
        homes = [(home, i) for row, i in zip(rows, ids, strict=True) if (home := row[0] or row[1])]
        classes = {row[0] for row in rows if row[0]}
        log(f"{len(homes)} ids that RQ's compact had left in {name} are returned to their lists", level="warning")
        pushes = [("RPUSH", keys.queue(home.decode()), i) for home, i in homes]
        self.connection.pipeline([*pushes, *_known(classes), ("LTRIM", name, len(ids), -1)])


def _known(classes: Iterable[bytes]) -> list[tuple[Argument, ...]]:
    """The commands that make the dispatcher read the lists of these classes."""
    return [
        command
        for name in classes
        for command in (("HSET", keys.CLASSES, name, ""), ("SADD", keys.CHANGED_CLASSES, name))
    ]
