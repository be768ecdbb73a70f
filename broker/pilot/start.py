"""Starts a pilot in the background, and describes what it consists of.

This is apart from the supervisor, so that the command that starts one need not import it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from pilotq.broker import errors
from pilotq.broker.errors import NoPilot, PilotFailed, PilotqError
from pilotq.broker.log import as_text
from pilotq.broker.os_strings import from_json, from_utf8, to_json, to_utf8
from pilotq.broker.pilot.directory import Pilot, create, write_private
from pilotq.broker.tasks.submit_context import SubmitContext, capture_context

FAILURE_PREFIX = "the pilot failed: "  # in the supervisor's log, before the error's class and text
SUBMIT_CONTEXT = "submit-context"  # file: the one the pilot was started in, for jobs of RQ's own producers
ALLOCATION_ENDED = 75  # the supervisor's exit code when the pilot ended because its allocation ends
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

    ``min_nodes``: with fewer nodes the pilot does not begin. ``options`` belong to each worker's command line.
    ``grants``: node -> the most cores to use there, where its worker cannot know that.
    """

    nodes: list[str]
    method: str = "srun"
    min_nodes: int = 1
    options: list[str] = []
    grants: dict[str, int] = {}


class SupervisorOptions(msgspec.Struct, kw_only=True):
    """What a pilot consists of. It is passed in a file that is removed once it is read, never in an argument list.

    ``bind``: addresses to listen on; empty: a unix socket only. ``redis``: URL of the user's own server, instead of a
    private one. ``contact``: as `Settings.node_timeout_s`; None: that, or 0 on a unix socket. ``owner_pid``: when this
    process ends, the pilot ends at once (0: it lives on). ``remote``: workers on the nodes of an allocation; ``grace``
    seconds before its end, tasks get the signal ``notice`` and are queued again. ``program``: the beginning of the
    parts' command lines, before the verb.
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
    def expected_nodes(self) -> list[LocalNode]:
        """All nodes the pilot begins with; those of an allocation have the granted cores: workers may find fewer."""
        granted = self.remote.grants.items() if self.remote is not None else ()
        return [*self.nodes, *(LocalNode(name, list(range(cores)), {}) for name, cores in granted)]


def read_options(path: str) -> SupervisorOptions:
    """Read the file that `start_pilot` has written, and remove it: the URL in it may contain a password."""
    with open(path, "rb") as file:
        options = from_json(file.read(), SupervisorOptions)
    os.unlink(path)
    return _paths_by(from_utf8, options)


def _paths_by(convert: Callable[[str], str], options: SupervisorOptions) -> SupervisorOptions:
    """The same with its paths converted: the supervisor may run in another locale than this process."""
    directory, server, program = (
        convert(options.directory),
        convert(options.server),
        list(map(convert, options.program)),
    )
    return msgspec.structs.replace(options, directory=directory, server=server, program=program)


class StartedPilot(Pilot, frozen=True):
    """A pilot whose supervisor is a child of this process.

    ``process`` (a Popen) has its exit code: 0, ALLOCATION_ENDED, 2 or 3.
    """

    process: Any


def program(options: SupervisorOptions) -> list[str]:
    """The beginning of a part's command line, before the verb."""
    return options.program or [sys.executable, "-m", "pilotq"]


def save_submit_context(pilot: Pilot) -> None:
    """Save the submit context of this process, for tasks that come without one."""
    write_private(pilot.path(SUBMIT_CONTEXT), msgspec.msgpack.encode(capture_context()))


def saved_submit_context(pilot: Pilot) -> SubmitContext:
    """The submit context that the pilot was started in; that of this process if none was saved."""
    try:
        with open(pilot.path(SUBMIT_CONTEXT), "rb") as file:
            return msgspec.msgpack.decode(file.read(), type=SubmitContext)
    except (FileNotFoundError, ValueError):  # none was saved, or a power loss has emptied it
        return capture_context()


def start_pilot(directory: str | None, options: SupervisorOptions, *, timeout: float = READY_S) -> StartedPilot:
    """Start a pilot in the background and wait until it is ready; ``timeout`` in seconds.

    ``directory`` as in `directory.create`; one that has been a pilot's is resumed. The pilot outlives this process,
    unless ``owner_pid`` says otherwise. Raises InvalidInput, PilotExists or PilotFailed, with the supervisor's message.

        pilot = start_pilot(None, SupervisorOptions(nodes=[LocalNode("n1", [0, 1], {0: 0, 1: 1})]))
    """
    pilot = create(directory, temporary=bool(options.owner_pid))
    save_submit_context(pilot)
    path = pilot.path(f"options-{os.urandom(4).hex()}.json")
    options = msgspec.structs.replace(options, directory=pilot.directory)
    write_private(path, to_json(_paths_by(to_utf8, options)))
    log = os.open(pilot.log("supervisor"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    offset = os.fstat(log).st_size
    try:
        # Not in the user's directory: a folder called pilotq there would be imported instead of this package.
        process = subprocess.Popen(
            [*program(options), "supervisor", "--options", path], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=pilot.directory, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(log)
    try:
        _await_ready(pilot, process, offset, timeout)
    except BaseException:
        # The user may have interrupted this: a supervisor that nobody waits for would go on.
        process.terminate()
        process.wait()
        raise
    return StartedPilot(pilot.directory, process)


def _await_ready(pilot: Pilot, process: subprocess.Popen[bytes], offset: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        ended = process.poll()
        try:
            if pilot.connection().pid == process.pid:
                return
        except NoPilot:
            pass
        if ended is not None:
            raise _failure(pilot, offset, ended)
        if time.monotonic() > deadline:
            raise PilotFailed(f"the pilot is not ready after {timeout:.0f} s: see {pilot.log('supervisor')}")
        time.sleep(0.005)


def _failure(pilot: Pilot, offset: int, code: int) -> PilotqError:
    """The error that ended the supervisor, from its log after ``offset`` bytes."""
    with open(pilot.log("supervisor"), encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        text = as_text(file.read()).strip()
    name, found, message = text.rpartition(FAILURE_PREFIX)[2].partition(": ")
    kind = getattr(errors, name, None)
    if found and isinstance(kind, type) and issubclass(kind, PilotqError):
        return kind(message)
    last = "\n".join(text.splitlines()[-5:])
    return PilotFailed(f"the supervisor ended with exit code {code}; {pilot.log('supervisor')} ends with:\n{last}")
