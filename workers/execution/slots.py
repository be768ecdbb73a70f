"""Keeps the slots of a node, and the prefetched tasks that get them next. Pure data, without input or output.

A slot is a reservation that dispatcher and worker both know. The dispatcher opens it by sending a task with its
number; here it goes from task to task of one class, until none of that class is left. While a process of its last task
cannot be killed it stays taken. Some of the prefetched tasks are *chained* to a slot: its launcher knows them
already, and starts each when the one before it has ended. For the dispatcher they are prefetched until they have the
slot.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Run, StateReport
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.tasks.runtime_estimate import RuntimeEstimates
from pilotq.workers.execution.execution import Execution, Phase
from pilotq.workers.execution.leased_runs import HeldLease, LeasedRun


class Slot:
    """One reservation for tasks of one class. ``task`` is the one that has it now; of a run its first element."""

    __slots__ = ("allocation", "class_name", "task", "chain")

    def __init__(self, task: Execution) -> None:
        self.allocation = task.allocation
        self.class_name = task.run.class_name
        self.task: Execution | LeasedRun = task
        self.chain: deque[Execution | LeasedRun] = deque()  # chained behind it, in order


class SlotTable:
    """Holds every task of a node that has not ended: in a slot, chained to one, or prefetched."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._runtimes = RuntimeEstimates()
        self._next_key = 1
        self._slots: dict[int, Slot] = {}  # by number
        self._slots_of: Counter[str] = Counter()  # by class
        # Oldest first. OrderedDict: both ends and the middle are taken from, and `dict` is slow at its front.
        # Runs stand at the key of their first element.
        self._queues: dict[str, OrderedDict[int, Execution | LeasedRun]] = {}
        self._queued: Counter[str] = Counter()  # elements in them, by class
        self._by_id: dict[str, Execution] = {}
        self.runs_by_key: dict[int, LeasedRun] = {}  # the key is that of the first element
        self.unkillable: dict[int, Execution] = {}  # by key

    def add(self, run: Run) -> Execution:
        """Enter a task: in phase WAITING if it came with a slot (launch it), else PREFETCHED."""
        e = Execution(self._take_keys(1), run)
        self._by_id[run.id] = e
        if run.slot:
            self._slots[run.slot] = Slot(e)
            self._slots_of[run.class_name] += 1
        else:
            self._queues.setdefault(run.class_name, OrderedDict())[e.key] = e
            self._queued[run.class_name] += 1
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

    def add_run(self, held: HeldLease, number: int, count: int) -> None:
        """Enter so many elements of a lease, from this one on, as a run that is prefetched."""
        run = LeasedRun(held, self._take_keys(count), number, count)
        self._queues.setdefault(run.class_name, OrderedDict())[run.key] = self.runs_by_key[run.key] = run
        self._queued[run.class_name] += count

    def _take_keys(self, count: int) -> int:
        self._next_key += count
        return self._next_key - count

    def find(self, task_id: str, execution: int) -> Execution | None:
        """The execution of a task that is here, and in no run; ``execution`` 0 means any."""
        e = self._by_id.get(task_id)
        return e if e is not None and execution in (0, e.run.execution) else None

    def find_all(self, task_id: str, execution: int) -> list[Execution]:
        """The same, or of an array all elements that are here."""
        e = self.find(task_id, execution)
        return [e] if e is not None else [e for e in self._by_id.values() if e.run.array == task_id]

    def end(self, e: Execution, *, go_on: bool = True) -> Execution | LeasedRun | None:
        """An execution has ended. Its slot goes to the task returned, or is released when None.

        That is the next of its chain, still CHAINED or in a run, else the oldest of its class, now WAITING; without
        ``go_on`` only one of its chain. One that had no slot is only removed.
        """
        self._forget(e)
        self.unkillable.pop(e.key, None)
        slot = self._slots.get(e.slot)
        if slot is None:
            self._leave_queue(e)
            return None
        return self._go_on(e.slot, slot, go_on=go_on)

    def _go_on(self, number: int, slot: Slot, *, go_on: bool) -> Execution | LeasedRun | None:
        if slot.chain:
            slot.task = slot.chain.popleft()
            return slot.task
        queue = self._queues.get(slot.class_name) if go_on else None
        if queue is None:
            self._close(number, slot)
            return None
        follower = self._take(slot.class_name, queue)
        follower.phase, follower.slot, follower.allocation = Phase.WAITING, number, slot.allocation
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
        """What is chained behind an execution that has a slot now, but for runs."""
        slot = self._slots.get(e.slot)
        return executions(slot.chain) if slot is not None and slot.task is e else []

    def add_runtime(self, class_name: str, seconds: float, number: int = 1) -> None:
        """So many tasks of this class have run so long, on average."""
        self._runtimes.add(class_name, seconds, number)

    def chain_room(self, slot: Slot) -> int:
        """How many more tasks may be chained to a slot: only short ones, and each slot of the class gets its share."""
        runtime, queue = self._runtimes.get(slot.class_name), self._queues.get(slot.class_name)
        if runtime is None or runtime.ends < self._settings.prefetch_after or not queue:
            return 0
        depth = min(int(self._settings.chain_s / max(runtime.mean_s, 1e-4)), self._settings.chain_max)
        queued = self._queued[slot.class_name]
        return min(depth - _length(slot), -(-queued // self._slots_of[slot.class_name]))

    def next_prefetched(self, slot: Slot) -> Execution | LeasedRun | None:
        """The oldest task of a slot's class that is prefetched, or the run that begins with it."""
        queue = self._queues.get(slot.class_name)
        return next(iter(queue.values())) if queue else None

    def next_runs(self, slot: Slot, most: int) -> list[Run]:
        """The messages of the next ones of a slot's class that are prefetched one by one."""
        queue = self._queues.get(slot.class_name)
        return [e.run for e in islice(queue.values(), most) if isinstance(e, Execution)] if queue else []

    def chain(self, slot: Slot) -> Execution:
        """Move the task that is `next_prefetched`, now CHAINED, to the end of a slot's chain."""
        e = self._take(slot.class_name, self._queues[slot.class_name])
        e.phase, e.slot, e.allocation = Phase.CHAINED, slot.task.slot, slot.allocation
        slot.chain.append(e)
        return e

    def chain_run(self, slot: Slot, most: int) -> LeasedRun:
        """Move up to ``most`` of the run that is `next_prefetched` to the end of a slot's chain, as a run."""
        queue = self._queues[slot.class_name]
        first = queue.popitem(last=False)[1]
        assert isinstance(first, LeasedRun)
        del self.runs_by_key[first.key]
        run = first.split(most) if first.count > most else first
        if run is not first:
            self._put_first(first, queue)
        self._left_queue(slot.class_name, run.count)
        self.runs_by_key[run.key] = run
        run.slot, run.allocation = slot.task.slot, slot.allocation
        slot.chain.append(run)
        return run

    def unchain(self, e: Execution) -> None:
        """Take one out of its chain: it has no slot."""
        self._slots[e.slot].chain.remove(e)
        e.slot, e.allocation = 0, ""

    def return_to_queue(self, e: Execution) -> None:
        """Take one out of its chain, to where it stood in the queue of its class: PREFETCHED again."""
        self.unchain(e)
        self._enqueue(e)

    def give_way(self, e: Execution) -> Execution | LeasedRun | None:
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
        self._queued[e.run.class_name] += 1
        older = list(takewhile(lambda key: key < e.key, queue))  # they came back before
        for key in (e.key, *reversed(older)):
            queue.move_to_end(key, last=False)

    def newest_chained(self, class_name: str, most: int) -> list[Execution]:
        """Up to ``most`` of the tasks of a class that are chained, the newest first."""
        of_class = [slot.chain for slot in self._slots.values() if slot.class_name == class_name]
        chained = [e for chain in of_class for e in executions(chain)]
        return sorted(chained, key=lambda e: -e.key)[:most]

    # -- runs of elements ---------------------------------------------------------------------------------------------

    def end_run(self, run: LeasedRun) -> Execution | LeasedRun | None:
        """The last element of a run has ended, and it was removed. The slot goes to what is returned, as of `end`."""
        return self._go_on(run.slot, self._slots[run.slot], go_on=True)

    def runs(self, *, launched: bool = False) -> list[LeasedRun]:
        """All runs; or those that launchers have."""
        return [run for run in self.runs_by_key.values() if run.slot or not launched]

    def run_of(self, key: int) -> LeasedRun | None:
        """The run that a launcher has, and that has an element with this key."""
        return next((run for run in self.runs(launched=True) if run.key <= key <= run.last_key), None)

    def first_runs(self) -> list[LeasedRun]:
        """The runs whose first element has a slot now."""
        return [slot.task for slot in self._slots.values() if isinstance(slot.task, LeasedRun)]

    def unpack(self, run: LeasedRun, count: int = 0) -> list[Execution]:
        """Make an execution of each element of a run, in its place; or only of the first ``count``."""
        count = min(count, run.count) or run.count
        del self.runs_by_key[run.key]
        found = [self._execution(run, number) for number in range(count)]
        at = run.key
        run.pass_first(count)
        rest: list[Execution | LeasedRun] = []
        if run.count:
            self.runs_by_key[run.key] = run
            rest.append(run)
        if not run.slot:
            queue = self._queues[run.class_name]
            items = list(queue.items())
            place = next(n for n, (key, _) in enumerate(items) if key == at)
            new = [(one.key, one) for one in (*found, *rest)]
            self._queues[run.class_name] = OrderedDict([*items[:place], *new, *items[place + 1 :]])
            return found
        slot = self._slots[run.slot]
        for e in found:
            e.phase, e.slot, e.allocation = Phase.CHAINED, run.slot, run.allocation
        if slot.task is run:
            slot.task = found[0]
            slot.chain.extendleft(reversed([*found[1:], *rest]))
        else:
            place = slot.chain.index(run)
            chain = list(slot.chain)
            slot.chain = deque([*chain[:place], *found, *rest, *chain[place + 1 :]])
        return found

    def _execution(self, run: LeasedRun, number: int) -> Execution:
        message = run.run(number)
        e = Execution(run.key + number, message)
        self._by_id[message.id] = e
        return e

    def _put_first(self, run: LeasedRun, queue: OrderedDict[int, Execution | LeasedRun]) -> None:
        queue[run.key] = self.runs_by_key[run.key] = run
        queue.move_to_end(run.key, last=False)

    # -- retracting -----------------------------------------------------------------------------------------------

    def retract(self, class_name: str, most: int) -> list[Execution]:
        """Take out up to ``most`` of the tasks of a class that are prefetched, the newest ones; in their order."""
        queue = self._queues.get(class_name)
        if queue is None:
            return []
        taken: list[Execution] = []
        while queue and len(taken) < most:
            last = queue[next(reversed(queue))]
            if isinstance(last, LeasedRun) and last.count > 1:
                last.count -= 1
                taken.append(self._execution(last, last.count))
            else:
                queue.popitem(last=True)
                if isinstance(last, LeasedRun):
                    del self.runs_by_key[last.key]
                    last = self._execution(last, 0)
                taken.append(last)
        self._left_queue(class_name, len(taken))
        for e in taken:
            self._forget(e)
        return taken[::-1]

    def retract_all(self) -> list[Execution]:
        """Take out every prefetched task."""
        return [e for name in list(self._queues) for e in self.retract(name, self._queued[name])]

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
        counts = Counter({name: self._queued[name] for name in self._queues})
        for slot in self._slots.values():
            if length := _length(slot):
                counts[slot.class_name] += length
        return dict(counts)

    def __len__(self) -> int:
        """Tasks that are here, launched or not."""
        return len(self._by_id) + sum(run.count for run in self.runs_by_key.values())

    def __bool__(self) -> bool:
        return bool(self._by_id or self.runs_by_key)

    def __iter__(self) -> Iterator[Execution]:
        """Those that are in no run."""
        return iter(list(self._by_id.values()))

    def _take(self, class_name: str, queue: OrderedDict[int, Execution | LeasedRun]) -> Execution:
        first = queue.popitem(last=False)[1]
        e = first
        if isinstance(first, LeasedRun):
            del self.runs_by_key[first.key]
            e = self._execution(first, 0)
            first.pass_first()
            if first.count:
                self._put_first(first, queue)
        self._left_queue(class_name, 1)
        assert isinstance(e, Execution)
        return e

    def _left_queue(self, class_name: str, number: int) -> None:
        """So many have left the queue of a class: an empty one goes."""
        self._queued[class_name] -= number
        if not self._queued[class_name]:
            del self._queues[class_name], self._queued[class_name]

    def _close(self, number: int, slot: Slot) -> None:
        del self._slots[number]
        self._slots_of[slot.class_name] -= 1

    def _forget(self, e: Execution) -> None:
        # A newer execution of the same task may have arrived meanwhile: that one stays.
        if self._by_id.get(e.run.id) is e:
            del self._by_id[e.run.id]

    def _leave_queue(self, e: Execution) -> None:
        queue = self._queues.get(e.run.class_name)
        if queue is not None and queue.pop(e.key, None) is not None:
            self._left_queue(e.run.class_name, 1)


def executions(chain: Iterable[Execution | LeasedRun]) -> list[Execution]:
    """Those of a chain that are in no run."""
    return [e for e in chain if isinstance(e, Execution)]


def _length(slot: Slot) -> int:
    """How many tasks are chained to a slot, behind the one that has it."""
    behind = sum(e.count if isinstance(e, LeasedRun) else 1 for e in slot.chain)
    return behind + (slot.task.count - 1 if isinstance(slot.task, LeasedRun) else 0)
