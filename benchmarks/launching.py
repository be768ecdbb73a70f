"""Measures what a launcher itself costs for a task: each kind is fed with chains of `/bin/true`, and nothing else runs.

The CPU time is the launcher's own, by the scheduler's count; the children's is not in it. The kinds take turns.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from benchmarks.figures import Figure
from pilotq.broker.launcher_kind import Kind, native_failure
from pilotq.workers.protocol import (
    Exited,
    FrameDecoder,
    FromLauncher,
    Launch,
    LaunchBase,
    LaunchSlot,
    Quit,
    encode_frame,
)

CHAIN = 16  # launches of a slot that the launcher has


def own_cpu(pid: int) -> float:
    """Seconds that a process of one thread has run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


class _Feeder:
    """A launcher of one kind and its pipes."""

    def __init__(self, kind: Kind, folder: str) -> None:
        down, self._down = os.pipe()
        self._up, up = os.pipe()
        self._wake, wake = os.pipe()
        os.set_blocking(self._up, False)
        command = [sys.executable, "-m", "pilotq.workers.launcher.launcher", "--dir", folder, "--node", "n",
                   "--calls", "1", "--kind", kind,
                   "--down", str(down), "--up", str(up), "--wake", str(wake)]  # fmt: skip
        self.process = subprocess.Popen(command, pass_fds=(down, up, wake))
        for fd in (down, up, wake):
            os.close(fd)
        self._decoder: FrameDecoder[FromLauncher] = FrameDecoder(FromLauncher)  # type: ignore[arg-type]
        self._folder = os.fsencode(folder)
        self._slots = [f"n[{cpu}]" for cpu in sorted(os.sched_getaffinity(0))]
        env = {os.fsencode(k): os.fsencode(v) for k, v in os.environ.items()}
        self._send([LaunchBase("base", env, 0o022, {})])
        self._send([LaunchSlot(slot, {b"PILOTQ_NODE": b"n"}, {}, [int(slot[2:-1])]) for slot in self._slots])
        self._key = 0

    def _send(self, messages: list[LaunchBase | LaunchSlot | Launch | Quit]) -> None:
        data = encode_frame(messages)
        while data:
            data = data[os.write(self._down, data) :]

    def _launch(self, slot: str, after: int) -> Launch:
        self._key += 1
        env = {b"QCG_PM_STEP_ID": b"0" * 32, b"PILOTQ_ARRAY_ID": b"1", b"PILOTQ_INDEX": b"%d" % self._key}
        argv = [b"/bin/true", b"%d" % self._key]
        return Launch(self._key, f"1_{self._key}", 1, "base", slot, argv, env, self._folder, after=after)

    def feed(self, number: int) -> tuple[float, float]:
        """Tasks per second, and own CPU seconds a task."""
        chains: dict[str, deque[int]] = {slot: deque() for slot in self._slots}
        owner: dict[int, str] = {}
        sent = ended = 0
        cpu, began = own_cpu(self.process.pid), time.perf_counter()
        while ended < number:
            messages: list[LaunchBase | LaunchSlot | Launch | Quit] = []
            for slot, keys in chains.items():
                while len(keys) < CHAIN and sent < number:
                    launch = self._launch(slot, keys[-1] if keys else 0)
                    messages.append(launch)
                    keys.append(launch.key)
                    owner[launch.key] = slot
                    sent += 1
            if messages:
                self._send(messages)
            select.select([self._wake], [], [])
            os.read(self._wake, 100)
            try:
                reports = self._decoder.feed(os.read(self._up, 1 << 20))
            except BlockingIOError:
                continue
            for report in reports:
                if isinstance(report, Exited):
                    ended += 1
                    chains[owner.pop(report.key)].remove(report.key)
        return number / (time.perf_counter() - began), (own_cpu(self.process.pid) - cpu) / number

    def close(self) -> None:
        self._send([Quit()])
        self.process.wait()
        for fd in (self._down, self._up, self._wake):
            os.close(fd)


def run(number: int = 2_000, rounds: int = 7) -> list[Figure]:
    kinds: list[Kind] = ["python"] if native_failure() else ["python", "native"]
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    costs: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        feeders = {kind: _Feeder(kind, folder) for kind in kinds}
        for feeder in feeders.values():
            feeder.feed(100)
        for _ in range(rounds):
            for kind, feeder in feeders.items():
                rate, cost = feeder.feed(number)
                rates[kind].append(rate)
                costs[kind].append(cost)
        for feeder in feeders.values():
            feeder.close()
    return [
        Figure(
            f"own CPU of the {kind} launcher for a task", statistics.median(costs[kind]) * 1e6, "us",
            60 if kind == "native" else 250, False, f"{statistics.median(rates[kind]):,.0f} tasks/s",
        )
        for kind in kinds
    ]  # fmt: skip
