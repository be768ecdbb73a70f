"""The service of a `LocalManager`: `pilotq-qcg-service` as a child of this process, which it does not outlive."""

from __future__ import annotations

import atexit
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.lock import holder
from pilotq.broker.qcg.errors import ServiceError

STOP_S = 90.0  # workers get 30 s, the server as long again; more is an error
# Not as `-m`: in the user's directory a folder called pilotq would be imported instead of us.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from pilotq.cli.qcg.service import main; main()"


class ServiceProcess:
    """A private pilot, which ends with this process at the latest. Raises ServiceError when it cannot be started.

    ``server_args`` are the arguments of QCG-PilotJob's service, numbers and paths among them; ``timeout`` in seconds.
    """

    def __init__(self, server_args: Iterable[Any], timeout: float) -> None:
        args = [os.fspath(arg) if isinstance(arg, os.PathLike) else str(arg) for arg in server_args]
        self._pid = os.getpid()
        with tempfile.TemporaryFile() as output:
            # In a session of its own: Ctrl-C is for our program, which decides what becomes of the service.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *args, "--net", "--owner", str(self._pid)], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=output, start_new_session=True,
            )  # fmt: skip
            try:
                directory = self._await_ready(timeout)
                if directory is None:
                    self._process.wait()
                    output.seek(0)
                    raise ServiceError(f"Service not started: {_last_line(output.read())}")
            except BaseException:
                self._process.terminate()
                self._process.wait()
                self._close()
                raise
        self.pilot = Pilot(directory)
        atexit.register(self.stop)

    def _await_ready(self, timeout: float) -> str | None:
        """The pilot's directory, which the service prints when it is ready; None when it ends before that."""
        out = self._process.stdout
        assert out is not None
        deadline = time.monotonic() + timeout
        text = b""
        while not text.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise ServiceError(f"Service not started in {timeout:.1f}")
            read = os.read(out.fileno(), 4096)
            if not read:
                return None
            text += read
        return os.fsdecode(text[:-1].rpartition(b"\n")[2])

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, timeout: float = STOP_S) -> None:
        """End the pilot and what runs in it, and wait until it is gone; ``--resume`` goes on with what had not ended.

        Raises ServiceError after ``timeout`` seconds. Does nothing when it is gone, or in a child of our process.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.stop)
        if self.alive():
            # The supervisor and not the service: its tasks get their grace, and the service writes its report.
            supervisor = holder(self.pilot.path("lock"))
            os.kill(supervisor.pid if supervisor is not None else self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServiceError(
                f"the pilot in {self.pilot.directory} has not ended after {timeout:g} s: "
                f"{self.pilot.log('supervisor')} says what it does"
            ) from None
        self._close()

    def _close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()


def _last_line(output: bytes) -> str:
    """The last line that the service has written, without its name."""
    lines = output.decode(errors="replace").strip().splitlines() or ["it has written nothing"]
    return lines[-1].removeprefix("pilotq-qcg-service: ")
