"""Runs of Snakemake in one directory: each has a queue for its tasks, and a file that it holds locked while it lives.

Several may live at once, for different outputs. What a dead one has left is found by its queue.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress

FOLDER = os.path.join(".snakemake", "pilotq_runs")


class Run:
    """This run. `end` removes its file."""

    def __init__(self) -> None:
        os.makedirs(FOLDER, exist_ok=True)
        self.queue = f"snakemake-{secrets.token_hex(6)}"
        self._file = open(_path(self.queue), "w")  # noqa: SIM115  # it is held until the end
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def dead(self) -> set[str]:
        """The queues of the runs that have died here, and not ended."""
        return {name for name in os.listdir(FOLDER) if name != self.queue and not _is_held(name)}

    def end(self, forget: bool) -> None:
        """Nobody needs to look for its tasks any more, if ``forget``."""
        if forget:
            remove(self.queue)
        self._file.close()


def remove(queue: str) -> None:
    """Forget a run: it has no tasks left."""
    with suppress(FileNotFoundError):
        os.unlink(_path(queue))


def _path(queue: str) -> str:
    return os.path.join(FOLDER, queue)


def _is_held(queue: str) -> bool:
    try:
        with open(_path(queue), "r+") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return True  # it has ended at this moment
    return False
