"""The service behind a LocalManager: a pilot in an auxiliary directory, started and ended as QCG-PilotJob's is.

The auxiliary directory is the pilot's own, in the service's working directory and with QCG-PilotJob's name for it:
who has its path knows where relative paths of jobs begin, and `--resume` takes up the same one.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

from pilotq.broker.lock import Holder, holder, start_time
from pilotq.broker.pilot import Pilot
from pilotq.broker.qcg.errors import ServiceError

STOP_S = 90.0  # workers get 30 s, the server as long again; then something is wrong
LOOK_S = 0.02
LOG = "service.log"
_PROGRAM = (sys.executable, "-m", "pilotq")

_AUXILIARY = re.compile(r"\.qcgpjm-service-.*")
# What has a meaning here, and what QCG-PilotJob's service takes besides.
_VALUES = (
    "net-port", "net-pub-port", "net-port-min", "net-port-max", "file-path", "report-format", "report-file", "log",
    "parent", "tags", "slurm-partition-nodes", "slurm-limit-nodes-range-begin", "slurm-limit-nodes-range-end",
    "slurm-resources-file", "wrapper-rt-stats", "nl-init-timeout", "nl-ready-threshold", "nl-start-method",
)  # fmt: skip
_FLAGS = (
    "net", "file", "disable-nl", "show-progress", "governor", "enable-proc-stats", "enable-rt-stats", "disable-pub",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ServiceError(f"the arguments of the service are wrong: {message}")


def _parse(server_args: Iterable[Any]) -> argparse.Namespace:
    parser = _Parser(add_help=False)
    parser.add_argument("--wd", default=".")
    parser.add_argument("--nodes")
    parser.add_argument("--resources", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument("--resume")
    parser.add_argument("--id")
    parser.add_argument("--envschema", default="auto")
    parser.add_argument("--system-core", action="store_true")
    for name in _VALUES:
        parser.add_argument(f"--{name}")
    for name in _FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args([os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in server_args])


class Service:
    """A pilot that ends with this process at the latest. Raises ServiceError when it cannot be started.

    ``server_args`` are the arguments of QCG-PilotJob's service, numbers and paths among them; ``timeout`` in seconds.
    """

    def __init__(self, server_args: Iterable[Any], timeout: float) -> None:
        args = _parse(server_args)
        self.wd = os.path.abspath(args.wd)
        self.resumed: bool = args.resume is not None
        schemas = args.envschema.lower().split(",")
        slurm = "slurm" in schemas or ("auto" in schemas and "SLURM_NODELIST" in os.environ)
        self.env_schema = "slurm" if slurm else "common"
        self._pid = os.getpid()
        directory = _auxiliary(args, self.wd)
        self.pilot = Pilot(directory)
        self._start([*_start_options(args), "--resume" if self.resumed else "--dir", directory], timeout)
        self._supervisor = holder(self.pilot.path("lock"))
        self._guard = _guard(directory)
        atexit.register(self.stop)
        with suppress(FileExistsError):
            os.symlink(os.path.relpath(self.pilot.log("supervisor"), directory), self.pilot.path(LOG))

    def _start(self, options: list[str], timeout: float) -> None:
        # As a person starts it: what nodes there are is not ours to know. Not in the user's directory, where a folder
        # called pilotq would be imported instead of us.
        with subprocess.Popen(
            [*_PROGRAM, "start", *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, cwd="/", text=True,
        ) as process:  # fmt: skip
            try:
                _, said = process.communicate(timeout=timeout)
            except BaseException as error:
                process.kill()
                self._end(holder(self.pilot.path("lock")), STOP_S)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise ServiceError(f"Service not started in {timeout:.1f}") from None
                raise
        if process.returncode:
            raise ServiceError(f"Service not started: {said.strip().removeprefix('pilotq: ')}")

    def alive(self) -> bool:
        return _lives(self._supervisor)

    def stop(self, timeout: float = STOP_S) -> None:
        """End the pilot and what runs in it, and wait until it is gone; what had not ended is there for ``--resume``.

        Raises ServiceError after ``timeout`` seconds. Does nothing when it is gone, or in a child of our process.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.stop)
        try:
            self._end(self._supervisor, timeout)
        finally:
            with self._guard:  # closes its pipe, and waits for it
                self._guard.kill()

    def _end(self, supervisor: Holder | None, timeout: float) -> None:
        if supervisor is None or not _lives(supervisor):
            return
        with suppress(ProcessLookupError):
            os.kill(supervisor.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while _lives(supervisor):
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"the pilot in {self.pilot.directory} has not ended after {timeout:g} s: "
                    f"{self.pilot.log('supervisor')} says what it does"
                )
            time.sleep(LOOK_S)


def _lives(supervisor: Holder | None) -> bool:
    """Whether the process lives, and not only holds its lock: that it gives back a moment before it ends."""
    return supervisor is not None and start_time(supervisor.pid) == supervisor.start


def _guard(directory: str) -> subprocess.Popen[bytes]:
    """A process that ends the pilot when ours is gone, however it went: then the pipe that it reads from is closed."""
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; exec "$@"', "sh", *_PROGRAM, "stop", "--dir", directory],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
    )  # fmt: skip


def working_directory(pilot: Pilot) -> str | None:
    """Where relative paths of a service's jobs begin; None for a pilot that no service has started."""
    return os.path.dirname(pilot.directory) if _AUXILIARY.fullmatch(pilot.id) else None


def _start_options(args: argparse.Namespace) -> list[str]:
    options = ["--resources", args.resources]
    if args.nodes is not None:
        options += ["--nodes", args.nodes]
    if args.system_core:
        options += ["--system-core"]
    return options


def _auxiliary(args: argparse.Namespace, wd: str) -> str:
    """The auxiliary directory: a new one, or the one that ``--resume`` names or has in it. Raises ServiceError."""
    if args.resume is None:
        name = args.id or f"{socket.gethostname()}.{random.randint(0, 9999)}"
        return os.path.join(wd, f".qcgpjm-service-{name}")
    path: str = os.path.abspath(args.resume)
    found = [path]
    if os.path.isdir(path) and not _AUXILIARY.fullmatch(os.path.basename(path)):
        found = [os.path.join(path, name) for name in os.listdir(path) if _AUXILIARY.fullmatch(name)]
    found = [path for path in found if os.path.isdir(os.path.join(path, "server"))]
    if not found:
        raise ServiceError(f"Resume directory {path} not exists or is not valid QCG-PilotJob auxiliary directory")
    return max(found, key=os.path.getmtime)
