"""Gives a task a cgroup (version 2) of its own, whose memory the kernel limits.

That takes a cgroup below which this user may make others, with the memory controller: the one of a container, of
`systemd-run --user --scope -p Delegate=yes`, or of a job step that was delegated. A cgroup that has others with limits
below it must have no process of its own, so its processes, this one too, move into one of these: MEMBERS.
"""

from __future__ import annotations

import hashlib
import os
import re

from pilotq.workers.process_tree import started_since

MEMBERS = "pilotq-members"  # has the processes that were in the cgroup before
# Cgroups of an ordinary user's services and scopes, which systemd manages: their files are the user's, too.
OF_USER = re.compile(r"/user@[^/]*\.service/")
MACHINE_KILLS = "/proc/vmstat"
ROUNDS = 20  # of moving processes while they fork


def find_base() -> tuple[str, str]:
    """The cgroup below which tasks can have their own, and a sentence: why not, where it is empty. Changes nothing."""
    try:
        own, mount = _own_cgroup()
    except (OSError, StopIteration):
        return "", "no cgroup of version 2 is mounted here"
    base = os.path.dirname(own) if os.path.basename(own) == MEMBERS else own
    if "memory" not in _read(base, "cgroup.controllers").split():
        return "", f"{base} does not have the memory controller"
    files = ("", "cgroup.procs", "cgroup.subtree_control")
    if not all(os.access(os.path.join(base, name), os.W_OK) for name in files):
        return "", f"{base} is not this user's: `systemd-run --user --scope -p Delegate=yes pilotq ...` gives it one"
    if base != mount and (os.geteuid() == 0 or OF_USER.search(base + "/")) and not _is_delegated(base):
        run = "systemd-run" if os.geteuid() == 0 else "systemd-run --user"
        return "", f"{base} was not delegated: `{run} --scope -p Delegate=yes pilotq ...` runs in one that is"
    return base, ""


def prepare() -> str:
    """Make the cgroup of `find_base` ready and return it; raises OSError, also where there is none."""
    base, why = find_base()
    if not base:
        raise OSError(0, why)
    if "memory" in _read(base, "cgroup.subtree_control").split():
        return base
    if os.path.exists(os.path.join(base, "cgroup.type")):  # the uppermost of a machine may have processes
        members = os.path.join(base, MEMBERS)
        os.makedirs(members, exist_ok=True)
        for _ in range(ROUNDS):
            pids = _read(base, "cgroup.procs").split()
            if not pids:
                break
            for pid in pids:
                _move(members, int(pid))
    _write(base, "cgroup.subtree_control", "+memory")
    return base


def make(path: str, limit: int) -> None:
    """A cgroup that may use so many bytes, and whose processes the kernel kills together when they want more."""
    os.mkdir(path)
    try:
        _write(path, "memory.max", str(limit))
        _write(path, "memory.oom.group", "1")
        if os.path.exists(os.path.join(path, "memory.swap.max")):
            _write(path, "memory.swap.max", "0")
    except OSError:
        remove(path)
        raise


def enter(path: str, pid: int) -> None:
    """Move the main process of a session, which was started just now, and what it has started since.

    What these start later is there, too. What was started before it was moved, and has left the session and its parent
    by then, stays outside.
    """
    moved = set()
    new = [pid]
    for _ in range(ROUNDS):
        for number in new:
            _move(path, number)
        moved.update(new)
        new = [
            process.pid
            for process in started_since(pid)
            if process.alive and process.pid not in moved and (process.session == pid or process.parent in moved)
        ]
        if not new:
            break


def _move(path: str, pid: int) -> None:
    try:
        _write(path, "cgroup.procs", str(pid))
    except ProcessLookupError:
        pass  # it has ended already


def killed_at(path: str) -> int:
    """How many bytes were used when the kernel killed the processes of a cgroup for its limit; 0: it did not."""
    if not _event(path, "memory.events", "oom_kill"):
        return 0
    # It may have been killed for the limit of a cgroup above or below it: then it has not reached its own.
    own = "memory.events.local" if os.path.exists(os.path.join(path, "memory.events.local")) else "memory.events"
    if not _event(path, own, "oom"):
        return 0
    return int(_read(path, "memory.peak") or _read(path, "memory.max"))


def oom_kills() -> tuple[str, int]:
    """Where it is counted, and how many processes the kernel has killed because memory was short.

    Those of this process's cgroup, where the kernel tells them (below it too, by version 2); else those of the machine.
    """
    for controller, name in (("memory", "memory.oom_control"), ("", "memory.events")):
        try:
            folder, _ = _own_cgroup(controller)
        except (OSError, StopIteration):
            continue
        if "oom_kill " in _read(folder, name):
            return os.path.join(folder, name), _event(folder, name, "oom_kill")
    return MACHINE_KILLS, _event("/proc", "vmstat", "oom_kill")


def kill(path: str) -> None:
    """SIGKILL for all processes in it, where the kernel can do that (from 5.14 on)."""
    try:
        _write(path, "cgroup.kill", "1")
    except OSError:
        pass


def remove(path: str) -> None:
    """Remove it, and those that a task has made below it. Without effect while a process is in them."""
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            pass


def prefix_of(directory: str, node: str) -> str:
    """How the names of the cgroups begin that tasks of a node get; ``directory`` is the pilot's."""
    return f"pilotq-{hashlib.sha256(os.fsencode(f'{directory} {node}')).hexdigest()[:16]}-"


def clean(base: str, prefix: str) -> None:
    """Remove the empty cgroups below ``base`` whose names begin so: a launcher that was killed has left them."""
    try:
        names = os.listdir(base)
    except OSError:
        return
    for name in names:
        if name.startswith(prefix):
            remove(os.path.join(base, name))


def _own_cgroup(controller: str = "") -> tuple[str, str]:
    """The directory of this process's cgroup, and where cgroups are mounted: of a container, its uppermost one.

    With ``controller`` that of version 1 which has this controller.
    """
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        lines = (line.rstrip("\n").split(":", 2) for line in file)
        own = next(path for _, controllers, path in lines if controller in controllers.split(","))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.partition(" - ")
            root, mount = fields.split()[3:5]
            kind, _, options = rest.split()
            fits = kind == "cgroup" and controller in options.split(",") if controller else kind == "cgroup2"
            if fits and (own + "/").startswith(root.rstrip("/") + "/"):
                below = own[len(root.rstrip("/")) :].strip("/")
                return os.path.join(mount, below) if below else mount, mount
    raise FileNotFoundError(controller or "cgroup2")


def _is_delegated(path: str) -> bool:
    """Whether systemd says that a cgroup is left to those who run in it."""
    for name in ("trusted.delegate", "user.delegate"):
        try:
            if os.getxattr(path, name) == b"1":
                return True
        except OSError:
            pass
    return False


def _event(path: str, name: str, event: str) -> int:
    """How often that has happened, by a file of counters."""
    return int(dict(line.split() for line in _read(path, name).splitlines()).get(event, 0))


def _read(path: str, name: str) -> str:
    try:
        with open(os.path.join(path, name), encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, name: str, text: str) -> None:
    fd = os.open(os.path.join(path, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
