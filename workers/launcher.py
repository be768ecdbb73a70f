"""The launcher: a child of a worker's control process that starts and reaps task processes.

    python -m pilotq.workers.launcher --dir <output directory> --node <name> --down <fd> --up <fd>

One thread and one loop over the pipe from the control process and the ends of children. It knows nothing of Redis,
time limits or grace: it does what records say (`workers/wire.py`) and tells what it saw. It lives as long as the
pipe: when that closes, whatever the reason, everything below this process is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

from pilotq.workers.capture import NOTHING, Capture, PoolFile
from pilotq.workers.spawn import Refusal, Spawner
from pilotq.workers.sweep import PAUSE_S, Family
from pilotq.workers.wire import (
    Base,
    Captured,
    Down,
    Exited,
    Frames,
    Launch,
    Quit,
    Refused,
    Signal,
    Started,
    Swept,
    Up,
    frame,
)

POLL_S = 0.02  # between two looks at leftovers; the end of one that is our child wakes us sooner
REPORT_MAX = 64  # records in a frame; more of them would make the control process wait for the first
READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped for each read
END_S = 5.0  # how long the last sweep may take; what lives then hangs in the kernel
PR_SET_CHILD_SUBREAPER = 36
# They may be sent to a whole process group or job step (Ctrl-C, scancel, srun --signal): our end is the pipe's.
IGNORED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGXCPU,
)  # fmt: skip


class Running:
    """One launch that was started and of which something lives."""

    __slots__ = ("key", "name", "began", "stdout", "stderr", "killed")

    def __init__(self, key: int, name: str, began: float, stdout: PoolFile | None, stderr: PoolFile | None) -> None:
        self.key = key
        self.name = name  # <id>.<execution>: of output files that are kept
        self.began = began  # monotonic seconds
        self.stdout = stdout
        self.stderr = stderr
        self.killed = False  # SIGKILL was sent: what appears later gets it too


class Launcher:
    """``down`` and ``up`` are the ends of the pipes that are ours; ``directory`` is absolute."""

    def __init__(self, directory: str, node: str, down: int, up: int) -> None:
        self._down = down
        self._up = up
        self._frames: Frames[Down] = Frames(Down)  # type: ignore[arg-type]
        self._capture = Capture(directory, node)
        self._spawner = Spawner(self._capture)
        self._family = Family()
        self._running: dict[int, Running] = {}
        self._ended: dict[int, Running] = {}  # their main process ended, others live
        self._records: list[Up] = []
        self._unsent = bytearray()
        self._waiting = False  # for the pipe to take more
        self._look_at = 0.0  # monotonic: when what is left of ended launches is looked at again
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, _woken)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        os.set_blocking(up, False)
        self._poll = select.epoll()
        self._poll.register(down, select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)

    def run(self) -> None:
        """Returns when the control process says so or is gone; nothing that was started lives then."""
        try:
            while self._turn():
                pass
        finally:
            self._end()

    def _turn(self) -> bool:
        """Wait for something, do what it asks for; False when the pipe has closed or Quit came."""
        goes_on = True
        for fd, _ in self._poll.poll(POLL_S if self._ended else -1):
            if fd == self._down:
                goes_on = self._receive()
            elif fd == self._wake:
                os.read(self._wake, 4096)
                self._reap()
        if self._ended and time.monotonic() >= self._look_at:
            self._look()
        return self._flush() and goes_on

    def _receive(self) -> bool:
        data = os.read(self._down, READ_BYTES)
        for record in self._frames.feed(data):
            if isinstance(record, Launch):
                self._launch(record)
            elif isinstance(record, Signal):
                self._signal(record.key, record.signal)
            elif isinstance(record, Base):
                self._spawner.add(record)
            elif isinstance(record, Quit):
                return False
        return bool(data)

    def _launch(self, launch: Launch) -> None:
        began = time.monotonic()
        try:
            spawned = self._spawner.spawn(launch)
        except Refusal as refusal:
            self._report(Refused(launch.key, refusal.reason, str(refusal)))
            return
        self._family.born(launch.key, spawned.pid, spawned.env, began)
        out, err = spawned.stdout, spawned.stderr
        self._running[launch.key] = Running(launch.key, f"{launch.id}.{launch.execution}", began, out, err)
        paths = out.path if out else "", err.path if err else ""
        self._report(Started(launch.key, spawned.pid, time.time(), *paths))

    def _signal(self, key: int, number: int) -> None:
        running = self._running.get(key) or self._ended.get(key)
        if running is not None:
            running.killed |= number == signal.SIGKILL
            self._family.send(key, number)

    def _reap(self) -> None:
        """Wait for every child that has ended, then see what is left of those that were main processes."""
        # First all, then the judgement: what a main process leaves as a zombie must not count as alive.
        records = []
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
            else:
                running = self._running.pop(key)
                seconds = time.monotonic() - running.began
                cpu = usage.ru_utime + usage.ru_stime
                record = Exited(key, status, time.time(), seconds, cpu, usage.ru_maxrss * 1024, 0, NOTHING, NOTHING)
                records.append((running, record))
        for running, record in records:
            if self._family.lives(running.key):
                record.left = self._family.count(running.key)
                self._ended[running.key] = running
            else:
                record.stdout, record.stderr = self._collect(running)
            self._report(record)

    def _look(self) -> None:
        """See which ended launches are swept by now; what appeared since a SIGKILL gets it too."""
        began = time.monotonic()
        for running in list(self._ended.values()):
            if not self._family.lives(running.key):
                del self._ended[running.key]
                self._report(Swept(running.key, time.time(), *self._collect(running)))
            elif running.killed:
                self._family.send(running.key, signal.SIGKILL)
        now = time.monotonic()
        # Reading /proc takes long on a full node: at most a tenth of our time goes into it.
        self._look_at = now + max(POLL_S, 10 * (now - began))

    def _collect(self, running: Running) -> tuple[Captured, Captured]:
        out, err = running.stdout, running.stderr
        return (
            self._capture.collect(out, running.name + ".out") if out else NOTHING,
            self._capture.collect(err, running.name + ".err") if err else NOTHING,
        )

    def _report(self, record: Up) -> None:
        self._records.append(record)
        if len(self._records) >= REPORT_MAX:
            self._flush()

    def _flush(self) -> bool:
        """Send what was reported, as far as the pipe takes it; False when nobody reads it any more."""
        if self._records:
            self._unsent += frame(self._records)
            self._records = []
        waiting = False
        while self._unsent and not waiting:
            try:
                del self._unsent[: os.write(self._up, self._unsent)]
            except BlockingIOError:
                waiting = True  # never wait here: the control process may be waiting for us to read
            except OSError:
                return False
        if waiting and not self._waiting:
            self._poll.register(self._up, select.EPOLLOUT)
        elif self._waiting and not waiting:
            self._poll.unregister(self._up)
        self._waiting = waiting
        return True

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


def _woken(_signal: int, _frame: object) -> None:
    """Python wants a handler where the wake-up descriptor is written."""


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
    down, up = int(options["--down"]), int(options["--up"])
    Launcher(os.path.abspath(options["--dir"]), options["--node"], down, up).run()


if __name__ == "__main__":
    main(sys.argv[1:])
