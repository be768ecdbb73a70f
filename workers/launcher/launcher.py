"""The launcher: a child of a worker's control process that starts and reaps task processes.

    python -m pilotq.workers.launcher.launcher --dir <output directory> --node <name> --calls <number>
        --down <fd> --up <fd> --bell <fd>

One thread and one loop over the pipe from the control process and the ends of children. It knows nothing of Redis,
time limits or grace: it does what records say (`workers/protocol.py`) and tells what it saw. It lives as long as the
pipe: when that closes, whatever the reason, everything below this process is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections import deque

from pilotq.broker import failpoints
from pilotq.workers.launcher.capture import Capture
from pilotq.workers.launcher.chain import Line, Running
from pilotq.workers.launcher.interpreter_pool import Interpreters
from pilotq.workers.launcher.interpreter_process import Options
from pilotq.workers.launcher.report_pipe import Uplink
from pilotq.workers.launcher.spawn import Refusal, Spawner
from pilotq.workers.process_tree import PAUSE_S, Family
from pilotq.workers.protocol import (
    NOTHING,
    Base,
    Begun,
    Call,
    Captured,
    Down,
    Exited,
    Forget,
    Frames,
    Launch,
    Place,
    Refused,
    Returned,
    Signal,
    Started,
    Swept,
    Withdraw,
    Withdrawn,
)

POLL_S = 0.02  # between two looks at leftovers; the end of one that is our child wakes us sooner
YOUNG_S = 0.02  # what has ended by then, and left nothing, is not said to have started: its end says it
READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped for each read
END_S = 5.0  # how long the last sweep may take; what lives then hangs in the kernel
PR_SET_CHILD_SUBREAPER = 36
# They may be sent to a whole process group or job step (Ctrl-C, scancel, srun --signal): our end is the pipe's.
IGNORED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGXCPU,
)  # fmt: skip


class Launcher:
    """``down``, ``up`` and ``bell`` are the ends of the pipes that are ours; ``directory`` is absolute."""

    def __init__(self, options: Options, down: int, up: int, bell: int) -> None:
        self._down = down
        self._up = up
        self._frames: Frames[Down] = Frames(Down)  # type: ignore[arg-type]
        self._capture = Capture(options.directory, options.node)
        self._spawner = Spawner(self._capture)
        self._family = Family()
        self._running: dict[int, Running] = {}
        self._ended: dict[int, Running] = {}  # their main process ended, others live
        self._lines: dict[int, Line] = {}  # behind all that run or ended, and with all that are lined up
        self._going: deque[Line] = deque()  # their first one may start
        self._look_at = 0.0  # monotonic: when what is left of ended launches is looked at again
        self._children = _child_signals()
        self._poll = select.epoll()
        self._poll.register(down, select.EPOLLIN)
        self._poll.register(self._children, select.EPOLLIN)
        self._uplink = Uplink(up, bell, self._poll)
        self._calls = Interpreters(
            options, self._spawner, self._capture, self._family, self._uplink, self._poll, self._leave,
            self._going.append,
        )  # fmt: skip
        self._young = self._calls.young  # not said to have started, oldest first

    def run(self) -> None:
        """Returns when the control process says so or is gone; nothing that was started lives then."""
        try:
            while self._turn():
                pass
        finally:
            self._end()

    def _turn(self) -> bool:
        """Wait for something, do what it asks for; False when the pipe has closed or Quit came."""
        for fd, _ in self._poll.poll(self._pause()):
            if fd == self._down:
                if not self._receive():
                    return False
            elif fd == self._children:
                os.read(self._children, 128)
                self._reap()
            elif fd == self._up:
                self._uplink.flush()
            else:
                self._calls.hear(fd)
        now = time.monotonic()
        if self._ended and now >= self._look_at:
            self._look()
        if self._young:
            self._confirm(now)
        self._calls.tick(now)
        while self._going and not self._uplink.waiting:
            self._go_on(self._going.popleft())
        self._uplink.flush()
        self._uplink.ring_if_due(now)
        return not self._uplink.deaf

    def _pause(self) -> float:
        """Seconds until something is to be done though nothing happens; -1: for ever."""
        if self._going and not self._uplink.waiting:
            return 0.0  # the pipe was full a moment ago
        moments = [self._look_at] if self._ended else []
        if self._young:
            moments.append(next(iter(self._young.values())).began + YOUNG_S)
        moments += [moment for moment in (self._uplink.ring_at(), self._calls.next()) if moment is not None]
        return max(min(moments) - time.monotonic(), 0.0) if moments else -1

    def _receive(self) -> bool:
        data = os.read(self._down, READ_BYTES)
        for record in self._frames.feed(data):
            if isinstance(record, (Launch, Call)):
                self._launch(record)
            elif isinstance(record, Withdraw):
                self._withdraw(record.key)
            elif isinstance(record, Signal):
                self._signal(record)
            elif isinstance(record, (Base, Place)):
                self._spawner.add(record)
            elif isinstance(record, Forget):
                self._spawner.forget()
            else:
                return False  # Quit
        return bool(data)

    def _launch(self, launch: Launch | Call) -> None:
        failpoints.at("launch received")
        line = self._lines.get(launch.after)
        if line is None:
            line = Line()
            self._going.append(line)
        elif line.serving is not None and not line:
            self._going.append(line)  # its interpreter may take one more
        self._lines[launch.key] = line
        line.append((launch, self._spawner.surroundings(launch)))

    def _go_on(self, line: Line) -> None:
        """Start the first one of a line."""
        if not line:
            return
        launch, around = line[0]
        if isinstance(launch, Call):
            if not self._calls.feed(line):
                self._going.appendleft(line)
            return
        if line.serving is not None:
            return  # calls before it have not returned
        key = launch.key
        self._uplink.report(Begun(key))
        self._uplink.flush()
        if self._uplink.waiting:
            self._going.appendleft(line)  # not before who reads the pipe after our death can know of it
            return
        failpoints.at("begun said")
        line.popleft()
        began = time.monotonic()
        try:
            spawned = self._spawner.spawn(launch, around)
        except Refusal as refusal:
            self._uplink.report(Refused(key, refusal.reason, str(refusal)))
            self._leave(key, line)
            self._uplink.urge()
            return
        failpoints.at("spawned")
        self._family.born(key, spawned.pid, spawned.env, began)
        files = spawned.stdout, spawned.stderr
        self._running[key] = self._young[key] = Running(launch, key, spawned.pid, files, line)
        failpoints.at("born")

    def _leave(self, key: int, line: Line) -> None:
        """Nothing is left of a launch: its line goes on."""
        del self._lines[key]
        if line:
            self._going.append(line)
            self._uplink.mention()
        elif line.serving is not None:
            self._uplink.mention()
        else:
            self._uplink.urge()

    def _withdraw(self, key: int) -> None:
        line = self._lines.get(key)
        if line is None:
            return
        self._calls.take_back(key, line)
        for item in line:
            if item[0].key == key:
                self._lines.pop(key).remove(item)
                self._uplink.report(Withdrawn(key))
                self._uplink.urge()
                return

    def _confirm(self, now: float) -> None:
        """Say of what has lived for a moment that it has started."""
        for running in list(self._young.values()):
            if now < running.began + YOUNG_S:
                break
            self._say_started(running, now)

    def _say_started(self, running: Running, now: float) -> None:
        del self._young[running.key]
        out, err = running.stdout, running.stderr
        paths = out.path if out else "", err.path if err else ""
        self._uplink.report(Started(running.key, running.pid, running.started, now - running.began, *paths))
        self._uplink.urge()

    def _signal(self, record: Signal) -> None:
        key, number = record.key, record.signal
        running = self._running.get(key) or self._ended.get(key)
        if running is not None:
            running.killed |= number == signal.SIGKILL
            self._family.send(running.family, number)
        elif (line := self._lines.get(key)) is not None:
            self._calls.signal(record, line)

    def _reap(self) -> None:
        """Wait for every child that has ended, then see what is left of those that were main processes."""
        # First all, then the judgement: what a main process leaves as a zombie must not count as alive.
        records: list[tuple[Running, Exited | Returned]] = []
        now = 0.0
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            key = self._family.reaped(pid)
            if key is None:
                self._look_at = 0.0  # it may have been the last one of its launch
                continue
            now = time.monotonic()
            cpu = usage.ru_utime + usage.ru_stime
            rss = usage.ru_maxrss * 1024
            if key < 0:
                if (ended := self._calls.died(key, status, cpu, rss)) is not None:
                    records.append(ended)
            else:
                failpoints.at("reaped")
                running = self._running.pop(key)
                seconds = now - running.began
                exited = Exited(key, pid, status, running.started, time.time(), seconds, cpu, rss, 0, NOTHING, NOTHING)
                records.append((running, exited))
        for running, record in records:
            key = running.key
            if self._family.lives(running.family):
                if key in self._young:
                    self._say_started(running, now)
                record.left = self._family.count(running.family)
                self._ended[key] = running
                self._uplink.urge()
            else:
                self._young.pop(key, None)
                record.left = 0
                record.stdout, record.stderr = self._collect(running)
                failpoints.at("collected")
                self._leave(key, running.line)
            self._uplink.report(record)
            failpoints.at("reported")

    def _look(self) -> None:
        """See which ended launches are swept by now; what appeared since a SIGKILL gets it too."""
        began = time.monotonic()
        for running in list(self._ended.values()):
            if not self._family.lives(running.family):
                del self._ended[running.key]
                self._uplink.report(Swept(running.key, time.time(), *self._collect(running)))
                self._leave(running.key, running.line)
            elif running.killed:
                self._family.send(running.family, signal.SIGKILL)
        now = time.monotonic()
        # Reading /proc takes long on a full node: at most a tenth of our time goes into it.
        self._look_at = now + max(POLL_S, 10 * (now - began))

    def _collect(self, running: Running) -> tuple[Captured, Captured]:
        out, err = running.stdout, running.stderr
        return (
            self._capture.collect(out, running.name + ".out") if out else NOTHING,
            self._capture.collect(err, running.name + ".err") if err else NOTHING,
        )

    def _end(self) -> None:
        """Kill everything below this process, wait for it, remove the files of the pool."""
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            self._family.kill_all()
            try:
                while os.wait4(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break  # no child is left, and what had lost its parent had come home
            time.sleep(PAUSE_S)
        self._capture.close()


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


def _become_subreaper() -> None:
    """Orphans below this process come home to it; without that (no Linux) their groups are all that is seen."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        pass


def main(argv: list[str]) -> None:
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _become_subreaper()
    # What this process has open beyond 0, 1 and 2 is nobody else's.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # the descriptor of the listing
    pipes = [int(options[name]) for name in ("--down", "--up", "--bell")]
    own = Options(os.path.abspath(options["--dir"]), options["--node"], int(options["--calls"]))
    Launcher(own, *pipes).run()


if __name__ == "__main__":
    main(sys.argv[1:])
