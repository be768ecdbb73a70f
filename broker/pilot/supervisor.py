"""The supervisor: the one process that `run` and `start` leave. Parent of server, dispatcher and local workers.

It starts them, starts them again when they die (within a budget), writes the journal, and ends them in order when it
is told to: by a wish in Redis, by SIGTERM, or by the end of the process it was started for.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable

from pilotq import __version__
from pilotq.broker import failpoints
from pilotq.broker.errors import PilotFailed, PilotqError, StateLost, Superseded
from pilotq.broker.pilot import recovery
from pilotq.broker.pilot.directory import Connection, Pilot, establish_epoch, remember_total
from pilotq.broker.pilot.lock import BEAT_S, Lock, start_time
from pilotq.broker.pilot.queue_client import POLL_S, SupervisorLink
from pilotq.broker.pilot.remote_workers import Steps
from pilotq.broker.pilot.rollback import open_journal
from pilotq.broker.pilot.server import RunningServer, remove_socket, wait_ready
from pilotq.broker.pilot.start import CUT_SHORT, FAILED, LocalNode, SupervisorOptions, program
from pilotq.broker.processes import Budget, Part, become_subreaper, log, reap_orphans
from pilotq.broker.settings import Settings, load
from pilotq.broker.slurm.deadline import Deadline
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link, parse_url
from pilotq.broker.store.journal_writer import JournalWriter
from pilotq.broker.store.messages import Leave

MODES = ("", "drain", "walltime", "stop", "now")  # each hurries the one before
SETTLE_S = 0.5  # a claim under way when the pause was said shows in ``busy`` by then
END_S = 5.0  # how long the dispatcher may take to end
Sweep = Callable[[str, str], object]


def run_supervisor(options: SupervisorOptions, sweep: Sweep) -> int:
    """Run a pilot in this process until it has ended; returns the exit code: 0, CUT_SHORT, or 2 or 3 when it failed.

    ``sweep(directory, node)`` must end what is left of a dead worker's tasks; it may take some seconds.
    """
    os.umask(0o077)
    # The parts find the server in the directory, when all is in order there: one that went to it by itself would read
    # the wishes of the pilot that lived here before.
    os.environ.pop("PILOTQ_REDIS_URL", None)
    try:
        supervisor = Supervisor(options, sweep, load(os.environ.get("PILOTQ_SETTINGS")))
        return supervisor.run()
    except (PilotqError, OSError) as error:
        # The boundary to whoever started us: `start_pilot` reads this from the log.
        log(f"{FAILED}{type(error).__name__}: {error}")
        return error.exit_code if isinstance(error, PilotqError) else PilotqError.exit_code


class Supervisor:
    """One pilot, from taking its lock to giving it back."""

    def __init__(self, options: SupervisorOptions, sweep: Sweep, settings: Settings) -> None:
        self.pilot = Pilot(options.directory)
        self.options = options
        self.settings = settings
        self.sweep = sweep
        self.mode = ""
        self.server: RunningServer | None = None
        self.link: SupervisorLink | None = None
        self.journal: JournalWriter | None = None
        self.dispatcher = self._part("dispatcher", ["dispatcher", "--dir", options.directory])
        self.workers = {node.name: self._part(f"worker-{node.name}", self._worker(node)) for node in options.nodes}
        remote = options.remote
        self.steps = Steps(remote, self.pilot, program(options), settings) if remote is not None else None
        self.deadline = Deadline(os.environ if remote else {}, options.grace, options.notice, settings.deadline_s)
        self.budgets: dict[str, Budget] = {}
        self.swept: set[str] = set()  # nodes whose dead worker's tasks were swept, while the loss is not yet announced
        self.bereaved: dict[str, int] = {}  # nodes of a predecessor that was killed, and their workers' numbers
        self.owner_start = start_time(options.owner_pid) if options.owner_pid else None
        self.next_beat = 0.0
        self.lock = Lock.take(self.pilot.path("lock"))

    def _part(self, name: str, argv: list[str]) -> Part:
        return Part(name, [*program(self.options), *argv], log=self.pilot.log(name), cwd=self.pilot.directory)

    def _worker(self, node: LocalNode) -> list[str]:
        real = ",".join(f"{core}:{cpu}" for core, cpu in node.real.items())
        argv = ["worker", "--dir", self.pilot.directory, "--node", node.name, "--cores", ",".join(map(str, node.cores))]
        return [*argv, "--real", real, *(["--shared"] if node.shared else [])]

    # -- the whole life ---------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Returns 0 or CUT_SHORT after a clean end; raises what made the pilot fail, after everything was ended."""
        try:
            failure = self._live()
            self._end(failure)
        except Superseded:
            self._abandon()
            raise
        if failure is not None:
            raise failure
        log("the pilot has ended")
        return CUT_SHORT if self.mode == "walltime" else 0

    def _live(self) -> PilotqError | OSError | None:
        """Until the pilot is told to end, or has failed: then what failed."""
        try:
            self._boot()
            while not self.mode:
                self._tick()
                self._mend()
            if self.mode == "drain":
                self._drain()
        except Superseded:
            raise
        except (PilotqError, OSError) as error:
            # The boundary of the pilot's life: whatever went wrong, nothing may be left behind.
            self.mode = "now"
            return error
        return None

    def _boot(self) -> None:
        become_subreaper()
        signal.signal(signal.SIGTERM, lambda *_: self._hurry("stop"))
        # A function and not SIG_IGN, which the parts would inherit.
        signal.signal(signal.SIGINT, lambda *_: None)
        self.deadline.look(time.monotonic())  # the answer comes while the server boots
        self.bereaved = recovery.end(self.pilot, self.sweep)
        options, admin, part = self.options, None, None
        if options.redis:
            address = parse_url(options.redis)
        else:
            self.server = RunningServer(
                self.pilot.directory, bind=options.bind, durability=options.durability, server=options.server
            )
            self.server.start()
            address, admin, part = self.server.address, self.server.admin, self.server.part
        # They load while the server boots, and then wait for connection.json.
        for child in (self.dispatcher, *self.workers.values()):
            child.start()
            failpoints.at("part started")
        recovery.note(self.pilot, self._parts())
        if wait_ready(address, part, stopped=self._keep):
            self._open(address, admin)
            self._mend_steps()

    def _open(self, address: Address, admin: Address | None) -> None:
        """The server answers: check that it is the right one, and let everybody in."""
        failpoints.at("server ready")
        options = self.options
        link = Link(address)
        try:
            epoch = establish_epoch(self.pilot, link)
            # These were of the pilot that lived here before.
            link.call("DEL", keys.WISH, keys.PLANNED, keys.ENDS, keys.CLOSED, keys.ASIDE)
            contact = 0.0 if address.path else self.settings.contact_s
            link.call("HSET", keys.WISH, "contact", contact if options.contact is None else options.contact)
            planned = [node.name for node in options.planned]
            if planned:
                link.call("SADD", keys.PLANNED, *planned)
            if options.remote:
                link.call("HSET", keys.WISH, "least", options.remote.least)
        finally:
            link.close()
        self.journal = open_journal(self.pilot, address, self.settings)
        self.link = SupervisorLink(address, epoch, self.journal)
        for node, pid in self.bereaved.items():
            self.link.announce_loss(node, pid, "its pilot was killed")
        self.pilot.write_connection(
            Connection(
                address=address, admin=admin, epoch=epoch, pilot=self.pilot.id, host=socket.gethostname(),
                pid=os.getpid(), version=__version__, directory=self.pilot.directory, started=time.time(),
                job=self.deadline.job,
            )
        )  # fmt: skip
        failpoints.at("connection written")
        log(f"the pilot {self.pilot.id} is ready at {address}")

    # -- what happens all the time ----------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Wait until something happens, at most POLL_S; then do what is due."""
        poll = select.poll()
        for part in self._parts():
            if part.pidfd is not None and part.running:
                poll.register(part.pidfd, select.POLLIN)
        answer = self.link.fileno() if self.link is not None else None
        if answer is not None:
            poll.register(answer, select.POLLIN)
        poll.poll(POLL_S * 1000)
        reap_orphans({self.deadline.pid, *(part.pid for part in self._parts())})
        self._keep()
        if self.link is not None:
            self.link.poll(time.monotonic())
            if self.link.wish:
                self._hurry(self.link.wish if self.link.wish in MODES else "stop")

    def _parts(self) -> list[Part]:
        server = [self.server.part] if self.server is not None else []
        steps = self.steps.parts if self.steps is not None else []
        return [*server, self.dispatcher, *self.workers.values(), *steps]

    def _hurry(self, mode: str) -> None:
        if MODES.index(mode) > MODES.index(self.mode):
            self.mode = mode

    def _keep(self) -> bool:
        """Keep the lock, and look whether the owner lives; True when the pilot is to end."""
        now = time.monotonic()
        if now >= self.next_beat:
            self.next_beat = now + BEAT_S
            self.lock.beat()
        self.deadline.look(now)
        if self.deadline.due(time.time()):
            self._hurry("walltime")
        owner = self.options.owner_pid
        if owner and (self.owner_start is None or start_time(owner) != self.owner_start):
            self._hurry("now")
        return bool(self.mode)

    def _mend(self) -> None:
        """Start again what has died. Raises StateLost, and PilotFailed when it died too often."""
        if self.link is not None and self.link.lost:
            raise StateLost(
                "the server came back without the tasks it had: nothing is guessed, and nothing more is started; "
                "what has ended stands in journal.jsonl"
            )
        if self.server is not None and self.server.part.ended():
            self._restart(self.server.part)
        if self.dispatcher.ended():
            self._restart(self.dispatcher)
        for node, part in self.workers.items():
            if part.ended() and not self._retired(node, part) and self._lost(node, part):
                self._restart(part)
        self._mend_steps()

    def _mend_steps(self) -> None:
        """Start workers on the nodes of the allocation, and start them again.

        Not before connection.json is there: a file system of many hosts may remember that it was not. And not before
        the dispatcher knows when the allocation ends: it would begin what cannot end in time.
        """
        if self.steps is None or self.link is None:
            return
        told = self.link.tell(self.deadline)
        if self.steps.begun:
            self.steps.mend(self.link, time.monotonic())
        elif told and self.deadline.settled:
            self.steps.begin(time.monotonic())

    def _retired(self, node: str, part: Part) -> bool:
        """Its worker has left because it was told to."""
        if part.process is None or part.process.returncode or self.link is None:
            return False
        self.link.nodes()
        return node in self.link.retired

    def _lost(self, node: str, part: Part) -> bool:
        """A worker died: nothing of its tasks may run when they are started again. Whether all was said and done."""
        if node not in self.swept:
            self.sweep(self.pilot.directory, node)
            self.swept.add(node)
            failpoints.at("worker swept")
        # The new worker registers under the same name: only before that the record tells which incarnation died.
        if self.link is None or not self.link.announce_loss(node, part.pid, f"its worker {part.ended()}"):
            return False
        failpoints.at("loss announced")
        self.swept.discard(node)
        return True

    def _restart(self, part: Part) -> None:
        budget = self.budgets.setdefault(part.name, Budget(self.settings.restart_limit, self.settings.restart_window_s))
        how = part.ended()
        failpoints.at("part ended")
        if not budget.take(time.monotonic()):
            raise PilotFailed(
                f"the {part.name} {how}, after {budget.limit} restarts within {budget.window:.0f} s; "
                f"{part.log} ends with:\n{part.last_words()}"
            )
        log(f"the {part.name} {how}; it is started again")
        part.start()
        recovery.note(self.pilot, self._parts())

    # -- the end ------------------------------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Go on with what happens all the time until the condition holds; False when the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._tick()
        return True

    def _drain(self) -> None:
        """Hand out nothing more, and wait until nothing runs, or until somebody hurries."""
        log("the pilot ends when nothing runs any more")
        paused, idle_since = False, time.monotonic()
        while self.mode == "drain":
            paused = paused or (self.link is not None and self.link.pause())
            if not paused or self.link is None or self.link.busy != 0:
                idle_since = time.monotonic()
            if time.monotonic() - idle_since >= SETTLE_S:
                return
            self._tick()
            self._mend()

    def _end(self, failure: PilotqError | OSError | None) -> None:
        log(f"the pilot ends ({'it failed' if failure is not None else self.mode})")
        if self.link is not None:
            self.link.pause()
        self._end_workers()
        if self.link is not None and (total := self.link.total()) is not None:
            try:
                remember_total(self.pilot, total)
            except OSError as error:  # a file system that is full must not keep it from ending in good order
                log(f"how many tasks there were cannot be noted ({error.strerror}): `pilotq status` may tell too few")
        self.dispatcher.signal(signal.SIGTERM)
        if not self._until(lambda: not self.dispatcher.running, END_S):
            self.dispatcher.kill()
        link = self.link
        if link is not None and not self._until(lambda: link.drain_journal(time.monotonic()), END_S):
            log(f"the journal is not complete; the rest stays in {self.pilot.path('server')} until the next start")
        self._close_link()
        self.pilot.remove_connection()
        if self.server is not None:
            self.server.stop()
        for part in self._parts():
            part.close()
        reap_orphans(set())
        recovery.forget(self.pilot)
        self.lock.release()

    def _end_workers(self) -> None:
        """End all workers, those of other nodes too, and whatever is left of local ones."""
        asked = ""

        def gone() -> bool:
            nonlocal asked
            nodes = self.link.nodes() if self.link is not None else []
            # Said again, with less grace, when somebody hurries.
            if self.link is not None and asked != self.mode:
                asked = self.mode if self.link.leave(nodes, self._last_word()) else ""
            local = any(part.running for part in self.workers.values())
            others = [node for node in nodes if node.name not in self.workers]
            if self.steps is not None and not others and (self.link is None or self.link.online):
                self.steps.dismiss()
            return not local and not others and not (self.steps and self.steps.running)

        told = self.link is not None and self.link.leave(self.link.nodes(), self._last_word())
        for part in self.workers.values() if self.mode != "walltime" or not told else ():
            part.signal(signal.SIGTERM)
        if not told and self.steps is not None:
            for part in self.steps.parts:
                part.signal(signal.SIGTERM)
        self._until(gone, self.settings.stop_wait_s + self._grace())
        if self.steps is not None:
            self.steps.end(END_S)
        for name, part in self.workers.items():
            if part.running:
                log(f"the {part.name} did not end within {self.settings.stop_wait_s:.0f} s and is killed")
                part.kill()
            if part.process is not None and part.process.returncode != 0:
                self.sweep(self.pilot.directory, name)

    def _grace(self) -> float:
        """Seconds that tasks have to end, from here on."""
        if self.mode == "walltime":
            return self.deadline.left_for_tasks(time.time())
        return 0.0 if self.mode == "now" else self.settings.kill_grace_s

    def _last_word(self) -> Leave:
        if self.mode == "walltime":
            return Leave(self._grace(), "walltime", self.options.notice)
        return Leave(self._grace())

    def _close_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def _abandon(self) -> None:
        """The directory belongs to another pilot: leave its files alone, and write nothing more."""
        self._close_link()
        for part in self._parts():
            part.kill()
            part.close()
        if self.server is not None:
            remove_socket(self.server.address)
        for node in self.workers:
            self.sweep(self.pilot.directory, node)
        self.lock.close()
