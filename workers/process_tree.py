"""Finding and signalling everything that belongs to a task, by /proc.

A launcher is a child subreaper: whatever a task starts, in whatever session or group, stays below the task's main
process, and what loses its parent comes home to the launcher. So the tree below a launch is complete, and only the
processes that came home must be told apart: by their session, else by the mark in their environment. `Family` does
that. Once a launcher is dead the tree is torn: then the marks alone tell (`kill_marked`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from signal import SIGKILL
from typing import NamedTuple

TASK_MARK = "PILOTQ_TASK_ID"  # what has it in its environment is part of a task
CALL_MARK = "PILOTQ_PATH"  # ... and what has this is an interpreter of functions, or was forked by one
MARKS = (b"PILOTQ_TASK_ID", b"PILOTQ_EXECUTION", b"PILOTQ_DIR")
WINDOW = 200  # so many process numbers are looked at one by one; listing /proc is cheaper from about there
ROUNDS = 20  # passes over what keeps forking while it is signalled; the caller tries again later
PAUSE_S = 0.01  # between two looks at what was killed
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """From /proc/<pid>/stat. ``start`` is in clock ticks since boot; with ``pid`` it names a process for good."""

    pid: int
    alive: bool
    parent: int
    group: int
    session: int
    start: int


def look(pid: int) -> Process | None:
    """What the process is now; None if there is none. A zombie is one that is not alive."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            data = file.read(4096)
    except OSError:
        return None
    # The command stands in brackets and may contain anything, brackets and blanks too.
    fields = data[data.rfind(b")") + 2 :].split()
    # A main thread that has ended while others run looks like a zombie, but is none.
    alive = fields[0] not in b"ZX" or int(fields[17]) > 1
    return Process(pid, alive, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def processes() -> dict[int, Process]:
    """Every process that can be seen, by number."""
    found = {}
    for name in os.listdir("/proc"):
        if name[0] in "123456789" and (process := look(int(name))) is not None:
            found[process.pid] = process
    return found


def below(roots: Iterable[int], everybody: Mapping[int, Process]) -> list[Process]:
    """The living of ``roots`` and of all that descend from them."""
    children: dict[int, list[int]] = {}
    for process in everybody.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: dict[int, Process] = {}
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        # A snapshot of /proc is not taken at one instant, so numbers used twice could close a circle.
        if pid not in found and pid in everybody:
            found[pid] = everybody[pid]
            waiting += children.get(pid, ())
    return [process for process in found.values() if process.alive]


def environment(pid: int) -> bytes:
    """``\\0NAME=value\\0...\\0``; of a process that ended, or may not be looked into, ``\\0``."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return b"\0" + file.readall() + b"\0"
    except OSError:
        return b"\0"


def send(process: Process, signal: int) -> None:
    """Signal that very process, not another one that has its number by now."""
    now = look(process.pid)
    if now is not None and now.start == process.start:
        try:
            os.kill(process.pid, signal)
        except OSError:
            pass  # it has ended, or belongs to another user: then whoever asked sees that it is still there


def kill_marked(
    marks: Mapping[str, str] | Callable[[Mapping[str, str]], bool], signal: int = SIGKILL, seconds: float = 5.0
) -> list[int]:
    """Signal every process of a task that carries the marks, until none is left; at most for ``seconds``, blocking.

    ``marks`` are environment variables and their values, or a function that judges an environment. Only processes of
    tasks are judged: those that have TASK_MARK or CALL_MARK, so never a part of a pilot. Each gets the signal once, its
    children of later too. Returns the numbers of those that still live.
    """
    deadline = time.monotonic() + seconds
    told: set[tuple[int, int]] = set()
    clean = 0
    while True:
        left = list(_marked(marks))
        for process in left:
            if (process.pid, process.start) not in told:
                told.add((process.pid, process.start))
                send(process, signal)
        # A process in the middle of exec has no environment for a moment: one clean look is no proof.
        clean = 0 if left else clean + 1
        if clean == 2 or time.monotonic() > deadline:
            return [process.pid for process in left]
        time.sleep(PAUSE_S)


def _marked(marks: Mapping[str, str] | Callable[[Mapping[str, str]], bool]) -> Iterator[Process]:
    task, call = (b"\0" + mark.encode() + b"=" for mark in (TASK_MARK, CALL_MARK))
    for name in os.listdir("/proc"):
        if name[0] not in "123456789" or int(name) == os.getpid():
            continue
        data = environment(int(name))
        if task not in data and call not in data:
            continue
        pairs = (os.fsdecode(item).partition("=") for item in data.split(b"\0") if item)
        env = {key: value for key, _, value in pairs}
        fits = marks(env) if callable(marks) else all(env.get(key) == value for key, value in marks.items())
        if fits and (process := look(int(name))) is not None and process.alive:
            yield process


class _Kin:
    """One launch: its main process, and what tells others apart. ``group`` is False once its group was seen empty."""

    __slots__ = ("pid", "env", "began", "running", "group")

    def __init__(self, pid: int, env: Mapping[bytes, bytes], began: float) -> None:
        self.pid = pid
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


class Family:
    """Which of this process's descendants belongs to which launch. Launches are named by their key.

    The caller tells of every main process it starts (`born`) and of every child it has waited for (`reaped`), before
    it asks anything else.
    """

    def __init__(self) -> None:
        self._kin: dict[int, _Kin] = {}
        self._mains: dict[int, int] = {}  # number of a main process not waited for -> key
        self._orphans: dict[int, int] = {}  # number of a child that came home -> key
        self._children = _Children()

    def born(self, key: int, pid: int, env: Mapping[bytes, bytes], began: float) -> None:
        """``env`` is what it was started with, ``began`` monotonic seconds of just before."""
        self._kin[key] = _Kin(pid, env, began)
        self._mains[pid] = key

    def mark(self, key: int, env: Mapping[bytes, bytes]) -> None:
        """What it has started since carries the marks in ``env``."""
        self._kin[key].env = env

    def reaped(self, pid: int) -> int | None:
        """The key of the launch whose main process this was."""
        key = self._mains.pop(pid, None)
        if key is None:
            self._orphans.pop(pid, None)
        else:
            self._kin[key].running = False
        return key

    def lives(self, key: int) -> bool:
        """Whether something is left of a launch whose main process has ended; if not, the launch is forgotten."""
        kin = self._kin[key]
        group = kin.group_lives()
        self._adopt(kin, key)
        if group or (self._orphans and key in self._orphans.values()):
            return True
        del self._kin[key]
        return False

    def count(self, key: int) -> int:
        """How many processes of a launch live, of which `lives` was true just now: at least one."""
        return max(1, len(self._living(key)))

    def send(self, key: int, signal: int) -> None:
        """Signal all that belongs to a launch; what it forks meanwhile too, unless it forks faster than we look."""
        kin = self._kin.get(key)
        if kin is None:
            return
        if kin.group_lives():
            try:
                os.killpg(kin.pid, signal)  # nobody can fork out of this
            except OSError:
                pass  # it ended meanwhile, or became another user's
        told: set[tuple[int, int]] = set()
        for _ in range(ROUNDS):
            self._adopt(kin, key)
            new = [p for p in self._living(key) if p.group != kin.pid and (p.pid, p.start) not in told]
            for process in new:
                told.add((process.pid, process.start))
                send(process, signal)
            if not new:
                return

    def kill_all(self) -> None:
        """SIGKILL everything below this process, whomever it belongs to."""
        for kin in self._kin.values():
            if kin.group_lives():
                try:
                    os.killpg(kin.pid, SIGKILL)
                except OSError:
                    pass  # as above
        everybody = processes()
        ours = [p.pid for p in everybody.values() if p.parent == os.getpid()]
        for process in below(ours, everybody):
            send(process, SIGKILL)

    def _living(self, key: int) -> list[Process]:
        kin = self._kin[key]
        everybody = processes()
        roots = [pid for pid, owner in self._orphans.items() if owner == key]
        if kin.running:
            roots.append(kin.pid)
        if kin.group:
            # Where there is no subreaper these went to init, and are in no tree of ours.
            roots += [p.pid for p in everybody.values() if p.group == kin.pid]
        return below(roots, everybody)

    def _adopt(self, asking: _Kin, key: int) -> None:
        """Find an owner for each child that came home; ``asking`` is who may have lost it just now."""
        for pid in self._children.strangers(self._mains, self._orphans, asking.pid):
            process = look(pid)
            if process is not None and process.alive and process.parent == os.getpid():
                owner = self._owner(process, asking, key)
                if owner is not None:
                    self._orphans[pid] = owner

    def _owner(self, process: Process, asking: _Kin, key: int) -> int | None:
        # A number that still names a session is not given to a new process, so the latest launch with it is the one.
        by_session = [k for k, kin in self._kin.items() if kin.pid == process.session]
        if by_session:
            return max(by_session)
        data = environment(process.pid)
        for k, kin in self._kin.items():
            marks = kin.marks()
            if marks and all(mark in data for mark in marks):
                return k
        # It hides whose it is. It is taken for part of the launch that has just ended, unless it is older: then it
        # waits here for the end of one that is older still.
        boot = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        began = int((asking.began + boot) * TICKS_PER_S)
        # A tick is long: within one the numbers, which are given out in turn, tell which process is the older.
        younger = (process.start, process.pid) > (began, asking.pid)
        return key if younger and not asking.running else None


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

    def strangers(self, mains: Mapping[int, int], orphans: Mapping[int, int], since: int) -> list[int]:
        """Numbers of children that are in neither of the two (without a list: of processes that may be children).

        ``since``: only processes started after the one of this number matter.
        """
        numbers: Iterable[int]
        if self._list >= 0:
            words = self._read().split()
            if len(words) == len(mains) + len(orphans):
                return []  # each main process and orphan is a child until it is waited for
            numbers = map(int, words)
        else:
            numbers = self._recent(since)
        return [pid for pid in numbers if pid not in mains and pid not in orphans]

    def _read(self) -> bytes:
        data = part = os.pread(self._list, 4096, 0)
        # The kernel fills at most a page; only this process removes children, so the parts fit together.
        while len(part) > 4000:
            part = os.pread(self._list, 4096, len(data))
            data += part
        return data

    def _recent(self, since: int) -> Iterable[int]:
        last = int(os.pread(self._last, 100, 0).split()[-1])
        if 0 <= last - since < WINDOW:
            return range(since + 1, last + 1)
        return [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]
