"""The parts of a pilot as commands: for the supervisor, and by hand for debugging, compose and srun."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

import click
import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.pilot.directory import Pilot, create, establish_epoch, find
from pilotq.broker.pilot.server import DURABILITY, wait_ready
from pilotq.broker.pilot.start import LocalNode, SupervisorOptions, remember, remembered
from pilotq.broker.processes import log
from pilotq.broker.settings import Settings, load
from pilotq.broker.store.connection import Address, Link, parse_url
from pilotq.cli.options import counter_option, dir_option, server_url
from pilotq.cli.pilot_options import grace_option, node_info, notice_option, set_counters
from pilotq.workers.machine.identity import Here
from pilotq.workers.machine.topology import CORES_MAX, check_node_name

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
    from pilotq.broker.pilot.standalone_server import run_server

    return run_server(directory, settings(), bind=list(bind), durability=durability, server=server)


@click.command("dispatcher")
@dir_option
@redis_option
@click.option("--journal", is_flag=True, help="Keep the journal of your own server's pilot, too, and let it be found.")
def dispatcher_command(directory: str | None, redis: str | None, journal: bool) -> int:
    """Run only the dispatcher of a pilot, in the foreground.

    It waits for the server for a minute. With a server of your own DIR is where it remembers whose tasks those are.
    With --journal it is the whole pilot but for server and workers: in DIR other commands find it and its journal,
    and `pilotq stop` ends it, with all workers.

    \b
    Example: pilotq dispatcher --dir p
    """
    from pilotq.broker.scheduling.dispatcher import run_dispatcher

    if journal:
        return _keep(directory, redis)
    pilot, address, epoch = _reach(directory, redis)
    return run_dispatcher(address, epoch, settings(), remembered(pilot))


@click.command("worker")
@dir_option
@redis_option
@click.option("--node", metavar="NAME", help="The node's name in the pilot.  [default: the host's]")
@click.option("--cores", metavar="LIST", help="Core numbers: 0,1.  [default: all it may use]")
@click.option("--real", metavar="LIST", help="CPU of each core where they differ: 0:4,1:5.")
@click.option("--shared", is_flag=True, help="Its CPUs are used by other nodes too.")
@click.option("--virtual", type=click.IntRange(1, CORES_MAX), metavar="N",
              help="So many cores, whatever CPUs there are; other nodes may use these, too.")  # fmt: skip
@counter_option
@click.option("--no-smt", is_flag=True, help="One core for each physical core, not for each hardware thread.")
@click.option("--grant", type=click.IntRange(1), metavar="N",
              help="Use at most N cores.  [default: as many as Slurm has granted]")  # fmt: skip
@grace_option
@notice_option
@click.option("--keep", is_flag=True, help="Start the worker again when it dies.  [default: in an allocation]")
@click.option("--until-eof", is_flag=True, hidden=True)
@click.option("--system-core", metavar="NODE", hidden=True)
def worker_command(directory: str | None, redis: str | None, **values: Any) -> int:
    """Run the worker of one node, in the foreground; with it the node joins the pilot.

    It waits for the server for a minute. A password goes into PILOTQ_REDIS_URL, or into a file that
    PILOTQ_PASSWORD_FILE names, never into an argument.

    \b
    Example: pilotq worker --dir p --node n2 --cores 0,1
    Example: srun --overlap --cpu-bind=none pilotq worker --dir p
    """
    from pilotq.workers.worker import run_worker

    check_node_name(values["node"] or "here", "--node")
    virtual = values["virtual"]
    if virtual and (values["cores"] or values["real"]):
        raise InvalidInput("give --virtual, or --cores and --real: --virtual takes the CPUs there are in turn")
    pilot, address, epoch = _reach(directory, redis)
    pilot_job = pilot.job()
    here = Here(os.environ, pilot_job)
    named = values["cores"]
    numbers = _numbers(named) if named else here.cores(no_smt=values["no_smt"], grant=values["grant"])
    if values["system_core"] == (values["node"] or here.name):
        numbers = numbers[1:]
    cpus = {core: core for core in numbers} | (_pairs(values["real"]) if values["real"] else {})
    if virtual:
        first = _neighbour() * virtual
        cpus = {core: numbers[(first + core) % len(numbers)] for core in range(virtual)}
        numbers = list(cpus)
    set_counters(values["counters"])
    shared = values["shared"] or virtual is not None or len(set(cpus.values())) < len(cpus)
    local = LocalNode(values["node"] or here.name, numbers, cpus, shared)

    def work() -> int:
        info, own = here.known(node_info(local)), settings()
        if values["real"] and not own.aside_parts:
            # The supervisor has cut its machine into nodes: what fails on one of them fails on all.
            own = msgspec.structs.replace(own, aside_after=0)
        return run_worker(pilot.directory, address, epoch, info, cpus, own)

    if not (values["keep"] or (here.job and not named)):
        return work()
    from pilotq.broker.slurm.end_reporter import Herald
    from pilotq.workers.machine.cleanup import sweep_node
    from pilotq.workers.machine.node_supervisor import Keeper

    name, eof, link = local.name, values["until_eof"], Link(address)
    # When the pilot's own allocation ends its supervisor knows.
    joined = os.environ if here.job != pilot_job else {}
    herald = Herald(link, joined, values["grace"], values["notice_signal"], settings())
    keeper = Keeper(name, link, herald, work, lambda: sweep_node(pilot.directory, name), settings(), until_eof=eof)
    return keeper.run(pilot.log(f"worker-{name}"))


def _neighbour() -> int:
    """The last number of this host's address: containers of one service are neighbours there, and so, as long as there
    are enough CPUs, theirs differ."""
    with suppress(OSError, ValueError):
        return int(socket.gethostbyname(socket.gethostname()).rpartition(".")[2])
    return 0


def _keep(directory: str | None, redis: str | None) -> int:
    """A pilot on a server of the user's own, whose workers are started elsewhere; returns the exit code."""
    from pilotq.broker.pilot.supervisor import run_supervisor

    url = server_url(redis)
    if url is None or directory is None:
        raise InvalidInput("--journal is for a server of your own: give --redis (or PILOTQ_REDIS_URL) and --dir")
    pilot = create(directory)
    remember(pilot)
    return run_supervisor(SupervisorOptions(directory=pilot.directory, redis=url), lambda _directory, _node: None)


@click.command("supervisor", hidden=True)
@click.option("--options", "path", required=True, metavar="FILE")
def supervisor_command(path: str) -> int:
    """What `run` and `start` leave in the background; FILE is read and removed."""
    from pilotq.broker.pilot.start import read_options
    from pilotq.broker.pilot.supervisor import run_supervisor
    from pilotq.workers.machine.cleanup import sweep_node

    return run_supervisor(read_options(path), sweep_node)


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
