"""A real pilot whose nodes only pretend to run tasks: supervisor, server, dispatcher and journal are as ever."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.parts import cpu, parts
from pilotq.broker import Broker
from pilotq.broker.pilot.start import SupervisorOptions, start_pilot

ROOT = Path(__file__).parents[2]
END_S = 120.0
# A few cores stand for all of a large machine, so that answers may take long; nobody is to be given up for it.
PATIENCE_S = 120.0


class PretendedPilot:
    """A pilot with ``nodes`` pretended nodes of so many cores."""

    def __init__(self, directory: str, nodes: int, cores: int) -> None:
        self.directory = directory
        self.nodes = nodes
        self.cores = cores
        command = [
            sys.executable, "-m", "benchmarks.pretended.host", "--dir", directory, "--nodes", str(nodes),
            "--cores", str(cores),
        ]  # fmt: skip
        self._host = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._said() != "ready":
            raise SystemExit(f"the pretended nodes ended with {self._host.wait()}")
        self.broker = Broker.connect(directory)
        self.broker.link.timeout = PATIENCE_S
        self.parts = {**parts(directory), self._host.pid: "pretended nodes"}

    def cpu(self) -> Counter[str]:
        """CPU seconds of each part so far."""
        return cpu(self.parts)

    def report(self) -> Counter[str]:
        """What the process of the nodes says of itself: messages, launched, turns, cpu, pretence."""
        assert self._host.stdin is not None
        self._host.stdin.write("report\n")
        self._host.stdin.flush()
        return Counter(json.loads(self._said()))

    def close(self) -> None:
        self.broker.close()
        self._host.terminate()
        self._host.communicate(timeout=END_S)

    def _said(self) -> str:
        assert self._host.stdout is not None
        return self._host.stdout.readline().strip()


@contextlib.contextmanager
def pretended_pilot(nodes: int, cores: int, **settings: Any) -> Iterator[PretendedPilot]:
    """Start such a pilot, and end it; ``settings`` as in PILOTQ_SETTINGS."""
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder, _settings({"reply_s": PATIENCE_S, **settings}):
        started = start_pilot(os.path.join(folder, "pilot"), SupervisorOptions())
        try:
            pilot = PretendedPilot(started.directory, nodes, cores)
            try:
                yield pilot
            finally:
                pilot.close()
        finally:
            started.process.terminate()
            started.process.wait()


@contextlib.contextmanager
def _settings(settings: dict[str, Any]) -> Iterator[None]:
    before = os.environ.get("PILOTQ_SETTINGS")
    if settings:
        os.environ["PILOTQ_SETTINGS"] = json.dumps(settings)
    try:
        yield
    finally:
        os.environ.pop("PILOTQ_SETTINGS", None)
        if before is not None:
            os.environ["PILOTQ_SETTINGS"] = before
