"""Starts and reaps the processes of tasks, as a child of a worker process: the launcher.

    python -m pilotq.workers.launcher.launcher --dir <output directory> --node <name> --calls <number>
        --kind <native or python> --down <fd> --up <fd> --wake <fd>

One thread runs one loop over the pipe from the worker process and the ends of children; that of kind native leaves
plain launches to a core in C (`plain_launches.py`). It knows nothing of Redis, time limits or grace: it does what
messages ask for (`workers/protocol.py`) and reports what happened. It lives as long as the pipe: when that closes, for
whatever reason, every process below this one is killed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.log import log_as
from pilotq.broker.os_strings import printable
from pilotq.broker.processes import become_subreaper, spare_collections
from pilotq.workers import cgroups
from pilotq.workers.launcher.capture import Capture
from pilotq.workers.launcher.chain import Chain, Running
from pilotq.workers.launcher.interpreter_pool import InterpreterPool
from pilotq.workers.launcher.interpreter_process import LauncherOptions
from pilotq.workers.launcher.plain_launches import ChildEnd, Events, PlainLaunches, TakenLaunch
from pilotq.workers.launcher.report_pipe import ReportPipe
from pilotq.workers.launcher.spawn import Refusal, Spawner, full_environment
from pilotq.workers.process_tree import KILL_POLL_S, ProcessTracker
from pilotq.workers.protocol import (
    NO_OUTPUT,
    Begun,
    Call,
    CallRun,
    Captured,
    Element,
    Exited,
    Forget,
    FrameDecoder,
    GroupSwept,
    Launch,
    LaunchBase,
    LaunchRun,
    LaunchSlot,
    Ran,
    Refused,
    Retract,
    Retracted,
    Returned,
    Signal,
    Started,
    ToLauncher,
)
from pilotq.workers.script_files import ScriptFiles
from pilotq.workers.shortage import is_shortage

POLL_S = 0.02  # how often ended launches with living processes are checked; the end of a child of ours wakes us sooner
ANNOUNCE_S = 0.02  # a process that has ended by then, and left nothing, gets no Started: its Exited says enough
READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped for each read
FAULT_BYTES = 16 * os.sysconf("SC_PAGE_SIZE")  # the kernel maps so much of a file around each page fault
SHUTDOWN_S = 5.0  # how long the last kill may take; a process that lives then hangs in the kernel
_encode = msgspec.msgpack.Encoder().encode
# They may be sent to a whole process group or job step (Ctrl-C, scancel, srun --signal): our end is the pipe's.
IGNORED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGXCPU,
)  # fmt: skip


class Launcher:
    """Does what messages ask for, and reports what happened.

    ``down``, ``up`` and ``wake`` are our ends of the pipes; the directory of ``options`` is absolute. With ``native``
    plain launches are left to the native part.
    """

    def __init__(self, options: LauncherOptions, down: int, up: int, wake: int, *, native: bool) -> None:
        self._down = down
        self._up = up
        self._decoder: FrameDecoder[ToLauncher] = FrameDecoder(ToLauncher)  # type: ignore[arg-type]
        self._capture = Capture(options.directory, options.node)
        self._scripts = ScriptFiles(options.directory, options.node)
        self._spawner = Spawner(self._capture, self._scripts)
        self._tracker = ProcessTracker()
        self._running: dict[int, Running] = {}
        self._ended: dict[int, Running] = {}  # their main process ended, others live
        self._chains: dict[int, Chain] = {}  # by key of each launch that waits, runs, or has living processes
        self._startable: deque[Chain] = deque()  # their first launch may start
        self._check_at = 0.0  # monotonic: when the ended launches are checked again
        self._children = _child_signals()
        self._poll = select.epoll()
        self._poll.register(down, select.EPOLLIN)
        self._poll.register(self._children, select.EPOLLIN)
        self._reports = ReportPipe(up, wake, self._poll)
        self._interpreters = InterpreterPool(
            options, self._spawner, self._capture, self._tracker, self._reports, self._poll, self._complete,
            self._startable.append,
        )  # fmt: skip
        self._unannounced = self._interpreters.unannounced  # not reported as started, oldest first
        self._plain = None
        if native:
            self._plain = PlainLaunches(
                (down, up, wake), self._poll.fileno(), self._children, self._chains, self._capture, self._spawner,
                self._tracker, self._take_over,
            )  # fmt: skip

    def run(self) -> None:
        """Returns when the worker process sends Quit or has ended; no process that was started lives then."""
        try:
            while self._turn():
                pass
        finally:
            self._shut_down()

    def _turn(self) -> bool:
        """Wait for an event and handle it; False when the pipe has closed or Quit arrived."""
        if self._plain is None:
            events = self._wait()
        else:
            self._spawner.unpin()
            events = self._plain.run(self._pause(), may_start=not self._reports.full)
            self._spawner.forget_cpus()
        if events.unsent:
            self._reports.resend(events.unsent)
        if events.ends:
            self._reap(events.ends)
        for message in events.messages:
            if not self._receive(message):
                return False
        for fd in events.ready:
            if fd == self._up:
                self._reports.flush()
            else:
                self._interpreters.receive(fd)
        if events.closed:
            return False
        now = time.monotonic()
        if self._ended and now >= self._check_at:
            self._check_ended()
        if self._unannounced:
            self._announce(now)
        self._interpreters.tick(now)
        while self._startable and not self._reports.full:
            self._start_next(self._startable.popleft())
        self._reports.flush()
        self._reports.wake_if_due(now)
        return not self._reports.peer_closed

    def _pause(self) -> float:
        """Seconds until something is to be done though no event arrives; -1: for ever."""
        if self._startable and not self._reports.full:
            return 0.0  # the pipe was full a moment ago
        moments = [self._check_at] if self._ended else []
        if self._unannounced:
            moments.append(next(iter(self._unannounced.values())).began + ANNOUNCE_S)
        pending = (self._reports.wake_at(), self._interpreters.next_tick())
        moments += [moment for moment in pending if moment is not None]
        return max(min(moments) - time.monotonic(), 0.0) if moments else -1

    def _wait(self) -> Events:
        """Wait for an event, as `PlainLaunches.run` does; without the native part all launches are ours."""
        messages: list[ToLauncher] = []
        ready: list[int] = []
        ends: list[ChildEnd] = []
        closed = False
        for fd, _ in self._poll.poll(self._pause()):
            if fd == self._down:
                data = os.read(self._down, READ_BYTES)
                messages, closed = self._decoder.feed(data), not data
            elif fd == self._children:
                os.read(self._children, 128)
                ends = list(_ended_children())
            else:
                ready.append(fd)
        return Events(messages, ready, ends, b"", closed)

    def _receive(self, message: ToLauncher) -> bool:
        """Do what a message asks for; False when it is Quit."""
        if isinstance(message, (Launch, Call)):
            self._enqueue(message)
        elif isinstance(message, LaunchRun):
            for number in range(message.number):
                self._enqueue(message.launch_of(number))
        elif isinstance(message, CallRun):
            for call in message.calls():
                self._enqueue(call)
        elif isinstance(message, Retract):
            self._retract(message.key)
        elif isinstance(message, Signal):
            self._signal(message)
        elif isinstance(message, (LaunchBase, LaunchSlot)):
            self._spawner.add(message)
        elif isinstance(message, Forget):
            self._spawner.forget()
            if self._plain is not None:
                self._plain.forget()
        else:
            return False  # Quit
        return True

    def _chain_of(self, key: int) -> Chain | None:
        """The chain of a launch that waits, runs, or has living processes; from now on it is ours."""
        if self._plain is not None and key not in self._chains:
            self._plain.take(key)
        return self._chains.get(key)

    def _take_over(self, chain: Chain, taken: TakenLaunch | None) -> None:
        """A chain of the native part is ours from now on; ``taken`` is the launch of it that runs or has just ended."""
        for launch, _ in chain:
            self._chains[launch.key] = chain
        if taken is None:
            chain.handed_over = True
            self._startable.append(chain)
            return
        launch, context = taken.launch, taken.context
        key = launch.key
        env = full_environment(launch, context)
        self._tracker.add(key, taken.pid, env, taken.began, launch.slot, context.cpus)
        running = Running(launch, key, taken.pid, taken.files, chain)
        running.began, running.started = taken.since, taken.started
        self._chains[key] = chain
        self._running[key] = self._unannounced[key] = running

    def _enqueue(self, launch: Launch | Call) -> None:
        """Put it at the end of the chain it names, or of a new one."""
        failpoints.hit("launch received")
        chain = self._chain_of(launch.after)
        if chain is None:
            chain = Chain()
            self._startable.append(chain)
        elif chain.interpreter and not chain:
            self._startable.append(chain)  # its interpreter may take one more
        self._chains[launch.key] = chain
        chain.append((launch, self._spawner.context(launch)))

    def _start_next(self, chain: Chain) -> None:
        """Start the first launch of a chain."""
        if not chain or (self._plain is not None and self._plain.adopt(chain, self._chains)):
            return
        launch, context = chain[0]
        if isinstance(launch, Call):
            if not self._interpreters.feed(chain):
                self._startable.appendleft(chain)
            return
        if chain.interpreter:
            return  # calls before it have not returned
        key = launch.key
        self._reports.report(Begun(key))
        self._reports.flush()
        if self._reports.full:
            self._startable.appendleft(chain)  # else the reader of the pipe could not know of it after our death
            return
        failpoints.hit("begun sent")
        chain.popleft()
        chain.handed_over = False
        began = time.monotonic()
        try:
            spawned = self._spawner.spawn(launch, context)
        except Refusal as refusal:
            passing = is_shortage(refusal)
            self._reports.report(Refused(key, refusal.reason, printable(str(refusal)), passing))
            self._complete(key, chain, held_back=passing)
            self._reports.request_wake()
            return
        failpoints.hit("spawned")
        self._tracker.add(key, spawned.pid, spawned.env, began, launch.slot, context.cpus if context else ())
        files = spawned.stdout, spawned.stderr
        self._running[key] = self._unannounced[key] = Running(launch, key, spawned.pid, files, chain, spawned.script)
        failpoints.hit("tracked")

    def _complete(self, key: int, chain: Chain, *, held_back: bool = False) -> None:
        """No process of a launch is left: its chain goes on, unless the launch was ``held_back`` to be tried again."""
        del self._chains[key]
        while held_back and chain:
            launch, _ = chain.pop()
            del self._chains[launch.key]
            self._reports.report(Retracted(launch.key))
        if chain:
            if not self._startable or self._startable[-1] is not chain:
                self._startable.append(chain)
            self._reports.defer_wake()
        elif chain.interpreter:
            self._reports.defer_wake()
        else:
            self._reports.request_wake()

    def _retract(self, key: int) -> None:
        chain = self._chain_of(key)
        if chain is None:
            return
        self._interpreters.retract(key, chain)
        for item in chain:
            if item[0].key == key:
                self._chains.pop(key).remove(item)
                self._reports.report(Retracted(key))
                self._reports.request_wake()
                return

    def _announce(self, now: float) -> None:
        """Report the start of those that have lived for a moment."""
        for running in list(self._unannounced.values()):
            if now < running.began + ANNOUNCE_S:
                break
            self._report_started(running, now)

    def _report_started(self, running: Running, now: float) -> None:
        del self._unannounced[running.key]
        running.element = None  # its end is told by itself
        out, err = running.stdout, running.stderr
        paths = out.path if out else b"", err.path if err else b""
        self._reports.report(Started(running.key, running.pid, running.started, now - running.began, *paths))
        self._reports.request_wake()

    def _signal(self, message: Signal) -> None:
        key, number = message.key, message.signal
        chain = self._chain_of(key)
        running = self._running.get(key) or self._ended.get(key)
        if running is not None:
            running.killed |= number == signal.SIGKILL
            self._tracker.send_signal(running.tracker_key, number)
            if running.cgroup and running.killed:
                cgroups.kill(running.cgroup)
        elif chain is not None:
            self._interpreters.signal(message, chain)

    def _reap(self, ends: list[ChildEnd]) -> None:
        """Report those of the children that have ended, and were waited for, that were main processes."""
        # First all, then the reports: a zombie that a main process leaves must not count as alive.
        reports: list[tuple[Running, Exited | Returned]] = []
        now = time.monotonic()
        for end in ends:
            pid = end.pid
            key = self._tracker.reaped(pid)
            if key is None:
                self._check_at = 0.0  # it may have been the last one of its launch
            elif key < 0:
                if (ended := self._interpreters.reaped(key, end.status, end.cpu, _peak(end))) is not None:
                    reports.append(ended)
            else:
                failpoints.hit("reaped")
                running = self._running.pop(key)
                exited = Exited(
                    key, pid, end.status, running.started, time.time(), now - running.began, end.cpu, _peak(end), 0,
                    NO_OUTPUT, NO_OUTPUT,
                )  # fmt: skip
                if running.cgroup:
                    exited.killed_at = cgroups.killed_at(running.cgroup)
                reports.append((running, exited))
        for running, report in reports:
            key = running.key
            if self._tracker.has_living(running.tracker_key):
                if key in self._unannounced:
                    self._report_started(running, now)
                report.remaining = self._tracker.count_living(running.tracker_key)
                report.stdout, report.stderr = (
                    self._capture.peek(file) if file else NO_OUTPUT for file in (running.stdout, running.stderr)
                )
                self._ended[key] = running
                self._reports.request_wake()
            else:
                self._unannounced.pop(key, None)
                report.remaining = 0
                report.stdout, report.stderr = self._collect(running)
                failpoints.hit("collected")
                self._complete(key, running.chain)
            if running.element is not None and isinstance(report, Exited):
                self._reports.report(_ran(report, running.element))
            else:
                self._reports.report(report)
            failpoints.hit("reported")

    def _check_ended(self) -> None:
        """Report the ended launches of which no process lives by now; what appeared since a SIGKILL gets it too."""
        began = time.monotonic()
        for running in list(self._ended.values()):
            if not self._tracker.has_living(running.tracker_key):
                del self._ended[running.key]
                self._reports.report(GroupSwept(running.key, time.time(), *self._collect(running)))
                self._complete(running.key, running.chain)
            elif running.killed:
                self._tracker.send_signal(running.tracker_key, signal.SIGKILL)
        now = time.monotonic()
        # Reading /proc takes long on a full node: at most a tenth of our time goes into it.
        self._check_at = now + max(POLL_S, 10 * (now - began))

    def _collect(self, running: Running) -> tuple[Captured, Captured]:
        """The output of a launch of which no process is left; the file of its script goes."""
        if running.script:
            self._scripts.remove(running.script)
        if running.cgroup:
            cgroups.remove(running.cgroup)
        out, err = running.stdout, running.stderr
        return (
            self._capture.collect(out, running.name + ".out") if out else NO_OUTPUT,
            self._capture.collect(err, running.name + ".err") if err else NO_OUTPUT,
        )

    def _shut_down(self) -> None:
        """Kill every process below this one, wait for it, remove the files of the pool."""
        if self._plain is not None:
            self._plain.take_running()
        deadline = time.monotonic() + SHUTDOWN_S
        while time.monotonic() < deadline:
            self._tracker.kill_all()
            try:
                while os.wait4(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break  # no child is left, and every orphan had become a child
            time.sleep(KILL_POLL_S)
        self._capture.close()
        self._scripts.close()


def _ended_children() -> Iterator[ChildEnd]:
    """Every child that has ended; it is waited for."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        cpu, faults = usage.ru_utime + usage.ru_stime, usage.ru_minflt + usage.ru_majflt
        yield ChildEnd(pid, status, cpu, usage.ru_maxrss, faults)


def _ran(exited: Exited, element: Element) -> Exited | Ran:
    """The end of an element, as it is told."""
    if exited.status or exited.stdout.length or exited.stderr.length:
        return exited
    after, lasted = round((exited.started - element.origin) * 1e6), round((exited.ended - exited.started) * 1e6)
    memory, cpu = exited.max_rss, round(exited.cpu * 1e6)
    row = (element.index, element.place, after, max(lasted, 0), exited.pid, memory, cpu)
    return Ran(exited.key, exited.seconds, exited.ended, _encode(row))


def _peak(end: ChildEnd) -> int:
    """The peak memory of a child in bytes.

    Until it executes its program a child shares our memory, which the kernel counts for it. So what has needed less
    than we do would show our peak: there it is at most what its page faults can have mapped.
    """
    if end.max_rss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        return end.max_rss * 1024
    return min(end.max_rss * 1024, end.faults * FAULT_BYTES)


def _child_signals() -> int:
    """A descriptor that is readable when a child has ended. SIGCHLD interrupts nothing any more; tasks get no mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    words = (ctypes.c_ulong * (128 // ctypes.sizeof(ctypes.c_ulong)))()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words[(signal.SIGCHLD - 1) // bits] = 1 << (signal.SIGCHLD - 1) % bits
    fd = ctypes.CDLL(None, use_errno=True).signalfd(-1, words, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "no descriptor for the ends of children")
    return int(fd)


def main(argv: list[str]) -> None:
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    log_as("launcher", options["--node"])
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # without it the process groups of launches are all that is tracked
        become_subreaper()
    # Descriptors beyond 0, 1 and 2 are not for tasks.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # the descriptor of the listing
    spare_collections()
    pipes = [int(options[name]) for name in ("--down", "--up", "--wake")]
    own = LauncherOptions(os.path.abspath(options["--dir"]), options["--node"], int(options["--calls"]))
    Launcher(own, *pipes, native=options["--kind"] == "native").run()


if __name__ == "__main__":
    main(sys.argv[1:])
