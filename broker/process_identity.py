"""Identifies a process for good: numbers of processes are used again, soon in a container."""

from __future__ import annotations

import os


def machine_id() -> str:
    """Where numbers of processes mean the same as here: one boot of a machine, and one pid namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is dead or a zombie.

    Together with the pid it identifies a process for good: pids alone are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])
