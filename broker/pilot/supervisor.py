"""The supervisor of a pilot: starts server, dispatcher and workers, restarts those that die, ends them in order.

It is the one process that `run` and `start` leave behind, and the parent of all local ones. Restarts have a budget. It
also writes the journal. It ends by the field ``stop`` of the control record in Redis, by SIGTERM, or with the process
it was started for.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

from pilotq import __version__
from pilotq.broker import failpoints
from pilotq.broker.errors import PilotFailed, PilotqError, StateLost, Superseded
from pilotq.broker.log import log, log_as
from pilotq.broker.pilot import recovery
from pilotq.broker.pilot.directory import ConnectionInfo, Pilot, establish_queue_id, remember_total
from pilotq.broker.pilot.lock import HEARTBEAT_S, Lock
from pilotq.broker.pilot.queue_client import POLL_S, QueueClient
from pilotq.broker.pilot.remote_workers import RemoteWorkers
from pilotq.broker.pilot.rollback import open_journal
from pilotq.broker.pilot.server import RunningServer, remove_socket, wait_ready
from pilotq.broker.pilot.start import ALLOCATION_ENDED, FAILURE_PREFIX, LocalNode, SupervisorOptions, program
from pilotq.broker.process_identity import start_time
from pilotq.broker.processes import PilotProcess, RestartBudget, become_subreaper, reap_orphans
from pilotq.broker.settings import Settings, load
from pilotq.broker.slurm.deadline import Deadline
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection, parse_url
from pilotq.broker.store.journal_writer import JournalWriter
from pilotq.broker.store.messages import Leave

MODES = ("", "drain", "walltime", "stop", "now")  # how to end, each faster than the one before; empty: not at all
IDLE_S = 0.5  # a claim under way when the pause was set shows in ``busy`` by then
END_S = 5.0  # how long the dispatcher may take to end
CleanNode = Callable[[str, str], object]


def run_supervisor(options: SupervisorOptions, clean_node: CleanNode) -> int:
    """Run a pilot in this process until it has ended; returns the exit code: 0, ALLOCATION_ENDED, or 2 or 3.

    ``clean_node(directory, node)`` must end what is left of a dead worker's tasks; it may take some seconds.
    """
    log_as("supervisor")
    os.umask(0o077)
    # The parts find the server through the directory, once all is in order there: a part that connected earlier would
    # read the control record of the pilot that lived here before.
    os.environ.pop("PILOTQ_REDIS_URL", None)
    try:
        supervisor = Supervisor(options, clean_node, load(os.environ.get("PILOTQ_SETTINGS")))
        return supervisor.run()
    except (PilotqError, OSError) as error:
        # The boundary to the process that started this one: `start_pilot` reads the line from the log.
        log(f"{FAILURE_PREFIX}{type(error).__name__}: {error}", level="error")
        return error.exit_code if isinstance(error, PilotqError) else PilotqError.exit_code
    finally:
        # The interpreter takes our handlers away while it ends: a late SIGTERM would become the exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Supervisor:
    """Runs one pilot, from taking its lock to releasing it."""

    def __init__(self, options: SupervisorOptions, clean_node: CleanNode, settings: Settings) -> None:
        self.pilot = Pilot(options.directory)
        self.options = options
        self.settings = settings
        self.clean_node = clean_node
        self.mode = ""
        self.server: RunningServer | None = None
        self.queue: QueueClient | None = None
        self.journal: JournalWriter | None = None
        self.dispatcher = self._child("dispatcher", ["dispatcher", "--dir", options.directory])
        self.workers = {node.name: self._child(f"worker-{node.name}", self._worker(node)) for node in options.nodes}
        remote = options.remote
        self.remote_workers = RemoteWorkers(remote, self.pilot, program(options), settings) if remote else None
        env = os.environ if remote else {}
        self.deadline = Deadline(env, options.grace, options.notice, settings.allocation_poll_s)
        self.budgets: dict[str, RestartBudget] = {}
        self.cleaned: set[str] = set()  # nodes cleaned after their worker's death, the loss not yet announced
        self.lost_workers: dict[str, int] = {}  # node -> process number of its worker, of a killed supervisor
        self.owner_start = start_time(options.owner_pid) if options.owner_pid else None
        self.next_heartbeat = 0.0
        self.lock = Lock.take(self.pilot.path("lock"))

    def _child(self, name: str, argv: list[str]) -> PilotProcess:
        return PilotProcess(name, [*program(self.options), *argv], log=self.pilot.log(name), cwd=self.pilot.directory)

    def _worker(self, node: LocalNode) -> list[str]:
        real = ",".join(f"{core}:{cpu}" for core, cpu in node.real.items())
        argv = ["worker", "--dir", self.pilot.directory, "--node", node.name, "--cores", ",".join(map(str, node.cores))]
        return [*argv, "--replace", "--real", real, *(["--shared"] if node.shared else [])]

    # -- the whole life ---------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the end; returns 0 or ALLOCATION_ENDED. Raises what made the pilot fail, after everything ended."""
        try:
            failure = self._run_until_end()
            self._end(failure)
        except Superseded:
            self._abandon()
            raise
        if failure is not None:
            raise failure
        log("the pilot has ended")
        return ALLOCATION_ENDED if self.mode == "walltime" else 0

    def _run_until_end(self) -> PilotqError | OSError | None:
        """Returns when the pilot is asked to end, or with the error that made it fail."""
        try:
            self._boot()
            while not self.mode:
                self._tick()
                self._restart_dead()
            if self.mode == "drain":
                self._drain()
        except Superseded:
            raise
        except (PilotqError, OSError) as error:
            # The boundary of the pilot: whatever went wrong, nothing may be left behind.
            self.mode = "now"
            return error
        return None

    def _boot(self) -> None:
        become_subreaper()
        signal.signal(signal.SIGTERM, lambda *_: self._escalate("stop"))
        # A function and not SIG_IGN, which the parts would inherit.
        signal.signal(signal.SIGINT, lambda *_: None)
        self.deadline.poll(time.monotonic())  # the answer comes while the server boots
        self.lost_workers = recovery.kill_leftovers(self.pilot, self.clean_node)
        options, admin = self.options, None
        if options.redis:
            address = parse_url(options.redis)
            await_server: Callable[..., bool] = partial(wait_ready, address)
        else:
            self.server = RunningServer(
                self.pilot.directory, bind=options.bind, durability=options.durability, server=options.server
            )
            self.server.start()
            address, admin, await_server = self.server.address, self.server.admin, self.server.wait_ready
        # They load while the server boots, and then wait for connection.json.
        for child in (self.dispatcher, *self.workers.values()):
            child.start()
            failpoints.hit("part started")
        recovery.record_parts(self.pilot, self._parts())
        if await_server(stopped=self._check_end):
            self._open(address, admin)
            self._restart_remote()

    def _open(self, address: Address, admin: Address | None) -> None:
        """Check that the server that answers is the right one, and publish the connection."""
        failpoints.hit("server ready")
        options = self.options
        connection = Connection(address)
        try:
            queue_id = establish_queue_id(self.pilot, connection)
            # These belong to the pilot that lived here before.
            connection.call(
                "DEL",
                keys.CONTROL,
                keys.STATUS,
                keys.EXPECTED_NODES,
                keys.ALLOCATION_ENDS,
                keys.DRAINED,
                keys.LEAVING,
                keys.QUARANTINE,
            )
            contact = 0.0 if address.path else self.settings.node_timeout_s
            connection.call("HSET", keys.CONTROL, "contact", contact if options.contact is None else options.contact)
            expected = [node.name for node in options.expected_nodes]
            if expected:
                connection.call("RPUSH", keys.EXPECTED_NODES, *expected)
            if options.remote:
                connection.call("HSET", keys.CONTROL, "min_nodes", options.remote.min_nodes)
        finally:
            connection.close()
        self.journal = open_journal(self.pilot, address, self.settings)
        self.queue = QueueClient(address, queue_id, self.journal)
        for node, pid in self.lost_workers.items():
            self.queue.announce_loss(node, pid, "its pilot was killed")
        self.pilot.write_connection(
            ConnectionInfo(
                address=address, admin=admin, queue_id=queue_id, pilot=self.pilot.id, host=socket.gethostname(),
                pid=os.getpid(), version=__version__, directory=self.pilot.directory, started=time.time(),
                job=self.deadline.job,
            )
        )  # fmt: skip
        failpoints.hit("connection written")
        log(f"the pilot {self.pilot.id} is ready at {address}")

    # -- what happens all the time ----------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Wait for an event, at most POLL_S; then do what is due."""
        poll = select.poll()
        for part in self._parts():
            if part.pidfd is not None and part.running:
                poll.register(part.pidfd, select.POLLIN)
        replies = self.queue.fileno() if self.queue is not None else None
        if replies is not None:
            poll.register(replies, select.POLLIN)
        poll.poll(POLL_S * 1000)
        reap_orphans({self.deadline.pid, *(part.pid for part in self._parts())})
        self._check_end()
        if self.queue is not None:
            self.queue.poll(time.monotonic())
            if self.queue.stop_mode:
                self._escalate(self.queue.stop_mode if self.queue.stop_mode in MODES else "stop")

    def _parts(self) -> list[PilotProcess]:
        server = [self.server.part] if self.server is not None else []
        remote = self.remote_workers.parts if self.remote_workers is not None else []
        return [*server, self.dispatcher, *self.workers.values(), *remote]

    def _escalate(self, mode: str) -> None:
        if MODES.index(mode) > MODES.index(self.mode):
            self.mode = mode

    def _check_end(self) -> bool:
        """Renew the lock, and check allocation and owner; returns whether the pilot is to end."""
        now = time.monotonic()
        if now >= self.next_heartbeat:
            self.next_heartbeat = now + HEARTBEAT_S
            self.lock.heartbeat()
        self.deadline.poll(now)
        if self.deadline.due(time.time()):
            self._escalate("walltime")
        owner = self.options.owner_pid
        if owner and (self.owner_start is None or start_time(owner) != self.owner_start):
            self._escalate("now")
        return bool(self.mode)

    def _restart_dead(self) -> None:
        """Restart the parts that have died. Raises StateLost, and PilotFailed when one died too often."""
        if self.queue is not None and self.queue.lost:
            raise StateLost(
                "the server came back without the tasks it had: nothing is guessed, and nothing more is started; "
                "what has ended stands in journal.jsonl"
            )
        if self.server is not None and self.server.part.ended():
            self._restart(self.server.part)
        if self.dispatcher.ended():
            self._restart(self.dispatcher)
        for node, part in self.workers.items():
            if part.ended() and not self._is_retired(node, part) and self._announce_loss(node, part):
                self._restart(part)
        self._restart_remote()

    def _restart_remote(self) -> None:
        """Start workers on the nodes of the allocation, and restart them.

        Not before connection.json is there: a file system of many hosts may remember that it was not. And not before
        the dispatcher knows when the allocation ends: it would start tasks that cannot end in time.
        """
        if self.remote_workers is None or self.queue is None:
            return
        end_known = self.queue.report_end(self.deadline)
        if self.remote_workers.started:
            self.remote_workers.restart_dead(self.queue, time.monotonic())
        elif end_known and self.deadline.settled:
            self.remote_workers.start(time.monotonic())

    def _is_retired(self, node: str, part: PilotProcess) -> bool:
        """Whether the worker has ended because its node was retired."""
        if part.process is None or part.process.returncode or self.queue is None:
            return False
        self.queue.nodes()
        return node in self.queue.retired

    def _announce_loss(self, node: str, part: PilotProcess) -> bool:
        """Clean the node of a dead worker, and announce the loss; returns whether that was possible.

        None of its tasks' processes may run when the tasks are started again.
        """
        if node not in self.cleaned:
            self.clean_node(self.pilot.directory, node)
            self.cleaned.add(node)
            failpoints.hit("worker swept")
        # The new worker registers under the same name: only before that the record tells which incarnation died.
        if self.queue is None or not self.queue.announce_loss(node, part.pid, f"its worker {part.ended()}"):
            return False
        failpoints.hit("loss announced")
        self.cleaned.discard(node)
        return True

    def _restart(self, part: PilotProcess) -> None:
        budget = self.budgets.setdefault(
            part.name, RestartBudget(self.settings.restart_limit, self.settings.restart_window_s)
        )
        how = part.ended()
        failpoints.hit("part ended")
        if not budget.take(time.monotonic()):
            raise PilotFailed(
                f"the {part.name} {how}, after {budget.limit} restarts within {budget.window:.0f} s; "
                f"{part.log} ends with:\n{part.last_lines()}"
            )
        log(f"the {part.name} {how}; it is started again", level="warning")
        part.start()
        recovery.record_parts(self.pilot, self._parts())

    # -- the end ------------------------------------------------------------------------------------------------------

    def _tick_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Tick until the condition holds; False when the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._tick()
        return True

    def _drain(self) -> None:
        """Pause the dispatcher, and wait until nothing runs, or until a faster mode is asked for."""
        log("the pilot ends when nothing runs any more")
        paused, idle_since = False, time.monotonic()
        while self.mode == "drain":
            paused = paused or (self.queue is not None and self.queue.pause())
            if not paused or self.queue is None or self.queue.busy != 0:
                idle_since = time.monotonic()
            if time.monotonic() - idle_since >= IDLE_S:
                return
            self._tick()
            self._restart_dead()

    def _end(self, failure: PilotqError | OSError | None) -> None:
        log(f"the pilot ends ({'it failed' if failure is not None else self.mode})")
        if self.queue is not None:
            self.queue.pause()
        self._end_workers()
        if self.queue is not None and (total := self.queue.total()) is not None:
            try:
                remember_total(self.pilot, total)
            except OSError as error:  # a full file system must not keep the pilot from ending in good order
                log(
                    f"the number of tasks cannot be written ({error.strerror}): `pilotq status` may show too few",
                    level="error",
                )
        self.dispatcher.signal(signal.SIGTERM)
        if not self._tick_until(lambda: not self.dispatcher.running, END_S):
            self.dispatcher.kill()
        queue = self.queue
        if queue is not None and not self._tick_until(lambda: queue.drain_journal(time.monotonic()), END_S):
            log(
                f"the journal is not complete; the rest stays in {self.pilot.path('server')} until the next start",
                level="error",
            )
        self._close_queue()
        self.pilot.remove_connection()
        if self.server is not None:
            self.server.stop()
        for part in self._parts():
            part.close()
        reap_orphans(set())
        recovery.clear(self.pilot)
        self.lock.release()

    def _end_workers(self) -> None:
        """End all workers, those of other nodes too, and what is left of local ones."""
        mode_sent = ""

        def gone() -> bool:
            nonlocal mode_sent
            nodes = self.queue.nodes() if self.queue is not None else []
            # Sent again, with less grace, when a faster mode is asked for.
            if self.queue is not None and mode_sent != self.mode:
                mode_sent = self.mode if self.queue.leave(nodes, self._leave_message()) else ""
            local = any(part.running for part in self.workers.values())
            others = [node for node in nodes if node.name not in self.workers]
            if self.remote_workers is not None and not others and (self.queue is None or self.queue.online):
                self.remote_workers.stop_waiting()
            return not local and not others and not (self.remote_workers and self.remote_workers.running)

        informed = self.queue is not None and self.queue.leave(self.queue.nodes(), self._leave_message())
        for part in self.workers.values() if self.mode != "walltime" or not informed else ():
            part.signal(signal.SIGTERM)
        if not informed and self.remote_workers is not None:
            for part in self.remote_workers.parts:
                part.signal(signal.SIGTERM)
        self._tick_until(gone, self.settings.stop_wait_s + self._grace())
        if self.remote_workers is not None:
            self.remote_workers.stop(END_S)
        for name, part in self.workers.items():
            if part.running:
                log(
                    f"the {part.name} did not end within {self.settings.stop_wait_s:.0f} s and is killed",
                    level="warning",
                )
                part.kill()
            if part.process is not None and part.process.returncode != 0:
                self.clean_node(self.pilot.directory, name)

    def _grace(self) -> float:
        """Seconds that tasks have to end, from now on."""
        if self.mode == "walltime":
            return self.deadline.left_for_tasks(time.time())
        return 0.0 if self.mode == "now" else self.settings.kill_grace_s

    def _leave_message(self) -> Leave:
        if self.mode == "walltime":
            return Leave(self._grace(), "walltime", self.options.notice)
        return Leave(self._grace())

    def _close_queue(self) -> None:
        if self.queue is not None:
            self.queue.close()
            self.queue = None
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def _abandon(self) -> None:
        """End without touching the directory, which belongs to another pilot now."""
        self._close_queue()
        for part in self._parts():
            part.kill()
            part.close()
        if self.server is not None:
            remove_socket(self.server.address)
        for node in self.workers:
            self.clean_node(self.pilot.directory, node)
        self.lock.close()
