"""Starts, replaces and ends the launchers of a node; their pipes never block the worker process."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import msgspec

from pilotq.broker.errors import PilotFailed
from pilotq.broker.launcher_kind import Kind
from pilotq.broker.log import log
from pilotq.broker.processes import RestartBudget
from pilotq.broker.settings import Settings
from pilotq.workers.protocol import (
    Call,
    CallRun,
    Forget,
    FrameDecoder,
    FromLauncher,
    Launch,
    LaunchBase,
    LaunchRun,
    LaunchSlot,
    Quit,
    Retract,
    Signal,
    ToLauncher,
    encode_frame,
)

ISOLATED = -1
CORES_PER_LAUNCHER = 8  # a launcher waits while a child of its begins: short tasks of other cores wait with it
LAUNCHERS_MIN = 4  # of a node, where it has so many cores
READ_BYTES = 1 << 16  # what its pipe holds
PIPE_BYTES = 1 << 20  # a burst of launches fits, so that writes seldom wait
KNOWN_MAX = 1000  # bases and slots a launcher keeps
QUIT_S = 8.0  # longer than a launcher takes to kill what it has
KILLED_S = 1.0
_encode = msgspec.msgpack.Encoder().encode


class LaunchersFailedError(PilotFailed):
    """Launchers of this node died more often than the settings allow."""


class LauncherHandle:
    """Starts one launcher as a child process, which keeps captured output in ``directory``; exchanges records with it.

    Records are collected by `launch` and `send`, and written by `flush`. `receive` is to be called when ``wake`` is
    readable, and returns the records that have arrived.
    """

    def __init__(self, number: int, core_group: int, directory: str, node: str, calls: int, kind: Kind) -> None:
        self.number = number
        self.core_group = core_group
        self.stopping = False  # gets no more work: it was killed, or asked to quit
        self.closed = False  # it has closed its end of the pipe
        self.full = False  # the pipe takes no more for now
        self.starting_key = 0  # key of the last launch that it has begun
        down, self.down = os.pipe2(os.O_CLOEXEC)
        self.up, up = os.pipe2(os.O_CLOEXEC)
        self.wake, wake = os.pipe2(os.O_CLOEXEC)
        for end in (self.down, self.up, self.wake):
            os.set_blocking(end, False)
        try:
            fcntl.fcntl(self.down, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the user's pages for pipes are used up: the usual 64 KiB do
        command = [
            sys.executable, "-m", "pilotq.workers.launcher.launcher", "--dir", directory, "--node", node,
            "--calls", str(calls), "--kind", kind, "--down", str(down), "--up", str(up), "--wake", str(wake),
        ]  # fmt: skip
        try:
            self._process = subprocess.Popen(
                command, pass_fds=(down, up, wake), stdin=subprocess.DEVNULL, start_new_session=True, cwd=directory
            )
        finally:
            for end in (down, up, wake):
                os.close(end)
        self._known_bases: set[str] = set()
        self._known_slots: set[str] = set()
        self._records: list[ToLauncher | msgspec.Raw] = []
        self._outgoing = bytearray()
        self._frames: FrameDecoder[FromLauncher] = FrameDecoder(FromLauncher)  # type: ignore[arg-type]

    @property
    def pid(self) -> int:
        return self._process.pid

    def launch(self, base: LaunchBase, slot: LaunchSlot, launch: Launch | Call | LaunchRun | CallRun) -> None:
        """Raises what an encoder raises when this launch cannot travel; then none of it is sent."""
        if base.name in self._known_bases and slot.name in self._known_slots:
            self._records.append(msgspec.Raw(_encode(launch)))
            return
        forget = len(self._known_bases) + len(self._known_slots) >= KNOWN_MAX
        # Encoded here, one by one: what cannot be encoded must not take with it all that goes into one frame.
        records: list[ToLauncher | msgspec.Raw] = [Forget()] if forget else []
        if forget or base.name not in self._known_bases:
            records.append(msgspec.Raw(_encode(base)))
        if forget or slot.name not in self._known_slots:
            records.append(msgspec.Raw(_encode(slot)))
        records.append(msgspec.Raw(_encode(launch)))
        if forget:
            self._known_bases.clear()
            self._known_slots.clear()
        self._known_bases.add(base.name)
        self._known_slots.add(slot.name)
        self._records += records

    def send(self, record: Retract | Signal | Quit) -> None:
        self._records.append(record)

    def flush(self) -> None:
        """Write what the pipe takes; ``full`` says that something waits for the moment it is writable."""
        if self._records:
            self._outgoing += encode_frame(self._records)
            self._records.clear()
        self.full = False
        while self._outgoing:
            try:
                written = os.write(self.down, self._outgoing)
            except BlockingIOError:
                self.full = True
                return
            except BrokenPipeError:
                # It died; what becomes of its tasks is decided when it is reaped.
                self._outgoing.clear()
                return
            del self._outgoing[:written]

    def receive(self) -> list[FromLauncher]:
        """All records that have arrived; none when nothing came or the launcher is ``closed``."""
        records: list[FromLauncher] = []
        try:
            # Before the records: what comes after them writes to the wake pipe again. When the launcher has ended it
            # stays readable.
            os.read(self.wake, READ_BYTES)
        except BlockingIOError:
            pass
        full = True
        while full:
            try:
                data = os.read(self.up, READ_BYTES)
            except BlockingIOError:
                break
            records += self._frames.feed(data)
            full = len(data) == READ_BYTES
            self.closed = not data
        return records

    def kill(self) -> None:
        """SIGKILL; may be repeated until `reap`."""
        self.stopping = True
        # Not by way of Popen: it would take the exit status, and the death would never be seen among the children.
        os.kill(self.pid, signal.SIGKILL)

    def reap(self, seconds: float | None = None) -> None:
        """Wait until the process has ended and close the pipes; TimeoutExpired if it does not end in time."""
        self._process.wait(seconds)
        for end in (self.down, self.up, self.wake):
            os.close(end)


class LauncherPool:
    """Keeps the launchers of a node, of one kind: one for each group of cores, replaced when it dies or hangs.

    That of the first group starts at once, another one when something is to begin there.
    """

    def __init__(self, directory: str, node: str, cores: Sequence[int], settings: Settings, kind: Kind) -> None:
        self._kind = kind
        self._directory = directory
        self._node = node
        self._settings = settings
        group = min(CORES_PER_LAUNCHER, -(-len(cores) // LAUNCHERS_MIN))
        self._core_groups = {core: position // group for position, core in enumerate(cores)}
        self._budget = RestartBudget(settings.restart_limit, settings.restart_window_s)
        self._started = 0
        self._serving: dict[int, LauncherHandle] = {}  # by core group
        self.living: dict[int, LauncherHandle] = {}  # by number, with those that are stopping
        self._start(0)

    def _start(self, core_group: int) -> LauncherHandle:
        self._started += 1
        launcher = LauncherHandle(
            self._started, core_group, self._directory, self._node, self._settings.interpreter_calls, self._kind
        )
        self.living[launcher.number] = launcher
        if core_group != ISOLATED:
            self._serving[core_group] = launcher
        return launcher

    def serving(self, core: int) -> LauncherHandle:
        """The launcher that starts what begins at this core; raises OSError when it is to be started and cannot be."""
        core_group = self._core_groups.get(core, 0)
        return self._serving.get(core_group) or self._start(core_group)

    def start_isolated(self) -> LauncherHandle:
        """A launcher for one task that may be what kills launchers; `stop_isolated` ends it."""
        return self._start(ISOLATED)

    def stop_isolated(self, launcher: LauncherHandle) -> None:
        """The task of a launcher has ended: one that was for this task alone ends, too."""
        if launcher.core_group == ISOLATED:
            launcher.stopping = True
            launcher.send(Quit())

    def with_pid(self, pid: int) -> LauncherHandle | None:
        return next((launcher for launcher in self.living.values() if launcher.pid == pid), None)

    def replace(self, launcher: LauncherHandle) -> None:
        """Kill a launcher that hangs, or has died already, and start another in its place.

        Raises LaunchersFailedError after ``restart_limit`` replacements in ``restart_window_s``.
        """
        launcher.kill()
        if self._serving.get(launcher.core_group) is not launcher:
            return
        if not self._budget.take(time.monotonic()):
            raise LaunchersFailedError(
                f"launchers of node {self._node} died more than {self._settings.restart_limit} times in "
                f"{self._settings.restart_window_s:g} s: the log of this worker has more"
            )
        self._start(launcher.core_group)

    def reap(self, launcher: LauncherHandle) -> None:
        """Remove a launcher that has ended."""
        del self.living[launcher.number]
        launcher.reap()

    def close(self) -> None:
        """End all: they kill what they still have; those that do not end in time are killed themselves."""
        for launcher in self.living.values():
            launcher.send(Quit())
            launcher.flush()
        deadline = time.monotonic() + QUIT_S
        for launcher in self.living.values():
            try:
                launcher.reap(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                launcher.kill()
                try:
                    launcher.reap(KILLED_S)
                except subprocess.TimeoutExpired:
                    log(f"launcher process {launcher.pid} cannot be killed: it hangs in the kernel", level="error")
        self.living.clear()


def ended_children() -> Iterator[int]:
    """Pids of children that have ended and are still to be reaped by the caller, one at a time."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None:
            return
        yield found.si_pid
