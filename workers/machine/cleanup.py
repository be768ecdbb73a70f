"""What a dead worker leaves on its machine: launchers, and below them tasks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

from pilotq.broker.processes import log
from pilotq.workers.process_tree import PAUSE_S, Process, kill_marked, processes, send

LAUNCHERS_S = 7.0  # longer than a launcher takes to kill what it has


def sweep_node(directory: str, node: str) -> None:
    """End what the dead worker of a node has left; takes until nothing of it lives, at most some seconds.

    First its launchers: they end by themselves, and know the tasks that hide their marks. A launcher may have been
    stopped, and would go on with launches of the dead later. Then, by their marks, tasks whose first node it was, and
    what it had started for others.
    """
    deadline = time.monotonic() + LAUNCHERS_S
    while launchers := _launchers(directory, node):
        for launcher in launchers:
            send(launcher, signal.SIGCONT)
            if time.monotonic() > deadline:
                log(f"launcher process {launcher.pid} of node {node} does not end, and is killed")
                send(launcher, signal.SIGKILL)
        if time.monotonic() > deadline + 1.0:
            break
        time.sleep(PAUSE_S)

    def ours(env: Mapping[str, str]) -> bool:
        first = env.get("PILOTQ_NODELIST", "").partition(",")[0]
        return env.get("PILOTQ_DIR") == directory and node in (first, env.get("PILOTQ_NODE"))

    left = kill_marked(ours)
    if left:
        log(f"processes of tasks of node {node} cannot be killed: {', '.join(map(str, left))}")


def _launchers(directory: str, node: str) -> list[Process]:
    """Launchers of that node that live."""
    words = [
        b"pilotq.workers.launcher.launcher",
        b"--dir",
        os.fsencode(os.path.join(directory, "output")),
        b"--node",
        os.fsencode(node),
    ]
    found = []
    for process in processes().values():
        if process.alive:
            with suppress(OSError), open(f"/proc/{process.pid}/cmdline", "rb") as file:
                if words == file.read().split(b"\0")[2:7]:
                    found.append(process)
    return found
