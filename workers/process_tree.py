"""Finds and signals all processes of a task, by /proc.

A launcher is a child subreaper: whatever a task starts, in whatever session or group, stays below the task's main
process, and a process that loses its parent (an orphan) becomes a child of the launcher. So the tree below a launch is
complete, and only the orphans must be assigned to their launches: by their session, else by the mark in their
environment, else by their CPUs, where only one launch can be meant. `ProcessTracker` does that. Once a launcher is dead
its tree is lost: then the marks alone identify it (`kill_marked`).
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from signal import SIGKILL
from typing import Generic, NamedTuple, TypeVar

TASK_MARK = "PILOTQ_TASK_ID"  # a process with it in its environment is part of a task
CALL_MARK = "PILOTQ_PATH"  # ... and one with this is an interpreter of functions, or was forked by one
MARKS = (b"PILOTQ_TASK_ID", b"PILOTQ_EXECUTION", b"PILOTQ_DIR")
READ_S = 0.2  # a process hangs in the kernel if the thread that reads its environment is blocked there for so long
LONG_READ_S = 1.0  # ... and so long where its pages are counted: it may be changing what it has mapped
STARVED_S = 30.0  # how long a thread that gets no CPU is waited for
SCAN_MAX = 200  # so many process numbers are read one by one; listing /proc is cheaper from about there
ROUNDS_MAX = 20  # passes over processes that keep forking while they are signalled; the caller tries again later
KILL_POLL_S = 0.01  # between two scans for processes that were killed
CLEAN_SCANS = 2  # a process in the middle of exec has no environment for a moment: one scan without a find is no proof
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")


class Process(NamedTuple):
    """A process as /proc/<pid>/stat shows it.

    ``start`` is in clock ticks since boot; with ``pid`` it identifies a process for good.
    """

    pid: int
    alive: bool
    parent: int
    group: int
    session: int
    start: int


def read_process(pid: int) -> Process | None:
    """What the process is now; None if there is none. A zombie is not ``alive``.

    >>> read_process(os.getpid()).parent == os.getppid()
    True
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            data = file.read(4096)
    except OSError:
        return None
    # The command stands in brackets and may contain anything, brackets and blanks too.
    fields = data[data.rfind(b")") + 2 :].split()
    # A main thread that has ended while others run is shown as a zombie, but the process lives.
    alive = fields[0] not in b"ZX" or int(fields[17]) > 1
    return Process(pid, alive, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def processes() -> dict[int, Process]:
    """Every process that is visible, by number."""
    found = {}
    for name in os.listdir("/proc"):
        if name[0] in "123456789" and (process := read_process(int(name))) is not None:
            found[process.pid] = process
    return found


def started_since(pid: int) -> list[Process]:
    """The processes that were started after that one, as their numbers say, and perhaps others."""
    with open("/proc/loadavg", "rb", buffering=0) as file:
        last = int(file.read(100).split()[-1])
    return [process for number in _numbers_since(pid, last) if (process := read_process(number)) is not None]


def _numbers_since(pid: int, last: int) -> Iterable[int]:
    """Numbers given out after ``pid``, up to the ``last``; where there are many, of all processes."""
    if 0 <= last - pid < SCAN_MAX:
        return range(pid + 1, last + 1)
    return [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]


def living_subtree(roots: Iterable[int], snapshot: Mapping[int, Process]) -> list[Process]:
    """The living among ``roots`` and all their descendants."""
    children: dict[int, list[int]] = {}
    for process in snapshot.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: dict[int, Process] = {}
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        # A snapshot of /proc is not taken at one instant, so numbers used twice could close a circle.
        if pid not in found and pid in snapshot:
            found[pid] = snapshot[pid]
            waiting += children.get(pid, ())
    return [process for process in found.values() if process.alive]


def environment(pid: int) -> bytes:
    """``\\0NAME=value\\0...\\0``; ``\\0`` of a process that has ended, or may not be read.

    Of a process that hangs in the kernel the call may hang, too.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return b"\0" + file.readall() + b"\0"
    except OSError:
        return b"\0"


_STATE = re.compile(rb"^(?:State|voluntary_ctxt_switches):\t(\w+)", re.MULTILINE)
_hung: dict[int, int] = {}  # processes of which something cannot be read, as they hang in the kernel: number -> start


def environments(pids: Iterable[int]) -> dict[int, bytes]:
    """The environments of these processes, but for those whose reading hangs: then so does the process itself."""
    return _read_each(pids, environment)


def proportional_sizes(pids: Iterable[int]) -> dict[int, int]:
    """The memory of these processes in bytes, each page that several share in parts; without those that do not tell."""
    return {pid: size for pid, size in _read_each(pids, _proportional_size, LONG_READ_S).items() if size >= 0}


def _proportional_size(pid: int) -> int:
    """-1 of a process that has ended, or may not be read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb", buffering=0) as file:
            _, found, rest = file.read(4096).partition(b"\nPss:")
    except OSError:
        return -1
    return int(rest.split()[0]) * 1024 if found else -1


def _read_each(pids: Iterable[int], read: Callable[[int], T], seconds: float = READ_S) -> dict[int, T]:
    """What ``read`` returns for each process. It runs in a thread, as the caller must not wait for one that hangs."""
    waiting = deque(pid for pid in pids if pid not in _hung or _start(pid) != _hung[pid])
    found: dict[int, T] = {}
    deadline = time.monotonic() + STARVED_S
    while waiting and time.monotonic() < deadline:
        reader = _Reader(waiting, found, read)
        if reader.wait(deadline, seconds):
            break
    return found


class _Reader(Generic[T]):
    """Reads of the ``waiting`` into ``found``, until there is none left or one of them hangs."""

    def __init__(self, waiting: deque[int], found: dict[int, T], read: Callable[[int], T]) -> None:
        self._current = self._thread = 0
        self._read_one = read
        self._given_up = threading.Event()
        self._done = threading.Event()
        try:
            threading.Thread(target=self._read_beside, args=(waiting, found), daemon=True).start()
        except RuntimeError:
            # The limit of processes is reached: the worker, and all that it runs, must not end for that.
            self._read(waiting, found)

    def wait(self, deadline: float, seconds: float) -> bool:
        """Wait; False when one is blocked for so many seconds, or got no CPU until the deadline: the caller goes on
        with what is still waiting."""
        before = None
        while not self._done.wait(seconds):
            now = self._blocked()
            if now is not None and now == before:
                pid = now[0]
                _hung[pid] = _start(pid)
                self._given_up.set()
                if self._current != pid:  # it has come to its end at this moment
                    _hung.pop(pid, None)
                return False
            if time.monotonic() > deadline:
                self._given_up.set()
                return False
            before = now
        return True

    def _blocked(self) -> tuple[int, bytes] | None:
        """The process that is read, and how often the thread was blocked, if it is now: it does not wait for a CPU."""
        pid = self._current
        try:
            with open(f"/proc/self/task/{self._thread}/status", "rb", buffering=0) as file:
                state, switches = _STATE.findall(file.read(4096))
        except (OSError, ValueError):
            return None
        return (pid, switches) if pid and state in b"SD" else None

    def _read_beside(self, waiting: deque[int], found: dict[int, T]) -> None:
        self._thread = threading.get_native_id()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the caller's
        self._read(waiting, found)

    def _read(self, waiting: deque[int], found: dict[int, T]) -> None:
        while waiting and not self._given_up.is_set():
            self._current = pid = waiting.popleft()
            data = self._read_one(pid)
            self._current = 0
            if self._given_up.is_set():
                _hung.pop(pid, None)
                return
            found[pid] = data
        self._done.set()


def _start(pid: int) -> int:
    process = read_process(pid)
    return process.start if process is not None else 0


def send_signal(process: Process, signal: int) -> None:
    """Signal that very process, not another one that has its number by now."""
    now = read_process(process.pid)
    if now is not None and now.start == process.start:
        try:
            os.kill(process.pid, signal)
        except OSError:
            pass  # it has ended, or belongs to another user: then the caller sees that it is still there


def kill_marked(
    marks: Mapping[str, str] | Callable[[Mapping[str, str]], bool], signal: int = SIGKILL, seconds: float = 5.0
) -> list[int]:
    """Signal every process of a task that carries the marks, until none is left; at most for ``seconds``, blocking.

    ``marks`` are environment variables and their values, or a function that tests an environment. Only processes of
    tasks are tested: those that have TASK_MARK or CALL_MARK, so never a process of the pilot itself. Each gets the
    signal once, later children too. Returns the numbers of those that still live.

    >>> kill_marked({"PILOTQ_TASK_ID": "no-such-task"})
    []
    """
    deadline = time.monotonic() + seconds
    signaled: set[tuple[int, int]] = set()
    clean = 0
    while True:
        left = list(_marked(marks))
        for process in left:
            if (process.pid, process.start) not in signaled:
                signaled.add((process.pid, process.start))
                send_signal(process, signal)
        clean = 0 if left else clean + 1
        if clean == CLEAN_SCANS or time.monotonic() > deadline:
            return [process.pid for process in left]
        time.sleep(KILL_POLL_S)


def _marked(marks: Mapping[str, str] | Callable[[Mapping[str, str]], bool]) -> Iterator[Process]:
    task, call = (b"\0" + mark.encode() + b"=" for mark in (TASK_MARK, CALL_MARK))
    numbers = [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]
    for pid, data in environments(pid for pid in numbers if pid != os.getpid()).items():
        if task not in data and call not in data:
            continue
        pairs = (os.fsdecode(item).partition("=") for item in data.split(b"\0") if item)
        env = {key: value for key, _, value in pairs}
        fits = marks(env) if callable(marks) else all(env.get(key) == value for key, value in marks.items())
        if fits and (process := read_process(pid)) is not None and process.alive:
            yield process


class _Launch:
    """One launch: its main process, and what identifies others of it. ``group`` is False once its group was empty."""

    __slots__ = ("pid", "env", "began", "slot", "cpus", "subreaper", "running", "group")

    def __init__(self, pid: int, env: Mapping[bytes, bytes], began: float, slot: str, cpus: Collection[int]) -> None:
        self.pid = pid
        self.slot = slot
        self.cpus = cpus
        self.subreaper = False
        self.env = env
        self.began = began
        self.running = True
        self.group = True

    def group_lives(self) -> bool:
        # Once empty, the number is free and may become another task's group: it is never asked for again.
        if self.group:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                self.group = False
            except PermissionError:
                pass  # it lives, as another user
        return self.group

    def marks(self) -> list[bytes]:
        return [b"\0" + name + b"=" + self.env[name] + b"\0" for name in MARKS if name in self.env]


class ProcessTracker:
    """Tracks which of this process's descendants belongs to which launch. Launches are identified by their key.

    The caller adds every main process it starts (`add`) and every child it has waited for (`reaped`), before it asks
    anything else::

        tracker.add(key, pid, env, began)
        ...
        if (key := tracker.reaped(pid)) is not None and not tracker.has_living(key):
            ...  # no process of the launch is left
    """

    def __init__(self) -> None:
        self._launches: dict[int, _Launch] = {}
        self.mains: dict[int, int] = {}  # number of a main process not waited for -> key
        # Called before an orphan is assigned: the launches of all main processes must have been added by then.
        self.before_assigning: Callable[[], None] | None = None
        self._orphans: dict[int, int] = {}  # number of an orphan -> key
        self._children = _Children()

    def add(
        self, key: int, pid: int, env: Mapping[bytes, bytes], began: float, slot: str = "", cpus: Collection[int] = ()
    ) -> None:
        """``env`` is what it was started with, ``began`` monotonic seconds of just before, ``cpus`` what it may use.

        Of one ``slot`` only one launch runs at a time.
        """
        self._launches[key] = _Launch(pid, env, began, slot, cpus)
        self.mains[pid] = key

    def set_subreaper(self, key: int) -> None:
        """While its main process lives, orphans of this launch are that one's children."""
        self._launches[key].subreaper = True

    def set_marks(self, key: int, env: Mapping[bytes, bytes]) -> None:
        """Processes that it has started since then carry the marks in ``env``."""
        self._launches[key].env = env

    def reaped(self, pid: int) -> int | None:
        """The key of the launch whose main process this was."""
        key = self.mains.pop(pid, None)
        if key is None:
            self._orphans.pop(pid, None)
        else:
            self._launches[key].running = False
        return key

    def has_living(self, key: int) -> bool:
        """Whether a process is left of a launch whose main process has ended; if not, the launch is forgotten."""
        launch = self._launches[key]
        group = launch.group_lives()
        self._assign_orphans(launch, key)
        if group or (self._orphans and key in self._orphans.values()):
            return True
        del self._launches[key]
        return False

    def count_living(self, key: int) -> int:
        """How many processes of a launch live for which `has_living` was true just now: at least one."""
        return max(1, len(self._living(key)))

    def send_signal(self, key: int, signal: int) -> None:
        """Signal all processes of a launch; those that it forks meanwhile too, unless it forks faster than we scan."""
        launch = self._launches.get(key)
        if launch is None:
            return
        if launch.group_lives():
            try:
                os.killpg(launch.pid, signal)  # no process can escape this by a fork
            except OSError:
                pass  # it ended meanwhile, or became another user's
        signaled: set[tuple[int, int]] = set()
        for _ in range(ROUNDS_MAX):
            self._assign_orphans(launch, key)
            new = [p for p in self._living(key) if p.group != launch.pid and (p.pid, p.start) not in signaled]
            for process in new:
                signaled.add((process.pid, process.start))
                send_signal(process, signal)
            if not new:
                return

    def kill_all(self) -> None:
        """SIGKILL every process below this one, of whatever launch it is."""
        for launch in self._launches.values():
            if launch.group_lives():
                try:
                    os.killpg(launch.pid, SIGKILL)
                except OSError:
                    pass  # as above
        snapshot = processes()
        children = [p.pid for p in snapshot.values() if p.parent == os.getpid()]
        for process in living_subtree(children, snapshot):
            send_signal(process, SIGKILL)

    def _living(self, key: int) -> list[Process]:
        launch = self._launches[key]
        snapshot = processes()
        roots = [pid for pid, owner in self._orphans.items() if owner == key]
        if launch.running:
            roots.append(launch.pid)
        if launch.group:
            # Where there is no subreaper these are children of init now, and in no tree of ours.
            roots += [p.pid for p in snapshot.values() if p.group == launch.pid]
        return living_subtree(roots, snapshot)

    def _assign_orphans(self, candidate: _Launch, key: int) -> None:
        """Find the launch of each new orphan; ``candidate`` is the launch that may have ended just now."""
        for pid in self._children.unknown(self.mains, self._orphans, candidate.pid):
            process = read_process(pid)
            if process is not None and process.alive and process.parent == os.getpid():
                if self.before_assigning is not None:
                    self.before_assigning()
                owner = self._owner(process, candidate, key)
                if owner is not None:
                    self._orphans[pid] = owner

    def _owner(self, process: Process, candidate: _Launch, key: int) -> int | None:
        # A number that still names a session is not given to a new process, so the latest launch with it is the one.
        by_session = [k for k, launch in self._launches.items() if launch.pid == process.session]
        if by_session:
            return max(by_session)
        data = environments([process.pid]).get(process.pid, b"\0")
        for k, launch in self._launches.items():
            marks = launch.marks()
            if marks and all(mark in data for mark in marks):
                return k
        # It hides its origin: a daemon with a session and an environment of its own, or one that hangs in the kernel.
        # It has the CPUs of its slot, unless it has chosen others. While more than one slot can be meant it stays
        # unassigned.
        possible = self._older(process)
        try:
            cpus = os.sched_getaffinity(process.pid)
        except OSError:
            return None  # it has ended
        possible = {k: launch for k, launch in possible.items() if cpus == set(launch.cpus)} or possible
        if len({launch.slot for launch in possible.values()}) != 1:
            return None
        if len(possible) == 1:
            return next(iter(possible))
        return key if key in possible and not candidate.running else None

    def _older(self, process: Process) -> dict[int, _Launch]:
        """The launches that could have started a process: those that are older."""
        boot = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        # A tick is long: within one the numbers, which are given out in turn, show which process is the older.
        return {
            k: launch
            for k, launch in self._launches.items()
            if not (launch.subreaper and launch.running)  # it keeps its own orphans
            and (process.start, process.pid) > (int((launch.began + boot) * TICKS_PER_S), launch.pid)
        }


class _Children:
    """The children of this process, as the kernel lists them; where it has no list, as /proc shows them."""

    def __init__(self) -> None:
        me = os.getpid()
        self._last = -1
        try:
            self._list = os.open(f"/proc/{me}/task/{me}/children", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._list = -1
            self._last = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)

    def unknown(self, mains: Mapping[int, int], orphans: Mapping[int, int], since: int) -> list[int]:
        """Numbers of children that are in neither of the two (without a list: of processes that may be children).

        ``since``: only processes started after the one of this number matter.
        """
        numbers: Iterable[int]
        if self._list >= 0:
            children = self._read().split()
            if len(children) == len(mains) + len(orphans):
                return []  # each main process and orphan is a child until it is waited for
            numbers = map(int, children)
        else:
            numbers = _numbers_since(since, int(os.pread(self._last, 100, 0).split()[-1]))
        return [pid for pid in numbers if pid not in mains and pid not in orphans]

    def _read(self) -> bytes:
        data = part = os.pread(self._list, 4096, 0)
        # The kernel fills at most a page; only this process removes children, so the parts fit together.
        while len(part) > 4000:
            part = os.pread(self._list, 4096, len(data))
            data += part
        return data
