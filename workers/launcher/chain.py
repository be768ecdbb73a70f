"""Holds launches that are to be started one after the other, and those of which a process lives."""

from __future__ import annotations

import time
from collections import deque

from pilotq.workers.launcher.capture import PoolFile
from pilotq.workers.launcher.spawn import LaunchContext
from pilotq.workers.protocol import Call, ConfinedLaunch, Launch


class Chain(deque[tuple[Launch | Call, LaunchContext | None]]):
    """Launches and calls that are to be started one after the other.

    ``interpreter`` is the number of the interpreter that has calls of this chain, or 0: the chain goes on when these
    have returned. ``handed_over`` says that the native part has left the first launch to us.
    """

    __slots__ = ("interpreter", "handed_over")

    def __init__(self) -> None:
        super().__init__()
        self.interpreter = 0
        self.handed_over = False


class Running:
    """One launch that was started and of which a process lives; or a call that an interpreter was given.

    ``stdout`` and ``stderr`` are None where they go to named files. ``tracker_key`` is the key of its processes in the
    ProcessTracker: of a call that is its interpreter's.
    """

    __slots__ = (
        "key", "tracker_key", "name", "pid", "began", "started", "stdout", "stderr", "killed", "unwanted", "chain",
        "script", "cgroup", "element",
    )  # fmt: skip

    def __init__(
        self, launch: Launch | Call, tracker_key: int, pid: int, files: tuple[PoolFile | None, PoolFile | None],
        chain: Chain, script: str = "",
    ) -> None:  # fmt: skip
        self.key = launch.key
        self.tracker_key = tracker_key
        self.name = f"{launch.id}.{launch.attempt}"  # of output files that are kept
        self.pid = pid
        self.began = time.monotonic()
        self.started = time.time()
        self.stdout, self.stderr = files
        self.killed = False  # SIGKILL was sent: a process that appears later gets it too
        self.unwanted = False  # a call that was asked to end: whatever it returns, nobody is told of its result
        self.chain = chain
        self.cgroup = launch.cgroup if isinstance(launch, ConfinedLaunch) else ""
        self.script = script  # path of its script's file, to be removed
        self.element = launch.element if isinstance(launch, Launch) else None  # until it has been told of
