"""The pilot of an `Executor`: finds the one that runs here, or starts a private one, and ends that."""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref

from pilotq.broker.client.results import OutputFiles
from pilotq.broker.errors import NoPilot, PilotFailed
from pilotq.broker.pilot.directory import Pilot, find

END_S = 90.0  # one that has not ended by then is left to its own end
# Not as `-m`: in the user's directory a folder called pilotq would be imported instead of us.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from pilotq.cli.main import main; main()"


def running(dir: str | None) -> Pilot | None:
    """The pilot to use; None when none runs and none was asked for. Raises NoPilot where one was, and does not run."""
    named = dir is not None or bool(os.environ.get("PILOTQ_DIR"))
    try:
        pilot = find(dir)
        pilot.connection()
    except NoPilot:
        if named:
            raise
        return None
    if pilot.alive():
        return pilot
    if named:
        raise NoPilot(
            f"the pilot in {pilot.directory} has died: go on with it by "
            f"`pilotq start --resume {shlex.quote(pilot.directory)}`"
        )
    return None


def start(nodes: str | int | None) -> Pilot:
    """A pilot in a temporary directory; it ends with this process, too. Raises PilotFailed when it does not start."""
    pilot = Pilot(os.path.join(tempfile.mkdtemp(prefix="pilotq-"), "pilot"))
    more = [] if nodes is None else ["--nodes", str(nodes)]
    started = _pilotq(pilot, "start", "--owner", str(os.getpid()), *more)
    if started.returncode:
        _remove(pilot, os.getpid())
        raise PilotFailed(started.stderr.strip().removeprefix("pilotq: "))
    return pilot


def end_with_program(pilot: Pilot) -> None:
    """End what `start` has returned when this program ends."""
    atexit.register(end, pilot)


def end(pilot: Pilot, files: OutputFiles | None = None) -> None:
    """End what `start` has returned. What it leaves is removed when nobody can read results from ``files`` any more.

    One that has not ended in time ends with this process, and its directory stays.
    """
    try:
        _pilotq(pilot, "stop", "--now", timeout=END_S)
    except subprocess.TimeoutExpired:
        return
    if files is None:
        _remove(pilot, os.getpid())
        return
    _kept[:] = [removal for removal in _kept if removal.alive]
    _kept.append(weakref.finalize(files, _remove, pilot, os.getpid()))


def remove_kept() -> None:
    """At the end of the program: remove what was kept for those who could have read large results."""
    while _kept:
        _kept.pop()()


_kept: list[weakref.finalize[[Pilot, int], OutputFiles]] = []


def _remove(pilot: Pilot, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that was forked from it
        shutil.rmtree(os.path.dirname(pilot.directory), ignore_errors=True)


def _pilotq(pilot: Pilot, verb: str, *args: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _PROGRAM, verb, "--dir", pilot.directory, *args]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
        timeout=timeout,
    )
