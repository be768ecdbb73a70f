"""Child processes of a pilot: each is started with a log of its own, watched by pidfd, and restarted within a budget.

Such a process, a *part* of the pilot, ends with its parent: the kernel sends it SIGTERM when the supervisor ends,
however that happens.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections import deque
from typing import TYPE_CHECKING

from pilotq.broker.log import as_text

if TYPE_CHECKING:
    import subprocess

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
COLLECT_AFTER = 50_000  # objects that were made and are still there
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def become_subreaper() -> None:
    """Make orphans below this process its children, so that none escapes (see `reap_orphans`)."""
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def spare_collections() -> None:
    """Look for cycles of objects seldom, and not among those that are there now: tasks make many, but no cycles."""
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def terminate_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends; ``parent`` is its number before the fork."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The parent may have died before the line above took effect: then no signal would ever come.
    if os.getppid() != parent:
        os._exit(1)


def kill_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def open_pidfd(pid: int) -> int | None:
    """A descriptor that is readable once the process has ended; None on kernels before 5.3, which have none.

    Raises ProcessLookupError when there is no such process.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, AttributeError):
        return None


class RestartBudget:
    """Allows at most ``limit`` restarts within ``window`` seconds.

    RestartBudget(5, 60.0).take(time.monotonic())
    """

    def __init__(self, limit: int, window: float) -> None:
        self.limit = limit
        self.window = window
        self._times: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Whether one more restart is allowed; ``now`` is monotonic."""
        while self._times and self._times[0] <= now - self.window:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return False
        self._times.append(now)
        return True


class PilotProcess:
    """One part of a pilot: how it is started, and its process while there is one.

    ``log`` is a file that is appended to, readable by its owner only. ``cwd`` is the directory the process runs in:
    never the user's, where a folder called ``pilotq`` would be imported instead of this package. ``hold_stdin``: its
    stdin is a pipe that stays open as long as this process lives, so that what it starts elsewhere notices our end.
    ``env`` is its environment, where that is another than ours.
    """

    def __init__(
        self, name: str, argv: list[str], *, log: str, cwd: str, hold_stdin: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.argv = argv
        self.log = log
        self.cwd = cwd
        self.hold_stdin = hold_stdin
        self.env = env
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd: int | None = None

    def start(self) -> None:
        import subprocess  # here: launchers and interpreters import this module too, and start nothing by it

        self.close()
        parent = os.getpid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.PIPE if self.hold_stdin else subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.cwd, env=self.env, start_new_session=True, umask=0o077,
                preexec_fn=lambda: terminate_with(parent),  # noqa: PLW1509 - a supervisor has one thread, and this takes no lock
            )  # fmt: skip
        finally:
            os.close(log)
        self.pidfd = open_pidfd(self.process.pid)

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ended(self) -> str:
        """How it ended, as text; empty while it runs, and before it was started."""
        code = self.process.poll() if self.process is not None else None
        if code is None:
            return ""
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)  # does nothing once the end was seen

    def kill(self) -> None:
        """Kill it with SIGKILL, and wait until it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Release the descriptors of an ended process."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None

    def last_lines(self, lines: int = 5) -> str:
        """The last lines of its log, or a note that it is empty."""
        return tail(self.log, lines) or f"({self.log} is empty)"


def tail(path: str, lines: int) -> str:
    """The last lines of a log, as people read them; empty when there is no such file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16_384))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return as_text("\n".join(text.splitlines()[-lines:]))


def reap_orphans(known: set[int]) -> None:
    """Reap ended children that are not in ``known``: those are waited for by their owners.

    Stops at the first known one: it is in front of others in the kernel's list until its owner has reaped it.
    """
    while True:
        try:
            # WNOWAIT: waitpid(-1) would take the exit status of a part from its owner.
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in known:
            return
        os.waitpid(found.si_pid, 0)
