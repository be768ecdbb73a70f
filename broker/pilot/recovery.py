"""What a killed supervisor has left: its parts, and below them its tasks. All of it goes before anything is started.

A supervisor notes the numbers of its parts in ``parts.json``. Its successor kills those that live: they are about to
end, but slowly, with the grace that tasks have; meanwhile the same tasks would begin again beside them. On another
machine than the successor's nothing can be done, and nothing is.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from pilotq.broker.errors import NoPilot
from pilotq.broker.pilot.directory import Pilot, write_private
from pilotq.broker.pilot.lock import Holder, start_time
from pilotq.broker.pilot.server import remove_socket
from pilotq.broker.processes import Part, log

NAME = "parts.json"
GONE_S = 5.0  # after SIGKILL


class Parts(msgspec.Struct):
    """``machine`` as in `lock.Holder`; of each part its process number and when that process started."""

    machine: str
    parts: dict[str, tuple[int, int | None]]


def note(pilot: Pilot, parts: Iterable[Part]) -> None:
    """Write down who the parts are. A file system that is full must not end the pilot."""
    found = {part.name: (part.pid, start_time(part.pid)) for part in parts if part.running}
    with suppress(OSError):
        write_private(pilot.path(NAME), msgspec.json.encode(Parts(Holder.here().machine, found)))


def noted(pilot: Pilot) -> dict[str, tuple[int, int | None]]:
    """The parts as `note` has them, and the start time of each; none of a supervisor on another machine."""
    try:
        with open(pilot.path(NAME), "rb") as file:
            found = msgspec.json.decode(file.read(), type=Parts)
    except (FileNotFoundError, msgspec.DecodeError):
        return {}
    return found.parts if found.machine == Holder.here().machine else {}


def forget(pilot: Pilot) -> None:
    with suppress(FileNotFoundError):
        os.unlink(pilot.path(NAME))


def end(pilot: Pilot, sweep: Callable[[str, str], object]) -> dict[str, int]:
    """Kill what lives of a predecessor, tasks too; returns node -> process number of its workers.

    Its connection, which leads nowhere, is removed. The server is left to end by itself, or to be ended with care: it
    writes its log.
    """
    with suppress(NoPilot, msgspec.DecodeError):
        remove_socket(pilot.connection().address)
        pilot.remove_connection()
    left = noted(pilot)
    for name, (pid, start) in left.items():
        if name != "server" and start is not None and start_time(pid) == start:
            log(f"the {name} of the pilot that was killed still lives, and is killed")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + GONE_S
            while start_time(pid) == start and time.monotonic() < deadline:
                time.sleep(0.005)
    workers = {name.removeprefix("worker-"): pid for name, (pid, _) in left.items() if name.startswith("worker-")}
    for node in workers:
        sweep(pilot.directory, node)
    return workers
