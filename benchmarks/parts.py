"""The processes of a pilot, by what they are, and what each has used so far."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil

from pilotq.broker.pilot.directory import Pilot

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# A word of its command line, and what the process is.
KINDS = {
    "supervisor": "supervisor", "dispatcher": "dispatcher", "worker": "worker process",
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
    found: dict[str, float] = {}
    for pid, kind in pids.items():
        found[kind] = found.get(kind, 0.0) + _own(pid)
        if kind == "launcher":
            found["tasks"] = found.get("tasks", 0.0) + _reaped(pid)
    return Counter(found)  # type: ignore[arg-type]  # of floats, and 0 for what is not there


def _own(pid: int) -> float:
    """By the scheduler's count, which is finer than ticks."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def _reaped(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) * TICK_S


def memory(pids: Mapping[int, str]) -> Counter[str]:
    """Bytes of memory that each kind of these processes has now."""
    found: Counter[str] = Counter()
    for pid, kind in pids.items():
        found[kind] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def listed(used: Mapping[str, float], form: str = ".0f") -> str:
    return ", ".join(f"{part} {value:{form}}" for part, value in sorted(used.items()))
