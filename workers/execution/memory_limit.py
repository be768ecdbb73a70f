"""Holds the executions of a node to the memory that they asked for, and tells what each of them has used."""

from __future__ import annotations

import os
from signal import SIGKILL

from pilotq.broker.settings import Settings
from pilotq.broker.store.resources import NodeInfo, class_info
from pilotq.broker.tasks.quantities import size_text
from pilotq.workers.execution.execution import Execution
from pilotq.workers.memory_watch import MemoryWatch, WatchedTask
from pilotq.workers.protocol import Call, ConfinedLaunch, Exited, Launch, Returned

KILLED = 128 + SIGKILL  # what a shell says of a command that was killed


class MemoryLimits:
    """The memory of the executions of one node. With ``cgroup`` programs get cgroups, whose paths begin so."""

    def __init__(self, info: NodeInfo, settings: Settings, cgroup: str = "") -> None:
        self._node = info.name
        self._enforced = bool(info.memory_by)
        self._cgroup = cgroup
        self.watch = MemoryWatch(settings.memory_sample_s)

    def limit_of(self, class_name: str) -> int:
        """The bytes that a task of this class may use on a node; 0: any."""
        found = class_info(class_name) if self._enforced else None
        return found.request.memory if found is not None else 0

    def confine(self, launch: Launch | Call, class_name: str) -> Launch | Call:
        """The launch of a program, in a cgroup with its limit, where it has one; of a function, as it is."""
        limit = self.limit_of(class_name) if self._cgroup and isinstance(launch, Launch) else 0
        if not limit or not isinstance(launch, Launch):
            return launch
        fields = {name: getattr(launch, name) for name in Launch.__struct_fields__}
        return ConfinedLaunch(**fields, cgroup=f"{self._cgroup}{launch.key}", memory=limit)

    def confines(self, class_name: str) -> bool:
        """Whether programs of this class get cgroups."""
        return bool(self._cgroup and self.limit_of(class_name))

    def started(self, e: Execution, pid: int) -> None:
        """Its main process runs, or that of the function's interpreter: it is measured.

        A program in a cgroup, too: what has left its session before it was moved there is not in it.
        """
        if e.memory is None:
            limit, confined = self.limit_of(e.run.class_name), bool(self._cgroup) and not e.function
            e.memory = watched(e.key, e.run.id, e.run.execution, limit, confined=confined)
        self.watch.add(e.memory, pid)

    def over(self, task: WatchedTask) -> str:
        """Why a task ends that was found above its limit: a sentence for people."""
        return f"It used {size_text(task.over)} of {size_text(task.limit)} on {self._node}: its worker has killed it."

    def exited(self, e: Execution, record: Exited | Returned, now: float) -> None:
        """Its main process has ended: take down what it has used, and whether the kernel has killed it for that."""
        if e.memory is None and not record.status and not (isinstance(record, Exited) and record.killed_at):
            return  # it went well, before it was measured
        record.max_rss = max(record.max_rss, e.memory.peak if e.memory is not None else 0)
        here = e.memory is not None and e.memory.over
        if e.reason == "memory" and here and not record.status and not record.remaining:
            e.reason = e.message = ""  # it succeeded before its end could reach it
        if isinstance(record, Exited) and record.killed_at and not e.reason:
            record.max_rss = max(record.max_rss, record.killed_at)
            limit = self.limit_of(e.run.class_name)
            e.reason = "memory"
            e.message = f"It used all of {size_text(limit)} on {self._node}: the kernel has killed it, in its cgroup."
        killed = isinstance(record, Exited) and os.waitstatus_to_exitcode(record.status) in (-SIGKILL, KILLED)
        if killed and not e.reason and (where := self.watch.kernel_has_killed(now)):
            e.reason = "memory"
            e.message = (
                f"It was killed by the kernel for memory, probably: a process {where} was, on {self._node}, at that "
                f"moment, and the task has used up to {size_text(record.max_rss)}."
            )

    def ended(self, e: Execution) -> None:
        """Nothing of it lives any more, or it was given up."""
        if e.exited is not None:
            e.exited.max_rss = max(e.exited.max_rss, e.peak, e.memory.peak if e.memory is not None else 0)
        if e.memory is not None:
            self.watch.remove(e.memory)
            e.memory = None


def watched(name: object, task_id: str, execution: int, limit: int, *, confined: bool = False) -> WatchedTask:
    """What `MemoryWatch` needs to know of an execution; all its processes bear these marks, unless they hide them."""
    marks = {b"PILOTQ_TASK_ID": task_id.encode(), b"PILOTQ_EXECUTION": b"%d" % execution}
    return WatchedTask(name, limit, marks, confined=confined)
