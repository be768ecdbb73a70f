"""Runs the worker process of one node. Its loop waits for everything at once and blocks on nothing.

    python -m pilotq.workers.worker --dir <pilot directory> --node <name> --cores 0,1 [--real 0:2,1:3]

Exit code 0 after it was asked to leave (by the dispatcher or by SIGTERM) and all was confirmed; 3 when it had to give
up: no server, a server with another state, a newer worker of this node, launchers that keep dying.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from pilotq.broker.errors import InvalidInput, PilotFailed, PilotqError, ServerUnavailable, StateLost, Superseded
from pilotq.broker.launcher_kind import launcher_kind
from pilotq.broker.log import log, log_as
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.processes import become_subreaper, spare_collections
from pilotq.broker.settings import Settings, load
from pilotq.broker.store.connection import Address
from pilotq.broker.store.messages import Leave, Stop
from pilotq.broker.store.resources import BY_CGROUP, BY_WATCHER, NodeInfo
from pilotq.workers import cgroups
from pilotq.workers.execution.launch_builder import LaunchBuilder
from pilotq.workers.execution.launcher_pool import LauncherPool, LaunchersFailedError, ended_children
from pilotq.workers.execution.node import Node
from pilotq.workers.multinode.node import MultinodeHooks
from pilotq.workers.session import Session, iso
from pilotq.workers.spilled_results import SpilledResults

CUT_OFF_S = 1.0  # beyond the grace, for tasks to be swept when nobody is left to report to
SHOWN_AFTER_S = 1.0  # RQ's record of an execution costs three keys: short ones have none
SHOWN_MAX = 16  # for each node: RQ's pages read them all
MOVED_S = 2.0  # how long the server has not answered when it is looked for elsewhere
Descriptors = dict[int, int]  # number -> what is waited for


def run_worker(
    directory: str, address: Address, queue_id: str, info: NodeInfo, real: Mapping[int, int], settings: Settings
) -> int:
    """Be the worker of a node until it is asked to leave; returns the exit code. For the main thread of a process.

    ``directory`` is the pilot's, ``real`` maps core numbers to CPU numbers where they differ. The incarnation in
    ``info`` is set here.
    """
    return serve(Session(address, queue_id, settings), directory, info, real, settings)


def serve(session: Session, directory: str, info: NodeInfo, real: Mapping[int, int], settings: Settings) -> int:
    """`run_worker` over a session that is given."""
    log_as("worker", info.name)
    try:
        kind = launcher_kind()
    except InvalidInput as error:
        log(f"the worker of node {info.name} cannot begin: {error}", level="error")
        return PilotFailed.exit_code
    directory = os.path.abspath(directory)
    output = os.path.join(directory, "output")
    os.makedirs(output, mode=0o700, exist_ok=True)
    session.keep_result = SpilledResults(output, info.name).keep
    become_subreaper()
    spare_collections()
    signals = _Signals()
    cgroup = _cgroups_of_tasks(directory, info)
    launchers = LauncherPool(output, info.name, info.cores, settings, kind)
    try:
        info.incarnation = session.register(info)
        node = make_node(session, launchers, directory, info, real, settings, cgroup)
        log(f"worker of node {info.name}, incarnation {info.incarnation}, {len(info.cores)} cores, {kind} launcher")
        try:
            return _Loop(session, launchers, node, signals, settings, directory).run()
        finally:
            node.close()
    except PilotFailed as error:
        log(f"the worker of node {info.name} cannot begin: {error}", level="error")
        return PilotFailed.exit_code
    finally:
        launchers.close()
        if cgroup:
            cgroups.clean(*os.path.split(cgroup))
        session.close()
        signals.close()


def make_node(
    session: Session,
    launchers: LauncherPool,
    directory: str,
    info: NodeInfo,
    real: Mapping[int, int],
    settings: Settings,
    cgroup: str = "",
) -> Node:
    """What decides for a node whose session has registered; the arguments are as of `serve`.

    ``cgroup`` is how the paths of the cgroups of its tasks begin; empty: they get none.
    """
    builder = LaunchBuilder(session.shared_data, directory, real, info)
    return Node(
        session, launchers, builder, directory, info, settings,
        lambda actions: MultinodeHooks(actions, session, launchers, builder, directory, info, real, settings),
        cgroup,
    )  # fmt: skip


def _cgroups_of_tasks(directory: str, info: NodeInfo) -> str:
    """How the paths of the cgroups of tasks begin; empty where a watcher must do, which ``info`` says then."""
    if info.memory_by != BY_CGROUP:
        return ""
    try:
        base = cgroups.prepare()
    except OSError as error:
        log(f"tasks get no cgroups, and are measured instead: {error.strerror}", level="warning")
        info.memory_by = BY_WATCHER
        return ""
    prefix = cgroups.prefix_of(directory, info.name)
    cgroups.clean(base, prefix)
    return os.path.join(base, prefix)


class _Signals:
    """Signals as a descriptor to wait on. SIGINT is left to the supervisor: Ctrl-C reaches the whole terminal."""

    def __init__(self) -> None:
        self.fileno, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, _wake)
        # Slurm may send it to all processes of a job some time before the end: the supervisor's business. A handler, as
        # launchers would inherit that it is ignored.
        signal.signal(signal.SIGUSR1, _ignore)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def read(self) -> set[int]:
        """Numbers of the signals that have come; only called when the descriptor is readable."""
        return set(os.read(self.fileno, 4096))

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self.fileno)
        os.close(self._wake)


def _ignore(_signal: int, _frame: object) -> None:
    """Ignores a signal that is for others."""


def _wake(_signal: int, _frame: object) -> None:
    """Python wants a handler where the wake-up descriptor is written."""


class _Loop:
    """Waits for messages, launchers, signals and deadlines, and passes each to the node."""

    def __init__(
        self, session: Session, launchers: LauncherPool, node: Node, signals: _Signals, settings: Settings,
        directory: str,
    ) -> None:  # fmt: skip
        self._session = session
        self._launchers = launchers
        self._node = node
        self._signals = signals
        self._settings = settings
        self._poll = select.poll()
        self._registered: Descriptors = {}
        self._heartbeat_at = 0.0
        self._leave_by: float | None = None  # monotonic: how long is waited for the last confirmations
        self._online = True
        self._exit_code = 0
        self._pilot = Pilot(directory)
        self._look_at = 0.0  # monotonic: when it is looked for the server at another address
        self._looking = self._moved = False

    def run(self) -> int:
        while not self._over():
            try:
                self._step()
            except PilotFailed as error:
                self._give_up(error)
        if self._online:
            try:
                self._session.deregister()
            except ServerUnavailable as error:
                log(f"this node could not be deregistered: {error}", level="warning")
        return self._exit_code

    def _over(self) -> bool:
        if self._leave_by is None:
            return False
        if time.monotonic() >= self._leave_by:
            # Without the server there is no confirmation to wait for: what lives is killed with its launcher.
            if self._online:
                log("not everything had ended and was confirmed in time", level="warning")
                self._exit_code = PilotFailed.exit_code
            return True
        return not self._node.busy and not (self._online and (len(self._node.outbox) or self._session.unsent()))

    def _step(self) -> None:
        """Send what the last turn has brought about (also one that was broken off), wait, take in what has come."""
        for launcher in self._launchers.living.values():
            launcher.flush()
        if self._online:
            self._session.listen()
            self._node.report(time.monotonic())
        ready = self._wait()
        now = time.monotonic()
        heartbeat_due = now >= self._heartbeat_at
        if heartbeat_due:
            self._heartbeat_at = now + self._settings.heartbeat_s
        for launcher in list(self._launchers.living.values()):
            # With each heartbeat all of them: one that hangs does not wake this process for what it has done before.
            if heartbeat_due or launcher.wake in ready:
                self._node.receive_records(launcher.receive(), now)
                if launcher.closed:
                    self._node.launcher_ended(launcher, now)
        if self._signals.fileno in ready:
            self._signal(now)
        self._node.serve(ready.keys() & self._node.filenos())
        self._node.tick(now)
        if self._online:
            self._exchange(ready, heartbeat_due, now)
            self._check_contact(now)
        self._node.launch(now)

    def wanted(self, now: float) -> tuple[Descriptors, float]:
        """The descriptors to wait for, and the time (monotonic) of the next deadline."""
        wanted: Descriptors = {self._signals.fileno: select.POLLIN}
        for launcher in self._launchers.living.values():
            if not launcher.closed:
                wanted[launcher.wake] = select.POLLIN
            if launcher.full:
                wanted[launcher.down] = select.POLLOUT
        wanted.update(dict.fromkeys(self._node.filenos(), select.POLLIN))
        moments = [self._node.next(), self._leave_by]
        if self._online:
            # poll goes by number: a connection made again under the old number needs no new registration.
            wanted.update(dict.fromkeys(self._session.filenos(), select.POLLIN))
            moments += [self._heartbeat_at, now + self._session.pause(now), self._node.outbox.due(now)]
            moments.append(now + self._contact_bound() - self._session.out_of_touch(now))
        return wanted, min(moment for moment in moments if moment is not None)

    def _wait(self) -> Descriptors:
        """Wait for a descriptor or the next deadline; returns the descriptors that are ready."""
        now = time.monotonic()
        wanted, first = self.wanted(now)
        if wanted != self._registered:
            for fd in self._registered.keys() - wanted.keys():
                self._poll.unregister(fd)
            for fd, events in wanted.items():
                self._poll.register(fd, events)
            self._registered = wanted
        return dict(self._poll.poll(max(first - now, 0.0) * 1000))

    def _exchange(self, ready: Descriptors, heartbeat_due: bool, now: float) -> None:
        if heartbeat_due:
            state = "busy" if self._node.busy else "idle"
            self._session.post_heartbeat(
                {"last_heartbeat": iso(time.time()), "state": state, "pq_shortage": self._node.shortage()},
                self._longest(),
            )
        # With each heartbeat the session checks connections on which nothing arrives any more.
        if heartbeat_due or self._session.pause(now) <= 0 or any(fd in ready for fd in self._session.filenos()):
            for message in self._session.pump(now):
                if isinstance(message, Leave):
                    self._leave(message, now)
                elif isinstance(message, Stop) and not message.id:
                    for e in self._node.running():
                        self._node.receive(Stop(e.run.id, e.run.execution, message.reason), now)
                else:
                    self._node.receive(message, now)

    def _longest(self) -> list[tuple[str, int, float, str]]:
        """What RQ's tools are to show as running: what lives longest, and not only for a moment."""
        before = time.monotonic() - SHOWN_AFTER_S
        found = sorted((e.started, e.key, e.run) for e in self._node.running() if e.began < before)[:SHOWN_MAX]
        return [(h.id, h.execution, started, h.class_name) for started, _, h in found]

    def _check_contact(self, now: float) -> None:
        """Tasks of a node that is out of touch for too long end, as they are given to others; without tasks nobody
        needs this worker. So do those of a node that may be out of touch for ever, once its pilot goes on elsewhere."""
        bound, out_of_touch = self._contact_bound(), self._session.out_of_touch(now)
        if out_of_touch >= bound:
            raise ServerUnavailable(f"no answer from the server for {bound:g} s")
        if self._moved:
            raise Superseded("the pilot was started again, with its server at another address")
        if out_of_touch > MOVED_S and now >= self._look_at and not self._looking:
            self._look_at, self._looking = now + MOVED_S, True
            self._node.beside(self._look_for_server)

    def _look_for_server(self) -> None:
        try:
            with suppress(PilotqError):
                self._moved = self._pilot.connection().address != self._session.address
        finally:
            self._looking = False

    def _contact_bound(self) -> float:
        return self._session.contact_s or math.inf if self._node.busy else self._settings.server_wait_s

    def _signal(self, now: float) -> None:
        numbers = self._signals.read()
        if signal.SIGTERM in numbers:
            self._leave(Leave(self._settings.kill_grace_s), now)
        # Whatever the number: a full pipe may have lost a SIGCHLD behind others.
        for pid in ended_children():
            launcher = self._launchers.with_pid(pid)
            if launcher is None:
                os.waitpid(pid, 0)  # an orphan of a launcher that died before
            else:
                try:
                    self._node.launcher_ended(launcher, now)
                finally:
                    self._launchers.reap(launcher)

    def _leave(self, message: Leave, now: float) -> None:
        if self._leave_by is None:
            log(f"leaving ({message.reason}): tasks that run get {message.grace:g} s")
            self._leave_by = now + message.grace + self._settings.stop_wait_s
            if self._online:
                self._session.post_draining()
        self._node.leave(message, now)

    def _give_up(self, error: PilotFailed) -> None:
        """End all tasks; without grace when other executions of them may have begun."""
        log(f"giving up: {error}", level="error")
        self._exit_code = error.exit_code
        now = time.monotonic()
        grace = 0.0 if isinstance(error, (StateLost, Superseded)) else self._settings.kill_grace_s
        if not isinstance(error, LaunchersFailedError):
            self._online = False
            self._leave_by = now + grace + CUT_OFF_S
        self._leave(Leave(grace), now)


def main(argv: list[str]) -> int:
    """The command line above; the pilot must be ready within the settings' ``server_wait_s``."""
    parser = argparse.ArgumentParser(prog="python -m pilotq.workers.worker")
    parser.add_argument("--dir", required=True, help="the pilot's directory")
    parser.add_argument("--node", required=True, help="the node's name in this pilot")
    parser.add_argument("--cores", required=True, help="core numbers, separated by commas")
    parser.add_argument("--real", default="", help="core:CPU pairs where they differ, separated by commas")
    options = parser.parse_args(argv)
    cores = [int(core) for core in options.cores.split(",")]
    pairs = (pair.split(":") for pair in options.real.split(",") if pair)
    real = {int(core): int(cpu) for core, cpu in pairs}
    settings = load(os.environ.get("PILOTQ_SETTINGS"))
    connection = find(options.dir).await_connection(settings.server_wait_s)
    info = NodeInfo(
        options.node, 0, socket.gethostname(), os.getpid(), cores, shared_cores=len(set(real.values())) < len(real),
        cpus=[real.get(core, core) for core in cores],
    )  # fmt: skip
    return run_worker(connection.directory, connection.address, connection.queue_id, info, real, settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
