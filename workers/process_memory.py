"""Measures the memory of the processes of running tasks, by /proc.

`ProcessTable` knows which process belongs to which task: by its parent or its session, and of one that has left both by
the marks in its environment. It looks at each process once; what it costs afterwards is one short read for each process
of a task, and one of /proc/loadavg, which tells whether there are new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from pilotq.workers.process_tree import Process, environments, proportional_sizes, read_process

PAGE = os.sysconf("SC_PAGE_SIZE")
LISTED_FROM = 64  # so many new process numbers are looked at one by one; beyond that /proc is listed
FILES_MAX = 256  # so many files are kept open
# A child of a launcher that is no task's main process may be one that has left its task. Its marks are read at once,
# and again so much later, as its task may not have been entered yet, or it may not have executed its program.
STRAY_S = 0.5


class ProcessGroup:
    """The processes of one execution on this node.

    ``mains`` are the numbers of those that launchers have started, ``marks`` variables that all of them were given.
    """

    __slots__ = ("mains", "marks", "members", "size", "counted")

    def __init__(self, marks: Mapping[bytes, bytes]) -> None:
        self.mains: set[int] = set()
        self.marks = [b"\0%s=%s\0" % pair for pair in marks.items()]
        self.members: dict[int, Process] = {}
        self.size: dict[int, int] = {}  # number -> bytes that are resident, as measured last
        self.counted: tuple[int, dict[int, int]] = (-1, {})  # the last proportional size, and ``size`` at that time

    def estimate(self) -> int:
        """At most so much memory is used: shared pages count once as far as they did at the last exact measurement."""
        exact, then = self.counted
        if exact < 0:
            return sum(self.size.values())
        return exact + sum(max(size - then.get(pid, 0), 0) for pid, size in self.size.items())


class ProcessTable:
    """Which processes belong to which group. Not for several threads."""

    def __init__(self) -> None:
        self._owners: dict[int, ProcessGroup] = {}
        self._mains: dict[int, ProcessGroup] = {}
        self._others: dict[int, Process] = {}  # processes of no group
        self._launchers: set[int] = set()
        self._strays: dict[int, tuple[float, Process, bool]] = {}  # when it is looked at, and whether for the last time
        self._last = -1  # the process number that was given out last, when we looked
        self._files: dict[int, int] = {}  # number -> its open file of sizes: opening it costs more than reading it
        self._loadavg = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for fd in (self._loadavg, *self._files.values()):
            os.close(fd)

    def add(self, group: ProcessGroup, pid: int) -> None:
        """A launcher has started this process; what it has started so far is found, too."""
        process = read_process(pid)
        if process is None or not process.alive:
            return
        self._launchers.add(process.parent)
        self._mains[pid] = group
        group.mains.add(pid)
        self._strays.pop(pid, None)
        self._enter_tree(group, process)

    def remove(self, group: ProcessGroup) -> None:
        """The execution has ended. Its interpreter may go on with another one."""
        for pid in group.mains:
            if self._mains.get(pid) is group:
                del self._mains[pid]
        for pid, process in group.members.items():
            if self._owners.get(pid) is group:
                self._leave(pid)
                self._others[pid] = process
        group.members.clear()

    def find_new(self, now: float) -> list[int]:
        """Look at the processes that were started since the last time; returns those that belong to groups."""
        last = int(os.pread(self._loadavg, 100, 0).split()[-1])
        before, self._last = self._last, last
        found: list[int] = []
        if last != before:
            if not 0 < last - before <= LISTED_FROM or before < 0:
                numbers = self._list(again=last < before)
            else:
                numbers = list(range(before + 1, last + 1))
            for pid in numbers:
                if pid not in self._owners and pid not in self._others and (process := read_process(pid)) is not None:
                    found += self._assign(process, now)
        if self._strays:
            found += self._assign_strays(now)
        return found

    def _list(self, *, again: bool) -> list[int]:
        numbers = [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]
        if again:
            self._others.clear()  # the numbers have started over: they may stand for other processes by now
        present = set(numbers)
        self._others = {pid: process for pid, process in self._others.items() if pid in present}
        return numbers

    def _assign(self, process: Process, now: float) -> list[int]:
        group = self._owners.get(process.parent) or self._mains.get(process.session)
        if group is None:
            self._others[process.pid] = process
            if process.parent in self._launchers:
                self._strays[process.pid] = (now, process, False)
            return []
        return [process.pid] if self._enter(group, process) else []

    def _enter_tree(self, group: ProcessGroup, process: Process) -> list[int]:
        """Enter a process, its session and what is below it, as far as they were looked at already; their numbers."""
        self._others.pop(process.pid, None)
        found = [process.pid] if self._enter(group, process) else []
        below = {process.pid}
        for other in list(self._others.values()):  # in the order in which they were started
            if other.parent in below or other.session == process.pid:
                below.add(other.pid)
                del self._others[other.pid]
                found += [other.pid] if self._enter(group, other) else []
        return found

    def _enter(self, group: ProcessGroup, process: Process) -> bool:
        if not _leads_threads(process.pid):
            return False
        group.members[process.pid] = process
        self._owners[process.pid] = group
        return True

    def _assign_strays(self, now: float) -> list[int]:
        """Orphans with sessions of their own belong to the task whose marks they bear."""
        due = {pid: stray for pid, stray in self._strays.items() if stray[0] <= now}
        found = []
        for pid, data in environments(list(due)).items():
            process = due[pid][1]
            for group in set(self._mains.values()):
                if group.marks and pid in self._others and all(mark in data for mark in group.marks):
                    found += self._enter_tree(group, process)
        for pid, (_, process, last) in due.items():
            if last or pid in self._owners:
                del self._strays[pid]
            else:
                self._strays[pid] = (now + STRAY_S, process, True)
        return found

    def measure(self, group: ProcessGroup) -> int:
        """The memory that a group uses at most, in bytes: what is resident, as `ProcessGroup.estimate` has it."""
        size: dict[int, int] = {}
        for pid in group.members:
            pages = self._resident(pid)
            if pages:
                size[pid] = pages * PAGE
        for pid in group.members.keys() - size.keys():
            process = read_process(pid)
            if process is None or not process.alive or process.start != group.members[pid].start:
                del group.members[pid]
                self._leave(pid)
        group.size = size
        return group.estimate()

    def _leave(self, pid: int) -> None:
        self._owners.pop(pid, None)
        if (fd := self._files.pop(pid, None)) is not None:
            os.close(fd)

    def _resident(self, pid: int) -> int:
        """Pages; 0 of a process that has ended."""
        fd = self._files.get(pid)
        kept = fd is not None
        try:
            if fd is None:
                fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
                if len(self._files) < FILES_MAX:
                    self._files[pid], kept = fd, True
            return int(os.pread(fd, 128, 0).split(b" ", 2)[1])
        except (OSError, IndexError, ValueError):
            return 0
        finally:
            if fd is not None and not kept:
                os.close(fd)

    def measure_exactly(self, group: ProcessGroup) -> int:
        """The same, with shared pages counted once: slower, as the kernel looks at all pages.

        First it is made sure that no number stands for another process by now.
        """
        for pid, process in list(group.members.items()):
            now = read_process(pid)
            if now is None or now.start != process.start:
                del group.members[pid]
                self._leave(pid)
        self.measure(group)
        exact = proportional_sizes(group.size)
        group.counted = (sum(exact.get(pid, size) for pid, size in group.size.items()), dict(group.size))
        return group.counted[0]


def raise_oom_score(pids: Iterable[int], score: int) -> None:
    """Have the kernel end these processes before others when memory is short; those of other users stay as they are."""
    for pid in pids:
        try:
            fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if int(os.read(fd, 16)) < score:
                os.write(fd, b"%d" % score)
        except (OSError, ValueError):
            pass  # it has ended
        finally:
            os.close(fd)


def own_oom_score() -> int:
    """What the kernel adds to the score of this process when it looks for one to end; -1000 to 1000."""
    try:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _leads_threads(pid: int) -> bool:
    """Whether the number is that of a process, and not of one of its other threads."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            data = file.read(512)
    except OSError:
        return False
    return b"\nTgid:\t%d\n" % pid in data
