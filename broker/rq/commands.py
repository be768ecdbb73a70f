"""Receives RQ's worker commands on the channel of one worker: stop a job or an execution, shut down, kill what runs.

A message on a channel is lost when nobody listens: a stop that is sent while the connection is down has no effect.
"""

from __future__ import annotations

import json
from typing import Any

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection
from pilotq.broker.store.messages import Leave, Stop, ToWorker


class WorkerCommands:
    """A connection that is subscribed to the channel of one worker."""

    def __init__(self, address: Address, grace: float) -> None:
        self.connection = Connection(address)
        self._grace = grace

    def listen(self, name: str) -> None:
        """Connect, and subscribe to the channel of the worker of this name."""
        self.connection.close()
        self.connection.post("SUBSCRIBE", keys.command_channel(name))

    def read(self) -> list[ToWorker]:
        """The commands since the last call, as messages that the dispatcher could have sent. Never waits."""
        found: list[ToWorker] = []
        for reply in self.connection.replies():
            if isinstance(reply, Exception):
                raise reply
            if reply[0] == b"message":
                found += self._message(reply[2])
        return found

    def _message(self, text: bytes) -> list[ToWorker]:
        try:
            content: dict[str, Any] = json.loads(text)
            command, task_id, execution = content["command"], content.get("job_id", ""), content.get("execution_id", 0)
            if command == "stop-job":
                return [Stop(str(task_id), 0, "stopped")]
            if command == "stop-execution":
                return [Stop(str(task_id), int(execution), "stopped")]
            if command == "kill-horse":
                return [Stop("", 0, "stopped")]
            if command == "shutdown":
                return [Leave(self._grace)]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            pass  # no message of somebody else may end the worker
        return []
