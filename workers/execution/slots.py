"""Keeps the slots of a node, and the prefetched tasks that get them next. Pure data, without input or output.

A slot is a reservation that dispatcher and worker both know. The dispatcher opens it by sending a task with its
number; here it goes from task to task of one class, until none of that class is left. While a process of its last task
cannot be killed it stays taken. Some of the prefetched tasks are *chained* to a slot: its launcher knows them
already, and starts each when the one before it has ended. For the dispatcher they are prefetched until they have the
slot.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from itertools import count, takewhile

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Run, StateReport
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.tasks.runtime_estimate import RuntimeEstimates
from pilotq.workers.execution.execution import Execution, Phase


class Slot:
    """One reservation for tasks of one class. ``task`` is the one that has it now."""

    __slots__ = ("allocation", "class_name", "task", "chain")

    def __init__(self, task: Execution) -> None:
        self.allocation = task.allocation
        self.class_name = task.run.class_name
        self.task = task
        self.chain: deque[Execution] = deque()  # chained behind it, in order


class SlotTable:
    """Holds every task of a node that has not ended: in a slot, chained to one, or prefetched."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._runtimes = RuntimeEstimates()
        self._keys = count(1)
        self._slots: dict[int, Slot] = {}  # by number
        self._slots_of: Counter[str] = Counter()  # by class
        # Oldest first. OrderedDict: both ends and the middle are taken from, and `dict` is slow at its front.
        self._queues: dict[str, OrderedDict[int, Execution]] = {}
        self._by_id: dict[str, Execution] = {}
        self.unkillable: dict[int, Execution] = {}  # by key

    def add(self, run: Run) -> Execution:
        """Enter a task: in phase WAITING if it came with a slot (launch it), else PREFETCHED."""
        e = Execution(next(self._keys), run)
        self._by_id[run.id] = e
        if run.slot:
            self._slots[run.slot] = Slot(e)
            self._slots_of[run.class_name] += 1
        else:
            self._queues.setdefault(run.class_name, OrderedDict())[e.key] = e
        return e

    def open(self, number: int, allocation: str, class_name: str) -> Execution | None:
        """Open a slot for the oldest of the prefetched tasks of a class, now WAITING; None if there is none."""
        queue = self._queues.get(class_name)
        if queue is None:
            return None
        e = self._take(class_name, queue)
        e.phase, e.slot, e.allocation = Phase.WAITING, number, allocation
        self._slots[number] = Slot(e)
        self._slots_of[class_name] += 1
        return e

    def find(self, task_id: str, execution: int) -> Execution | None:
        """The execution of a task that is here; ``execution`` 0 means any."""
        e = self._by_id.get(task_id)
        return e if e is not None and execution in (0, e.run.execution) else None

    def find_all(self, task_id: str, execution: int) -> list[Execution]:
        """The same, or of an array all elements that are here."""
        e = self.find(task_id, execution)
        return [e] if e is not None else [e for e in self._by_id.values() if e.run.array == task_id]

    def end(self, e: Execution, *, go_on: bool = True) -> Execution | None:
        """An execution has ended. Its slot goes to the task returned, or is released when None.

        That is the next of its chain, still CHAINED, else the oldest of its class, now WAITING; without ``go_on`` only
        one of its chain. One that had no slot is only removed.
        """
        self._forget(e)
        self.unkillable.pop(e.key, None)
        slot = self._slots.get(e.slot)
        if slot is None:
            self._leave_queue(e)
            return None
        if slot.chain:
            follower = slot.chain.popleft()
        else:
            queue = self._queues.get(slot.class_name) if go_on else None
            if queue is None:
                self._close(e.slot, slot)
                return None
            follower = self._take(slot.class_name, queue)
            follower.phase, follower.slot, follower.allocation = Phase.WAITING, e.slot, slot.allocation
        slot.task = follower
        return follower

    def keep_reserved(self, e: Execution) -> None:
        """An execution that cannot be killed: it is no longer listed, its slot stays taken until it has ended."""
        self._forget(e)
        self.unkillable[e.key] = e

    def reduce(self, e: Execution, allocation: str) -> None:
        """An execution has ended, but this rest of its slot stays taken until `release`."""
        self._forget(e)
        if (slot := self._slots.get(e.slot)) is not None:
            slot.allocation = allocation

    def release(self, number: int) -> None:
        if (slot := self._slots.get(number)) is not None:
            self._close(number, slot)

    # -- chains -----------------------------------------------------------------------------------------------------

    def slot(self, number: int) -> Slot | None:
        return self._slots.get(number)

    def chained_behind(self, e: Execution) -> list[Execution]:
        """What is chained behind an execution that has a slot now."""
        slot = self._slots.get(e.slot)
        return list(slot.chain) if slot is not None and slot.task is e else []

    def add_runtime(self, class_name: str, seconds: float) -> None:
        """A task of this class has run so long."""
        self._runtimes.add(class_name, seconds)

    def chain_room(self, slot: Slot) -> int:
        """How many more tasks may be chained to a slot: only short ones, and each slot of the class gets its share."""
        runtime, queue = self._runtimes.get(slot.class_name), self._queues.get(slot.class_name)
        if runtime is None or runtime.ends < self._settings.prefetch_after or not queue:
            return 0
        depth = min(int(self._settings.chain_s / max(runtime.mean_s, 1e-4)), self._settings.chain_max)
        return min(depth - len(slot.chain), -(-len(queue) // self._slots_of[slot.class_name]))

    def next_prefetched(self, slot: Slot) -> Execution | None:
        """The oldest task of a slot's class that is prefetched."""
        queue = self._queues.get(slot.class_name)
        return next(iter(queue.values())) if queue else None

    def chain(self, slot: Slot) -> Execution:
        """Move the task that is `next_prefetched`, now CHAINED, to the end of a slot's chain."""
        e = self._take(slot.class_name, self._queues[slot.class_name])
        e.phase, e.slot, e.allocation = Phase.CHAINED, slot.task.slot, slot.allocation
        slot.chain.append(e)
        return e

    def unchain(self, e: Execution) -> None:
        """Take one out of its chain: it has no slot."""
        self._slots[e.slot].chain.remove(e)
        e.slot, e.allocation = 0, ""

    def return_to_queue(self, e: Execution) -> None:
        """Take one out of its chain, to where it stood in the queue of its class: PREFETCHED again."""
        self.unchain(e)
        self._enqueue(e)

    def give_way(self, e: Execution) -> Execution | None:
        """What has a slot cannot be started now, and its launcher goes on with the chain: the next has the slot.

        The one that could not be started is PREFETCHED again. None, and nothing changed, when nothing is chained to it.
        """
        slot = self._slots[e.slot]
        if not slot.chain:
            return None
        slot.task = slot.chain.popleft()
        e.slot, e.allocation = 0, ""
        self._enqueue(e)
        return slot.task

    def _enqueue(self, e: Execution) -> None:
        e.phase = Phase.PREFETCHED
        queue = self._queues.setdefault(e.run.class_name, OrderedDict())
        queue[e.key] = e
        older = list(takewhile(lambda key: key < e.key, queue))  # they came back before
        for key in (e.key, *reversed(older)):
            queue.move_to_end(key, last=False)

    def newest_chained(self, class_name: str, most: int) -> list[Execution]:
        """Up to ``most`` of the tasks of a class that are chained, the newest first."""
        chained = [e for slot in self._slots.values() if slot.class_name == class_name for e in slot.chain]
        return sorted(chained, key=lambda e: -e.key)[:most]

    # -- retracting -----------------------------------------------------------------------------------------------

    def retract(self, class_name: str, most: int) -> list[Execution]:
        """Take out up to ``most`` of the tasks of a class that are prefetched, the newest ones; in their order."""
        queue = self._queues.get(class_name)
        if queue is None:
            return []
        taken = [queue.popitem(last=True)[1] for _ in range(min(most, len(queue)))]
        if not queue:
            del self._queues[class_name]
        for e in taken:
            self._forget(e)
        return taken[::-1]

    def retract_all(self) -> list[Execution]:
        """Take out every prefetched task."""
        return [e for name in list(self._queues) for e in self.retract(name, len(self._queues[name]))]

    def retract_these(self, tasks: list[Execution]) -> list[Execution]:
        """Take out those of the tasks that are prefetched; returned in their order."""
        taken = sorted((e for e in tasks if e.phase is Phase.PREFETCHED), key=lambda e: e.key)
        for e in taken:
            self._forget(e)
            self._leave_queue(e)
        return taken

    # -- what is here ----------------------------------------------------------------------------------------------

    def slots(self) -> list[tuple[int, str, str]]:
        """(number, allocation, class) of each slot."""
        return [(number, slot.allocation, slot.class_name) for number, slot in self._slots.items()]

    def state(self, info: NodeInfo, term: int) -> StateReport:
        """All that the node holds, as it is reported to the dispatcher of this term."""
        return StateReport(info.name, info.incarnation, term, self.slots(), self.prefetched())

    def prefetched(self) -> dict[str, int]:
        """How many tasks are prefetched, by class, with those that are chained."""
        counts = Counter({name: len(queue) for name, queue in self._queues.items()})
        for slot in self._slots.values():
            if slot.chain:
                counts[slot.class_name] += len(slot.chain)
        return dict(counts)

    def __len__(self) -> int:
        """Tasks that are here, launched or not."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[Execution]:
        return iter(list(self._by_id.values()))

    def _take(self, class_name: str, queue: OrderedDict[int, Execution]) -> Execution:
        e = queue.popitem(last=False)[1]
        if not queue:
            del self._queues[class_name]
        return e

    def _close(self, number: int, slot: Slot) -> None:
        del self._slots[number]
        self._slots_of[slot.class_name] -= 1

    def _forget(self, e: Execution) -> None:
        # A newer execution of the same task may have arrived meanwhile: that one stays.
        if self._by_id.get(e.run.id) is e:
            del self._by_id[e.run.id]

    def _leave_queue(self, e: Execution) -> None:
        queue = self._queues.get(e.run.class_name)
        if queue is not None and queue.pop(e.key, None) is not None and not queue:
            del self._queues[e.run.class_name]
