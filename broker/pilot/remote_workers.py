"""Workers on the nodes of an allocation: started in one job step over all of them (srun), or one by one (ssh).

What starts them stays as long as they do, and says on stderr which of them has ended: that is the proof that a node's
worker is dead. Its exit code proves nothing (srun ends with 0 when a node fails), and its silence neither. Nor does a
node failure: it says that slurmd has not answered for some time, and what it had started may go on.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Collection, Iterator

from pilotq.broker.errors import InvalidInput, PilotFailed
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.queue_client import SupervisorLink
from pilotq.broker.pilot.start import Remote
from pilotq.broker.processes import Part, log
from pilotq.broker.settings import Settings
from pilotq.broker.slurm.allocation import expand

SRUN = (
    "srun", "--overlap", "--cpu-bind=none", "--mpi=none", "--no-kill", "--kill-on-bad-exit=0", "--wait=0",
    "--export=ALL", "--input=none",
)  # fmt: skip
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# What srun hands on with the environment, and ssh does not. Without the job's own a worker would not know that its
# allocation ends, nor how much memory was granted.
TOLD = (
    "PILOTQ_SETTINGS", "PILOTQ_COUNTERS", "PILOTQ_SERVER", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
    "SLURM_JOB_CPUS_PER_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU",
)  # fmt: skip
LOOK_S = 0.5  # how often is looked which nodes are there
SAY_S = 10.0  # how often a wait for nodes says so
READ_BYTES = 1 << 16
# srun: error: node[2-3]: tasks 1-2: Killed
ENDED = re.compile(r"^srun: error: (?P<nodes>[^\s:]+): tasks? [\d,\- ]+: (?P<how>.+)$")
FAILED = re.compile(r"^srun: error: (?P<how>Node failure) on (?P<nodes>\S+)")
UNSTARTED = re.compile(r"^srun: error: Task launch for \S+ failed on node (?P<nodes>[^\s:]+): (?P<how>.+)$")


class _Step:
    """One call of srun or ssh, and how far its words were read."""

    def __init__(self, part: Part, nodes: list[str]) -> None:
        self.part = part
        self.nodes = nodes
        self.offset = os.path.getsize(part.log) if os.path.exists(part.log) else 0
        self.rest = ""

    def lines(self) -> Iterator[str]:
        """What it has said since the last call, in whole lines."""
        with open(self.part.log, "rb") as file:
            file.seek(self.offset)
            data = file.read(READ_BYTES)
        self.offset += len(data)
        *whole, self.rest = (self.rest + data.decode("utf-8", "replace")).split("\n")
        yield from whole


class Steps:
    """The steps of one pilot. ``now`` is monotonic."""

    def __init__(self, remote: Remote, pilot: Pilot, program: list[str], settings: Settings) -> None:
        self.remote = remote
        self._pilot = pilot
        self._program = program
        self._settings = settings
        self._steps: list[_Step] = []
        self._number = 0
        self._tries: dict[str, int] = {}  # node -> how often it was tried again
        self._again: dict[str, float] = {}  # node -> when to try again
        self._left: set[str] = set()  # nodes that are given up
        self._came: set[str] = set()  # nodes that have joined, at some time
        self._retired: set[str] = set()
        self._failed: set[str] = set()  # nodes that Slurm has given up, and whose workers may live
        self.begun = False
        self._dismissed = False
        self._began = 0.0
        self._look_at = 0.0
        self._said = 0.0
        self._complete = False  # enough nodes have joined

    @property
    def parts(self) -> list[Part]:
        return [step.part for step in self._steps]

    @property
    def running(self) -> bool:
        return any(part.running for part in self.parts)

    def begin(self, now: float) -> None:
        self.begun = True
        self._began = self._said = now
        nodes = self.remote.nodes
        for group in [nodes] if self.remote.method == "srun" and nodes else [[name] for name in nodes]:
            self._start(group)

    def mend(self, link: SupervisorLink, now: float) -> None:
        """`tend` with what the server says, now and then; the dispatcher is told of the dead. Raises PilotFailed."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        nodes = {info.name: info for info in link.nodes()}
        if not link.online:
            return  # which nodes are there is not known
        for name, why in self.tend(nodes, link.retired, now):
            if name in nodes:
                link.announce_loss(name, nodes[name].pid, why)

    def tend(self, joined: Collection[str], retired: set[str], now: float) -> list[tuple[str, str]]:
        """Look after the steps; returns nodes whose worker is proved dead, and how that is known.

        ``joined`` are the nodes that are registered, ``retired`` those that are to have no worker. Raises PilotFailed
        when too few have come in time.
        """
        self._came.update(joined)
        for node in self._retired - retired:
            self._again.setdefault(node, now)
        self._retired = {node for node in retired if node in self.remote.nodes}
        dead = [found for step in self._steps for found in self._read(step)]
        for node, how in dead:
            log(f"the worker of node {node} has ended: {how}")
            self._try_later(node, now)
        for step in [step for step in self._steps if step.part.ended()]:
            dead += self._read(step)
            for node in step.nodes:
                if node not in joined:
                    self._try_later(node, now)
            log(f"{step.part.argv[0]} for {_some(step.nodes)} {step.part.ended()}")
            step.part.close()
            self._steps.remove(step)
        for node in [node for node in self._failed if node not in joined]:
            self._failed.discard(node)
            self._try_later(node, now)
        self._await(set(joined), now)
        for node in [node for node, when in self._again.items() if when <= now]:
            del self._again[node]
            if node not in joined or any(node == name for name, _ in dead):
                self._start([node])
        return dead

    def dismiss(self) -> None:
        """SIGTERM, once, when no node is registered any more: srun may still wait for one, and hears nothing else."""
        if not self._dismissed:
            self._dismissed = True
            for step in self._steps:
                if not self._came.issuperset(step.nodes):
                    step.part.signal(signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """End what still runs: SIGTERM, after some seconds SIGKILL."""
        deadline = time.monotonic() + seconds
        for part in self.parts:
            part.signal(signal.SIGTERM)
        for part in self.parts:
            while part.running and time.monotonic() < deadline:
                time.sleep(0.01)
            part.kill()
            part.close()
        self._steps = []

    def _start(self, nodes: list[str]) -> None:
        self._number += 1
        part = Part(
            f"step-{self._number}", self._command(nodes), log=self._pilot.log(f"step-{self._number}"),
            cwd=self._pilot.directory, held=self.remote.method == "ssh",
        )  # fmt: skip
        step = _Step(part, nodes)
        self._steps.append(step)
        try:
            part.start()
        except OSError as error:
            self._steps.remove(step)
            raise PilotFailed(f"{part.argv[0]} cannot be run, so no worker can be started: {error.strerror}") from None

    def _command(self, nodes: list[str]) -> list[str]:
        worker = [*self._program, "worker", "--keep", "--dir", self._pilot.directory, *self.remote.options]
        count = str(len(nodes))
        if self.remote.method == "srun":
            where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
            return [*SRUN, *where, *worker]
        (node,) = nodes
        grant = ["--grant", str(self.remote.grants[node])] if self.remote.grants.get(node) else []
        env = [f"SLURMD_NODENAME={node}", *(f"{name}={os.environ[name]}" for name in TOLD if name in os.environ)]
        return [*SSH, node, shlex.join(["env", *env, *worker, "--node", node, "--until-eof", *grant])]

    def _read(self, step: _Step) -> Iterator[tuple[str, str]]:
        for line in step.lines():
            for pattern in (ENDED, FAILED, UNSTARTED):
                if (found := pattern.match(line)) is None:
                    continue
                try:
                    names = expand(found["nodes"])
                except InvalidInput:
                    continue  # no line of srun's after all
                for name in [name for name in names if name in step.nodes]:
                    if pattern is not FAILED:
                        yield name, f"{step.part.argv[0]}: {found['how']}"
                    elif name not in self._failed:
                        self._failed.add(name)
                        log(f"Slurm has given up node {name}; its worker goes on as long as it reaches the server")
                break

    def _try_later(self, node: str, now: float) -> None:
        if node in self._left or node in self._retired or node in self._again:
            return
        tries = self._tries.get(node, 0)
        if tries >= self._settings.restart_limit:
            log(f"node {node} was tried {tries + 1} times: it is given up; the pilot goes on without it")
            self._left.add(node)
            return
        self._tries[node] = tries + 1
        self._again[node] = now + self._settings.retry_node_s * 2**tries

    def _await(self, joined: set[str], now: float) -> None:
        """Say what is waited for. Raises PilotFailed when the wait is over and too few nodes have come."""
        unwanted = self._left | self._retired
        missing = [name for name in self.remote.nodes if name not in joined and name not in unwanted]
        here = len(self.remote.nodes) - len([n for n in self.remote.nodes if n not in joined])
        self._complete = self._complete or here >= self.remote.least
        if missing and now - self._said >= SAY_S:
            self._said = now
            log(f"waiting for {_some(missing)} of {len(self.remote.nodes)} nodes; {self._words()}")
        waited = now - self._began
        if not self._complete and waited > self._settings.nodes_wait_s:
            raise PilotFailed(
                f"only {here} of {len(self.remote.nodes)} nodes have joined after {waited:.0f} s, at least "
                f"{self.remote.least} are needed; missing: {_some(missing)}; {self._words()}"
            )

    def _words(self) -> str:
        logs = {step.part.log: step for step in self._steps}
        said = [f"{path} ends with: {text}" for path, step in logs.items() if (text := step.part.last_words(2))]
        return "; ".join(said) or f"{self._pilot.log('step-1')} has more"


def _some(nodes: list[str]) -> str:
    return ", ".join(nodes[:10]) + (f" and {len(nodes) - 10} more" if len(nodes) > 10 else "")
