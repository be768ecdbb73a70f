"""`core_hours`: what the core-hours of a pilot were spent on, by the executions in its journal. Pure."""

from __future__ import annotations

from heapq import heappop, heappush

import msgspec

from pilotq.broker.client.executions import Executions

MICRO = 1_000_000
NOTABLE = 0.05  # a smaller share is not worth a change
PARTS = {
    "finished": "finished: executions that finished",
    "lost": "wasted: executions that failed, were stopped, or were tried again",
    "start_up": "start-up: idle before the first execution began",
    "no_work": "nothing queued: idle, with too little in the queue",
    "large": "large tasks: idle, too few for the task that was next",
    "overhead": "overhead: idle while tasks that fit were waiting",
    "tail": "tail: idle after the last execution had begun",
}
ADVICE = {
    "lost": "was wasted on failures and retries: `pilotq report` says why they failed",
    "start_up": "passed before the first task began: let one pilot run more tasks",
    "no_work": "had nothing queued: ask for fewer cores, or submit more at once",
    "large": "waited for large tasks: ask for tasks with fewer cores, or for more cores at once",
    "overhead": "was idle while tasks began: longer tasks begin less often",
    "tail": "went into the tail: long tasks first and shorter ones last, or fewer cores",
}


class CoreHours(msgspec.Struct, kw_only=True):
    """Core-microseconds by what they were spent on; the sum of PARTS is exactly ``whole``."""

    whole: int = 0
    finished: int = 0
    lost: int = 0
    start_up: int = 0
    no_work: int = 0
    large: int = 0
    overhead: int = 0
    tail: int = 0

    def share(self, part: str) -> float:
        """The part's share of the whole, from 0 to 1."""
        return float(getattr(self, part) / self.whole) if self.whole else 0.0

    @property
    def advice(self) -> str:
        """One sentence: the largest part that was not spent on what finished, and what to ask for next time."""
        if not self.whole:
            return ""
        worst = max(ADVICE, key=self.share)
        if self.share(worst) < NOTABLE:
            return f"{100 * self.share('finished'):.0f} % of the core-hours went into tasks that finished"
        return f"{100 * self.share(worst):.0f} % of the core-hours {ADVICE[worst]}"


def core_hours(
    runs: Executions, *, cores: int | None = None, begin: float | None = None, end: float | None = None
) -> CoreHours:
    """Divide ``cores`` x (``end`` - ``begin``) by what the cores did; times in unix seconds.

    Without them: all cores that any execution held, from the first time in the queue to the last end. Of what
    executions held only the time in between counts, and where they held more than ``cores``, as much as there is.
    Idle cores count as a whole for what there was at the time, see PARTS; next is the execution that began first of
    those in the queue, in which tasks with dependencies are from their release on. A node that joined late or left
    early counts as idle meanwhile.
    """
    found = CoreHours()
    if not len(runs):
        if cores and begin is not None and end is not None:
            found.whole = found.start_up = cores * max(_micro(end) - _micro(begin), 0)
        return found
    cores = len(runs.held()) if cores is None else cores
    sweep = _Sweep(runs, cores, found)
    first = _micro(min(runs.queued) if begin is None else begin)
    sweep.run(first, max(_micro(max(runs.ended) if end is None else end), first))
    return found


class _Sweep:
    """Goes through the moments at which something changed, and attributes the cores between them."""

    def __init__(self, runs: Executions, cores: int, found: CoreHours) -> None:
        self.runs, self.cores, self.found = runs, cores, found
        self.held = self.useful = 0  # cores of executions; of those that will finish
        self.demand = 0  # cores that those in the queue want
        self.queue: list[int] = []  # heap of places in the order of starts
        self.begun = 0  # executions, in the order of starts
        every = range(len(runs))
        self.by_start = sorted(every, key=runs.started.__getitem__)
        self.good = [word == "finished" for word in runs.statuses.words]

    def run(self, begin: int, end: int) -> None:
        runs = self.runs
        every = range(len(runs))
        by_end = sorted(every, key=runs.ended.__getitem__)
        place = [0] * len(runs)
        for number, run in enumerate(self.by_start):
            place[run] = number
        by_queue = sorted(every, key=runs.queued.__getitem__)
        # Of what happens at one moment ends come first, then what is queued, then starts; none starts before it is
        # queued, and none ends before it has started, but it may do both in one microsecond.
        queued = ended = 0
        now, total = begin, len(runs)
        while ended < total:
            at_start = _micro(runs.started[self.by_start[self.begun]]) if self.begun < total else None
            at_queue = _micro(runs.queued[by_queue[queued]]) if queued < total else None
            at_end = _micro(runs.ended[by_end[ended]])
            can_end = ended < self.begun and place[by_end[ended]] < self.begun
            moment = min(at for at in (at_start, at_queue, at_end if can_end else None) if at is not None)
            until = min(max(moment, begin), end)
            if until > now:
                self._spend(until - now)
                now = until
            if can_end and at_end == moment:
                self._hold(by_end[ended], -1)
                ended += 1
            elif at_queue == moment:
                self.demand += runs.cores[by_queue[queued]]
                heappush(self.queue, place[by_queue[queued]])
                queued += 1
            else:
                run = self.by_start[self.begun]
                self.demand -= runs.cores[run]
                self.begun += 1
                self._hold(run, 1)
        if end > now:
            self._spend(end - now)

    def _hold(self, run: int, sign: int) -> None:
        cores = self.runs.cores[run] * sign
        self.held += cores
        if self.good[self.runs.status[run]]:
            self.useful += cores

    def _spend(self, time: int) -> None:
        found, cores = self.found, self.cores
        found.whole += cores * time
        held = min(self.held, cores)
        useful = self.useful * held * time // self.held if self.held else 0
        found.finished += useful
        found.lost += held * time - useful
        idle = cores - held
        if not idle:
            return
        if not self.begun:
            found.start_up += idle * time
        elif self.begun == len(self.runs):
            found.tail += idle * time
        else:
            while self.queue and self.queue[0] < self.begun:
                heappop(self.queue)
            if self.queue and self.runs.cores[self.by_start[self.queue[0]]] > idle:
                found.large += idle * time
            else:
                wanted = min(idle, self.demand) if self.queue else 0
                found.overhead += wanted * time
                found.no_work += (idle - wanted) * time


def _micro(time: float) -> int:
    return round(time * MICRO)
