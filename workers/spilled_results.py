"""Keeps results in a file of the pilot when the server has no room for them."""

from __future__ import annotations

import base64
import os

from pilotq.broker.tasks.functions import Stored, stored_text
from pilotq.workers.whole_writes import write_whole


class SpilledResults:
    """One file of a worker in ``directory``; it is made when it is needed."""

    def __init__(self, directory: str, node: str) -> None:
        self._path = os.path.join(directory, f"{node}.{os.getpid()}.spilled")

    def keep(self, text: str) -> str:
        """The text of a report, with its pickle (the last line) in the file instead. Raises OSError."""
        *before, encoded = text.split("\n")
        data = base64.b64decode(encoded)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            offset = os.lseek(fd, 0, os.SEEK_END)
            write_whole(fd, data)
        finally:
            os.close(fd)
        return "\n".join([*before, stored_text(Stored(os.path.basename(self._path), offset, len(data)))])
