"""One spawn: from a Launch record to a process with the task's surroundings and nothing else.

posix_spawn can set little of what a task must find, so the launcher puts it on itself (mask, umask, directory, soft
limits) and the child inherits it; no helper process stands between, and nothing runs between fork and exec.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from typing import NamedTuple

from pilotq.workers.launcher.capture import Capture, PoolFile
from pilotq.workers.protocol import Base, Call, Launch, Place

DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"  # where a task without PATH finds its program
PROGRAM_S = 1.0  # a program found on PATH is looked for again after this: a newer one may stand in front
PROGRAMS_MAX = 1000  # of such findings are kept
READY_MAX = 1000  # surroundings that are kept made ready
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR}
Limit = tuple[int, int, int]  # number of the limit, soft, hard


class Refusal(Exception):
    """The task was not started; ``reason`` is of states.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Spawned(NamedTuple):
    pid: int
    env: dict[bytes, bytes]  # what it was started with
    stdout: PoolFile | None  # None: it goes to a named file
    stderr: PoolFile | None


class Surroundings:
    """A Base and a Place made ready for use."""

    __slots__ = ("env", "umask", "cpus", "path", "wanted", "limits", "ours")

    def __init__(self, base: Base, place: Place) -> None:
        env = {**place.defaults, **base.env, **place.env}
        self.env = {name.encode(): value.encode() for name, value in env.items()}
        self.umask = base.umask
        self.cpus = place.cpus
        self.path = base.path
        self.wanted: dict[int, int] | None = base.limits  # None: they are in the next two
        self.limits: list[Limit] = []  # to be set for a spawn, only those that differ from ours
        self.ours: list[Limit] = []  # to be set back after it


class Spawner:
    """Starts processes for one launcher, whose own mask, umask and directory it changes on the way."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        # A child inherits 0, 1 and 2: here is what they are between spawns.
        self._own = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), os.dup(1), os.dup(2)
        os.dup2(self._own[0], 0)
        # All signals are at their defaults in a child: exec resets those that are caught, the spawn those ignored.
        self._ignored = [s for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN]
        self._bases: dict[str, Base] = {}
        self._places: dict[str, Place] = {}
        self._ready: dict[tuple[str, str], Surroundings] = {}
        self._programs: dict[tuple[bytes, bytes], tuple[float, bytes]] = {}
        self._home = sorted(os.sched_getaffinity(0))
        self._cpus = self._home
        self._umask = os.umask(0o077)
        os.umask(self._umask)

    def add(self, record: Base | Place) -> None:
        """Launches may name this base or place from now on."""
        if isinstance(record, Base):
            self._bases[record.base] = record
        else:
            self._places[record.place] = record

    def forget(self) -> None:
        """No launch names any of those that were added any more."""
        self._bases.clear()
        self._places.clear()
        self._ready.clear()

    def surroundings(self, launch: Launch | Call) -> Surroundings | None:
        """What it names; None if that was not added."""
        key = (launch.base, launch.place)
        around = self._ready.get(key)
        if around is None:
            base, place = self._bases.get(launch.base), self._places.get(launch.place)
            if base is None or place is None:
                return None
            if len(self._ready) >= READY_MAX:
                self._ready.clear()
            around = self._ready[key] = Surroundings(base, place)
        return around

    def spawn(self, launch: Launch, around: Surroundings | None, stdin: int = -1) -> Spawned:
        """Start it in its `surroundings`, or raise Refusal; whatever is wrong with one launch comes out as that.

        With ``stdin`` an open descriptor is its standard input. An execution of 0 is no task: it gets no marks.
        """
        opened: list[int] = []
        pool: list[PoolFile] = []
        try:
            if around is None:
                raise Refusal("launch", f"Surroundings {launch.base!r} or place {launch.place!r} were not sent.")
            self._enter(launch, around)
            env = around.env.copy()
            for name, value in launch.env.items():
                env[name.encode()] = value.encode()
            if launch.execution:
                env[b"PILOTQ_TASK_ID"] = launch.id.encode()
                env[b"PILOTQ_EXECUTION"] = b"%d" % launch.execution
            program = self._program(launch.argv, env)
            files, stdout, stderr = self._files(launch, opened, pool, stdin)
            pid = self._start(program, launch.argv, env, files, around)
            return Spawned(pid, env, stdout, stderr)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            self._return(pool)
            raise Refusal("launch", f"Starting it failed: {_text(error)}.") from None
        except Refusal:
            self._return(pool)
            raise
        finally:
            for fd in opened:
                os.close(fd)

    def _return(self, pool: list[PoolFile]) -> None:
        for file in pool:
            self._capture.give_back(file)

    def _enter(self, launch: Launch, around: Surroundings) -> None:
        """Put on what the child inherits."""
        if around.wanted is not None:
            around.limits, around.ours = _find_limits(around.wanted)
            around.wanted = None
        cpus = around.cpus or self._home
        if cpus != self._cpus:
            try:
                os.sched_setaffinity(0, cpus)
            except (OSError, ValueError, OverflowError) as error:
                raise Refusal("launch", f"CPUs {cpus} cannot be used by this worker: {_text(error)}.") from None
            self._cpus = cpus
        if around.umask != self._umask:
            os.umask(around.umask)
            self._umask = around.umask
        try:
            os.chdir(launch.cwd)
        except OSError as error:
            raise _refusal(error, launch.cwd, "its working directory cannot be used") from None

    def _program(self, argv: list[bytes], env: dict[bytes, bytes]) -> bytes:
        """The file to execute: a name without ``/`` is looked for on the task's own PATH."""
        if not argv or not argv[0]:
            raise Refusal("launch", "Its command is empty.")
        name = argv[0]
        if b"/" in name:
            return name
        path = env.get(b"PATH", DEFAULT_PATH)
        now = time.monotonic()
        known = self._programs.get((name, path))
        if known is not None and now < known[0] and os.access(known[1], os.X_OK):
            return known[1]
        self._programs.pop((name, path), None)
        program = _search(name, path)
        # A relative directory on PATH means another one in each working directory.
        if all(folder.startswith(b"/") for folder in path.split(b":")):
            if len(self._programs) >= PROGRAMS_MAX:
                self._programs.clear()
            self._programs[name, path] = (now + PROGRAM_S, program)
        return program

    def _files(
        self, launch: Launch, opened: list[int], pool: list[PoolFile], stdin: int
    ) -> tuple[tuple[int, int, int], PoolFile | None, PoolFile | None]:
        """What becomes 0, 1 and 2 of the child; fills ``opened`` (to be closed) and ``pool`` (to be given back)."""
        stdout = stderr = -1
        if launch.stdin:
            stdin = open_input(launch.stdin)
            opened.append(stdin)
        elif stdin < 0:
            stdin = self._own[0]
        if launch.stdout:
            stdout = open_output(launch.stdout, launch.suffix)
            opened.append(stdout)
        if launch.stderr and launch.stderr == launch.stdout:
            stderr = stdout
        elif launch.stderr:
            stderr = open_output(launch.stderr, launch.suffix)
            opened.append(stderr)
        out = err = None
        try:
            if stdout < 0:
                out = self._capture.take()
                pool.append(out)
                stdout = out.fd
            if stderr < 0:
                err = self._capture.take()
                pool.append(err)
                stderr = err.fd
        except OSError as error:
            raise Refusal("output", f"Its output cannot be captured: {_text(error)}.") from None
        return (stdin, stdout, stderr), out, err

    def _start(
        self,
        program: bytes,
        argv: list[bytes],
        env: dict[bytes, bytes],
        files: tuple[int, int, int],
        around: Surroundings,
    ) -> int:
        stdin, stdout, stderr = files
        null, own_stdout, own_stderr = self._own
        try:
            # Not as actions of the spawn: these fail for descriptors above the child's limit of open files.
            if stdin != null:
                os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for limit in around.limits:
                resource.setrlimit(limit[0], limit[1:])
            return os.posix_spawn(program, argv, env, setsid=True, setsigmask=[], setsigdef=self._ignored)
        except OSError as error:
            raise _spawn_refusal(error, program) from None
        finally:
            # A low limit on memory or files would hit every later launch, and a file kept open here its readers.
            for limit in around.ours:
                resource.setrlimit(limit[0], limit[1:])
            if stdin != null:
                os.dup2(null, 0)
            os.dup2(own_stdout, 1)
            os.dup2(own_stderr, 2)


def _find_limits(wanted: dict[int, int]) -> tuple[list[Limit], list[Limit]]:
    """The soft limits that differ from ours: as they are wanted, and as they are."""
    limits, ours = [], []
    for number, value in wanted.items():
        soft, hard = resource.getrlimit(number)
        new = _capped(value, hard)
        if new != soft:
            limits.append((number, new, hard))
            ours.append((number, soft, hard))
    return limits, ours


def _capped(soft: int, hard: int) -> int:
    """``soft`` as far as ``hard`` allows; no limit may be written as -1 or as the kernel's largest number."""
    unlimited = resource.RLIM_INFINITY
    if not 0 <= soft < 1 << 63:
        return hard
    return soft if hard == unlimited else min(soft, hard)


def _search(name: bytes, path: bytes) -> bytes:
    denied = b""
    for folder in path.split(b":"):
        candidate = (folder or b".") + b"/" + name
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            denied = denied or candidate
    if denied:
        raise Refusal("not found", f"Permission denied: {_shown(denied)} is not executable.")
    raise Refusal(
        "not found", f"No such file or directory: {_shown(name)} is in no directory of its PATH ({_shown(path)})."
    )


def _open(path: str, flags: int) -> int:
    # Without O_NONBLOCK a FIFO that nobody opens on its other side would stop all tasks of this launcher; without
    # O_NOCTTY a terminal would become the launcher's.
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    os.set_blocking(fd, True)
    return fd


def open_input(path: str) -> int:
    """A descriptor of a task's standard input; raises Refusal."""
    try:
        return _open(path, os.O_RDONLY)
    except OSError as error:
        raise _refusal(error, path, "its stdin cannot be read") from None


def open_output(path: str, suffix: str) -> int:
    """A descriptor of an output file that a task has named; raises Refusal."""
    # What is no regular file (/dev/null, a FIFO) is written to directly: a name beside it would make no sense.
    if suffix and (os.path.isfile(path) or not os.path.exists(path)):
        path += suffix
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        try:
            return _open(path, flags)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return _open(path, flags)
    except (OSError, ValueError) as error:
        raise Refusal("output", f"{_text(error)}: {_shown(path)} cannot be written.") from None


def _refusal(error: OSError, path: str, what: str) -> Refusal:
    reason = "not found" if error.errno in MISSING else "launch"
    return Refusal(reason, f"{_text(error)}: {_shown(path)}, {what}.")


def _spawn_refusal(error: OSError, program: bytes) -> Refusal:
    shown = _shown(program)
    if error.errno == errno.ENOEXEC:
        what = "is neither a binary for this machine nor a script that begins with '#!'"
        return Refusal("launch", f"{_text(error)}: {shown} {what}.")
    if error.errno == errno.ENOENT and os.path.exists(program):
        return Refusal("not found", f"{_text(error)}: the interpreter or loader that {shown} asks for does not exist.")
    if error.errno in MISSING:
        return Refusal("not found", f"{_text(error)}: {shown}.")
    return Refusal("launch", f"{_text(error)}: {shown} could not be executed.")


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _shown(path: str | bytes) -> str:
    """A path in quotes, as text that can travel: what is no UTF-8 is escaped."""
    return repr(path.decode("utf-8", "backslashreplace") if isinstance(path, bytes) else path)
