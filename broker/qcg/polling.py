"""Waiting for jobs by polling: the interval between polls, and which ends of jobs were reported already.

It polls states and does not wait for events: an event may be of a job submitted before, or of one iteration of many,
and a wait that trusts it returns too early, or reports SUCCEED for what has failed.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from pilotq.broker.qcg.errors import TimeoutElapsed
from pilotq.broker.qcg.service.states import FINAL

Ask = Callable[[dict[str, Any]], Mapping[str, Any]]  # from a request to the data of its reply

INTERVAL_MIN_S, INTERVAL_MAX_S = 0.01, 0.2
REST_RATIO = 2  # a wait sleeps at least so many times as long as a poll took


class PollInterval:
    """The growing interval between polls, until ``timeout`` seconds are over (None: without limit)."""

    def __init__(self, timeout: float | None, longest: float) -> None:
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._longest = min(max(longest, INTERVAL_MIN_S), INTERVAL_MAX_S)
        self._pause = INTERVAL_MIN_S
        self._poll_started = time.monotonic()

    def sleep(self, what: str) -> None:
        """Sleep until the next poll; raises TimeoutElapsed, whose text begins with ``what``, when time is over."""
        now = time.monotonic()
        pause = max(self._pause, REST_RATIO * (now - self._poll_started))
        if self.deadline is not None:
            if now >= self.deadline:
                raise TimeoutElapsed(f"{what} after {self.timeout:g} s")
            pause = min(pause, self.deadline - now)
        time.sleep(pause)
        self._pause = min(self._pause * 1.3, self._longest)
        self._poll_started = time.monotonic()


class JobEnds:
    """The ends of jobs and iterations, each reported once, about in the order in which they happened.

    Jobs that others submitted, and that had ended when the first end was asked for, are not reported.
    """

    def __init__(self) -> None:
        self._unreported: set[str] = set()  # jobs submitted here, not reported yet
        self._reported: set[str] | None = None  # jobs; None: before the first call of `next`
        self._reported_iterations: defaultdict[str, set[str]] = defaultdict(set)  # of jobs that have not ended
        self._pending: deque[tuple[str, str]] = deque()

    def submitted(self, names: Collection[str]) -> None:
        """These jobs were submitted here: their ends are to be reported."""
        self._unreported.update(names)
        for name in names:
            self._reported_iterations.pop(name, None)  # one of this name was removed
        if self._reported is not None:
            self._reported.difference_update(names)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Do not report the ends of these (default: of all that were submitted here): the user knows them."""
        known = set(self._unreported if names is None else names)
        self._pending = deque(end for end in self._pending if end[0] not in known)
        self._unreported -= known
        for name in known:
            job, colon, _ = name.partition(":")
            if colon:
                self._reported_iterations[job].add(name)
            elif self._reported is not None:
                self._reported.add(name)

    def next(self, ask: Ask) -> tuple[str, str] | None:
        """(name, state) of an end that was not reported yet; None when there is none now."""
        if not self._pending:
            self._poll(ask)
        return self._pending.popleft() if self._pending else None

    def _poll(self, ask: Ask) -> None:
        jobs = {name: job["status"] for name, job in ask({"request": "listJobs"})["jobs"].items()}
        if self._reported is None:
            self._reported = {name for name, state in jobs.items() if state in FINAL and name not in self._unreported}
        fresh = [name for name in jobs if name not in self._reported]
        # Their state again, and not that of the list: when it is final here, so are those of all iterations.
        for name, job in _info(ask, fresh).items() if fresh else ():
            done = int(job.get("iterations", {}).get("finished", 0))
            if done > len(self._reported_iterations.get(name, ())):
                self._poll_iterations(ask, name)
            if job["status"] in FINAL:
                self._pending.append((name, job["status"]))
                self._reported.add(name)
                self._unreported.discard(name)
                self._reported_iterations.pop(name, None)

    def _poll_iterations(self, ask: Ask, name: str) -> None:
        reported = self._reported_iterations[name]
        for child in _info(ask, [name], withChilds=True).get(name, {}).get("childs", ()):
            part = f"{name}:{child['iteration']}"
            if child["state"] in FINAL and part not in reported:
                self._pending.append((part, child["state"]))
                reported.add(part)


def _info(ask: Ask, names: list[str], **params: Any) -> dict[str, Mapping[str, Any]]:
    reply = ask({"request": "jobInfo", "jobNames": names, "params": params})
    return {name: job["data"] for name, job in reply["jobs"].items() if "data" in job}
