"""What a dead launcher leaves behind: its tasks, which are killed by their marks before anything is said of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from signal import SIGKILL

from pilotq.broker.settings import Settings
from pilotq.workers import process_tree
from pilotq.workers.execution.escalation import Execution

LOOK_S = 0.02  # between two looks at what was killed
STUCK_LOOK_S = 1.0  # ... where all that is left hangs in the kernel
CLEAN_LOOKS = 2  # a process in the middle of exec has no environment for a moment: one clean look is no proof


class _Estate:
    """The executions of one launcher that is dead, or was killed and hangs in the kernel."""

    def __init__(self, launcher: int, executions: list[Execution], give_up_at: float) -> None:
        self.launcher = launcher
        self.executions = executions
        self.give_up_at = give_up_at
        self.stuck = False
        self.clean = 0


class Remains:
    """``directory`` is the pilot's: other pilots of this user may have tasks of the same name."""

    def __init__(self, directory: str, settings: Settings) -> None:
        self._directory = directory
        self._unkillable_s = settings.unkillable_s
        self._estates: list[_Estate] = []
        self._look_at = 0.0

    def add(self, launcher: int, executions: list[Execution], now: float) -> None:
        self._estates.append(_Estate(launcher, executions, now + self._unkillable_s))
        self._look_at = now

    def next(self) -> float | None:
        """Monotonic time of the next look; None when nothing is left."""
        return self._look_at if self._estates else None

    def look(self, now: float, launchers: dict[int, int]) -> tuple[list[Execution], list[Execution]]:
        """Kill what is there; returns the executions of which nothing lives any more, and those that cannot be killed:
        each once, and it is looked after until it has ended.

        Nothing before `next`. ``launchers`` are the pids of the launchers that live, by number.
        """
        if not self._estates or now < self._look_at:
            return [], []
        strays = self._kill_strays(set(launchers.values()))
        gone: list[Execution] = []
        stuck: list[Execution] = []
        for estate in list(self._estates):
            marks = {(e.handed.id, str(e.handed.execution)) for e in estate.executions}
            alive = process_tree.kill_marked(self._belongs(marks), SIGKILL, seconds=0) if marks else []
            dead = not strays and not alive and estate.launcher not in launchers
            estate.clean = estate.clean + 1 if dead else 0
            if estate.clean >= CLEAN_LOOKS:
                gone += estate.executions
                self._estates.remove(estate)
            elif now >= estate.give_up_at and not estate.stuck:
                estate.stuck = True
                stuck += estate.executions
        hurry = any(estate.clean or not estate.stuck for estate in self._estates)
        self._look_at = now + (LOOK_S if hurry else STUCK_LOOK_S)
        return gone, stuck

    def _belongs(self, marks: set[tuple[str, str]]) -> Callable[..., bool]:
        return lambda env: (
            env.get("PILOTQ_DIR") == self._directory
            and (env.get("PILOTQ_TASK_ID", ""), env.get("PILOTQ_EXECUTION", "")) in marks
        )

    @staticmethod
    def _kill_strays(launchers: set[int]) -> bool:
        """Orphans come to us from a dead launcher only, with their marks or without; True if some live."""
        everybody = process_tree.processes()
        me = os.getpid()
        ours = [p.pid for p in everybody.values() if p.parent == me and p.pid not in launchers]
        strays = process_tree.below(ours, everybody)
        for process in strays:
            process_tree.send(process, SIGKILL)
        return bool(strays)
