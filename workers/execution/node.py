"""Runs the tasks of one node: decides what follows from each message, launcher's record and deadline.

`Node` never waits: the loop in worker.py passes it what has happened, with the time. What concerns tasks over several
nodes is left to its hooks (hooks.py).
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence

from pilotq.broker import failpoints
from pilotq.broker.errors import ServerUnavailable, StateLost, Superseded
from pilotq.broker.log import log
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import (
    UNKNOWN,
    ClearSuspicion,
    EndReport,
    ExecutionEnd,
    Lease,
    Leave,
    Reopen,
    RetractTasks,
    Run,
    StateRequest,
    Stop,
    ToWorker,
    Vacate,
)
from pilotq.broker.store.resources import NodeInfo
from pilotq.workers.execution.crash_isolation import CrashIsolation
from pilotq.workers.execution.escalation import Escalation
from pilotq.workers.execution.execution import UNSTARTED, Action, Execution, Phase
from pilotq.workers.execution.file_threads import FileThreads
from pilotq.workers.execution.held_back import hold_back, shortage_of
from pilotq.workers.execution.hooks import NodeActions, NodeHooks
from pilotq.workers.execution.launch_builder import LaunchBuilder, NotYetError, Prepared, UnlaunchableError, refusal
from pilotq.workers.execution.launcher_pool import LauncherHandle, LauncherPool
from pilotq.workers.execution.leased_ends import exited_of, read_row
from pilotq.workers.execution.leased_runs import LeasedRun
from pilotq.workers.execution.memory_limit import MemoryLimits
from pilotq.workers.execution.orphans import OrphanReaper
from pilotq.workers.execution.output_files import PendingOutputs
from pilotq.workers.execution.reporting import LEAVE_REASONS, Outbox, Reporter
from pilotq.workers.execution.run_builder import RunBuilder
from pilotq.workers.execution.slots import Slot, SlotTable
from pilotq.workers.memory_watch import MemoryWatch
from pilotq.workers.protocol import (
    Begun,
    Exited,
    FromLauncher,
    GroupSwept,
    Ran,
    Refused,
    Retract,
    Retracted,
    Returned,
    Signal,
    Started,
)
from pilotq.workers.session import Session, iso
from pilotq.workers.shortage import RETRY_S, is_shortage

SIGNALS = {Action.TERM: signal.SIGTERM, Action.KILL: signal.SIGKILL}


class Node:
    """Runs the tasks of one node of the pilot in ``directory``; the dispatcher knows the node from ``info``.

    ``hooks`` makes the part that runs tasks over several nodes, which acts on this node by the `NodeActions` given.
    The paths of tasks' cgroups begin with ``cgroup``, where they get any.
    """

    def __init__(
        self, session: Session, launchers: LauncherPool, builder: LaunchBuilder, directory: str, info: NodeInfo,
        settings: Settings, hooks: Callable[[NodeActions], NodeHooks], cgroup: str = "",
    ) -> None:  # fmt: skip
        self._session = session
        self._launchers = launchers
        self._info = info
        self._settings = settings
        self._slots = SlotTable(settings)
        self._escalation = Escalation(settings)
        self._builder = builder
        self._runs = RunBuilder(builder)
        self._reporter = Reporter(info.name, directory)
        self._orphans = OrphanReaper(directory, settings)
        self._memory = MemoryLimits(info, settings, cgroup)
        self.outbox = Outbox(session, settings, info.name, self._reporter.report)
        self._ready: deque[Execution] = deque()  # have a slot: `launch` takes them
        self._postponed: dict[int, Execution] = {}  # have a slot, but must wait for the server or their turn
        self._retry_at = self._look_at = 0.0
        self._unpack_at = 0.0  # when the first of a run may be overdue; 0: no run has a slot
        self._to_chain: set[int] = set()  # slots that have gone on to another task: `launch` chains others to it
        self._retracted: list[Execution] = []  # prefetched again, and to be returned to the dispatcher
        self._starts: list[tuple[str, int, str, str, bytes, bytes]] = []
        self._files = FileThreads(settings.journal_fsync_s)
        self._outputs = PendingOutputs(self._files)
        self._isolation = CrashIsolation(settings)
        self._notice_signal = 0  # number of the signal that announces the end to tasks
        self.leaving = False
        self._hooks = hooks(self)

    @property
    def busy(self) -> bool:
        return bool(self._slots) or self._hooks.busy

    def running(self) -> list[Execution]:
        return [e for e in self._slots if e.started]

    # -- messages of the dispatcher --------------------------------------------------------------------------------

    def receive(self, message: ToWorker, now: float) -> None:
        if isinstance(message, Run):
            self._add(message)
        elif isinstance(message, Lease):
            self._add_lease(message)
        elif isinstance(message, Stop):
            self._stop_all(message, now)
        elif isinstance(message, Vacate):
            self._unpack_launched(lambda run: run.slot in message.slots)
            for e in [e for e in self._slots if e.slot in message.slots]:
                self._stop(e, "gave way", self._settings.kill_grace_s, now)
        elif isinstance(message, Reopen):
            self._reopen(message)
        elif isinstance(message, RetractTasks):
            self._retract(message, now)
        elif isinstance(message, StateRequest):
            # What has ended is no longer in the state: reported later, it would be counted a second time.
            self.outbox.flush(now, all_now=True)
            state = self._slots.state(self._info, message.term)
            state.remote = self._hooks.remote_executions()
            self._session.post_state(state)
        elif isinstance(message, ClearSuspicion):
            self.outbox.streak.clear_suspicion(healthy=message.healthy)
        else:
            self._hooks.receive(message, now)

    def _stop_all(self, message: Stop, now: float) -> None:
        for run in self._slots.runs():
            if run.holds(message.id, message.execution):
                self._unpack(run)
        for e in self._slots.find_all(message.id, message.execution):
            if not message.unstarted or e.phase in UNSTARTED:
                self._stop(e, message.reason, self._settings.kill_grace_s, now)

    def _retract(self, message: RetractTasks, now: float) -> None:
        tasks = self._slots.retract(message.class_name, message.count)
        self._return(tasks, message.class_name)
        if len(tasks) < message.count:
            self._unpack_launched(lambda run: run.class_name == message.class_name)
        for e in self._slots.newest_chained(message.class_name, message.count - len(tasks)):
            e.to_retract = True
            self._carry_out(e, self._escalation.retract(e, now), now)

    def _add(self, run: Run) -> None:
        if self._slots.find(run.id, run.execution) is not None:
            return  # sent twice
        e = self._slots.add(run)
        if e.phase is Phase.WAITING:
            self._ready.append(e)
        if self.leaving:
            e.reason = LEAVE_REASONS[0]
            self._return(self._slots.retract_all())

    def _reopen(self, message: Reopen) -> None:
        """Start prefetched tasks in slots that are open again; what becomes of these is reported as after an end."""
        ends = []
        for number, allocation in message.slots:
            e = self._slots.open(number, allocation, message.class_name)
            self._ready += [e] if e is not None else []
            ends.append(ExecutionEnd(number, message.class_name, -1.0, e is not None, UNKNOWN))
        self._session.post_ends([], ends)

    def _add_lease(self, lease: Lease) -> None:
        """Enter the elements of a lease: those without a slot as a run, if they are alike."""
        ends = [lease.run(number) for number in (0, lease.number - 1)]
        if any(run.holds(end.id, end.execution) for end in ends for run in self._slots.runs()):
            return  # sent twice
        held = None
        with_slot = len(lease.slots)
        if lease.number > with_slot and not self.leaving and not self._memory.confines(lease.class_name):
            held = self._runs.hold(lease)
        for number in range(lease.number if held is None else with_slot):
            self._add(lease.run(number))
        if held is not None:
            self._slots.add_run(held, with_slot, lease.number - with_slot)

    def _unpack(self, run: LeasedRun, count: int = 0) -> None:
        """Make executions of a run, or of its first ``count`` elements: something is to be done with one of them."""
        since, given = run.since, run.given
        found = self._slots.unpack(run, count)
        if not run.slot:
            return
        slot = self._slots.slot(run.slot)
        for e in found:
            e.launcher = run.launcher
            run.held.describe(e)
            e.launch_begun = e.key <= given
            if slot is not None and slot.task is e:
                self._escalation.launching(e, since)
            else:
                self._escalation.chained(e)

    def _unpack_launched(self, wanted: Callable[[LeasedRun], bool] = lambda _: True) -> None:
        for run in self._slots.runs(launched=True):
            if wanted(run):
                self._unpack(run)

    def _unpack_behind(self, e: Execution) -> None:
        """What is chained behind an execution must be seen one by one."""
        slot = self._slots.slot(e.slot)
        for run in list(slot.chain) if slot is not None and slot.task is e else ():
            if isinstance(run, LeasedRun):
                self._unpack(run)

    def _stop(self, e: Execution, reason: str, grace: float, now: float, *, notice: bool = False) -> None:
        if e.launched:
            self._carry_out(e, self._escalation.stop(e, reason, grace, now, notice=notice), now)
            return
        e.reason = e.reason or reason
        if e.phase is Phase.PREFETCHED:
            self._end(e, time.time(), now)
        elif self._postponed.pop(e.key, None) is not None:
            self._ready.append(e)

    def _return(self, tasks: list[Execution], asked: str = "") -> None:
        """Return tasks to the dispatcher. For the class ``asked`` it gets an answer even when there are none."""
        counts = {asked: 0} if asked else {}
        for e in tasks:
            counts[e.run.class_name] = counts.get(e.run.class_name, 0) + 1
        if counts:
            self._session.post_returned([e.run for e in tasks], counts)
        for e in tasks:
            self._hooks.forget(e)

    def leave(self, message: Leave, now: float) -> None:
        """End all tasks and return those that have not started; repeated, it can only shorten the grace."""
        self.leaving, self._notice_signal = True, message.notice
        self._return(self._slots.retract_all())
        self._unpack_launched()
        for e in self._slots:
            self._stop(e, message.reason, message.grace, now, notice=message.notice != 0)
        self._hooks.leave(message.grace, now)

    # -- records of launchers --------------------------------------------------------------------------------------

    def receive_records(self, records: Sequence[FromLauncher], now: float) -> None:
        """What a launcher has told, in order."""
        runs = self._slots.runs_by_key
        passed: dict[LeasedRun, int] = {}  # so many of their elements have ended plainly
        try:
            for record in records:
                run = runs.get(record.key)
                if run is None:
                    self.receive_record(record, now)
                elif isinstance(record, Ran) or (isinstance(record, Returned) and _is_plain(record)):
                    failpoints.hit("end received")
                    if run in passed and run.ends is not None and run.ends.is_full:
                        self._count_plain(run, passed.pop(run), now)
                    if run not in passed:
                        self.outbox.open_ends(run, now)
                    passed[run] = passed.get(run, 0) + 1
                    del runs[run.key]
                    run.pass_plain(record)
                    if run.count:
                        runs[run.key] = run
                    else:
                        self._end_run(run, now)
                elif isinstance(record, Begun):
                    self._begun(record, run.launcher, run)
                else:
                    if run in passed:
                        self._count_plain(run, passed.pop(run), now)
                    self._unpack(run, 0 if isinstance(record, Refused) and record.passing else 1)
                    self.receive_record(record, now)
        finally:
            for run, number in passed.items():
                self._count_plain(run, number, now)

    def receive_record(self, record: FromLauncher, now: float) -> None:
        e = self._escalation.executions.get(record.key)
        if e is None and isinstance(record, Begun) and (run := self._slots.run_of(record.key)) is not None:
            self._begun(record, run.launcher, run)
        elif e is None:
            if not self._hooks.receive_record(record):
                self._receive_late_record(record, now)
        elif isinstance(record, (Exited, Returned, Ran)):
            e.held_back = None
            ended = exited_of(e.key, read_row(record.row), e.run.handed) if isinstance(record, Ran) else record
            self._exited(e, ended, now)
        elif isinstance(record, Begun):
            self._begun(record, e.launcher)
        elif isinstance(record, Started):
            e.held_back = None
            suffix = e.suffix.encode()
            e.live_outputs = (record.stdout_path or e.stdout + suffix, record.stderr_path or e.stderr + suffix)
            e.pid = record.pid
            self._memory.started(e, record.pid)
            self._carry_out(e, self._escalation.started(e, record.at, now - record.seconds), now)
        elif isinstance(record, GroupSwept):
            if e.exited is not None:
                e.exited.stdout, e.exited.stderr = record.stdout, record.stderr
            self._end(e, record.ended, now)
        elif isinstance(record, Refused):
            self._refuse(e, record.reason, record.message, now, passing=record.passing)
        elif isinstance(record, Retracted):
            self._not_started(e, now)

    def _begun(self, record: Begun, launcher: int, run: LeasedRun | None = None) -> None:
        """The keys in a record ascend; ``run`` is that of the first one, if that is in one."""
        self._launchers.living[launcher].starting_key = record.key
        for key in (record.key, *record.others):
            if (e := self._escalation.executions.get(key)) is not None:
                e.launch_begun = True
                continue
            if run is None or not run.key <= key <= run.last_key:
                run = self._slots.run_of(key)
            if run is not None:
                run.given = key

    def _end_run(self, run: LeasedRun, now: float) -> None:
        """All elements of a run have ended."""
        follower = self._slots.end_run(run)
        if follower is not None:
            self._go_on(follower, now)
            return
        assert run.ends is not None
        run.ends.kept = False
        self.outbox.urgent = True

    def _count_plain(self, run: LeasedRun, number: int, now: float) -> None:
        """So many elements of a run have ended plainly, one after the other."""
        mean = self.outbox.count_plain(run, number)
        self._slots.add_runtime(run.class_name, mean, number)
        run.since = now
        self._to_chain.add(run.slot)

    def _go_on(self, follower: Execution | LeasedRun, now: float) -> None:
        """It has a slot now, in which something else has ended."""
        if isinstance(follower, LeasedRun):
            follower.since = now
            self._unpack_at = self._unpack_at or now + self._settings.launch_confirm_s
            self._to_chain.add(follower.slot)
        elif follower.phase is Phase.CHAINED:
            self._escalation.launching(follower, now)
            self._to_chain.add(follower.slot)
        else:
            self._ready.append(follower)

    def _unpack_overdue(self, now: float) -> None:
        """Those whose launch was not confirmed in time are seen one by one: the escalation decides."""
        self._unpack_at = 0.0
        for run in self._slots.first_runs():
            due = run.since + self._settings.launch_confirm_s
            if due <= now:
                self._unpack(run)
            else:
                self._unpack_at = min(due, self._unpack_at or due)

    def _receive_late_record(self, record: FromLauncher, now: float) -> None:
        """A record of what was reported as unkillable, else of what was taken from a launcher that was given up."""
        over = isinstance(record, (GroupSwept, Ran))
        over = over or (isinstance(record, (Exited, Returned)) and not record.remaining)
        if over and (e := self._slots.unkillable.get(record.key)) is not None:
            self._end(e, time.time(), now)

    def _exited(self, e: Execution, record: Exited | Returned, now: float) -> None:
        e.exited = record
        self._memory.exited(e, record, now)
        if record.remaining:
            self._carry_out(e, self._escalation.exited(e, now), now)
            return
        early = e.phase is Phase.LAUNCHING or (isinstance(record, Returned) and e.reason == "time limit")
        if early and record.status == 0:
            e.reason = ""  # it succeeded before it got SIGTERM, or in spite of it
        e.pid, e.started, e.began = record.pid, record.started, now - record.seconds
        self._slots.add_runtime(e.run.class_name, record.seconds)
        self._end(e, record.ended, now)

    def _not_started(self, e: Execution, now: float) -> None:
        """Its launcher has not started it, and never will: it waits as before."""
        self._escalation.ended(e)
        if e.phase is Phase.LAUNCHING:
            e.phase = Phase.WAITING
            self._ready.append(e)
            return
        self._slots.return_to_queue(e)
        if e.reason and e.reason not in LEAVE_REASONS:
            self._end(e, time.time(), now)
        elif e.to_retract or self.leaving:
            self._retracted.append(e)

    def launcher_ended(self, launcher: LauncherHandle, now: float) -> None:
        """A launcher has died or closed its pipe; the caller still reaps it."""
        if not launcher.stopping:
            log(f"launcher {launcher.number} (process {launcher.pid}) has died", level="warning")
            self._abandon(launcher, now, dead=True)

    def _drain(self, launcher: LauncherHandle, now: float) -> None:
        while records := launcher.receive():
            self.receive_records(records, now)

    def _abandon(self, launcher: LauncherHandle, now: float, *, dead: bool) -> None:
        """Take everything from a launcher that is dead or hangs, and replace it."""
        self._drain(launcher, now)
        self._unpack_launched(lambda run: run.launcher == launcher.number)
        taken = []
        for e in [e for e in self._escalation.executions.values() if e.launcher == launcher.number]:
            if dead and not e.launch_begun:
                self._not_started(e, now)  # records of all launches that began have been read
                continue
            if e.phase is Phase.CHAINED:
                self._slots.unchain(e)
                if not e.reason:  # an interpreter had it behind others: what it began last is to blame
                    e.reason, e.outcome = "worker lost", "requeue"
            self._escalation.ended(e)
            e.phase = Phase.KILLED
            if not e.reason:
                e.reason = "worker lost"
            taken.append(e)
        taken += [e for e in self._slots.unkillable.values() if e.launcher == launcher.number]
        self._orphans.add(launcher.number, taken, now)
        if self.leaving:
            launcher.kill()
        else:
            self._launchers.replace(launcher)
        self._hooks.launcher_ended(launcher.number)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        """Monotonic time at which `tick` wants to be called."""
        retry_at = max(self._retry_at, self._look_at) if self._postponed else None
        moments = [self._escalation.next(), self._orphans.next(), self._hooks.next(), retry_at, self._unpack_at or None]
        return min((m for m in moments if m is not None), default=None)

    def tick(self, now: float) -> None:
        if self._unpack_at and now >= self._unpack_at:
            self._unpack_overdue(now)
        for e, action in self._escalation.due(now):
            # A launcher that was given up in this very loop has taken others with it.
            if e.key in self._escalation.executions:
                self._carry_out(e, action, now)
        self._reap_orphans(now)
        if self._postponed and now >= max(self._retry_at, self._look_at):
            self._ready.extend(self._postponed.values())
            self._postponed.clear()
        if self._retracted:
            self._return(self._slots.retract_these(self._retracted))
            self._retracted.clear()
        self._hooks.tick(now)

    def _reap_orphans(self, now: float) -> None:
        gone, stuck = self._orphans.reap(now, {number: one.pid for number, one in self._launchers.living.items()})
        for e in gone:
            self._end(e, time.time(), now)
        for e in stuck:
            self._report_unkillable(e, now)

    def _carry_out(self, e: Execution, action: Action | None, now: float) -> None:
        if action is None:
            return
        if action is Action.KILL:
            self._hooks.killing(e)
        if action is not Action.RETRACT:
            # It takes longer than was expected: what is chained to it must be free to go elsewhere.
            self._unpack_behind(e)
            for other in self._slots.chained_behind(e):
                self._carry_out(other, self._escalation.retract(other, now), now)
        if action is Action.ANNOUNCE:
            e.leased = False
            self._starts.append((e.run.id, e.run.execution, e.allocation, iso(e.started), *e.live_outputs))
        elif action is Action.HANGS:
            self._give_up_launcher(e, now)
        elif action is Action.UNKILLABLE:
            self._report_unkillable(e, now)
        elif (launcher := self._launchers.living.get(e.launcher)) is not None:
            number = SIGNALS.get(action, self._notice_signal)
            launcher.send(Retract(e.key) if action is Action.RETRACT else Signal(e.key, number, e.reason))

    def _give_up_launcher(self, e: Execution, now: float) -> None:
        launcher = self._launchers.living.get(e.launcher)
        if launcher is None:
            return  # it has died at the same moment: `_abandon` has taken its tasks
        self._drain(launcher, now)
        if e.key not in self._escalation.executions or self._escalation.has_deadline(e):
            return  # its confirmation was waiting in the pipe
        log(
            f"launcher {launcher.number} does not go on with task {e.run.id}: it is replaced",
            level="warning",
            task=e.run.id,
        )
        self._unpack_launched(lambda run: run.launcher == launcher.number)
        self._escalation.mark_lost(launcher.number, launcher.starting_key)
        self._abandon(launcher, now, dead=False)

    # -- launching and ending --------------------------------------------------------------------------------------

    def launch(self, now: float) -> None:
        """Send to the launchers what has a slot, and what they start by themselves after it."""
        while self._ready:
            e = self._ready.popleft()
            if e.reason:
                self._end(e, time.time(), now)
            elif not self._isolation.may_start(e.run, self._escalation.executions, now):
                self._postponed[e.key], self._retry_at = e, now + RETRY_S
            elif (prepared := self._build(e, 0, now)) is not None:
                alone = self._isolation.start(e.key, e.run, now)
                try:
                    launcher = self._launchers.start_isolated() if alone else self._launchers.serving(e.first_core)
                except OSError as error:
                    self._refuse(e, "launch", f"Its launcher cannot start: {error}.", now, passing=is_shortage(error))
                    continue
                if e.run.crashes:  # reported before it can kill this worker: only what had begun is charged
                    self._session.post_starts([(e.run.id, e.run.execution, e.allocation, iso(time.time()), b"", b"")])
                if self._send(e, launcher, prepared, now):
                    self._escalation.launching(e, now)
                    self._to_chain.add(e.slot)
                    failpoints.hit("launch sent")
        for number in self._to_chain:
            if (slot := self._slots.slot(number)) is not None and now >= self._retry_at:
                self._chain(slot, now)
        self._to_chain.clear()

    def _chain(self, slot: Slot, now: float) -> None:
        """Let the launcher start short tasks by itself, after the one that has just got a slot and each other."""
        if "]," in slot.allocation:
            return  # between two executions over several nodes all of these must have been swept
        task = slot.task
        last = slot.chain[-1] if slot.chain else task
        launcher = self._launchers.living.get(task.launcher)
        if launcher is None or launcher.stopping or self.leaving:
            return
        if isinstance(task, Execution) and (task.run.crashes or task.reason):
            return
        if isinstance(last, Execution) and self._escalation.retracting(last):
            return
        room = self._slots.chain_room(slot)
        if room > 0:
            with self._builder.reading_ahead(self._slots.next_runs(slot, room)):
                self._chain_next(slot, room, _last_key(last), launcher, now)

    def _chain_next(self, slot: Slot, room: int, after: int, launcher: LauncherHandle, now: float) -> None:
        """Chain up to ``room`` tasks that are prefetched, behind the one with that key."""
        while room > 0 and now >= self._retry_at:
            e = self._slots.next_prefetched(slot)
            if isinstance(e, LeasedRun):
                run = self._slots.chain_run(slot, room)
                room -= run.count
                after = self._send_run(run, after, launcher)
                continue
            if e is None or e.run.crashes:
                return
            room -= 1
            self._slots.chain(slot)
            prepared = self._build(e, after, now)
            if prepared is not None and self._send(e, launcher, prepared, now):
                self._escalation.chained(e)
                after = e.key

    def _send_run(self, run: LeasedRun, after: int, launcher: LauncherHandle) -> int:
        """Send a run to its launcher, behind that key; the key to chain to next. Whatever is wrong is found and said of
        each of its elements."""
        try:
            launcher.launch(*self._runs.build_run(run, after))
        except Exception:  # noqa: BLE001  # the boundary of its tasks
            for e in self._slots.unpack(run):
                self._slots.return_to_queue(e)
            return after
        run.launcher = launcher.number
        return run.last_key

    def _build(self, e: Execution, after: int, now: float) -> Prepared | None:
        """The records for its launcher. None when that must wait for the server, or when it can never be launched."""
        try:
            return self._builder.build(e, after)
        except (NotYetError, ServerUnavailable, StateLost, Superseded) as error:
            if isinstance(error, NotYetError):
                self._look_at = now + RETRY_S
            else:
                self._retry_at = now + RETRY_S
            if e.phase is Phase.CHAINED:
                self._slots.return_to_queue(e)
            else:
                self._postponed[e.key] = e
            if not isinstance(error, (NotYetError, ServerUnavailable)):
                raise
        except UnlaunchableError as error:
            self._refuse(e, error.reason, str(error), now, passing=is_shortage(error))
        return None

    def _send(self, e: Execution, launcher: LauncherHandle, prepared: Prepared, now: float) -> bool:
        """Send the records to its launcher; False when they cannot be sent, and it has ended."""
        base, slot, launch = prepared
        try:
            launcher.launch(base, slot, self._memory.confine(launch, e.run.class_name))
        except Exception as error:  # noqa: BLE001  # the boundary of one task
            self._refuse(e, "launch", str(refusal(error)), now, passing=is_shortage(error))
            return False
        e.launcher = launcher.number
        return True

    def _refuse(self, e: Execution, reason: str, message: str, now: float, *, passing: bool) -> None:
        """It cannot be launched: never, or not now."""
        if passing:  # its launcher has retracted what was behind it
            self._retry_at = now + RETRY_S
            self._unpack_behind(e)
        if passing and not e.reason and hold_back(e, message, now, self._settings.shortage_s):
            self._out_of_escalation(e)
            if e.phase is Phase.CHAINED:
                self._slots.return_to_queue(e)
            elif (follower := self._slots.give_way(e)) is not None:
                self._go_on(follower, now)
            else:
                e.phase = Phase.WAITING
                self._postponed[e.key] = e
            return
        if e.phase is Phase.CHAINED:
            self._slots.return_to_queue(e)
        if not e.reason:
            e.reason, e.message = reason, e.message if passing else message
        self._end(e, time.time(), now)

    def shortage(self) -> str:
        """Why something here is held back now, for people."""
        return shortage_of(self._slots)

    def _end(self, e: Execution, ended: float, now: float) -> None:
        """Nothing of it lives on this node. It has ended when the other nodes of it have confirmed the same."""
        if self._hooks.defer_end(e, ended, now):
            self._out_of_escalation(e)
            e.phase = Phase.SWEPT
            return
        unconfirmed = self._hooks.unconfirmed(e)
        if unconfirmed:
            e.message = f"{e.message} {unconfirmed} stays reserved: its end was not confirmed there.".strip()
            self._slots.reduce(e, unconfirmed)
            self._report(e, ended, None, now)
            self._hooks.keep_reserved(e, unconfirmed)
        else:
            self._complete(e, ended, now)
        self._hooks.forget(e)

    def _out_of_escalation(self, e: Execution) -> None:
        if e.key in self._escalation.executions:
            self._escalation.ended(e)
            if (launcher := self._launchers.living.get(e.launcher)) is not None:
                self._launchers.stop_isolated(launcher)

    def _complete(self, e: Execution, ended: float, now: float) -> None:
        """It has ended on all its nodes: its slot goes to the next task or is released, and its end is reported."""
        failpoints.hit("end received")
        late = e.key in self._slots.unkillable
        self._out_of_escalation(e)
        follower = self._slots.end(e, go_on=self._may_go_on(e))
        if follower is not None:
            self._go_on(follower, now)
        seconds = now - e.began if e.started and not late else -1.0
        end = ExecutionEnd(e.slot, e.run.class_name, seconds, follower is not None)
        if late:
            log(f"task {e.run.id} has ended after all: {e.allocation} is free again", task=e.run.id)
            self._session.post_ends([], [end])
        else:
            self._report(e, ended, end, now)

    def _may_go_on(self, e: Execution) -> bool:
        # The next task may kill this worker. One that was lost before must not be charged for that: its end is
        # reported first.
        return not self.leaving and not e.run.crashes and self._hooks.may_go_on(e)

    def _report_unkillable(self, e: Execution, now: float) -> None:
        """Something of it cannot be killed: it has failed, but its slot stays reserved until `_end`."""
        if e.key in self._slots.unkillable:
            return
        if e.key in self._escalation.executions:
            self._escalation.ended(e)
        self._slots.keep_reserved(e)
        if e.reason != "launch hangs":
            e.reason, e.outcome = "unkillable", "failed"
        log(
            f"task {e.run.id} cannot be killed: {e.allocation} stays reserved until it has ended",
            level="error",
            task=e.run.id,
        )
        self._report(e, time.time(), None, now)

    def _report(self, e: Execution, ended: float, end: ExecutionEnd | None, now: float) -> None:
        self._memory.ended(e)
        if e.spec is None:
            self._builder.describe(e)
        report = self._reporter.end(e, ended)
        for captured in (e.exited.stdout, e.exited.stderr) if e.exited is not None else ():
            if captured.path:
                self._files.sync(captured.path)
        if e.suffix and e.started:
            self._outputs.add(e, counts=isinstance(report, EndReport) and report.outcome not in ("lost", "requeue"))
        self.outbox.add(e, report, end, now)

    def report(self, now: float) -> None:
        """Send the reports that are due, and publish or discard output files as the server has answered."""
        if self._starts:
            self._session.post_starts(self._starts)
            self._starts = []
        self.outbox.flush(now)
        for task_id, execution, verdict in self._session.verdicts():
            self._outputs.answered(task_id, execution, counts=verdict != "stale")

    # -- tasks over several nodes: what the loop asks, and what the hooks do with this node ------------------------

    def filenos(self) -> list[int]:
        """Descriptors to wait on for reading; then call `serve`."""
        return [self._memory.watch.fileno, *self._hooks.filenos()]

    def serve(self, ready: set[int]) -> None:
        if self._memory.watch.fileno in ready:
            self._end_those_over_limit(time.monotonic())
        self._hooks.serve(ready)

    def _end_those_over_limit(self, now: float) -> None:
        """Kill what uses more memory than it asked for: any grace would be time to use more."""
        for task in self._memory.watch.take_over_limit():
            e = self._escalation.executions.get(task.name) if isinstance(task.name, int) else None
            if not isinstance(task.name, int):
                self._hooks.over_limit(task, self._memory.over(task), now)
            elif e is not None:
                e.message = e.message if e.reason or e.exited else self._memory.over(task)
                self._carry_out(e, self._escalation.kill(e, "memory", now), now)

    def stop_execution(self, e: Execution, reason: str) -> None:
        self._stop(e, reason, self._settings.kill_grace_s, time.monotonic())

    def finish_execution(self, e: Execution, ended: float) -> None:
        self._end(e, ended, time.monotonic())

    def beside(self, action: Callable[[], None]) -> None:
        self._files.run(action)

    def memory_of(self, class_name: str) -> int:
        return self._memory.limit_of(class_name)

    @property
    def memory_watch(self) -> MemoryWatch:
        return self._memory.watch

    def free_slot(self, number: int) -> None:
        self._slots.release(number)

    def close(self) -> None:
        self._hooks.close()
        self._memory.watch.close()
        if not self._files.finish():
            log(
                "what was still to be done with files of tasks is left undone: their file systems do not answer",
                level="warning",
            )


def _is_plain(record: Returned) -> bool:
    """Whether it left and wrote nothing, and has a short result. Of one that lived for a moment there was `Started`."""
    written = record.stdout.length or record.stderr.length
    return bool(record.outcome == "finished" and record.value and not record.remaining and not written)


def _last_key(last: Execution | LeasedRun) -> int:
    return last.last_key if isinstance(last, LeasedRun) else last.key
