"""The end of a Slurm allocation, of a pilot or of a joined worker; it is read again from time to time.

Administrators may extend an allocation. Its end is wall-clock time, as Slurm has it. Reading never blocks: `scontrol`
runs as a child process, and is killed when it does not answer.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from typing import IO

from pilotq.broker.log import log
from pilotq.broker.slurm.allocation import (
    SCONTROL_S,
    end_from_env,
    end_from_job,
    job_id,
    job_record,
    scontrol_environment,
)
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument

SAVE_SHARE, SAVE_S = 0.25, 10.0  # share of the grace, at most so many seconds, for writing everything after the tasks


class Deadline:
    """The end of one job's allocation, kept up to date by `poll`.

    ``now`` is monotonic, ``clock`` and ``end`` are unix seconds; ``end`` is None while it is unknown.
    """

    def __init__(self, env: Mapping[str, str], grace: float, notice: int, poll_s: float) -> None:
        self.job = job_id(env)
        self.grace = grace
        self.notice = notice  # number of the signal that tasks get first
        self.end = end_from_env(env)
        self._poll_s = poll_s
        self._asked_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answer: IO[bytes] | None = None
        self._sent: float | None = None
        self._failures = 0
        self._answered = False  # scontrol has answered, or has failed

    @property
    def pid(self) -> int:
        """Process number of `scontrol`, while it runs; else 0."""
        return self._process.pid if self._process is not None else 0

    @property
    def settled(self) -> bool:
        """Whether the end is known, or there is none, or Slurm does not tell it; true after SCONTROL_S of polling."""
        return not self.job or self.end is not None or self._answered

    def due(self, clock: float) -> bool:
        """Whether the pilot must begin to end."""
        return self.end is not None and clock >= self.end - self.grace

    def left_for_tasks(self, clock: float) -> float:
        """Seconds that tasks may run once the pilot ends: what is left, less some to write everything."""
        left = self.grace if self.end is None else min(self.grace, self.end - clock)
        return max(left - min(SAVE_S, SAVE_SHARE * self.grace), 0.0)

    def poll(self, now: float) -> None:
        """Ask when it is time, and read the answer; never waits."""
        if not self.job:
            return
        if self._process is None:
            if self._asked_at is None or now >= self._asked_at + self._poll_s:
                self._ask(now)
        elif self._process.poll() is not None:
            self._read_answer()
        elif self._asked_at is not None and now >= self._asked_at + SCONTROL_S:
            self.close()
            self._note_failure(f"does not answer within {SCONTROL_S:.0f} s")

    def pending_update(self) -> tuple[Argument, ...] | None:
        """The command that reports the end to the dispatcher, if it has changed; once it is sent call `mark_sent`."""
        if self.end is None or self.end == self._sent:
            return None
        return (
            "HSET",
            keys.ALLOCATION_ENDS,
            self.job,
            f"{self.end - self.grace:.3f} {self.left_for_tasks(0):.3f} {self.notice}",
        )

    def mark_sent(self) -> None:
        self._sent = self.end

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _ask(self, now: float) -> None:
        self._asked_at = now
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        try:
            self._process = subprocess.Popen(
                ["scontrol", "show", "job", self.job],
                stdin=subprocess.DEVNULL, stdout=self._answer, stderr=subprocess.DEVNULL, env=scontrol_environment(),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.close()
            self._note_failure(f"cannot be run: {error.strerror}")

    def _read_answer(self) -> None:
        process, answer = self._process, self._answer
        assert process is not None and answer is not None, "only called while there is one"
        answer.seek(0)
        text = answer.read().decode("utf-8", "replace")
        code = process.returncode
        self.close()
        if code:
            self._note_failure(f"ended with exit code {code}")
            return
        self._failures = 0
        self._answered = True
        end = end_from_job(job_record(text, self.job))
        if end is not None and end != self.end:
            moved = "ends" if self.end is None else "is moved: it ends"
            log(f"the allocation (job {self.job}) {moved} at {end:.0f} (unix seconds)")
            self.end = end

    def _note_failure(self, how: str) -> None:
        self._failures += 1
        self._answered = True
        if self._failures == 1:
            known = "its end is not known" if self.end is None else "the end known before stays"
            log(f"scontrol show job {self.job} {how}: {known}; it is asked again every {self._poll_s:.0f} s")
