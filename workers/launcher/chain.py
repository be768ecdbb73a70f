"""What a launcher keeps of launches and calls: those that are lined up, and those of which something lives."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from pilotq.workers.launcher.capture import PoolFile
from pilotq.workers.launcher.spawn import Surroundings
from pilotq.workers.protocol import Call, Launch

if TYPE_CHECKING:
    from pilotq.workers.launcher.interpreter_process import Interpreter


class Line(deque[tuple[Launch | Call, Surroundings | None]]):
    """Launches and calls that are to be started one after the other. ``serving`` has calls of it."""

    __slots__ = ("serving",)

    def __init__(self) -> None:
        super().__init__()
        self.serving: Interpreter | None = None


class Running:
    """One launch that was started and of which something lives; or a call that an interpreter was given.

    ``stdout`` and ``stderr`` are None where they go to named files. ``family`` is the key of its processes.
    """

    __slots__ = ("key", "family", "name", "pid", "began", "started", "stdout", "stderr", "killed", "line")

    def __init__(
        self, launch: Launch | Call, family: int, pid: int, files: tuple[PoolFile | None, PoolFile | None], line: Line
    ) -> None:
        self.key = launch.key
        self.family = family
        self.name = f"{launch.id}.{launch.execution}"  # of output files that are kept
        self.pid = pid
        self.began = time.monotonic()
        self.started = time.time()
        self.stdout, self.stderr = files
        self.killed = False  # SIGKILL was sent: what appears later gets it too
        self.line = line
