"""What a node holds: its lanes, and the tasks handed ahead that will take them over. Pure book-keeping.

A lane is a reservation that dispatcher and worker both know. The dispatcher opens it by handing a task with its
number; here it goes from task to task of one class, until none of that class is left. While a process of its last task
cannot be killed it stays taken. Of the tasks handed ahead some are *lined up* on a lane: its launcher knows them
already. For the dispatcher they are ahead until the lane has come to them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from itertools import count, takewhile

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Handed, NodeInfo, NodeState
from pilotq.broker.tasks.runtime_estimate import Pace
from pilotq.workers.execution.escalation import Execution, Phase


class Lane:
    """``task`` is the one that has it now."""

    __slots__ = ("allocation", "class_name", "task", "line")

    def __init__(self, task: Execution) -> None:
        self.allocation = task.handed.allocation
        self.class_name = task.handed.class_name
        self.task = task
        self.line: deque[Execution] = deque()  # lined up behind it, in order


class Lanes:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pace: dict[str, Pace] = {}  # by class
        self._keys = count(1)
        self._lanes: dict[int, Lane] = {}  # by number
        self._lanes_of: Counter[str] = Counter()  # by class
        # Oldest first. OrderedDict: both ends and the middle are taken from, and `dict` is slow at its front.
        self._ahead: dict[str, OrderedDict[int, Execution]] = {}
        self._by_id: dict[str, Execution] = {}
        self.withheld: dict[int, Execution] = {}  # by key

    def hand(self, handed: Handed) -> Execution:
        """Enter a task: in phase WAITING if it came with a lane (launch it), else AHEAD."""
        e = Execution(next(self._keys), handed)
        self._by_id[handed.id] = e
        if handed.lane:
            self._lanes[handed.lane] = Lane(e)
            self._lanes_of[handed.class_name] += 1
        else:
            self._ahead.setdefault(handed.class_name, OrderedDict())[e.key] = e
        return e

    def find(self, task_id: str, execution: int) -> Execution | None:
        """The execution of a task that is here; ``execution`` 0 means whichever."""
        e = self._by_id.get(task_id)
        return e if e is not None and execution in (0, e.handed.execution) else None

    def end(self, e: Execution, *, go_on: bool = True) -> Execution | None:
        """An execution has ended. Its lane goes to the task returned, or is released when None.

        That is the next of its line, still LINED, else the oldest of its class, now WAITING; without ``go_on`` only
        one of its line. One that had no lane just leaves.
        """
        self._forget(e)
        self.withheld.pop(e.key, None)
        lane = self._lanes.get(e.lane)
        if lane is None:
            self._leave_row(e)
            return None
        if lane.line:
            follower = lane.line.popleft()
        else:
            row = self._ahead.get(lane.class_name) if go_on else None
            if row is None:
                self._close(e.lane, lane)
                return None
            follower = self._take(lane.class_name, row)
            follower.phase, follower.lane, follower.allocation = Phase.WAITING, e.lane, lane.allocation
        lane.task = follower
        return follower

    def withhold(self, e: Execution) -> None:
        """An execution that cannot be killed: it is gone from here, its lane stays taken until it has ended."""
        self._forget(e)
        self.withheld[e.key] = e

    def shrink(self, e: Execution, allocation: str) -> None:
        """An execution has ended, but this rest of its lane stays taken until `free`."""
        self._forget(e)
        if (lane := self._lanes.get(e.lane)) is not None:
            lane.allocation = allocation

    def free(self, number: int) -> None:
        if (lane := self._lanes.get(number)) is not None:
            self._close(number, lane)

    # -- lines -----------------------------------------------------------------------------------------------------

    def lane(self, number: int) -> Lane | None:
        return self._lanes.get(number)

    def behind(self, e: Execution) -> list[Execution]:
        """What is lined up behind an execution that has a lane now."""
        lane = self._lanes.get(e.lane)
        return list(lane.line) if lane is not None and lane.task is e else []

    def took(self, class_name: str, seconds: float) -> None:
        """A task of this class has run so long."""
        self._pace.setdefault(class_name, Pace()).add(seconds)

    def room(self, lane: Lane) -> int:
        """How many more tasks may be lined up on a lane: only short ones, and each lane of the class gets its share."""
        pace, row = self._pace.get(lane.class_name), self._ahead.get(lane.class_name)
        if pace is None or pace.ends < self._settings.ahead_after_ends or not row:
            return 0
        depth = min(int(self._settings.line_s / max(pace.mean_s, 1e-4)), self._settings.line_max)
        return min(depth - len(lane.line), -(-len(row) // self._lanes_of[lane.class_name]))

    def next(self, lane: Lane) -> Execution | None:
        """The oldest task of a lane's class that is ahead."""
        row = self._ahead.get(lane.class_name)
        return next(iter(row.values())) if row else None

    def line_up(self, lane: Lane) -> Execution:
        """Put the `next` one, now LINED, at the end of a lane's line."""
        e = self._take(lane.class_name, self._ahead[lane.class_name])
        e.phase, e.lane, e.allocation = Phase.LINED, lane.task.lane, lane.allocation
        lane.line.append(e)
        return e

    def unline(self, e: Execution) -> None:
        """Take one out of its line: it has no lane."""
        self._lanes[e.lane].line.remove(e)
        e.lane, e.allocation = 0, ""

    def put_back(self, e: Execution) -> None:
        """Take one out of its line, to where it stood in the row of its class: AHEAD again."""
        self.unline(e)
        e.phase = Phase.AHEAD
        row = self._ahead.setdefault(e.handed.class_name, OrderedDict())
        row[e.key] = e
        older = list(takewhile(lambda key: key < e.key, row))  # they came back before
        for key in (e.key, *reversed(older)):
            row.move_to_end(key, last=False)

    def newest_lined(self, class_name: str, most: int) -> list[Execution]:
        """Up to ``most`` of the tasks of a class that are lined up, the newest first."""
        lined = [e for lane in self._lanes.values() if lane.class_name == class_name for e in lane.line]
        return sorted(lined, key=lambda e: -e.key)[:most]

    # -- giving back -----------------------------------------------------------------------------------------------

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

    def recall_these(self, tasks: list[Execution]) -> list[Execution]:
        """Take out those of the tasks that are ahead; returned in their order."""
        taken = sorted((e for e in tasks if e.phase is Phase.AHEAD), key=lambda e: e.key)
        for e in taken:
            self._forget(e)
            self._leave_row(e)
        return taken

    # -- what is here ----------------------------------------------------------------------------------------------

    def lanes(self) -> list[tuple[int, str, str]]:
        """(number, allocation, class) of each lane."""
        return [(number, lane.allocation, lane.class_name) for number, lane in self._lanes.items()]

    def state(self, info: NodeInfo, term: int) -> NodeState:
        """All that the node holds, as the dispatcher of this term is told."""
        return NodeState(info.name, info.incarnation, term, self.lanes(), self.ahead())

    def ahead(self) -> dict[str, int]:
        """How many tasks are ahead, by class, with those that are lined up."""
        counts = Counter({name: len(row) for name, row in self._ahead.items()})
        for lane in self._lanes.values():
            if lane.line:
                counts[lane.class_name] += len(lane.line)
        return dict(counts)

    def __len__(self) -> int:
        """Tasks that are here, launched or not."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[Execution]:
        return iter(list(self._by_id.values()))

    def _take(self, class_name: str, row: OrderedDict[int, Execution]) -> Execution:
        e = row.popitem(last=False)[1]
        if not row:
            del self._ahead[class_name]
        return e

    def _close(self, number: int, lane: Lane) -> None:
        del self._lanes[number]
        self._lanes_of[lane.class_name] -= 1

    def _forget(self, e: Execution) -> None:
        # A newer execution of the same task may have been handed to us meanwhile: that one stays.
        if self._by_id.get(e.handed.id) is e:
            del self._by_id[e.handed.id]

    def _leave_row(self, e: Execution) -> None:
        row = self._ahead.get(e.handed.class_name)
        if row is not None and row.pop(e.key, None) is not None and not row:
            del self._ahead[e.handed.class_name]
