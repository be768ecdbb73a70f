"""When the allocation of a pilot or of a joined worker ends, read again from time to time: admins extend it.

The end is a moment of the wall clock, as Slurm has it. Asking never blocks: `scontrol` runs beside, and is killed when
it does not answer.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import IO

from pilotq.broker.processes import log
from pilotq.broker.slurm.allocation import SCONTROL_S, end_of, first_end, job_id
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument

SAVE_SHARE, SAVE_S = 0.25, 10.0  # of the grace, what is kept to write everything down when nothing runs any more


class Deadline:
    """The end of one job. ``now`` is monotonic, ``clock`` unix seconds; ``end`` is unix seconds, None: unknown."""

    def __init__(self, env: Mapping[str, str], grace: float, notice: int, read_s: float) -> None:
        self.job = job_id(env)
        self.grace = grace
        self.notice = notice  # number of the signal that tasks get first
        self.end = first_end(env)
        self._read_s = read_s
        self._asked_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answer: IO[bytes] | None = None
        self._told: float | None = None
        self._failures = 0
        self._heard = False  # an answer was taken in, or asking has failed

    @property
    def pid(self) -> int:
        """Of `scontrol`, while it runs."""
        return self._process.pid if self._process is not None else 0

    @property
    def settled(self) -> bool:
        """Whether nothing is to be waited for: the end is known, or there is none, or nobody says; after SCONTROL_S
        seconds of `look` at the latest."""
        return not self.job or self.end is not None or self._heard

    def due(self, clock: float) -> bool:
        """Whether it is time to begin to end."""
        return self.end is not None and clock >= self.end - self.grace

    def left_for_tasks(self, clock: float) -> float:
        """Seconds that tasks may still run once it is time: what is left, but for some to write everything down."""
        left = self.grace if self.end is None else min(self.grace, self.end - clock)
        return max(left - min(SAVE_S, SAVE_SHARE * self.grace), 0.0)

    def look(self, now: float) -> None:
        """Ask when it is time, and take in the answer; never waits."""
        if not self.job:
            return
        if self._process is None:
            if self._asked_at is None or now >= self._asked_at + self._read_s:
                self._ask(now)
        elif self._process.poll() is not None:
            self._take()
        elif self._asked_at is not None and now >= self._asked_at + SCONTROL_S:
            self.close()
            self._note_failure(f"does not answer within {SCONTROL_S:.0f} s")

    def news(self) -> tuple[Argument, ...] | None:
        """The command that tells the dispatcher of the end, when it has changed; then call `told`."""
        if self.end is None or self.end == self._told:
            return None
        return ("HSET", keys.ENDS, self.job, f"{self.end - self.grace:.3f} {self.left_for_tasks(0):.3f} {self.notice}")

    def told(self) -> None:
        self._told = self.end

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
                stdin=subprocess.DEVNULL, stdout=self._answer, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.close()
            self._note_failure(f"cannot be run: {error.strerror}")

    def _take(self) -> None:
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
        self._heard = True
        end = end_of(dict(re.findall(r"(\w+)=(\S*)", text)))
        if end is not None and end != self.end:
            moved = "ends" if self.end is None else "is moved: it ends"
            log(f"the allocation (job {self.job}) {moved} at {end:.0f} (unix seconds)")
            self.end = end

    def _note_failure(self, how: str) -> None:
        self._failures += 1
        self._heard = True
        if self._failures == 1:
            known = "its end is not known" if self.end is None else "what was known of its end stands"
            log(f"scontrol show job {self.job} {how}: {known}; it is asked again every {self._read_s:.0f} s")
