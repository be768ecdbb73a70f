"""The parts of a pilot as commands: for the supervisor, and by hand for debugging, compose and srun."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import click

from pilotq.broker.children import log
from pilotq.broker.errors import InvalidInput
from pilotq.broker.link import Address, Link, parse_url
from pilotq.broker.pilot import Pilot, create, establish_epoch, find
from pilotq.broker.server import DURABILITY, wait_ready
from pilotq.broker.settings import Settings, load
from pilotq.broker.start import LocalNode
from pilotq.cli.options import counter_option, dir_option, server_url
from pilotq.cli.pilots import node_info, set_counters
from pilotq.workers.topology import usable_cpus

redis_option = click.option(
    "--redis", metavar="URL", help="Your own server: redis://host:port, unix:///path.  [default: $PILOTQ_REDIS_URL]"
)


def settings() -> Settings:
    return load(os.environ.get("PILOTQ_SETTINGS"))


@click.command("server")
@click.option("--dir", "directory", required=True, metavar="DIR", help="The pilot's directory; made if need be.")
@click.option(
    "--bind",
    multiple=True,
    metavar="ADDRESS",
    help="Listen there too, on a random port; may be repeated.  [default: a unix socket only]",
)
@click.option("--server", metavar="FILE", help="The server's executable.  [default: $PILOTQ_SERVER, else found]")
@click.option("--durability", type=click.Choice(sorted(DURABILITY)), default="everysec",
              help="How soon what was accepted is on disk.")  # fmt: skip
def server_command(directory: str, bind: tuple[str, ...], server: str | None, durability: str) -> int:
    """Run only the server of a pilot, with its journal, in the foreground.

    \b
    Example: pilotq server --dir p --bind 10.0.0.5
    """
    from pilotq.broker.server_alone import run_server

    return run_server(directory, settings(), bind=list(bind), durability=durability, server=server)


@click.command("dispatcher")
@dir_option
@redis_option
def dispatcher_command(directory: str | None, redis: str | None) -> int:
    """Run only the dispatcher of a pilot, in the foreground.

    It waits for the server for a minute. With a server of your own DIR is where it remembers whose tasks those are.

    \b
    Example: pilotq dispatcher --dir p
    """
    from pilotq.broker.dispatcher import run_dispatcher

    _, address, epoch = _reach(directory, redis)
    return run_dispatcher(address, epoch, settings())


@click.command("worker")
@dir_option
@redis_option
@click.option("--node", metavar="NAME", help="The node's name in the pilot.  [default: the host's]")
@click.option("--cores", metavar="LIST", help="Core numbers: 0,1.  [default: all it may use]")
@click.option("--real", metavar="LIST", help="CPU of each core where they differ: 0:4,1:5.")
@click.option("--shared", is_flag=True, help="Its CPUs are used by other nodes too.")
@counter_option
def worker_command(
    directory: str | None, redis: str | None, node: str | None, cores: str | None, real: str | None, shared: bool,
    counters: tuple[str, ...],
) -> int:  # fmt: skip
    """Run the worker of one node, in the foreground; with it the node joins the pilot.

    It waits for the server for a minute. A password goes into PILOTQ_REDIS_URL, or into a file that
    PILOTQ_PASSWORD_FILE names, never into an argument.

    \b
    Example: pilotq worker --dir p --node n2 --cores 0,1
    """
    from pilotq.workers.control import run_worker

    name = node or socket.gethostname().partition(".")[0]
    numbers = _numbers(cores) if cores else usable_cpus()
    cpus = {core: core for core in numbers} | (_pairs(real) if real else {})
    set_counters(counters)
    info = node_info(LocalNode(name, numbers, cpus, shared or len(set(cpus.values())) < len(cpus)))
    pilot, address, epoch = _reach(directory, redis)
    return run_worker(pilot.directory, address, epoch, info, cpus, settings())


@click.command("supervisor", hidden=True)
@click.option("--options", "path", required=True, metavar="FILE")
def supervisor_command(path: str) -> int:
    """What `run` and `start` leave in the background; FILE is read and removed."""
    from pilotq.broker.start import read_options
    from pilotq.broker.supervisor import run_supervisor
    from pilotq.workers.sweep import kill_marked

    def sweep(directory: str, node: str) -> None:
        """Kill what a dead worker has left: its tasks are those whose first node it was."""

        def ours(env: Mapping[str, str]) -> bool:
            return env.get("PILOTQ_DIR") == directory and env.get("PILOTQ_NODELIST", "").partition(",")[0] == node

        left = kill_marked(ours)
        if left:
            log(f"processes of tasks of node {node} cannot be killed: {', '.join(map(str, left))}")

    return run_supervisor(read_options(path), sweep)


def _reach(directory: str | None, redis: str | None) -> tuple[Pilot, Address, str]:
    """The pilot, its server's address and epoch; waits for the server, and says so. Raises NoPilot, PilotFailed."""
    url = server_url(redis)
    if url is None:
        pilot = find(directory)
        log(f"waiting for the server of {pilot.directory}, at most {settings().server_wait_s:.0f} s")
        connection = pilot.await_connection(settings().server_wait_s)
        return pilot, connection.address, connection.epoch
    if directory is None:
        raise InvalidInput("--redis needs --dir, too: a directory for output, and for what must be remembered")
    address = parse_url(url)
    pilot = create(directory)
    log(f"waiting for the server at {address}")
    wait_ready(address)
    link = Link(address)
    try:
        return pilot, address, establish_epoch(pilot, link)
    finally:
        link.close()


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise InvalidInput(f"--cores {text}: write numbers with commas between, such as 0,1") from None


def _pairs(text: str) -> dict[int, int]:
    try:
        return {int(core): int(cpu) for core, cpu in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise InvalidInput(f"--real {text}: write CORE:CPU pairs with commas between, such as 0:4,1:5") from None
