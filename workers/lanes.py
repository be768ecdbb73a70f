"""What a node holds: its lanes, and the tasks handed ahead that will take them over. Pure book-keeping.

A lane is a reservation that dispatcher and worker both know. The dispatcher opens it by handing a task with its
number; here it goes from task to task of one class, until none of that class is left, or for ever when a process of
its last task cannot be killed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from pilotq.broker.records import Handed
from pilotq.workers.ladder import Execution, Phase


class Lanes:
    def __init__(self) -> None:
        self._keys = count(1)
        self._lanes: dict[int, tuple[str, str]] = {}  # number -> allocation, class
        # Oldest first. OrderedDict: both ends and the middle are taken from, and `dict` is slow at its front.
        self._ahead: dict[str, OrderedDict[int, Execution]] = {}
        self._by_id: dict[str, Execution] = {}

    def hand(self, handed: Handed) -> Execution:
        """Enter a task: in phase WAITING if it came with a lane (launch it), else AHEAD."""
        e = Execution(next(self._keys), handed)
        self._by_id[handed.id] = e
        if handed.lane:
            self._lanes[handed.lane] = (handed.allocation, handed.class_name)
        else:
            self._ahead.setdefault(handed.class_name, OrderedDict())[e.key] = e
        return e

    def find(self, task_id: str, execution: int) -> Execution | None:
        """The execution of a task that is here; ``execution`` 0 means whichever."""
        e = self._by_id.get(task_id)
        return e if e is not None and execution in (0, e.handed.execution) else None

    def end(self, e: Execution, *, go_on: bool = True) -> Execution | None:
        """An execution has ended. Its lane goes to the task returned (now WAITING), or is released when None.

        One that was ahead leaves its class's row, and no lane is concerned. Without ``go_on`` lanes are released
        whatever waits.
        """
        self._forget(e)
        if e.phase is Phase.AHEAD:
            self._leave_row(e)
            return None
        row = self._ahead.get(e.handed.class_name) if go_on else None
        if row is None:
            self._lanes.pop(e.lane, None)
            return None
        follower = row.popitem(last=False)[1]
        if not row:
            del self._ahead[e.handed.class_name]
        follower.phase, follower.lane, follower.allocation = Phase.WAITING, e.lane, e.allocation
        return follower

    def withhold(self, e: Execution) -> None:
        """An execution that cannot be killed: it is gone from here, its lane stays taken for ever."""
        self._forget(e)

    def recall(self, class_name: str, most: int) -> list[Execution]:
        """Take out up to ``most`` of the tasks of a class that are ahead, the newest ones; returned in their order."""
        row = self._ahead.get(class_name)
        if row is None:
            return []
        taken = [row.popitem(last=True)[1] for _ in range(min(most, len(row)))]
        if not row:
            del self._ahead[class_name]
        for e in taken:
            self._forget(e)
        return taken[::-1]

    def recall_all(self) -> list[Execution]:
        """Take out every task that is ahead."""
        return [e for name in list(self._ahead) for e in self.recall(name, len(self._ahead[name]))]

    def lanes(self) -> list[tuple[int, str, str]]:
        """(number, allocation, class) of each lane."""
        return [(number, allocation, name) for number, (allocation, name) in self._lanes.items()]

    def ahead(self) -> dict[str, int]:
        """How many tasks are ahead, by class."""
        return {name: len(row) for name, row in self._ahead.items()}

    def __len__(self) -> int:
        """Tasks that are here, launched or not."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[Execution]:
        return iter(list(self._by_id.values()))

    def _forget(self, e: Execution) -> None:
        # A newer execution of the same task may have been handed to us meanwhile: that one stays.
        if self._by_id.get(e.handed.id) is e:
            del self._by_id[e.handed.id]

    def _leave_row(self, e: Execution) -> None:
        row = self._ahead[e.handed.class_name]
        del row[e.key]
        if not row:
            del self._ahead[e.handed.class_name]
