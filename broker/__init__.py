"""The broker of a pilot: tasks and their records in Redis, scheduling, and the Python interface for scripts.

``from pilotq.broker import Broker, Task`` is all that a script needs. The public names are imported when they are first
used: every process of a pilot imports something below this package, and start-up time is measured.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # importing typing would take longer than all of this
if TYPE_CHECKING:
    from typing import Any

    from pilotq.broker.client.broker import Broker
    from pilotq.broker.client.executor import Executor
    from pilotq.broker.tasks.model import ArrayRange, Request, Task

__all__ = ["ArrayRange", "Broker", "Executor", "Request", "Task"]
_HOMES = {
    "ArrayRange": "tasks.model", "Broker": "client.broker", "Executor": "client.executor", "Request": "tasks.model",
    "Task": "tasks.model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
