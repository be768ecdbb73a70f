"""`Census`: the names of tasks that have not ended, and the arrays, each record read once and a few at a time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable

import msgspec

from pilotq.broker.client.overview_tally import pattern_of
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.tasks.model import id_of
from pilotq.broker.tasks.states import ENDED

READ_MAX = 500  # records that are read at one update
OPEN_MAX = 20_000  # tasks whose names are kept; of more the names are not read
ARRAYS_MAX = 200  # arrays whose records are read at each update
AGAIN_S, TRIES = 5.0, 2  # a record that is not there may be written later, as its submission goes on
FIELDS = ("status", "pq_name", "pq_array", "pq_class")


class ArrayState(msgspec.Struct, kw_only=True):
    """An array that has not ended: its elements, how many have ended, and of these how many did not finish; the
    position of the first that was not handed out."""

    name: str
    class_name: str
    size: int
    ended: int = 0
    unfinished: int = 0
    following: int = 0


class Census:
    """The tasks and arrays that have not ended.

    Their ids are running numbers: the census goes from the first one of a submission that is not done to the last
    number that was given, and so asks for each record once.
    """

    def __init__(self) -> None:
        self.open: dict[str, str] = {}  # id -> pattern of its name, without arrays
        self.names: Counter[str] = Counter()  # how many of each of these
        self.arrays: dict[str, ArrayState] = {}
        self._next = 0
        self._later: deque[tuple[float, str, int]] = (
            deque()
        )  # when to read a record again, and how often it was missing

    def begin(self, link: Connection) -> None:
        """Find where to begin; before the journal is read, so that no end is missed."""
        first, last = link.pipeline([("ZRANGE", keys.SUBMISSIONS, 0, 0, "WITHSCORES"), ("GET", keys.SEQ)])
        self._next = int(float(first[1])) if first else int(last or 0) + 1

    def forget(self, changes: Iterable[tuple[str, bool]]) -> None:
        """Leave out tasks that have ended; one that is to run again (True) is read again."""
        for task_id, again in changes:
            if again:
                self._later.append((0.0, task_id.partition("_")[0], TRIES))
                continue
            name = self.open.pop(task_id, None)
            if name is not None:
                self.names[name] -= 1
                if not self.names[name]:
                    del self.names[name]
            self.arrays.pop(task_id, None)

    def update(self, link: Connection, last: int) -> None:
        """Read some more, up to the task with the number ``last``, and what has become of arrays."""
        wanted: dict[str, int] = {}
        while self._later and self._later[0][0] <= time.monotonic() and len(wanted) < READ_MAX:
            _, task_id, tried = self._later.popleft()
            wanted[task_id] = tried
        if len(self.open) < OPEN_MAX:
            end = max(min(self._next + READ_MAX - len(wanted), last + 1), self._next)
            wanted.update((id_of(number), 0) for number in range(self._next, end))
            self._next = end
        rows = link.read_hashes([keys.job(i) for i in wanted], *FIELDS) if wanted else []
        for (task_id, tried), row in zip(wanted.items(), rows, strict=True):
            self._add(task_id, row, tried)
        self._read_arrays(link)

    def _read_arrays(self, link: Connection) -> None:
        some = list(self.arrays)[:ARRAYS_MAX]
        fields = ("pq_left", "pq_unfinished", "pq_next")
        rows = link.read_hashes([keys.job(i) for i in some], *fields) if some else []
        for array, (left, unfinished, following) in zip(some, rows, strict=True):
            state = self.arrays[array]
            if left is None:  # somebody has deleted it
                del self.arrays[array]
            elif left.isdigit():
                state.ended, state.unfinished = max(state.size - int(left), 0), _whole(unfinished)
                state.following = min(_whole(following), state.size)

    def _add(self, task_id: str, row: list[bytes | None], tried: int) -> None:
        status, name, array, class_name = (_text(value) for value in row)
        if not status or status == "created":
            # A large submission is still being written; else it has ended, and its record has expired.
            if tried < TRIES:
                self._later.append((time.monotonic() + AGAIN_S, task_id, tried + 1))
        elif status in ENDED:
            return
        elif array:
            size = array.split(" ", 1)[0].rpartition(":")[2]
            self.arrays[task_id] = ArrayState(name=name, class_name=class_name, size=int(size) if size.isdigit() else 0)
        elif task_id not in self.open:
            self.open[task_id] = pattern = pattern_of(name)
            self.names[pattern] += 1


def _text(value: bytes | None) -> str:
    return value.decode("utf-8", "replace") if value else ""


def _whole(value: bytes | None) -> int:
    return int(value) if value and value.isdigit() else 0
