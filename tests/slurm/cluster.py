"""A real Slurm cluster for tests: jobs are submitted, watched and removed; nodes are broken and repaired.

`slurm-cluster` beside this file starts it: one machine, a network namespace for each node. A test gets `Cluster` from
the fixture `cluster` (conftest.py), and everything in its folder is seen by all nodes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.support.waiting import wait_until

PROGRAM = Path(__file__).parent / "slurm-cluster"
BIN = Path(sys.executable).parent  # where `pilotq` is
NODES, CPUS = 4, 4
STATE = Path(os.environ.get("SLURM_TESTBED_DIR", "/tmp/slurm-testbed"))
# Short, but not so short that a busy machine makes another story of them.
SETTINGS = {"kill_grace_s": 1.0, "journal_fsync_s": 0.05, "heartbeat_s": 0.5}
SCRIPT = """\
#!/bin/bash
export PATH={bin}:$PATH PILOTQ_SETTINGS='{settings}'
cd {folder}
{lines}
"""


def run(*command: str, seconds: float = 60.0, **more: Any) -> subprocess.CompletedProcess[str]:
    """A program outside any allocation; its output is captured."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PILOTQ_")) or k == "SLURM_TESTBED_DIR"}
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
        env={**env, "PATH": f"{BIN}:{env['PATH']}", "SLURM_CONF": str(STATE / "slurm.conf")}, **more,
    )  # fmt: skip


def processes_of(node: str, folder: Path, word: str) -> list[int]:
    """On one machine all nodes' processes are seen: those of a node are in its network namespace."""
    there = set(run("ip", "netns", "pids", f"stb-{node}").stdout.split())
    return [int(pid) for pid in run("pgrep", "-f", f"{word}.*{folder}").stdout.split() if pid in there]


def supervisor_and_worker(node: str, folder: Path) -> tuple[int, int] | None:
    """The two processes `pilotq worker` of a node; None while there are not just these two."""
    found = processes_of(node, folder, "pilotq worker")
    if len(found) != 2:
        return None
    parent = int(Path(f"/proc/{found[1]}/stat").read_text().rpartition(")")[2].split()[1])
    return (found[0], found[1]) if parent == found[0] else (found[1], found[0])


class Job:
    """One batch job; its output stands in ``out``."""

    def __init__(self, number: str, out: Path) -> None:
        self.number = number
        self.out = out

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says; empty for a moment when it cannot say."""
        return dict(re.findall(r"(\w+)=(\S*)", run("scontrol", "show", "job", self.number).stdout))

    @property
    def state(self) -> str:
        return self.facts().get("JobState", "")

    def said(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def await_text(self, text: str, seconds: float = 60.0) -> str:
        """Its output, when ``text`` stands in it."""

        def look() -> str:
            said = self.said()
            assert text in said or self.state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), said
            return said if text in said else ""

        return wait_until(look, seconds=seconds, what=f"{text!r} in {self.out}:\n{self.said()}")

    def await_end(self, seconds: float = 100.0) -> str:
        """Its state when it has ended."""
        return wait_until(
            lambda: s if (s := self.state) not in ("PENDING", "RUNNING", "COMPLETING", "") else "",
            seconds=seconds, what=f"end of job {self.number}, which said:\n{self.said()}",
        )  # fmt: skip

    def cancel(self, *options: str) -> None:
        run("scancel", *options, self.number)


class Cluster:
    """The cluster, and one test's folder and jobs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []

    def submit(self, *lines: str, options: str = "-N4 --exclusive -t5", **settings: Any) -> Job:
        """A batch job of these lines, in the test's folder, with `pilotq` on PATH."""
        overrides = msgspec.json.encode({**SETTINGS, **settings}).decode()
        text = SCRIPT.format(bin=BIN, settings=overrides, folder=self.folder, lines="\n".join(lines))
        return self.submit_script(text, *options.split())

    def submit_script(self, text: str, *options: str, **environment: str) -> Job:
        """A batch script as it is, submitted in the test's folder."""
        number = len(self.jobs)
        script, out = self.folder / f"job{number}.sh", self.folder / f"job{number}.out"
        script.write_text(text)
        variables = [f"{name}={value}" for name, value in environment.items()]
        done = run(
            "env", *variables, "sbatch", "--parsable", "-o", str(out), *options, str(script), cwd=str(self.folder)
        )
        assert done.returncode == 0, done.stderr
        self.jobs.append(Job(done.stdout.strip(), out))
        return self.jobs[-1]

    def node(self, name: str, action: str) -> None:
        """start, stop, kill, crash, disconnect or reconnect a node."""
        done = run(str(PROGRAM), "node", name, action)
        assert done.returncode == 0, done.stderr

    def mended(self) -> None:
        """All nodes are back, and no job is left."""
        run("scancel", "--quiet", "--user", str(os.geteuid()))  # also those that jobs have submitted
        for number in range(1, NODES + 1):
            run(str(PROGRAM), "node", f"node{number}", "reconnect")
            run(str(PROGRAM), "node", f"node{number}", "start")
        wait_until(lambda: not run("squeue", "-h").stdout, seconds=60, what="no job left")
        wait_until(self._idle, seconds=90, what="all nodes idle")

    def _idle(self) -> bool:
        states = dict(line.split() for line in run("sinfo", "-h", "-N", "-o", "%N %t").stdout.splitlines())
        for name in (name for name, state in states.items() if state in ("down", "drain")):
            run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        return [*states.values()] == ["idle"] * NODES
