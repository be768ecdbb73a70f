"""Watches how much memory running tasks use, in a thread beside the loop of the worker process.

A task is measured the oftener, the sooner it could be far above its limit: at the latest when it would have reached
1.3 times its limit and 256 MB more, growing by 1 GB each second (or faster, if it does), and oftener when it grows
towards its limit. One without a limit is measured each ``memory_sample_s``, for its peak.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping

from pilotq.broker.log import log
from pilotq.workers.cgroups import MACHINE_KILLS, oom_kills
from pilotq.workers.process_memory import (
    ProcessGroup,
    ProcessTable,
    own_oom_score,
    raise_oom_score,
)

# A task is to be ended before it uses this share of its limit, and so many bytes more.
EXCESS_SHARE, EXCESS_BYTES = 1.3, 256 << 20
FASTEST = 10**9  # bytes a second that a task may begin to grow by at any time
REACTION_S = 0.07  # from the measurement to the end of the processes
SHORTEST_S = 0.02  # between two measurements of a task
TOGETHER_S = 0.05  # tasks are measured together, at times that are multiples of this
LOOK_SHARE = 0.005  # of a core that looking for new processes may take, where no task has a limit
PEAK_STEP = 1.25  # so much above the last peak that of several processes is measured exactly
LATE_S = 1.5  # a kill by the kernel that was seen so long ago may be that of a task whose end is told now
CLOSE_S = 1.0  # how long the end of the thread is waited for
OOM_SCORE = 300  # above the worker's own: of a machine's memory so many thousandths
OOM_SCORE_MAX = 1000


class WatchedTask:
    """What one execution uses on this node. ``limit`` is in bytes, 0 for none; ``name`` is the caller's.

    With ``confined`` the kernel holds it to its limit, and counts otherwise than we do: a page of a file belongs to
    whoever has read it first. Only what is far above the limit has left its cgroup for sure.
    """

    __slots__ = ("bound", "ended", "group", "limit", "measured_at", "name", "next_at", "over", "peak", "size", "starts")

    def __init__(self, name: object, limit: int, marks: Mapping[bytes, bytes], *, confined: bool = False) -> None:
        self.name = name
        self.limit = limit
        self.bound = int(limit * EXCESS_SHARE) + EXCESS_BYTES if confined and limit else limit
        self.peak = 0  # bytes
        self.over = 0  # bytes that it used when it was found above its limit
        self.ended = False
        self.starts: deque[int] = deque()  # main processes that are still to be entered
        self.group = ProcessGroup(marks)
        self.size = 0
        self.measured_at = 0.0
        self.next_at = 0.0


class MemoryWatch:
    """Measures tasks from `add` to `remove`; those that are above their limit come out of `take_over_limit`, once each.

    ``fileno`` becomes readable then. ``sample_s`` is the longest time between two measurements.
    """

    def __init__(self, sample_s: float) -> None:
        self._sample_s = sample_s
        self.fileno = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._new: deque[WatchedTask] = deque()
        self._over: deque[WatchedTask] = deque()
        self._call = threading.Event()
        self._idle = True
        self._closing = False
        self._thread: threading.Thread | None = None
        self._kills = oom_kills()
        self._killed_at = float("-inf")

    def add(self, task: WatchedTask, pid: int) -> None:
        """A launcher has started this process for it: the first, or one more."""
        task.starts.append(pid)
        self._new.append(task)
        if task.limit or self._idle:
            self._call.set()
        if self._thread is None:
            self._start()

    def remove(self, task: WatchedTask) -> None:
        task.ended = True

    def take_over_limit(self) -> list[WatchedTask]:
        """Tasks that use more than their limit, since the last call."""
        try:
            os.eventfd_read(self.fileno)
        except BlockingIOError:
            pass
        found = []
        while self._over:
            task = self._over.popleft()
            if not task.ended:
                found.append(task)
        return found

    def kernel_has_killed(self, now: float) -> str:
        """Where the kernel has just killed something because memory was short; empty: it has not."""
        self._count_kills(now)
        if now - self._killed_at > LATE_S:
            return ""
        return "of this machine" if self._kills[0] == MACHINE_KILLS else "of its worker's cgroup"

    def close(self) -> None:
        self._closing = True
        self._call.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if self._thread is None or not self._thread.is_alive():  # else it is reading something that takes long
            os.close(self.fileno)

    def _count_kills(self, now: float) -> None:
        kills = oom_kills()
        if kills[0] == self._kills[0] and kills[1] != self._kills[1]:
            self._killed_at = now
        self._kills = kills  # the worker may have been moved into another cgroup

    def _start(self) -> None:
        try:
            self._thread = threading.Thread(target=self._run, daemon=True, name="memory watch")
            self._thread.start()
        except RuntimeError as error:  # so Python says that the limit of processes is reached
            self._thread = None
            log(
                f"the memory of tasks is not watched until the next one starts: no thread can be started ({error})",
                level="warning",
            )

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the loop's
        loop = _Loop(self._sample_s)
        try:
            while not self._closing:
                try:
                    self._turn(loop)
                except Exception:  # noqa: BLE001  # without this thread no limit would hold any more
                    log(f"tasks could not be measured, which is tried again:\n{traceback.format_exc()}", level="error")
                    time.sleep(self._sample_s)
        finally:
            loop.close()

    def _turn(self, loop: _Loop) -> None:
        now = time.monotonic()
        loop.drop_ended()
        while self._new:
            loop.add(self._new.popleft())
        if over := loop.measure(now):
            self._over.extend(over)
            os.eventfd_write(self.fileno, 1)
        if loop.sampled:
            self._count_kills(now)
        pause = loop.pause(time.monotonic())
        self._idle = pause is None
        if not self._new:
            self._call.wait(pause)
        self._call.clear()


class _Loop:
    """The tasks that are watched, and when each is to be measured. ``now`` is monotonic seconds."""

    def __init__(self, sample_s: float) -> None:
        self._sample_s = sample_s
        self._table = ProcessTable()
        self._tasks: dict[int, WatchedTask] = {}
        self._look_at = 0.0
        self._sample_at = 0.0
        self.sampled = False  # in the last call of `measure`: a whole period has passed
        self._score = min(own_oom_score() + OOM_SCORE, OOM_SCORE_MAX)

    def add(self, task: WatchedTask) -> None:
        if task.ended:
            return
        while task.starts:
            self._table.add(task.group, task.starts.popleft())
        raise_oom_score(task.group.members, self._score)
        self._tasks[id(task)] = task
        task.next_at = 0.0

    def drop_ended(self) -> None:
        for key in [key for key, task in self._tasks.items() if task.ended]:
            self._table.remove(self._tasks.pop(key).group)

    def measure(self, now: float) -> list[WatchedTask]:
        """Measure what is due; returns those that are found above their limit, once each."""
        self.sampled = now >= self._sample_at
        if self.sampled:
            self._sample_at = now + self._sample_s
        due = [task for task in self._tasks.values() if task.next_at <= now + SHORTEST_S / 2]
        # A child of one with a limit may use much at any time: it is looked for whenever its task is measured.
        if due and (now >= self._look_at or any(task.limit and not task.over for task in due)):
            self._look(now)
        return [task for task in due if self._measure(task, now)]

    def _look(self, now: float) -> None:
        began = time.thread_time()
        raise_oom_score(self._table.find_new(now), self._score)
        self._look_at = now + (time.thread_time() - began) / LOOK_SHARE

    def _measure(self, task: WatchedTask, now: float) -> bool:
        size = self._table.measure(task.group)
        shared = len(task.group.size) > 1 and size > PEAK_STEP * task.peak
        if shared or 0 < task.bound < size:
            size = self._table.measure_exactly(task.group)
        rate = (size - task.size) / (now - task.measured_at) if task.measured_at else 0.0
        task.size, task.measured_at = size, now
        task.peak = max(task.peak, size)
        task.next_at = now + self._period(task, rate)
        if task.next_at - now > 2 * TOGETHER_S:
            task.next_at -= task.next_at % TOGETHER_S
        if not task.limit or size <= task.bound or task.over:
            return False
        task.over = size
        return True

    def _period(self, task: WatchedTask, rate: float) -> float:
        """Seconds until it is measured again; ``rate`` is by how many bytes a second it grows."""
        if not task.limit or task.over:
            return self._sample_s
        room = task.limit * EXCESS_SHARE + EXCESS_BYTES - task.size
        period = room / max(rate, FASTEST) - REACTION_S
        if rate > 0:
            period = min(period, (task.bound - task.size) / rate / 2)
        return min(max(period, SHORTEST_S), self._sample_s)

    def pause(self, now: float) -> float | None:
        """Seconds until something is due; None: not before something is added."""
        if not self._tasks:
            return None
        return max(min(task.next_at for task in self._tasks.values()) - now, 0.0)

    def close(self) -> None:
        self._table.close()
