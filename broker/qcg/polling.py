"""Waiting for jobs: how often it is looked, and which ends were told already.

There are no events to wait for, only states to look at: an event may be of a job submitted before, or of one iteration
of many, and a wait that believes it returns early or says SUCCEED of what has failed.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from pilotq.broker.qcg.errors import TimeoutElapsed
from pilotq.broker.qcg.service.states import FINAL

Ask = Callable[[dict[str, Any]], Mapping[str, Any]]  # from a request to the data of its reply

SHORTEST_S, LONGEST_S = 0.01, 0.2
SHARE = 2  # what waits rests at least so many times as long as it has looked


class Pace:
    """Rests between looks, which grow, until ``timeout`` seconds are over (None: for ever)."""

    def __init__(self, timeout: float | None, longest: float) -> None:
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._longest = min(max(longest, SHORTEST_S), LONGEST_S)
        self._pause = SHORTEST_S
        self._looking = time.monotonic()

    def rest(self, what: str) -> None:
        """Sleep until the next look; raises TimeoutElapsed, saying ``what`` has not happened, when there is none."""
        now = time.monotonic()
        pause = max(self._pause, SHARE * (now - self._looking))
        if self.deadline is not None:
            if now >= self.deadline:
                raise TimeoutElapsed(f"{what} after {self.timeout:g} s")
            pause = min(pause, self.deadline - now)
        time.sleep(pause)
        self._pause = min(self._pause * 1.3, self._longest)
        self._looking = time.monotonic()


class Ends:
    """The ends of jobs and iterations, each told once, about in the order in which they happened.

    No news is what others submitted and had ended when the first end was asked for.
    """

    def __init__(self) -> None:
        self._ours: set[str] = set()  # jobs submitted here, not told yet
        self._told: set[str] | None = None  # jobs; None: nobody has asked yet
        self._parts: defaultdict[str, set[str]] = defaultdict(set)  # job that goes on -> its iterations that were told
        self._found: deque[tuple[str, str]] = deque()

    def submitted(self, names: Collection[str]) -> None:
        self._ours.update(names)
        for name in names:
            self._parts.pop(name, None)  # one of this name was removed
        if self._told is not None:
            self._told.difference_update(names)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """The ends of these (default: of all that were submitted here) are known to the user in another way."""
        known = set(self._ours if names is None else names)
        self._found = deque(end for end in self._found if end[0] not in known)
        self._ours -= known
        for name in known:
            job, colon, _ = name.partition(":")
            if colon:
                self._parts[job].add(name)
            elif self._told is not None:
                self._told.add(name)

    def next(self, ask: Ask) -> tuple[str, str] | None:
        """(name, state) of an end that was not told yet; None when there is none now."""
        if not self._found:
            self._look(ask)
        return self._found.popleft() if self._found else None

    def _look(self, ask: Ask) -> None:
        jobs = {name: job["status"] for name, job in ask({"request": "listJobs"})["jobs"].items()}
        if self._told is None:
            self._told = {name for name, state in jobs.items() if state in FINAL and name not in self._ours}
        fresh = [name for name in jobs if name not in self._told]
        # Their state again, and not that of the list: when it is final here, so are those of all iterations.
        for name, job in _info(ask, fresh).items() if fresh else ():
            done = int(job.get("iterations", {}).get("finished", 0))
            if done > len(self._parts.get(name, ())):
                self._look_into(ask, name)
            if job["status"] in FINAL:
                self._found.append((name, job["status"]))
                self._told.add(name)
                self._ours.discard(name)
                self._parts.pop(name, None)

    def _look_into(self, ask: Ask, name: str) -> None:
        told = self._parts[name]
        for child in _info(ask, [name], withChilds=True).get(name, {}).get("childs", ()):
            part = f"{name}:{child['iteration']}"
            if child["state"] in FINAL and part not in told:
                self._found.append((part, child["state"]))
                told.add(part)


def _info(ask: Ask, names: list[str], **params: Any) -> dict[str, Mapping[str, Any]]:
    reply = ask({"request": "jobInfo", "jobNames": names, "params": params})
    return {name: job["data"] for name, job in reply["jobs"].items() if "data" in job}
