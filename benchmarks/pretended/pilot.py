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


class PretendedPilot:
    """``nodes`` nodes of so many cores; ``report`` has what their process says at its end."""

    def __init__(self, directory: str, nodes: int, cores: int, speed: float) -> None:
        self.directory = directory
        self.nodes = nodes
        self.cores = cores
        self.report: dict[str, Any] = {}
        command = [
            sys.executable, "-m", "benchmarks.pretended.host", "--dir", directory, "--nodes", str(nodes),
            "--cores", str(cores), "--speed", str(speed),
        ]  # fmt: skip
        self._host = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._host.stdout is not None
        self._said = self._host.stdout
        if self._said.readline().strip() != "ready":
            raise SystemExit(f"the pretended nodes ended with {self._host.wait()}")
        self.broker = Broker.connect(directory)
        self.parts = {**parts(directory), self._host.pid: "pretended nodes"}

    def cpu(self) -> Counter[str]:
        """CPU seconds of each part so far."""
        return cpu(self.parts)

    def close(self) -> None:
        self.broker.close()
        self._host.terminate()
        said = self._said.read()
        self._host.wait(END_S)
        self._said.close()
        self.report = json.loads(said.strip().rpartition("\n")[2])


@contextlib.contextmanager
def pretended_pilot(nodes: int, cores: int, *, speed: float = 1.0, **settings: Any) -> Iterator[PretendedPilot]:
    """Start such a pilot, and end it; ``settings`` as in PILOTQ_SETTINGS."""
    with tempfile.TemporaryDirectory(prefix="pilotq-bench-") as folder, _settings(settings):
        started = start_pilot(os.path.join(folder, "pilot"), SupervisorOptions())
        try:
            pilot = PretendedPilot(started.directory, nodes, cores, speed)
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
