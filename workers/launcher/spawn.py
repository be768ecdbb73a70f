"""Starts one process from a Launch message: with the environment, CPUs and limits of its task and nothing else.

posix_spawn can set little of what a task needs, so the launcher changes its own CPU mask, umask, directory and soft
limits, and the child inherits them; no helper process stands between, and nothing runs between fork and exec.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from typing import NamedTuple

from pilotq.broker.os_strings import printable
from pilotq.workers import cgroups
from pilotq.workers.launcher.capture import Capture, PoolFile
from pilotq.workers.process_tree import KILL_POLL_S
from pilotq.workers.protocol import Call, ConfinedLaunch, Launch, LaunchBase, LaunchSlot
from pilotq.workers.script_files import ScriptFiles

DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"  # where a task without PATH finds its program
PATH_SHOWN = 80  # bytes of a directory in a message
PROGRAM_CACHE_S = 1.0  # a program found on PATH is searched again after this: a newer one may stand in front
PROGRAMS_MAX = 1000  # so many found programs are kept
CONTEXTS_MAX = 1000  # so many contexts are kept
KILL_S = 1.0  # how long the end of a process is waited for that could not be moved into its cgroup
MISSING_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR}
Limit = tuple[int, int, int]  # number of the limit, soft, hard


class Refusal(Exception):
    """The task was not started; ``reason`` is of states.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Spawned(NamedTuple):
    """A process that was started."""

    pid: int
    env: dict[bytes, bytes]  # what it was started with
    stdout: PoolFile | None  # None: it goes to a named file
    stderr: PoolFile | None
    script: str  # path of the file of its script; empty without one


class LaunchContext:
    """A LaunchBase and a LaunchSlot combined: what a process inherits or gets from both."""

    __slots__ = ("env", "umask", "cpus", "path", "files", "requested_limits", "limits", "own_limits")

    def __init__(self, base: LaunchBase, slot: LaunchSlot) -> None:
        self.env = {**slot.defaults, **base.env, **slot.env}
        self.umask = base.umask
        self.cpus = slot.cpus
        self.path = base.path
        self.files = slot.files
        self.requested_limits: dict[int, int] | None = base.limits  # None: they are in the next two
        self.limits: list[Limit] = []  # to be set for a spawn, only those that differ from ours
        self.own_limits: list[Limit] = []  # to be set back after it


class Spawner:
    """Starts processes for one launcher, whose own mask, umask and directory it changes for that."""

    def __init__(self, capture: Capture, scripts: ScriptFiles) -> None:
        self._capture = capture
        self._scripts = scripts
        # A child inherits 0, 1 and 2: these are the launcher's own, set back after each spawn.
        self.null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._own_stdio = self.null, os.dup(1), os.dup(2)
        os.dup2(self.null, 0)
        # All signals are at their defaults in a child: exec resets those that are caught, the spawn those ignored.
        self._ignored = [s for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN]
        self._bases: dict[str, LaunchBase] = {}
        self._slots: dict[str, LaunchSlot] = {}
        self._contexts: dict[tuple[str, str], LaunchContext] = {}
        self._programs: dict[tuple[bytes, bytes], tuple[float, bytes]] = {}
        self.all_cpus = sorted(os.sched_getaffinity(0))
        self._cpus = self.all_cpus
        self._umask = os.umask(0o077)
        os.umask(self._umask)

    def add(self, message: LaunchBase | LaunchSlot) -> None:
        """Launches may name this base or slot from now on."""
        if isinstance(message, LaunchBase):
            self._bases[message.name] = message
        else:
            self._slots[message.name] = message

    def forget(self) -> None:
        """No launch names any of those that were added any more."""
        self._bases.clear()
        self._slots.clear()
        self._contexts.clear()

    def context(self, launch: Launch | Call) -> LaunchContext | None:
        """The base and slot that it names, combined; None if one was not added, or cannot be used."""
        key = (launch.base, launch.slot)
        context = self._contexts.get(key)
        if context is None:
            base, slot = self._bases.get(launch.base), self._slots.get(launch.slot)
            if base is None or slot is None:
                return None
            if len(self._contexts) >= CONTEXTS_MAX:
                self._contexts.clear()
            try:
                context = self._contexts[key] = LaunchContext(base, slot)
            except ValueError:
                return None  # a text in it cannot be encoded
        return context

    def spawn(self, launch: Launch, context: LaunchContext | None, stdin: int = -1) -> Spawned:
        """Start it in its `context`, or raise Refusal: also for whatever else is wrong with this one launch.

        With ``stdin`` an open descriptor is its standard input.
        """
        opened: list[int] = []
        pool: list[PoolFile] = []
        argv, script, cgroup = launch.argv, "", ""
        try:
            if context is None:
                raise Refusal("launch", f"Base {launch.base!r} or slot {launch.slot!r} was not sent or cannot be used.")
            self._apply(launch, context)
            env = full_environment(launch, context)
            if launch.script:
                script = self._write_script(launch)
                argv = [*argv, os.fsencode(script)]
            program = self._program(argv, env)
            files, stdout, stderr = self._files(launch, opened, pool, stdin)
            if isinstance(launch, ConfinedLaunch):
                _make_cgroup(launch)
                cgroup = launch.cgroup
            pid = self._start(program, argv, env, files, context)
            if cgroup:
                _enter_cgroup(cgroup, pid)
            return Spawned(pid, env, stdout, stderr, script)
        except Refusal as refusal:
            self._release(pool, script, cgroup)
            if script and refusal.reason == "not found":
                raise Refusal(refusal.reason, f"{refusal} Its script is to be run by that program.") from None
            raise
        except Exception as error:  # noqa: BLE001  # the boundary of one task: none may end its launcher, which has others
            self._release(pool, script, cgroup)
            raise Refusal("launch", f"Starting it failed: {_error_text(error)}.") from None
        finally:
            for fd in opened:
                os.close(fd)

    def unpin(self) -> None:
        """Let this process use all its CPUs again, where it was this object that has changed them."""
        if self._cpus and self._cpus != self.all_cpus:
            os.sched_setaffinity(0, self.all_cpus)

    def forget_cpus(self) -> None:
        """Somebody else may have changed which CPUs this process may use."""
        self._cpus = []

    def _release(self, pool: list[PoolFile], script: str, cgroup: str) -> None:
        if cgroup:
            cgroups.remove(cgroup)
        for file in pool:
            self._capture.release(file)
        if script:
            self._scripts.remove(script)

    def _write_script(self, launch: Launch) -> str:
        try:
            return self._scripts.write(f"{launch.id}.{launch.attempt}", launch.script)
        except OSError as error:
            raise Refusal("launch", f"Its script cannot be written to a file: {_error_text(error)}.") from None

    def _apply(self, launch: Launch, context: LaunchContext) -> None:
        """Give this process what the child is to inherit."""
        if context.requested_limits is not None:
            context.limits, context.own_limits = find_limits(context.requested_limits)
            context.requested_limits = None
        cpus = context.cpus or self.all_cpus
        if cpus != self._cpus:
            try:
                os.sched_setaffinity(0, cpus)
            except (OSError, ValueError, OverflowError) as error:
                raise Refusal("launch", f"CPUs {cpus} cannot be used by this worker: {_error_text(error)}.") from None
            self._cpus = cpus
        if context.umask != self._umask:
            os.umask(context.umask)
            self._umask = context.umask
        if context.files or launch.files:
            _write_files({**context.files, **launch.files})
            context.files = {}
        try:
            if launch.make_cwd:
                os.makedirs(launch.cwd, exist_ok=True)
            os.chdir(launch.cwd)
        except OSError as error:
            what = "its working directory cannot be " + ("made" if launch.make_cwd else "used")
            raise _refusal(error, launch.cwd, what) from None

    def _program(self, argv: list[bytes], env: dict[bytes, bytes]) -> bytes:
        """The file to execute: a name without ``/`` is searched on the task's own PATH."""
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
            self._programs[name, path] = (now + PROGRAM_CACHE_S, program)
        return program

    def _files(
        self, launch: Launch, opened: list[int], pool: list[PoolFile], stdin: int
    ) -> tuple[tuple[int, int, int], PoolFile | None, PoolFile | None]:
        """What becomes 0, 1 and 2 of the child; fills ``opened`` (to be closed) and ``pool`` (to be released)."""
        stdout = stderr = -1
        if launch.stdin:
            stdin = open_input(launch.stdin)
            opened.append(stdin)
        elif stdin < 0:
            stdin = self._own_stdio[0]
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
            raise Refusal("output", f"Its output cannot be captured: {_error_text(error)}.") from None
        return (stdin, stdout, stderr), out, err

    def _start(
        self,
        program: bytes,
        argv: list[bytes],
        env: dict[bytes, bytes],
        files: tuple[int, int, int],
        context: LaunchContext,
    ) -> int:
        stdin, stdout, stderr = files
        null, own_stdout, own_stderr = self._own_stdio
        try:
            # Not as actions of the spawn: these fail for descriptors above the child's limit of open files.
            if stdin != null:
                os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for limit in context.limits:
                resource.setrlimit(limit[0], limit[1:])
            return os.posix_spawn(program, argv, env, setsid=True, setsigmask=[], setsigdef=self._ignored)
        except OSError as error:
            raise _spawn_refusal(error, program) from None
        finally:
            # A low limit on memory or files would hit every later launch, and a file kept open here its readers.
            for limit in context.own_limits:
                resource.setrlimit(limit[0], limit[1:])
            if stdin != null:
                os.dup2(null, 0)
            os.dup2(own_stdout, 1)
            os.dup2(own_stderr, 2)


def full_environment(launch: Launch, context: LaunchContext) -> dict[bytes, bytes]:
    """The environment of its process. An attempt of 0 is no task: it gets no marks."""
    env = {**context.env, **launch.env}
    if launch.attempt:
        env[b"PILOTQ_TASK_ID"] = launch.id.encode()
        env[b"PILOTQ_EXECUTION"] = b"%d" % launch.attempt
    return env


def _make_cgroup(launch: ConfinedLaunch) -> None:
    try:
        cgroups.make(launch.cgroup, launch.memory)
    except OSError as error:
        raise Refusal(
            "launch",
            f"Its cgroup cannot be made: {_error_text(error)}: {launch.cgroup}; --memory-policy watch needs none.",
        ) from None


def _enter_cgroup(cgroup: str, pid: int) -> None:
    """Move a process that was started just now; where that fails it is ended, and Refusal raised."""
    try:
        cgroups.enter(cgroup, pid)
    except OSError as error:
        cgroups.kill(cgroup)
        os.killpg(pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_S
        while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < deadline:
            time.sleep(KILL_POLL_S)  # one that hangs in the kernel is waited for as an orphan
        raise Refusal(
            "launch",
            f"It cannot be moved into its cgroup: {_error_text(error)}: {cgroup}; --memory-policy watch needs none.",
        ) from None


def _write_files(files: dict[bytes, bytes]) -> None:
    """Write files of a launch, which only this user may read."""
    umask = os.umask(0o077)  # it was a task's
    try:
        for path, content in files.items():
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(content)
            except OSError as error:
                raise Refusal("launch", f"{_error_text(error)}: its file {_quoted(path)} cannot be written.") from None
    finally:
        os.umask(umask)


def find_limits(requested: dict[int, int]) -> tuple[list[Limit], list[Limit]]:
    """The soft limits that differ from ours: as they are requested, and as they are. Raises ValueError."""
    limits, own = [], []
    for number, value in requested.items():
        soft, hard = resource.getrlimit(number)
        new = _capped(value, hard)
        if new != soft:
            limits.append((number, new, hard))
            own.append((number, soft, hard))
    return limits, own


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
        raise Refusal("not found", f"Permission denied: {_quoted(denied)} is not executable.")
    number, first = path.count(b":") + 1, _quoted(path.split(b":")[0][:PATH_SHOWN])
    where = (
        f"its PATH ({first})" if number == 1 else f"the {number} directories of its PATH, of which {first} is the first"
    )
    raise Refusal("not found", f"No such file or directory: {_quoted(name)} is not in {where}.")


def _open(path: bytes, flags: int) -> int:
    # Without O_NONBLOCK a FIFO that nobody opens on its other side would stop all tasks of this launcher; without
    # O_NOCTTY a terminal would become the launcher's.
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    os.set_blocking(fd, True)
    return fd


def open_input(path: bytes) -> int:
    """A descriptor of a task's standard input; raises Refusal."""
    try:
        return _open(path, os.O_RDONLY)
    except OSError as error:
        raise _refusal(error, path, "its stdin cannot be read") from None


def open_output(path: bytes, suffix: str) -> int:
    """A descriptor of an output file that a task has named; raises Refusal."""
    # What is no regular file (/dev/null, a FIFO) is written to directly: a name beside it would make no sense.
    if suffix and (os.path.isfile(path) or not os.path.exists(path)):
        path += suffix.encode()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        try:
            return _open(path, flags)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return _open(path, flags)
    except (OSError, ValueError) as error:
        raise Refusal("output", f"{_error_text(error)}: {_quoted(path)} cannot be written.") from None


def _refusal(error: OSError, path: bytes, what: str) -> Refusal:
    reason = "not found" if error.errno in MISSING_ERRNOS else "launch"
    return Refusal(reason, f"{_error_text(error)}: {_quoted(path)}, {what}.")


def _spawn_refusal(error: OSError, program: bytes) -> Refusal:
    quoted = _quoted(program)
    if error.errno == errno.ENOEXEC:
        what = "is neither a binary for this machine nor a script that begins with '#!'"
        return Refusal("launch", f"{_error_text(error)}: {quoted} {what}.")
    if error.errno == errno.ENOENT and os.path.exists(program):
        return Refusal(
            "not found", f"{_error_text(error)}: the interpreter or loader that {quoted} asks for does not exist."
        )
    if error.errno in MISSING_ERRNOS:
        return Refusal("not found", f"{_error_text(error)}: {quoted}.")
    return Refusal("launch", f"{_error_text(error)}: {quoted} could not be executed.")


def _error_text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _quoted(path: bytes) -> str:
    """A path in quotes, as text that can travel."""
    return f"'{printable(path)}'"
