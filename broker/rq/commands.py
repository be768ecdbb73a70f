"""What RQ's tools say to one worker, on a channel of its own: stop a job, stop an execution, go, kill what runs.

Words on a channel are lost when nobody listens: a stop that was sent while the server was away is not heard.
"""

from __future__ import annotations

import json
from typing import Any

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link
from pilotq.broker.store.messages import Leave, Stop, ToWorker


class Commands:
    """A connection that only listens."""

    def __init__(self, address: Address, grace: float) -> None:
        self.link = Link(address)
        self._grace = grace

    def listen(self, name: str) -> None:
        """Connect, and listen as the worker of this name."""
        self.link.close()
        self.link.post("SUBSCRIBE", keys.commands(name))

    def read(self) -> list[ToWorker]:
        """What was said since the last call, as the dispatcher would say it. Never waits."""
        found: list[ToWorker] = []
        for reply in self.link.replies():
            if isinstance(reply, Exception):
                raise reply
            if reply[0] == b"message":
                found += self._message(reply[2])
        return found

    def _message(self, text: bytes) -> list[ToWorker]:
        try:
            said: dict[str, Any] = json.loads(text)
            command, task_id, execution = said["command"], said.get("job_id", ""), said.get("execution_id", 0)
            if command == "stop-job":
                return [Stop(str(task_id), 0, "stopped")]
            if command == "stop-execution":
                return [Stop(str(task_id), int(execution), "stopped")]
            if command == "kill-horse":
                return [Stop("", 0, "stopped")]
            if command == "shutdown":
                return [Leave(self._grace)]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing of a stranger may end the worker
        return []
