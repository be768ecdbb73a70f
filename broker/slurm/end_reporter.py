"""Reports to the queue when the allocation of a joined node ends: the pilot's supervisor does not know that job.

Each node of the job has a reporter, and they take turns: one of them at a time asks Slurm, however many there are, and
a node that is lost only delays the next answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pilotq.broker.errors import ServerUnavailable
from pilotq.broker.log import log
from pilotq.broker.settings import Settings
from pilotq.broker.slurm.allocation import SCONTROL_S
from pilotq.broker.slurm.deadline import Deadline
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection

FIRST_NODE_S = 3.0  # the first node of the step may take so long to report, then each node asks by itself
FIRST_REPORT_S = SCONTROL_S + FIRST_NODE_S + 1.0
POLL_S = 0.02


class AllocationEndReporter:
    """The reporter of one node.

    ``env`` is the environment of its job step; empty where nothing is to be reported: no job, or the pilot's own.
    """

    def __init__(
        self, connection: Connection, env: Mapping[str, str], grace: float, notice: int, settings: Settings
    ) -> None:
        step = env if "SLURM_STEP_NUM_TASKS" in env else {}  # a batch script has the variables of its tasks to come
        turns = int(step.get("SLURM_STEP_NUM_TASKS", 1))
        place = int(step.get("SLURM_PROCID", 0))
        self._connection = connection
        self._deadline = Deadline(env, grace, notice, turns * settings.allocation_poll_s)
        self._first = place == 0
        self._delay = place * settings.allocation_poll_s
        self._poll_at = 0.0  # monotonic
        self._retry_at = 0.0

    @property
    def pid(self) -> int:
        """Process number of `scontrol`, while it runs; else 0."""
        return self._deadline.pid

    def report_first(self, stopped: Callable[[], bool]) -> None:
        """Wait until the queue knows the end of the allocation, or Slurm does not tell it; FIRST_REPORT_S at most."""
        if not self._deadline.job:
            return
        begin = time.monotonic()
        while not stopped() and (now := time.monotonic()) < begin + FIRST_REPORT_S:
            if self._first or now >= begin + FIRST_NODE_S:
                self._deadline.poll(now)
            if self._deadline.settled and self._report(now):
                return
            if not self._first and self._is_reported():
                self._poll_at = begin + self._delay
                return
            time.sleep(POLL_S)
        if not stopped():
            log(
                f"the end of job {self._deadline.job} could not be reported: tasks may start that cannot end in time",
                level="warning",
            )

    def poll(self, now: float) -> None:
        """Ask when it is this node's turn, and report a change; ``now`` is monotonic."""
        if now >= self._poll_at:
            self._deadline.poll(now)
            self._report(now)

    def close(self) -> None:
        self._deadline.close()

    def _report(self, now: float) -> bool:
        """Report the end if it has changed; whether nothing is left to report."""
        command = self._deadline.pending_update()
        if command is None:
            return True
        if now < self._retry_at:
            return False
        try:
            self._connection.call(*command)
        except ServerUnavailable:
            self._retry_at = now + 1.0
            return False
        self._deadline.mark_sent()
        return True

    def _is_reported(self) -> bool:
        """Whether another node of this job has reported it."""
        try:
            return bool(self._connection.call("HEXISTS", keys.ALLOCATION_ENDS, self._deadline.job))
        except ServerUnavailable:
            return False
