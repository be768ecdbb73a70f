"""Workers on the nodes of an allocation: starts them in one job step over all nodes (srun), or one by one (ssh).

srun, or ssh, lives as long as the workers it has started, and its stderr says which of them has ended: that is the
proof that a node's worker is dead. Its exit code proves nothing (srun ends with 0 when a node fails), and neither does
its silence. Nor does a node failure: it says that slurmd has not answered for some time, and what it had started may
still run.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Collection, Iterator

from pilotq.broker.errors import InvalidInput, PilotFailed
from pilotq.broker.log import log
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.queue_client import QueueClient
from pilotq.broker.pilot.start import Remote
from pilotq.broker.processes import PilotProcess
from pilotq.broker.settings import Settings
from pilotq.broker.slurm.allocation import expand_nodes
from pilotq.broker.slurm.step_environment import step_options

SRUN = (
    "srun", "--overlap", "--cpu-bind=none", "--mpi=none", "--no-kill", "--kill-on-bad-exit=0", "--wait=0",
    "--export=ALL", "--input=none",
)  # fmt: skip
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# Variables that srun forwards with the environment, and ssh does not. Without those of the job a worker would not know
# that its allocation ends, nor how much memory was granted.
FORWARDED = (
    "PILOTQ_SETTINGS", "PILOTQ_COUNTERS", "PILOTQ_POOLS", "PILOTQ_GPUS", "PILOTQ_THREADS", "PILOTQ_MEMORY_POLICY",
    "PILOTQ_LAUNCHER", "PILOTQ_LOG", "PILOTQ_SERVER", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE",
    "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_GPUS_PER_NODE",
)  # fmt: skip
POLL_S = 0.5  # interval at which the registered nodes are read
REPORT_S = 10.0  # interval at which a wait for nodes is logged
READ_BYTES = 1 << 16
# srun: error: node[2-3]: tasks 1-2: Killed
ENDED = re.compile(r"^srun: error: (?P<nodes>[^\s:]+): tasks? [\d,\- ]+: (?P<how>.+)$")
FAILED = re.compile(r"^srun: error: (?P<how>Node failure) on (?P<nodes>\S+)")
UNSTARTED = re.compile(r"^srun: error: Task launch for \S+ failed on node (?P<nodes>[^\s:]+): (?P<how>.+)$")


class _Launch:
    """One call of srun or ssh, and how far its output was read."""

    def __init__(self, process: PilotProcess, nodes: list[str]) -> None:
        self.process = process
        self.nodes = nodes
        self.offset = os.path.getsize(process.log) if os.path.exists(process.log) else 0
        self.rest = ""

    def lines(self) -> Iterator[str]:
        """Whole lines of its output since the last call."""
        with open(self.process.log, "rb") as file:
            file.seek(self.offset)
            data = file.read(READ_BYTES)
        self.offset += len(data)
        *whole, self.rest = (self.rest + data.decode("utf-8", "replace")).split("\n")
        yield from whole


class RemoteWorkers:
    """The workers that one pilot has started on other nodes, and the launches they came from. ``now`` is monotonic."""

    def __init__(self, remote: Remote, pilot: Pilot, program: list[str], settings: Settings) -> None:
        self.remote = remote
        self._pilot = pilot
        self._program = program
        self._settings = settings
        self._launches: list[_Launch] = []
        self._number = 0
        self._attempts: dict[str, int] = {}  # node -> number of retries
        self._retry_at: dict[str, float] = {}  # node -> time of the next retry
        self._given_up: set[str] = set()  # nodes that are not tried any more
        self._expected = set(remote.nodes)  # those that submissions wait for, as the queue knows
        self._joined: set[str] = set()  # nodes that have joined at some time
        self._retired: set[str] = set()
        self._left: set[str] = set()
        self._given_up_by_slurm: set[str] = set()  # nodes whose workers may still live
        self.started = False
        self._waits_stopped = False
        self._started_at = 0.0
        self._poll_at = 0.0
        self._reported_at = 0.0
        self._complete = False  # enough nodes have joined

    @property
    def parts(self) -> list[PilotProcess]:
        return [launch.process for launch in self._launches]

    @property
    def running(self) -> bool:
        return any(part.running for part in self.parts)

    def start(self, now: float) -> None:
        self.started = True
        self._started_at = self._reported_at = now
        nodes = self.remote.nodes
        for group in [nodes] if self.remote.method == "srun" and nodes else [[name] for name in nodes]:
            self._launch(group)

    def restart_dead(self, queue: QueueClient, now: float) -> None:
        """Read the registered nodes every POLL_S, `poll`, and announce dead workers. Raises PilotFailed."""
        if now < self._poll_at:
            return
        self._poll_at = now + POLL_S
        nodes = {info.name: info for info in queue.nodes()}
        if not queue.online:
            return  # the server is away: which nodes are registered is not known
        for name, why in self.poll(nodes, queue.retired, queue.left, now):
            if name in nodes:
                queue.announce_loss(name, nodes[name].pid, why)
        if self._given_up & self._expected and queue.expect_no_more(self._given_up & self._expected):
            self._expected -= self._given_up

    def poll(self, registered: Collection[str], retired: set[str], left: set[str], now: float) -> list[tuple[str, str]]:
        """Read what srun and ssh report, and restart workers; returns dead workers' nodes, each with its proof.

        ``registered`` are the nodes with a worker now, ``retired`` those that are to have none, and ``left`` those that
        were retired and resumed, maybe between two polls, and whose workers have ended. Raises PilotFailed when
        too few have joined in time.
        """
        self._joined.update(registered)
        for node in (self._retired - retired) | (left - self._left).intersection(self.remote.nodes):
            self._retry_at.setdefault(node, now)
        self._left = left
        self._retired = {node for node in retired if node in self.remote.nodes}
        dead = [found for launch in self._launches for found in self._read(launch)]
        for node, how in dead:
            log(f"the worker of node {node} has ended: {how}", level="warning", node=node)
            self._retry_later(node, now)
        for launch in [launch for launch in self._launches if launch.process.ended()]:
            dead += self._read(launch)
            for node in launch.nodes:
                if node not in registered:
                    self._retry_later(node, now)
            log(f"{launch.process.argv[0]} for {_some(launch.nodes)} {launch.process.ended()}")
            launch.process.close()
            self._launches.remove(launch)
        for node in [node for node in self._given_up_by_slurm if node not in registered]:
            self._given_up_by_slurm.discard(node)
            self._retry_later(node, now)
        self._check_joined(set(registered), now)
        for node in [node for node, when in self._retry_at.items() if when <= now]:
            del self._retry_at[node]
            if node not in registered or any(node == name for name, _ in dead):
                self._launch([node])
        return dead

    def stop_waiting(self) -> None:
        """Send SIGTERM, once no node is registered any more, to an srun that still waits for one of its nodes."""
        if not self._waits_stopped:
            self._waits_stopped = True
            for launch in self._launches:
                if not self._joined.issuperset(launch.nodes):
                    launch.process.signal(signal.SIGTERM)

    def stop(self, seconds: float) -> None:
        """End what still runs with SIGTERM, and after some seconds with SIGKILL."""
        deadline = time.monotonic() + seconds
        for part in self.parts:
            part.signal(signal.SIGTERM)
        for part in self.parts:
            while part.running and time.monotonic() < deadline:
                time.sleep(0.01)
            part.kill()
            part.close()
        self._launches = []

    def _launch(self, nodes: list[str]) -> None:
        self._number += 1
        part = PilotProcess(
            f"step-{self._number}", self._command(nodes), log=self._pilot.log(f"step-{self._number}"),
            cwd=self._pilot.directory, hold_stdin=self.remote.method == "ssh", env=_environment(),
        )  # fmt: skip
        launch = _Launch(part, nodes)
        self._launches.append(launch)
        try:
            part.start()
        except OSError as error:
            self._launches.remove(launch)
            raise PilotFailed(f"{part.argv[0]} cannot be run, so no worker can be started: {error.strerror}") from None

    def _command(self, nodes: list[str]) -> list[str]:
        worker = [*self._program, "worker", "--keep", "--replace", "--dir", self._pilot.directory, *self.remote.options]
        count = str(len(nodes))
        if self.remote.method == "srun":
            where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
            return [*SRUN, *where, *worker]
        (node,) = nodes
        grant = ["--grant", str(self.remote.grants[node])] if self.remote.grants.get(node) else []
        env = [f"SLURMD_NODENAME={node}", *(f"{name}={os.environ[name]}" for name in FORWARDED if name in os.environ)]
        return [*SSH, node, shlex.join(["env", *env, *worker, "--node", node, "--until-eof", *grant])]

    def _read(self, launch: _Launch) -> Iterator[tuple[str, str]]:
        for line in launch.lines():
            for pattern in (ENDED, FAILED, UNSTARTED):
                if (found := pattern.match(line)) is None:
                    continue
                try:
                    names = expand_nodes(found["nodes"])
                except InvalidInput:
                    continue  # the line is not srun's after all
                for name in [name for name in names if name in launch.nodes]:
                    if pattern is not FAILED:
                        yield name, f"{launch.process.argv[0]}: {found['how']}"
                    elif name not in self._given_up_by_slurm:
                        self._given_up_by_slurm.add(name)
                        log(
                            f"Slurm has given up node {name}; its worker goes on as long as it reaches the server",
                            level="warning",
                            node=name,
                        )
                break

    def _retry_later(self, node: str, now: float) -> None:
        if node in self._given_up or node in self._retired or node in self._retry_at:
            return
        tries = self._attempts.get(node, 0)
        if tries >= self._settings.restart_limit:
            log(
                f"node {node} was tried {tries + 1} times: it is given up; the pilot goes on without it",
                level="error",
                node=node,
            )
            self._given_up.add(node)
            return
        self._attempts[node] = tries + 1
        self._retry_at[node] = now + self._settings.worker_restart_s * 2**tries

    def _check_joined(self, joined: set[str], now: float) -> None:
        """Log which nodes are missing. Raises PilotFailed when the wait is over and too few have joined."""
        unwanted = self._given_up | self._retired
        missing = [name for name in self.remote.nodes if name not in joined and name not in unwanted]
        present = len(self.remote.nodes) - len([n for n in self.remote.nodes if n not in joined])
        self._complete = self._complete or present >= self.remote.min_nodes
        if missing and now - self._reported_at >= REPORT_S:
            self._reported_at = now
            log(f"waiting for {_some(missing)} of {len(self.remote.nodes)} nodes; {self._last_messages()}")
        waited = now - self._started_at
        if not self._complete and waited > self._settings.nodes_wait_s:
            raise PilotFailed(
                f"only {present} of {len(self.remote.nodes)} nodes have joined after {waited:.0f} s, at least "
                f"{self.remote.min_nodes} are needed; missing: {_some(missing)}; {self._last_messages()}"
            )

    def _last_messages(self) -> str:
        logs = {launch.process.log: launch for launch in self._launches}
        last = [f"{path} ends with: {text}" for path, launch in logs.items() if (text := launch.process.last_lines(2))]
        return "; ".join(last) or f"{self._pilot.log('step-1')} has more"


def _environment() -> dict[str, str]:
    """The environment of a step: that of this process, without what would make the step smaller."""
    unwanted = step_options(os.environ)
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def _some(nodes: list[str]) -> str:
    return ", ".join(nodes[:10]) + (f" and {len(nodes) - 10} more" if len(nodes) > 10 else "")
