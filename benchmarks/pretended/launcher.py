"""A launcher that starts nothing: each task ends after its simulated time, as if a process had run so long.

It takes the place of `LauncherHandle`, and answers with the records that a real launcher sends: begun, started when the
task lives for a moment, ended with exit code 0. ``sleep N`` runs N seconds, any other program no time, and so does a
function, which returns None. A chained task begins when the one before it has ended, as on a machine that has nothing
else to do.
"""

from __future__ import annotations

import heapq
import math
import pickle
import time
from collections.abc import Sequence
from itertools import count

import msgspec

from pilotq.broker.tasks.functions import result_text
from pilotq.workers.execution.launcher_pool import ISOLATED, LauncherHandle, LauncherPool
from pilotq.workers.launcher.launcher import ANNOUNCE_S
from pilotq.workers.launcher.report_pipe import WAKE_DELAY_S, WAKE_REPORTS
from pilotq.workers.protocol import (
    NO_OUTPUT,
    Begun,
    Call,
    CallRun,
    Element,
    Exited,
    FromLauncher,
    Launch,
    LaunchBase,
    LaunchRun,
    LaunchSlot,
    Quit,
    Ran,
    Retract,
    Retracted,
    Returned,
    Signal,
    Started,
)

FIRST_NUMBER = 1 << 30  # no descriptor has such a number
_numbers = count(FIRST_NUMBER)
_encode = msgspec.msgpack.Encoder().encode
_NONE = pickle.dumps(None)


def seconds_of(argv: Sequence[bytes]) -> float:
    """How long a command runs."""
    return float(argv[1]) if len(argv) == 2 and argv[0].rpartition(b"/")[2] == b"sleep" else 0.0


class PretendedLauncher(LauncherHandle):
    """Has no process, and no pipe: ``wake`` and ``down`` are numbers of no descriptor."""

    def __init__(self, number: int, core_group: int) -> None:
        self.number = number
        self.core_group = core_group
        self.stopping = self.closed = self.full = False
        self.starting_key = 0
        self.down, self.wake, self._number = next(_numbers), next(_numbers), next(_numbers)
        self._wall = time.time() - time.monotonic()
        self._records: list[FromLauncher] = []
        self._running: dict[int, float] = {}  # key -> when it began (monotonic)
        self._elements: dict[int, Element] = {}  # key -> which one it is, of those that came in runs
        self._moments: list[tuple[float, int, bool]] = []  # heap: when, key, whether it ends then, or is announced
        self._calls: dict[int, tuple[str, bytes]] = {}  # key of a function that runs -> text and value that it returns
        self._behind: dict[int, Launch | Call] = {}  # key -> what is chained behind it
        self._before: dict[int, int] = {}  # key of what is chained -> key it waits for
        self._unseen = 0  # reports since the reader was woken, as in ReportPipe
        self._wake_at = 0.0  # monotonic: when they are old enough
        self.launched = 0
        self.seconds = 0.0  # of CPU time that all of this took

    @property
    def pid(self) -> int:
        return self._number

    def launch(self, base: LaunchBase, slot: LaunchSlot, launch: Launch | Call | LaunchRun | CallRun) -> None:
        if isinstance(launch, LaunchRun):
            for number in range(launch.number):
                self.launch(base, slot, launch.launch_of(number))
            return
        if isinstance(launch, CallRun):
            for call in launch.calls():
                self.launch(base, slot, call)
            return
        began = time.thread_time()
        self.launched += 1
        if launch.after in self._running or launch.after in self._before:
            self._behind[launch.after] = launch
            self._before[launch.key] = launch.after
        else:
            self._start(launch, time.monotonic())
        self.seconds += time.thread_time() - began

    def send(self, record: Retract | Signal | Quit) -> None:
        if isinstance(record, Retract) and record.key in self._before:
            before = self._before.pop(record.key)
            del self._behind[before]
            follower = self._behind.pop(record.key, None)
            if follower is not None:
                self._behind[before], self._before[follower.key] = follower, before
            self._records.append(Retracted(record.key))
            self._unseen += WAKE_REPORTS
        elif isinstance(record, Signal) and record.key in self._running:
            self._end(record.key, time.monotonic(), record.signal)

    def flush(self) -> None:
        """There is no pipe to write to."""

    def advance(self, now: float) -> bool:
        """Let happen what is due; returns whether its reader would be woken."""
        began = time.thread_time()
        while self._moments and self._moments[0][0] <= now:
            at, key, ends = heapq.heappop(self._moments)
            if key in self._running and ends:
                self._end(key, at, 0)
            elif key in self._running:
                self._records.append(Started(key, 1, self._wall + self._running[key], ANNOUNCE_S, b"", b""))
                self._unseen += WAKE_REPORTS
        self.seconds += time.thread_time() - began
        return self._unseen >= WAKE_REPORTS or (self._unseen > 0 and now >= self._wake_at)

    def due(self) -> float:
        """Monotonic time at which `advance` is to be called again."""
        moments = [self._moments[0][0]] if self._moments else []
        if self._unseen:
            moments.append(0.0 if self._unseen >= WAKE_REPORTS else self._wake_at)
        return min(moments, default=math.inf)

    def receive(self) -> list[FromLauncher]:
        records, self._records = self._records, []
        self._unseen = 0
        return records

    def kill(self) -> None:
        self.stopping = self.closed = True

    def reap(self, seconds: float | None = None) -> None:
        """There is no process to wait for."""

    def _start(self, launch: Launch | Call, at: float) -> None:
        seconds = seconds_of(launch.argv) if isinstance(launch, Launch) else 0.0
        self._running[launch.key] = at
        if isinstance(launch, Call):
            # RQ reads the results of its producers' jobs itself.
            self._calls[launch.key] = (result_text(_NONE), b"") if launch.rq_fields else ("", _NONE)
        elif launch.element is not None:
            self._elements[launch.key] = launch.element
        heapq.heappush(self._moments, (at + seconds, launch.key, True))
        if seconds > ANNOUNCE_S:
            heapq.heappush(self._moments, (at + ANNOUNCE_S, launch.key, False))
        self._records.append(Begun(launch.key))

    def _end(self, key: int, at: float, status: int) -> None:
        began = self._running.pop(key)
        element = self._elements.pop(key, None)
        if element is not None and not status and at - began <= ANNOUNCE_S:
            after = round((self._wall + began - element.origin) * 1e6)
            row = _encode((element.index, element.place, after, round((at - began) * 1e6), 1, 0, 0))
            self._records.append(Ran(key, at - began, self._wall + at, row))
        else:
            times = self._wall + began, self._wall + at, at - began
            usage = 0.0, 0, 0, NO_OUTPUT, NO_OUTPUT
            if key in self._calls:
                text, value = self._calls.pop(key)
                self._records.append(Returned(key, 1, "finished", "", "", text, *times, *usage, value))
            else:
                self._records.append(Exited(key, 1, status, *times, *usage))
        follower = self._behind.pop(key, None)
        if follower is None:
            self._unseen += WAKE_REPORTS
            return
        if not self._unseen:
            self._wake_at = time.monotonic() + WAKE_DELAY_S
        self._unseen += 1
        del self._before[follower.key]
        self._start(follower, at)


class PretendedPool(LauncherPool):
    """The launchers of a node, as many as it would have; they end when they are told to."""

    def _start(self, core_group: int) -> LauncherHandle:
        self._started += 1
        launcher = PretendedLauncher(self._started, core_group)
        self.living[launcher.number] = launcher
        if core_group != ISOLATED:
            self._serving[core_group] = launcher
        return launcher

    def pretended(self) -> list[PretendedLauncher]:
        return [launcher for launcher in self.living.values() if isinstance(launcher, PretendedLauncher)]
