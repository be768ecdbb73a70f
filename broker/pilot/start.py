"""Starting a pilot in the background, and what it is made of.

Kept apart from the supervisor, so that the command which starts it need not load it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import msgspec

from pilotq.broker import errors
from pilotq.broker.errors import NoPilot, PilotFailed, PilotqError
from pilotq.broker.pilot.directory import Pilot, create, write_private
from pilotq.broker.tasks.model import Shared
from pilotq.broker.tasks.submit_context import capture

FAILED = "the pilot failed: "  # how the supervisor's log says why; the error's class and text follow
SURROUNDINGS = "surroundings"  # of whoever started the pilot: what jobs of RQ's own producers run in
CUT_SHORT = 75  # the supervisor's exit code when the end of the allocation ended the pilot
METHODS = ("srun", "ssh")  # how workers get onto the nodes of an allocation
READY_S = 300.0  # a million tasks load in some 10 s, more on a slow shared file system


class LocalNode(msgspec.Struct):
    """A node on this machine. ``real`` maps core numbers to CPUs; ``shared``: several cores stand for one CPU."""

    name: str
    cores: list[int]
    real: dict[int, int]
    shared: bool = False


class Remote(msgspec.Struct, kw_only=True):
    """The nodes of an allocation that get a worker, and how: ``srun`` or ``ssh``.

    ``least``: with fewer of them the pilot does not begin. ``options`` are of each worker's command line; ``grants``:
    at most so many cores of a node, where its worker cannot know it.
    """

    nodes: list[str]
    method: str = "srun"
    least: int = 1
    options: list[str] = []
    grants: dict[str, int] = {}


class SupervisorOptions(msgspec.Struct, kw_only=True):
    """What a pilot is made of. Travels in a file that is removed when it was read, never in an argument list.

    ``bind``: addresses to listen on; empty: a unix socket only. ``redis``: URL of the user's own server, instead of a
    private one. ``contact``: as `Settings.contact_s`; None: that, or 0 on a unix socket. ``owner_pid``: when this
    process ends the pilot ends too, at once (0: it lives on). ``remote``: workers on the nodes of an allocation, which
    ends: ``grace`` seconds before, tasks get the signal ``notice`` and are queued again. ``program`` is what stands
    before the verb in the parts' command lines.
    """

    nodes: list[LocalNode] = []
    bind: list[str] = []
    server: str = ""
    redis: str = ""
    durability: str = "everysec"
    contact: float | None = None
    owner_pid: int = 0
    remote: Remote | None = None
    grace: float = 60.0
    notice: int = signal.SIGTERM
    program: list[str] = []
    directory: str = ""

    @property
    def planned(self) -> list[LocalNode]:
        """All nodes the pilot begins with; of an allocation with the cores granted: its workers may find fewer."""
        granted = self.remote.grants.items() if self.remote is not None else ()
        return [*self.nodes, *(LocalNode(name, list(range(cores)), {}) for name, cores in granted)]


def read_options(path: str) -> SupervisorOptions:
    """Read the file that `start_pilot` wrote, and remove it: the URL in it may hold a password."""
    with open(path, "rb") as file:
        options = msgspec.json.decode(file.read(), type=SupervisorOptions)
    os.unlink(path)
    return options


class StartedPilot(Pilot, frozen=True):
    """A pilot whose supervisor is our child; ``process`` (a Popen) tells how it ended: 0, 2 or 3."""

    process: Any


def program(options: SupervisorOptions) -> list[str]:
    """What stands before the verb in the command line of a part."""
    return options.program or [sys.executable, "-m", "pilotq"]


def remember(pilot: Pilot) -> None:
    """Note the surroundings of this process, for tasks that come without any."""
    write_private(pilot.path(SURROUNDINGS), msgspec.msgpack.encode(capture()))


def remembered(pilot: Pilot) -> Shared:
    """The surroundings that the pilot was started in; those of this process if nobody has noted any."""
    try:
        with open(pilot.path(SURROUNDINGS), "rb") as file:
            return msgspec.msgpack.decode(file.read(), type=Shared)
    except FileNotFoundError:
        return capture()


def start_pilot(directory: str | None, options: SupervisorOptions, *, timeout: float = READY_S) -> StartedPilot:
    """Start a pilot in the background and wait until it is ready; ``timeout`` in seconds.

    ``directory`` as in `pilot.create`; one that has been a pilot's is resumed. The pilot outlives this process,
    unless ``owner_pid`` says otherwise. Raises InvalidInput, PilotExists or PilotFailed, in the supervisor's own words.
    """
    pilot = create(directory)
    remember(pilot)
    path = pilot.path(f"options-{os.urandom(4).hex()}.json")
    write_private(path, msgspec.json.encode(msgspec.structs.replace(options, directory=pilot.directory)))
    log = os.open(pilot.log("supervisor"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    said = os.fstat(log).st_size
    try:
        # Not in the user's directory: there a folder called pilotq would be imported instead of us.
        process = subprocess.Popen(
            [*program(options), "supervisor", "--options", path], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=pilot.directory, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(log)
    try:
        _await_ready(pilot, process, said, timeout)
    except BaseException:
        # Interrupted by the user, for one: a supervisor that nobody waits for would go on.
        process.terminate()
        process.wait()
        raise
    return StartedPilot(pilot.directory, process)


def _await_ready(pilot: Pilot, process: subprocess.Popen[bytes], said: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        ended = process.poll()
        try:
            if pilot.connection().pid == process.pid:
                return
        except NoPilot:
            pass
        if ended is not None:
            raise _failure(pilot, said, ended)
        if time.monotonic() > deadline:
            raise PilotFailed(f"the pilot is not ready after {timeout:.0f} s: see {pilot.log('supervisor')}")
        time.sleep(0.005)


def _failure(pilot: Pilot, said: int, code: int) -> PilotqError:
    """The error that ended the supervisor, from what its log says behind ``said`` bytes."""
    with open(pilot.log("supervisor"), encoding="utf-8", errors="replace") as file:
        file.seek(said)
        text = file.read().strip()
    name, found, message = text.rpartition(FAILED)[2].partition(": ")
    kind = getattr(errors, name, None)
    if found and isinstance(kind, type) and issubclass(kind, PilotqError):
        return kind(message)
    last = "\n".join(text.splitlines()[-5:])
    return PilotFailed(f"the supervisor ended with exit code {code}; {pilot.log('supervisor')} ends with:\n{last}")
