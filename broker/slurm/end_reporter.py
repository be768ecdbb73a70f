"""Tells the queue when the allocation of a joined node ends: the pilot's supervisor knows nothing of that job.

Each node of the job has a herald, and they take turns: Slurm is asked by one of them at a time, however many there are,
and a node that is gone delays the next answer, no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pilotq.broker.errors import ServerUnavailable
from pilotq.broker.processes import log
from pilotq.broker.settings import Settings
from pilotq.broker.slurm.allocation import SCONTROL_S
from pilotq.broker.slurm.deadline import Deadline
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Link

OTHERS_S = 3.0  # so long the first node of the step may take to tell, then each asks for itself
LEARN_S = SCONTROL_S + OTHERS_S + 1.0
PAUSE_S = 0.02


class Herald:
    """One node's. ``env`` is its step's; empty where nothing is to be told: no job, or that of the pilot itself."""

    def __init__(self, link: Link, env: Mapping[str, str], grace: float, notice: int, settings: Settings) -> None:
        step = env if "SLURM_STEP_NUM_TASKS" in env else {}  # a batch script has the variables of its tasks to come
        turns = int(step.get("SLURM_STEP_NUM_TASKS", 1))
        place = int(step.get("SLURM_PROCID", 0))
        self._link = link
        self._deadline = Deadline(env, grace, notice, turns * settings.deadline_s)
        self._first = place == 0
        self._wait = place * settings.deadline_s
        self._look_at = 0.0  # monotonic
        self._tell_at = 0.0

    @property
    def pid(self) -> int:
        """Of `scontrol`, while it runs."""
        return self._deadline.pid

    def learn(self, stopped: Callable[[], bool]) -> None:
        """Wait until the queue knows the end of the allocation, or nobody says it; LEARN_S seconds at most."""
        if not self._deadline.job:
            return
        begin = time.monotonic()
        while not stopped() and (now := time.monotonic()) < begin + LEARN_S:
            if self._first or now >= begin + OTHERS_S:
                self._deadline.look(now)
            if self._deadline.settled and self._told(now):
                return
            if not self._first and self._known():
                self._look_at = begin + self._wait
                return
            time.sleep(PAUSE_S)
        if not stopped():
            log(f"the end of job {self._deadline.job} could not be told: tasks may be begun that cannot end in time")

    def turn(self, now: float) -> None:
        """Ask when it is this node's turn, and tell what is new; ``now`` is monotonic."""
        if now >= self._look_at:
            self._deadline.look(now)
            self._told(now)

    def close(self) -> None:
        self._deadline.close()

    def _told(self, now: float) -> bool:
        """Whether nothing is left to be told."""
        command = self._deadline.news()
        if command is None:
            return True
        if now < self._tell_at:
            return False
        try:
            self._link.call(*command)
        except ServerUnavailable:
            self._tell_at = now + 1.0
            return False
        self._deadline.told()
        return True

    def _known(self) -> bool:
        """Whether another node of this job has told."""
        try:
            return bool(self._link.call("HEXISTS", keys.ENDS, self._deadline.job))
        except ServerUnavailable:
            return False
