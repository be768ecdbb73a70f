"""Recovery after a killed supervisor: ends its parts, and the tasks below them, before anything is started.

A supervisor records the process numbers of its parts in ``parts.json``. Its successor kills those that live: they would
end by themselves, but slowly, with the grace that tasks have, and meanwhile the same tasks would start again beside
them. On another machine than the successor's nothing can be done, and nothing is.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from pilotq.broker.errors import NoPilot
from pilotq.broker.log import log
from pilotq.broker.pilot.directory import Pilot, write_private
from pilotq.broker.pilot.lock import Holder
from pilotq.broker.pilot.server import remove_socket
from pilotq.broker.process_identity import start_time
from pilotq.broker.processes import PilotProcess

NAME = "parts.json"
GONE_S = 5.0  # after SIGKILL


class RecordedParts(msgspec.Struct):
    """The content of ``parts.json``: for each part its process number, and when that process started.

    ``machine`` as in `lock.Holder`.
    """

    machine: str
    parts: dict[str, tuple[int, int | None]]


def record_parts(pilot: Pilot, parts: Iterable[PilotProcess]) -> None:
    """Write the numbers of the parts to ``parts.json``. A full file system must not end the pilot."""
    found = {part.name: (part.pid, start_time(part.pid)) for part in parts if part.running}
    with suppress(OSError):
        write_private(pilot.path(NAME), msgspec.json.encode(RecordedParts(Holder.here().machine, found)))


def recorded_parts(pilot: Pilot) -> dict[str, tuple[int, int | None]]:
    """The parts as `record_parts` wrote them, with the start time of each; none of a supervisor on another machine."""
    try:
        with open(pilot.path(NAME), "rb") as file:
            found = msgspec.json.decode(file.read(), type=RecordedParts)
    except (FileNotFoundError, ValueError):
        return {}
    return found.parts if found.machine == Holder.here().machine else {}


def clear(pilot: Pilot) -> None:
    """Remove ``parts.json``."""
    with suppress(FileNotFoundError):
        os.unlink(pilot.path(NAME))


def kill_leftovers(pilot: Pilot, clean_node: Callable[[str, str], object]) -> dict[str, int]:
    """Kill what lives of a killed supervisor, tasks too; returns node -> process number of its workers.

    Its connection, which leads nowhere, is removed. The server is left to end by itself, or to be stopped by
    `RunningServer`: it still writes its log.
    """
    with suppress(NoPilot, msgspec.DecodeError):
        remove_socket(pilot.connection().address)
        pilot.remove_connection()
    left = recorded_parts(pilot)
    for name, (pid, start) in left.items():
        if name != "server" and start is not None and start_time(pid) == start:
            log(f"the {name} of the pilot that was killed still lives, and is killed", level="warning")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + GONE_S
            while start_time(pid) == start and time.monotonic() < deadline:
                time.sleep(0.005)
    workers = {name.removeprefix("worker-"): pid for name, (pid, _) in left.items() if name.startswith("worker-")}
    for node in workers:
        clean_node(pilot.directory, node)
    return workers
