"""Starting and ending pilots: what `run`, `start` and `stop` share."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import click

from pilotq.broker.archive import forget_total
from pilotq.broker.children import tail
from pilotq.broker.client import Broker
from pilotq.broker.errors import InvalidInput, NoPilot, PilotFailed
from pilotq.broker.pilot import Pilot, find
from pilotq.broker.records import NodeInfo
from pilotq.broker.server import DURABILITY
from pilotq.broker.start import LocalNode, StartedPilot, SupervisorOptions, start_pilot
from pilotq.cli.options import all_of, counter_option, counters_of, server_url
from pilotq.workers.topology import memory_bytes, numa_groups, usable_cpus, virtual_nodes

COUNTERS = "PILOTQ_COUNTERS"  # NAME=N, with spaces between: what every node has
GPU_NODE = "PILOTQ_GPU_NODE"  # of several nodes on one machine, the one that has its GPUs
LOOK_S = 0.05
NODES_S = 30.0  # how long nodes of this machine may take to join

pilot_options = all_of(
    click.option("--nodes", metavar="SPEC", help="Cores of its nodes: 4, or 4,2,2, or n1:4,n2:4.  [default: all here]"),
    click.option("--resources", type=click.Choice(["auto", "local", "slurm"]), default="auto",
                 help="Where its nodes come from."),
    click.option("--server", metavar="FILE", help="The server's executable.  [default: $PILOTQ_SERVER, else found]"),
    click.option("--redis", metavar="URL", help="Use this server.  [default: $PILOTQ_REDIS_URL, else a private one]"),
    click.option("--durability", type=click.Choice(sorted(DURABILITY)), default="everysec",
                 help="How soon what was accepted is on disk."),
    counter_option,
    click.option("--resume", metavar="DIR", help="Go on with the pilot that has ended in DIR."),
    click.option("--dir", "directory", metavar="DIR", help="The pilot's directory.  [default: .pilotq/<id>]"),
)  # fmt: skip


def supervisor_options(values: dict[str, Any], *, owner_pid: int = 0) -> SupervisorOptions:
    """What the values of `pilot_options` ask for; raises InvalidInput. With ``owner_pid`` it ends with that process.

    Counters, and which node has the GPUs, reach the workers by the environment: of this process, and of the pilot that
    it starts.
    """
    if values["resources"] == "slurm":
        raise InvalidInput("--resources slurm: pilots on the nodes of an allocation are not built yet: use local")
    plans = virtual_nodes(values["nodes"], usable_cpus(), socket.gethostname())
    set_counters(values["counters"])
    os.environ[GPU_NODE] = plans[0].name
    return SupervisorOptions(
        nodes=[LocalNode(plan.name, plan.cores, plan.real, plan.shared) for plan in plans],
        server=_server(values),
        redis=server_url(values["redis"]) or "",
        durability=values["durability"],
        owner_pid=owner_pid,
    )


def _directory_of(values: dict[str, Any]) -> str | None:
    """The directory to start in: that of ``--resume``, which must have been a pilot's, or of ``--dir``."""
    if not values["resume"]:
        directory: str | None = values["directory"]
        return directory
    if values["directory"]:
        raise InvalidInput("give --resume or --dir, not both: --resume names the directory")
    try:
        return find(values["resume"]).directory
    except NoPilot:
        raise NoPilot(f"--resume {values['resume']}: there has been no pilot in that directory: correct it") from None


def _server(values: dict[str, Any]) -> str:
    """The path of the server that the user names, checked before anything is made; empty when they name none."""
    named = values["server"] or os.environ.get("PILOTQ_SERVER")
    if not named:
        return ""
    from pilotq.broker.server import find_server

    try:
        return os.path.abspath(find_server(named))  # the supervisor runs in another directory
    except PilotFailed as error:
        raise InvalidInput(str(error)) from None


def set_counters(words: Sequence[str]) -> None:
    """Let the nodes have these counters, in this process and those that it starts; raises InvalidInput."""
    if words:
        counters_of(words)
        os.environ[COUNTERS] = " ".join(words)


def start(values: dict[str, Any], options: SupervisorOptions) -> StartedPilot:
    """Start the pilot that the values of `pilot_options` describe; raises as `start_pilot`."""
    pilot = start_pilot(_directory_of(values), options)
    forget_total(pilot)
    return pilot


def await_nodes(broker: Broker, pilot: StartedPilot, options: SupervisorOptions) -> None:
    """Wait until all nodes have joined; raises PilotFailed when the pilot ends, or they do not come."""
    wanted = {node.name for node in options.nodes}
    deadline = time.monotonic() + NODES_S
    while missing := wanted - {node.name for node in broker.nodes()}:
        if pilot.process.poll() is not None:
            raise failure(pilot)
        if time.monotonic() > deadline:
            raise PilotFailed(f"nodes {', '.join(sorted(missing))} have not joined: see {pilot.log('supervisor')}")
        time.sleep(0.005)


def node_info(node: LocalNode) -> NodeInfo:
    """What a worker registers. Memory is counted only for a node that is this whole machine, and of several nodes of
    one machine the first has its GPUs, those of CUDA_VISIBLE_DEVICES."""
    whole = not node.shared and all(core == cpu for core, cpu in node.real.items())
    whole = whole and sorted(node.cores) == usable_cpus()
    by_cpu = {cpu: core for core, cpu in node.real.items()}
    groups = [] if node.shared else [[by_cpu[cpu] for cpu in group] for group in numa_groups(sorted(by_cpu))]
    return NodeInfo(
        node.name, 0, socket.gethostname(), os.getpid(), node.cores, shared_cores=node.shared, numa=groups,
        gpus=gpus() if os.environ.get(GPU_NODE, node.name) == node.name else [],
        memory=memory_bytes() if whole else 0, counters=counters_of(os.environ.get(COUNTERS, "").split()),
    )  # fmt: skip


def gpus() -> list[str]:
    """The GPUs that CUDA would show here: as there, what follows one that is none does not count."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return list(takewhile(lambda name: re.fullmatch(r"[0-9]+|(GPU|MIG)-[A-Za-z0-9/-]+", name), names))


def await_end(
    pilot: Pilot, *, timeout: float | None, say: Callable[[], str] = lambda: "", ended: Callable[[], bool] | None = None
) -> None:
    """Wait until the pilot is gone; raises PilotFailed after ``timeout`` seconds.

    What ``say`` returns goes to stderr, once a second at most, and only when it has changed.
    """
    begin = said_at = time.monotonic()
    said = ""
    while not (ended() if ended is not None else not pilot.alive()):
        now = time.monotonic()
        if timeout is not None and now - begin > timeout:
            raise PilotFailed(
                f"the pilot in {pilot.directory} has not ended after {timeout:g} s: "
                f"`pilotq stop --now` hurries it, {pilot.log('supervisor')} says what it does"
            )
        if now - said_at >= 1.0:
            said_at, text = now, say()
            if text and text != said:
                said = text
                click.echo(f"pilotq: {text}", err=True)
        time.sleep(LOOK_S)


def failure(pilot: Pilot) -> PilotFailed:
    """The error for a pilot that has ended by itself, with the last words of its supervisor."""
    log = pilot.log("supervisor")
    return PilotFailed(f"the pilot failed; {log} ends with:\n{tail(log, 5)}")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def cores_of(nodes: Sequence[LocalNode]) -> int:
    return sum(len(node.cores) for node in nodes)
