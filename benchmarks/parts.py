"""The processes of a pilot, by what they are, and what they have used so far."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from pilotq.broker.pilot.directory import Pilot

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# A word of its command line, and what the process is.
PARTS = {
    "supervisor": "supervisor", "dispatcher": "dispatcher", "worker": "control process", "server": "server",
    "pilotq.workers.launcher.launcher": "launcher", "benchmarks.pretended.host": "pretended nodes",
}  # fmt: skip


def parts(directory: str) -> dict[int, str]:
    """Number and kind of each process of the pilot in this directory."""
    pids = [Pilot(directory).connection().pid]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, task.read_text().split())
    found = {pid: _kind(pid) for pid in pids}
    return {pid: kind for pid, kind in found.items() if kind}


def _kind(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if "server" in words[0] or "redis" in words[0]:
        return "server"
    return next((PARTS[word] for word in words if word in PARTS), "")


def cpu(pids: dict[int, str]) -> Counter[str]:
    """CPU seconds that each kind of these processes has used itself, without its children."""
    found: Counter[str] = Counter()
    for pid, kind in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[kind] += (int(fields[11]) + int(fields[12])) * TICK_S
    return found


def memory(pids: dict[int, str]) -> Counter[str]:
    """Bytes of memory that each kind of these processes has now."""
    found: Counter[str] = Counter()
    for pid, kind in pids.items():
        found[kind] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found
