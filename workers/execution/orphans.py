"""Kills the tasks that a dead launcher leaves behind, found by their marks, before their end is reported."""

from __future__ import annotations

import os
from collections.abc import Callable
from signal import SIGKILL

from pilotq.broker.settings import Settings
from pilotq.workers import process_tree
from pilotq.workers.execution.execution import Execution

POLL_S = 0.02  # between two polls of what was killed
STUCK_POLL_S = 1.0  # ... where all that is left hangs in the kernel


class _Orphans:
    """The executions of one launcher that is dead, or was killed and hangs in the kernel."""

    def __init__(self, launcher: int, executions: list[Execution], give_up_at: float) -> None:
        self.launcher = launcher
        self.executions = executions
        self.give_up_at = give_up_at
        self.stuck = False
        self.clean = 0


class OrphanReaper:
    """Kills the tasks of dead launchers, over several calls of `reap`.

    ``directory`` is the pilot's: other pilots of this user may have tasks of the same name.
    """

    def __init__(self, directory: str, settings: Settings) -> None:
        self._directory = directory
        self._unkillable_s = settings.unkillable_s
        self._groups: list[_Orphans] = []
        self._poll_at = 0.0

    def add(self, launcher: int, executions: list[Execution], now: float) -> None:
        self._groups.append(_Orphans(launcher, executions, now + self._unkillable_s))
        self._poll_at = now

    def next(self) -> float | None:
        """Monotonic time of the next `reap`; None when nothing is left."""
        return self._poll_at if self._groups else None

    def reap(self, now: float, launchers: dict[int, int]) -> tuple[list[Execution], list[Execution]]:
        """Kill what is there; returns the executions of which nothing lives any more, and those that cannot be killed:
        each once, and it is polled until it has ended.

        Nothing before `next`. ``launchers`` are the pids of the launchers that live, by number.
        """
        if not self._groups or now < self._poll_at:
            return [], []
        strays = self._kill_strays(set(launchers.values()))
        gone: list[Execution] = []
        stuck: list[Execution] = []
        for orphans in list(self._groups):
            marks = {(e.run.id, str(e.run.execution)) for e in orphans.executions}
            alive = process_tree.kill_marked(self._belongs(marks), SIGKILL, seconds=0) if marks else []
            dead = not strays and not alive and orphans.launcher not in launchers
            orphans.clean = orphans.clean + 1 if dead else 0
            if orphans.clean >= process_tree.CLEAN_SCANS:
                gone += orphans.executions
                self._groups.remove(orphans)
            elif now >= orphans.give_up_at and not orphans.stuck:
                orphans.stuck = True
                stuck += orphans.executions
        hurry = any(orphans.clean or not orphans.stuck for orphans in self._groups)
        self._poll_at = now + (POLL_S if hurry else STUCK_POLL_S)
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
        strays = process_tree.living_subtree(ours, everybody)
        for process in strays:
            process_tree.send_signal(process, SIGKILL)
        return bool(strays)
