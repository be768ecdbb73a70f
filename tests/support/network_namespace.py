"""A worker in a network namespace of its own, behind a cable that a test can cut."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys

import msgspec

from tests.support.fault_rig import Rig
from tests.support.waiting import wait_until

CUT = {"both": ("input", "output"), "replies": ("input",), "requests": ("output",)}
NUMBERS = itertools.count(os.getpid() % 250)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def possible() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "nft")))


class FarNode:
    """A node ``far`` behind a cable of its own."""

    def __init__(self, r: Rig) -> None:
        number = next(NUMBERS)
        self.rig = r
        self.name, self.cable = f"pq{os.getpid()}-{number}", f"pq{os.getpid()}n{number % 10}"
        self.here, there = f"10.213.{number % 256}.1", f"10.213.{number % 256}.2"
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "far", "netns", self.name)
        run("ip", "address", "add", f"{self.here}/24", "dev", self.cable)
        run("ip", "link", "set", self.cable, "up")
        self.inside("ip", "address", "add", f"{there}/24", "dev", "far")
        self.inside("ip", "link", "set", "far", "up")
        self.worker: subprocess.Popen[bytes] | None = None

    def inside(self, *command: str) -> None:
        run("ip", "netns", "exec", self.name, *command)

    def start(self, *, wait: bool = True) -> None:
        assert self.rig.pilot is not None
        command = [sys.executable, "-m", "pilotq", "worker", "--dir", self.rig.pilot.directory, "--node", "far"]
        env = {**os.environ, "PILOTQ_SETTINGS": msgspec.json.encode(self.rig.settings).decode()}
        with open(self.rig.folder / "far.log", "ab") as log:
            self.worker = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command, "--cores", "0", "--real", "0:0", "--shared"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=self.rig.folder,
            )  # fmt: skip
        if wait:
            wait_until(lambda: self in self, seconds=60, what="node far")

    def __contains__(self, _: object) -> bool:
        with self.rig.broker() as broker:
            return "far" in {node.name for node in broker.nodes()}

    def cut(self, direction: str) -> None:
        self.inside("nft", "add table inet cut")
        for hook in CUT[direction]:
            self.inside("nft", f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; policy drop; }}")

    def reconnect(self) -> None:
        self.inside("nft", "delete table inet cut")

    def remove(self) -> None:
        if self.worker is not None:
            self.worker.send_signal(signal.SIGCONT)
            self.worker.terminate()
            self.worker.wait(60)
        self.rig.stop()
        run("ip", "netns", "del", self.name)
