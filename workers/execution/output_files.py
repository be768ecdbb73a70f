"""Publishes or discards the output files of reruns, once it is known whether the execution counts.

Until then they have a name of their own. Their file systems may hang, so a thread beside the loop does it.
"""

from __future__ import annotations

import os

from pilotq.broker.log import log
from pilotq.broker.os_strings import printable
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.file_threads import FileThreads


class PendingOutputs:
    """Holds the output files of reruns that have ended and that the server has not judged yet."""

    def __init__(self, threads: FileThreads) -> None:
        self._threads = threads
        self._waiting: dict[tuple[str, int], tuple[list[bytes], str]] = {}  # files, suffix

    def add(self, e: Execution, *, counts: bool) -> None:
        """An execution has ended; it may count, or it is clear that it does not."""
        files = [path for path in dict.fromkeys((e.stdout, e.stderr)) if path]
        if counts:
            self._waiting[e.run.id, e.run.execution] = (files, e.suffix)
        else:
            self._threads.run(lambda: _publish_or_discard(files, e.suffix, publish=False))

    def answered(self, task_id: str, execution: int, *, counts: bool) -> None:
        """The server has judged an execution, of whatever kind."""
        if self._waiting and (found := self._waiting.pop((task_id, execution), None)):
            self._threads.run(lambda: _publish_or_discard(*found, publish=counts))


def _publish_or_discard(files: list[bytes], suffix: str, *, publish: bool) -> None:
    """The output of a repeated execution replaces the earlier one when it counts, and is removed when it does not."""
    for path in files:
        pending = path + suffix.encode()
        try:
            if publish:
                os.replace(pending, path)
            else:
                os.unlink(pending)
        except FileNotFoundError:
            pass  # the task, or its user, has moved it
        except OSError as error:
            log(f"output {printable(pending)} could not be published: {error.strerror}", level="warning")
