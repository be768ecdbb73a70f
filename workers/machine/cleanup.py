"""Ends the processes that a dead worker leaves on its machine: launchers, and below them tasks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

from pilotq.broker.log import log
from pilotq.workers import cgroups
from pilotq.workers.process_tree import KILL_POLL_S, Process, kill_marked, processes, send_signal
from pilotq.workers.script_files import remove_left

LAUNCHERS_END_S = 7.0  # longer than a launcher takes to kill what it has


def clean_node(directory: str, node: str) -> None:
    """End the processes of a node whose worker is dead; returns when none of them lives, at most after some seconds.

    First its launchers: they end by themselves, and know the tasks that hide their marks. A launcher that was stopped
    (SIGSTOP) is continued: else it would start tasks of the dead worker later. Then, by their marks, tasks whose first
    node it was, and processes that it had started for other nodes. Files of scripts and cgroups go, too.
    """
    deadline = time.monotonic() + LAUNCHERS_END_S
    while launchers := _launchers(directory, node):
        for launcher in launchers:
            send_signal(launcher, signal.SIGCONT)
            if time.monotonic() > deadline:
                log(
                    f"launcher process {launcher.pid} of node {node} does not end, and is killed",
                    level="warning",
                    node=node,
                )
                send_signal(launcher, signal.SIGKILL)
        if time.monotonic() > deadline + 1.0:
            break
        time.sleep(KILL_POLL_S)

    def belongs(env: Mapping[str, str]) -> bool:
        first = env.get("PILOTQ_NODELIST", "").partition(",")[0]
        return env.get("PILOTQ_DIR") == directory and node in (first, env.get("PILOTQ_NODE"))

    left = kill_marked(belongs)
    remove_left(directory, node)
    base, _ = cgroups.find_base()
    if base:
        cgroups.clean(base, cgroups.prefix_of(directory, node))
    if left:
        log(
            f"processes of tasks of node {node} cannot be killed: {', '.join(map(str, left))}", level="error", node=node
        )


def _launchers(directory: str, node: str) -> list[Process]:
    """The living launchers of that node, by their command line."""
    arguments = [
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
                if arguments == file.read().split(b"\0")[2:7]:
                    found.append(process)
    return found
