"""The processes of a pilot, by what they are, and what each has used so far."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from pilotq.broker.pilot.directory import Pilot

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# A word of its command line, and what the process is.
KINDS = {
    "supervisor": "supervisor", "dispatcher": "dispatcher", "worker": "control process",
    "pilotq.workers.launcher.launcher": "launcher", "benchmarks.pretended.host": "pretended nodes",
}  # fmt: skip
PROGRAMS = ("valkey-server", "redis-server")


def parts(directory: str) -> dict[int, str]:
    """Number and kind of each process of the pilot in this directory, without those of tasks."""
    supervisor = psutil.Process(Pilot(directory).connection().pid)
    found = {process.pid: _kind(process) for process in (supervisor, *supervisor.children(recursive=True))}
    return {pid: kind for pid, kind in found.items() if kind}


def _kind(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    if words and os.path.basename(words[0].partition(" ")[0]) in PROGRAMS:
        return "server"
    return next((KINDS[word] for word in words if word in KINDS), "")


def cpu(pids: Mapping[int, str]) -> Counter[str]:
    """CPU seconds of each kind of these processes, without their children; of "tasks" what launchers have reaped."""
    found: Counter[str] = Counter()
    for pid, kind in pids.items():
        user, system, children_user, children_system = _times(pid)
        found[kind] += (user + system) * TICK_S  # type: ignore[assignment]  # a Counter of floats
        if kind == "launcher":
            found["tasks"] += (children_user + children_system) * TICK_S  # type: ignore[assignment]
    return found


def _times(pid: int) -> Iterable[int]:
    # Of the whole process: psutil.cpu_times() would be the same, five times as slow.
    return map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])


def memory(pids: Mapping[int, str]) -> Counter[str]:
    """Bytes of memory that each kind of these processes has now."""
    found: Counter[str] = Counter()
    for pid, kind in pids.items():
        found[kind] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def listed(used: Mapping[str, float], form: str = ".0f") -> str:
    return ", ".join(f"{part} {value:{form}}" for part, value in sorted(used.items()))
