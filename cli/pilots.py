"""Starting and ending pilots: what `run`, `start` and `stop` share."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from pilotq.broker.children import tail
from pilotq.broker.errors import InvalidInput, PilotFailed
from pilotq.broker.pilot import Pilot, find
from pilotq.broker.records import NodeInfo
from pilotq.broker.server import DURABILITY
from pilotq.broker.start import LocalNode, SupervisorOptions
from pilotq.cli.options import all_of, server_url
from pilotq.workers.topology import memory_bytes, numa_groups, usable_cpus, virtual_nodes

LOOK_S = 0.05

pilot_options = all_of(
    click.option("--nodes", metavar="SPEC", help="Cores of its nodes: 4, or 4,2,2, or n1:4,n2:4.  [default: all here]"),
    click.option("--resources", type=click.Choice(["auto", "local", "slurm"]), default="auto",
                 help="Where its nodes come from."),
    click.option("--server", metavar="FILE", help="The server's executable.  [default: $PILOTQ_SERVER, else found]"),
    click.option("--redis", metavar="URL", help="Use this server.  [default: $PILOTQ_REDIS_URL, else a private one]"),
    click.option("--durability", type=click.Choice(sorted(DURABILITY)), default="everysec",
                 help="How soon what was accepted is on disk."),
    click.option("--resume", metavar="DIR", help="Go on with the pilot that has ended in DIR."),
    click.option("--dir", "directory", metavar="DIR", help="The pilot's directory.  [default: .pilotq/<id>]"),
)  # fmt: skip


def supervisor_options(values: dict[str, Any], *, owner_pid: int = 0) -> SupervisorOptions:
    """What the values of `pilot_options` ask for; raises InvalidInput. With ``owner_pid`` it ends with that process."""
    if values["resources"] == "slurm":
        raise InvalidInput("--resources slurm: pilots on the nodes of an allocation are not built yet: use local")
    plans = virtual_nodes(values["nodes"], usable_cpus(), socket.gethostname())
    return SupervisorOptions(
        nodes=[LocalNode(plan.name, plan.cores, plan.real, plan.shared) for plan in plans],
        server=values["server"] or "",
        redis=server_url(values["redis"]) or "",
        durability=values["durability"],
        owner_pid=owner_pid,
    )


def directory_of(values: dict[str, Any]) -> str | None:
    """The directory to start in: that of ``--resume``, which must have been a pilot's, or of ``--dir``."""
    if not values["resume"]:
        directory: str | None = values["directory"]
        return directory
    if values["directory"]:
        raise InvalidInput("give --resume or --dir, not both: --resume names the directory")
    return find(values["resume"]).directory


def node_info(node: LocalNode) -> NodeInfo:
    """What a worker registers. Memory is counted only for a node that is this whole machine."""
    whole = not node.shared and all(core == cpu for core, cpu in node.real.items())
    whole = whole and sorted(node.cores) == usable_cpus()
    by_cpu = {cpu: core for core, cpu in node.real.items()}
    groups = [] if node.shared else [[by_cpu[cpu] for cpu in group] for group in numa_groups(sorted(by_cpu))]
    return NodeInfo(
        node.name, 0, socket.gethostname(), os.getpid(), node.cores, shared_cores=node.shared, numa=groups,
        memory=memory_bytes() if whole else 0,
    )  # fmt: skip


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
