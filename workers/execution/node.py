"""What happens on a node: messages of the dispatcher, records of launchers and deadlines, each with its consequences.

`Node` waits for nothing: the loop (control.py) brings it what has happened, with the time.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Mapping

from pilotq.broker import failpoints
from pilotq.broker.errors import ServerUnavailable, StateLost, Superseded
from pilotq.broker.processes import log
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import End, Handed, Hello, Leave, NodeInfo, NodeState, Recall, Stop, ToWorker
from pilotq.workers.execution.crash_isolation import Trials
from pilotq.workers.execution.escalation import Execution, Ladder, Phase, Step
from pilotq.workers.execution.launch_builder import Preparer, UnlaunchableError
from pilotq.workers.execution.launcher_pool import Launcher, Launchers
from pilotq.workers.execution.orphans import Remains
from pilotq.workers.execution.output_files import Reruns
from pilotq.workers.execution.reporting import LEAVING, Outbox, Reporter
from pilotq.workers.execution.slots import Lane, Lanes
from pilotq.workers.protocol import (
    Base,
    Begun,
    Call,
    Exited,
    Launch,
    Place,
    Refused,
    Returned,
    Signal,
    Started,
    Swept,
    Up,
    Withdraw,
    Withdrawn,
)
from pilotq.workers.session import NodeLink, iso

SIGNALS = {Step.TERM: signal.SIGTERM, Step.KILL: signal.SIGKILL}
FETCH_AGAIN_S = 0.5  # a launch that needs the server while it is away is tried again


class Node:
    """One node of the pilot in ``directory``, as the dispatcher knows it from ``info``."""

    def __init__(
        self, link: NodeLink, launchers: Launchers, directory: str, info: NodeInfo, real: Mapping[int, int],
        settings: Settings,
    ) -> None:  # fmt: skip
        self._link = link
        self._launchers = launchers
        self._info = info
        self._settings = settings
        self._lanes = Lanes(settings)
        self._ladder = Ladder(settings)
        self._preparer = Preparer(link, directory, real, info.address)
        self._reporter = Reporter(info.name, directory)
        self._remains = Remains(directory, settings)
        self.outbox = Outbox(link, settings)
        self._ready: deque[Execution] = deque()  # have a lane: `launch` takes them
        self._postponed: dict[int, Execution] = {}  # have a lane, but the server was away
        self._fetch_at = 0.0
        self._begun: set[int] = set()  # lanes that have gone on to another task: `launch` lines up behind it
        self._withdrawn: list[Execution] = []  # ahead again, and to be given back
        self._starts: list[tuple[str, int, str, str, str, str]] = []
        self._reruns = Reruns()
        self._trials = Trials(settings)
        self._notice = 0  # number of the signal that says that the end is near
        self.leaving = False

    @property
    def busy(self) -> bool:
        return len(self._lanes) > 0

    def running(self) -> list[Execution]:
        return [e for e in self._lanes if e.started]

    # -- what the dispatcher says ----------------------------------------------------------------------------------

    def receive(self, message: ToWorker, now: float) -> None:
        if isinstance(message, Handed):
            self._hand(message)
        elif isinstance(message, Stop):
            e = self._lanes.find(message.id, message.execution)
            if e is not None:
                self._stop(e, message.reason, self._settings.kill_grace_s, now)
        elif isinstance(message, Recall):
            tasks = self._lanes.recall(message.class_name, message.count)
            self._give_back(tasks, message.class_name)
            for e in self._lanes.newest_lined(message.class_name, message.count - len(tasks)):
                e.recalled = True
                self._do(e, self._ladder.withdraw(e, now), now)
        elif isinstance(message, Hello):
            # What has ended is no longer in the state: said later, it would be counted a second time.
            self.outbox.flush(now, all_now=True)
            self._link.post_state(self._state(message.term))

    def _state(self, term: int) -> NodeState:
        return self._lanes.state(self._info, term)

    def _hand(self, handed: Handed) -> None:
        if self._lanes.find(handed.id, handed.execution) is not None:
            return  # said twice
        e = self._lanes.hand(handed)
        if e.phase is Phase.WAITING:
            self._ready.append(e)
        if self.leaving:
            e.reason = LEAVING[0]
            self._give_back(self._lanes.recall_all())

    def _stop(self, e: Execution, reason: str, grace: float, now: float, *, notice: bool = False) -> None:
        if e.launched:
            self._do(e, self._ladder.stop(e, reason, grace, now, notice=notice), now)
            return
        e.reason = e.reason or reason
        if e.phase is Phase.AHEAD:
            self._end(e, time.time(), now)
        elif self._postponed.pop(e.key, None) is not None:
            self._ready.append(e)

    def _give_back(self, tasks: list[Execution], asked: str = "") -> None:
        """``asked``: the class whose recall must be answered even when nothing of it is left."""
        counts = {asked: 0} if asked else {}
        for e in tasks:
            counts[e.handed.class_name] = counts.get(e.handed.class_name, 0) + 1
        if counts:
            self._link.post_give_back([(e.handed.id, e.handed.execution) for e in tasks], counts)

    def leave(self, word: Leave, now: float) -> None:
        """End all tasks and give everything back; said again, it can only shorten the grace."""
        self.leaving, self._notice = True, word.notice
        self._give_back(self._lanes.recall_all())
        for e in self._lanes:
            self._stop(e, word.reason, word.grace, now, notice=word.notice != 0)

    # -- what launchers say ----------------------------------------------------------------------------------------

    def heard(self, record: Up, now: float) -> None:
        e = self._ladder.executions.get(record.key)
        if e is None:
            self._heard_late(record, now)
        elif isinstance(record, (Exited, Returned)):
            self._exited(e, record, now)
        elif isinstance(record, Begun):
            e.begun = True
            self._launchers.living[e.launcher].trying = e.key
        elif isinstance(record, Started):
            e.live = (record.stdout_path or e.stdout + e.suffix, record.stderr_path or e.stderr + e.suffix)
            e.pid = record.pid
            self._do(e, self._ladder.started(e, record.at, now - record.seconds), now)
        elif isinstance(record, Swept):
            if e.exited is not None:
                e.exited.stdout, e.exited.stderr = record.stdout, record.stderr
            self._end(e, record.ended, now)
        elif isinstance(record, Refused):
            if not e.reason:
                e.reason, e.message = record.reason, record.message
            self._end(e, time.time(), now)
        elif isinstance(record, Withdrawn):
            self._not_begun(e, now)

    def _heard_late(self, record: Up, now: float) -> None:
        """Of what was withheld, else of what was taken from that launcher."""
        over = isinstance(record, Swept) or (isinstance(record, (Exited, Returned)) and not record.left)
        if over and (e := self._lanes.withheld.get(record.key)) is not None:
            self._end(e, time.time(), now)

    def _exited(self, e: Execution, record: Exited | Returned, now: float) -> None:
        e.exited = record
        if record.left:
            self._do(e, self._ladder.exited(e, now), now)
            return
        early = e.phase is Phase.LAUNCHING or (isinstance(record, Returned) and e.reason == "time limit")
        if early and record.status == 0:
            e.reason = ""  # it ended well before it could be told to end, or has made the best of being told
        e.pid, e.started = record.pid, record.started
        self._lanes.took(e.handed.class_name, record.seconds)
        self._end(e, record.ended, now)

    def _not_begun(self, e: Execution, now: float) -> None:
        """A launcher that was told of it did nothing, and never will: as if nothing had been."""
        self._ladder.ended(e)
        if e.phase is Phase.LAUNCHING:
            e.phase = Phase.WAITING
            self._ready.append(e)
            return
        self._lanes.put_back(e)
        if e.reason and e.reason not in LEAVING:
            self._end(e, time.time(), now)
        elif e.recalled or self.leaving:
            self._withdrawn.append(e)

    def launcher_ended(self, launcher: Launcher, now: float) -> None:
        """A launcher has died or closed its pipe; it is still to be reaped."""
        if not launcher.aside:
            log(f"launcher {launcher.number} (process {launcher.pid}) has died")
            self._abandon(launcher, now, dead=True)

    def _hear(self, launcher: Launcher, now: float) -> None:
        while records := launcher.hear():
            for record in records:
                self.heard(record, now)

    def _abandon(self, launcher: Launcher, now: float, *, dead: bool) -> None:
        """Take everything from a launcher that is dead or hangs, and replace it."""
        self._hear(launcher, now)
        taken = []
        for e in [e for e in self._ladder.executions.values() if e.launcher == launcher.number]:
            if dead and not e.begun:
                self._not_begun(e, now)  # we have heard of all that began
                continue
            if e.phase is Phase.LINED:
                self._lanes.unline(e)
            self._ladder.ended(e)
            e.phase = Phase.KILLED
            if not e.reason:
                e.reason = "worker lost"
            taken.append(e)
        taken += [e for e in self._lanes.withheld.values() if e.launcher == launcher.number]
        self._remains.add(launcher.number, taken, now)
        if self.leaving:
            launcher.kill()
        else:
            self._launchers.replace(launcher)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        """Monotonic time at which `tick` wants to be called."""
        moments = [self._ladder.next(), self._remains.next(), self._fetch_at if self._postponed else None]
        return min((m for m in moments if m is not None), default=None)

    def tick(self, now: float) -> None:
        for e, step in self._ladder.due(now):
            # A launcher that was put aside in this very loop has taken others with it.
            if e.key in self._ladder.executions:
                self._do(e, step, now)
        self._bury(now)
        if self._postponed and now >= self._fetch_at:
            self._ready.extend(self._postponed.values())
            self._postponed.clear()
        if self._withdrawn:
            self._give_back(self._lanes.recall_these(self._withdrawn))
            self._withdrawn.clear()

    def _bury(self, now: float) -> None:
        pids = {launcher.number: launcher.pid for launcher in self._launchers.living.values()}
        gone, stuck = self._remains.look(now, pids)
        for e in gone:
            self._end(e, time.time(), now)
        for e in stuck:
            self._withhold(e, now)

    def _do(self, e: Execution, step: Step | None, now: float) -> None:
        if step is None:
            return
        if step is not Step.WITHDRAW:
            # It takes longer than was thought: what is lined up behind it must be free to go elsewhere.
            for other in self._lanes.behind(e):
                self._do(other, self._ladder.withdraw(other, now), now)
        if step is Step.ANNOUNCE:
            self._starts.append((e.handed.id, e.handed.execution, e.allocation, iso(e.started), *e.live))
        elif step is Step.HANGS:
            self._put_aside(e, now)
        elif step is Step.UNKILLABLE:
            self._withhold(e, now)
        elif (launcher := self._launchers.living.get(e.launcher)) is not None:
            number = SIGNALS.get(step, self._notice)
            launcher.tell(Withdraw(e.key) if step is Step.WITHDRAW else Signal(e.key, number, e.reason))

    def _put_aside(self, e: Execution, now: float) -> None:
        launcher = self._launchers.living.get(e.launcher)
        if launcher is None:
            return  # it has died at the same moment: its tasks are being buried
        self._hear(launcher, now)
        if e.key not in self._ladder.executions or self._ladder.waits(e):
            return  # what it says had not been heard
        log(f"launcher {launcher.number} does not go on with task {e.handed.id}: it is put aside")
        self._ladder.blame(launcher.number, launcher.trying)
        self._abandon(launcher, now, dead=False)

    # -- launching and ending --------------------------------------------------------------------------------------

    def launch(self, now: float) -> None:
        """Tell the launchers to start whatever has a lane, and what to start after it."""
        while self._ready:
            e = self._ready.popleft()
            if e.reason:
                self._end(e, time.time(), now)
            elif not self._trials.may_begin(e.handed, self._ladder.executions, now):
                self._postponed[e.key], self._fetch_at = e, now + FETCH_AGAIN_S
            elif (prepared := self._prepare(e, 0, now)) is not None:
                alone = self._trials.begin(e.key, e.handed, now)
                launcher = self._launchers.alone() if alone else self._launchers.serving(e.first_core)
                if e.handed.crashes:  # known before it can kill this worker: only what had begun is charged
                    self._link.post_starts([(e.handed.id, e.handed.execution, e.allocation, iso(time.time()), "", "")])
                e.launcher = launcher.number
                launcher.launch(*prepared)
                self._ladder.launching(e, now)
                self._begun.add(e.lane)
                failpoints.at("launch told")
        for number in self._begun:
            if (lane := self._lanes.lane(number)) is not None and now >= self._fetch_at:
                self._line_up(lane, now)
        self._begun.clear()

    def _line_up(self, lane: Lane, now: float) -> None:
        """Let short tasks follow the one that has just got a lane, and each other, without asking us."""
        task = lane.task
        last = lane.line[-1] if lane.line else task
        launcher = self._launchers.living.get(task.launcher)
        if launcher is None or launcher.aside or task.handed.crashes or task.reason or self.leaving:
            return
        for _ in range(0 if self._ladder.withdrawing(last) else self._lanes.room(lane)):
            e = self._lanes.next(lane)
            if e is None or e.handed.crashes:
                return
            self._lanes.line_up(lane)
            if (prepared := self._prepare(e, last.key, now)) is not None:
                e.launcher = launcher.number
                launcher.launch(*prepared)
                self._ladder.lined(e)
                last = e

    def _prepare(self, e: Execution, after: int, now: float) -> tuple[Base, Place, Launch | Call] | None:
        """What its launcher is to be told. None when that must wait for the server, or when it has ended for ever."""
        try:
            return self._preparer.prepare(e, after)
        except (ServerUnavailable, StateLost, Superseded) as error:
            self._fetch_at = now + FETCH_AGAIN_S
            if e.phase is Phase.LINED:
                self._lanes.put_back(e)
            else:
                self._postponed[e.key] = e
            if not isinstance(error, ServerUnavailable):
                raise
        except UnlaunchableError as error:
            if e.phase is Phase.LINED:
                self._lanes.put_back(e)
            e.reason, e.message = error.reason, str(error)
            self._end(e, time.time(), now)
        return None

    def _end(self, e: Execution, ended: float, now: float) -> None:
        """Nothing of it lives: its lane goes on, and its end is reported."""
        failpoints.at("end heard")
        late = e.key in self._lanes.withheld
        if e.key in self._ladder.executions:
            self._ladder.ended(e)
            if (launcher := self._launchers.living.get(e.launcher)) is not None:
                self._launchers.dismiss(launcher)
        follower = self._lanes.end(e, go_on=self._goes_on(e))
        if follower is not None and follower.phase is Phase.LINED:
            self._ladder.launching(follower, now)
            self._begun.add(follower.lane)
        elif follower is not None:
            self._ready.append(follower)
        seconds = ended - e.started if e.started and not late else -1.0
        end = End(e.lane, e.handed.class_name, seconds, follower is not None)
        if late:
            log(f"task {e.handed.id} has ended after all: {e.allocation} is free again")
            self._link.post_ends([], [end])
        else:
            self._report(e, ended, end, now)

    def _goes_on(self, e: Execution) -> bool:
        # What comes next may kill this worker. Who was lost before must not pay for that: first its end is told.
        return not self.leaving and not e.handed.crashes

    def _withhold(self, e: Execution, now: float) -> None:
        """Something of it cannot be killed: it has failed, and its lane stays taken until `_end` all the same."""
        if e.key in self._lanes.withheld:
            return
        if e.key in self._ladder.executions:
            self._ladder.ended(e)
        self._lanes.withhold(e)
        if e.reason != "launch hangs":
            e.reason, e.wish = "unkillable", "failed"
        log(f"task {e.handed.id} cannot be killed: {e.allocation} stays taken until it has ended")
        self._report(e, time.time(), None, now)

    def _report(self, e: Execution, ended: float, end: End | None, now: float) -> None:
        report = self._reporter.report(e, ended)
        if e.suffix and e.started:
            self._reruns.add(e, counts=report.wish not in ("lost", "free"))
        self.outbox.add(e, report, end, now)

    def report(self, now: float) -> None:
        """Post what is due, and settle what the server has answered."""
        if self._starts:
            self._link.post_starts(self._starts)
            self._starts = []
        self.outbox.flush(now)
        for task_id, execution, verdict in self._link.verdicts():
            self._reruns.answered(task_id, execution, counts=verdict != "stale")
