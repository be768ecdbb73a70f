"""`pilotq worker`: the worker of one node, started by hand, by `srun` or by the supervisor."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

import click
import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.log import log_as
from pilotq.broker.pilot.start import LocalNode
from pilotq.broker.store.connection import Connection
from pilotq.cli.options import counter_option, dir_option, pool_option
from pilotq.cli.part_options import reach_part, redis_option, settings
from pilotq.cli.pilot_options import (
    grace_option,
    node_info,
    notice_option,
    own_gpus_option,
    set_resources,
    smt_options,
    threads_per_core,
)
from pilotq.workers.machine.identity import NodeIdentity
from pilotq.workers.machine.topology import CORES_MAX, check_node_name


@click.command("worker")
@dir_option
@redis_option
@click.option("--node", metavar="NAME", help="The node's name in the pilot.  [default: the host's]")
@click.option("--cores", metavar="LIST", help="Core numbers: 0,1.  [default: all it may use]")
@click.option("--real", metavar="LIST", help="The CPU of each core, where their numbers differ: 0:4,1:5.")
@click.option("--shared", is_flag=True, help="Other nodes use its CPUs, too.")
@click.option("--virtual", type=click.IntRange(1, CORES_MAX), metavar="N",
              help="Have N cores, whatever the number of CPUs; other nodes may use the same CPUs.")  # fmt: skip
@counter_option
@pool_option
@own_gpus_option
@smt_options
@click.option("--grant", type=click.IntRange(1), metavar="N",
              help="Use at most N cores.  [default: as many as Slurm has granted]")  # fmt: skip
@grace_option
@notice_option
@click.option("--keep", is_flag=True, help="Start the worker again when it dies.  [default: in an allocation]")
@click.option("--replace", is_flag=True, help="Take the place of a living worker of this name; what it runs is ended.")
@click.option("--until-eof", is_flag=True, hidden=True)
@click.option("--system-core", metavar="NODE", hidden=True)
def worker_command(directory: str | None, redis: str | None, **values: Any) -> int:
    """Run the worker of one node in the foreground; with it the node joins the pilot.

    It waits for the server for a minute. Give a password in PILOTQ_REDIS_URL, or in a file that PILOTQ_PASSWORD_FILE
    names, never in an argument.

    \b
    Example: pilotq worker --dir p --node n2 --cores 0,1
    Example: srun --overlap --cpu-bind=none pilotq worker --dir p
    """
    from pilotq.workers.machine.cleanup import clean_node
    from pilotq.workers.worker import run_worker

    log_as("worker", values["node"] or "")
    check_node_name(values["node"] or "here", "--node")
    set_resources(values)
    if values["virtual"] and (values["cores"] or values["real"]):
        raise InvalidInput("give --virtual, or --cores and --real: --virtual takes the available CPUs in turn")
    pilot, address, queue_id = reach_part(directory, redis)
    pilot_job = pilot.job()
    identity = NodeIdentity(os.environ, pilot_job)
    local = _local_node(values, identity)
    if not values["replace"]:  # the supervisor, which says so, has looked after these
        from pilotq.workers.machine.name_in_use import check_name_is_free

        check_name_is_free(Connection(address), local.name, settings())
        # One that was killed together with its launchers has left its tasks: they must end before others run them.
        clean_node(pilot.directory, local.name)

    def work() -> int:
        info, own = identity.complete(node_info(local, identity.cpus)), settings()
        if values["real"] and not own.quarantine_local_nodes:
            # The supervisor has cut its machine into nodes: what fails on one of them fails on all.
            own = msgspec.structs.replace(own, quarantine_after=0)
        return run_worker(pilot.directory, address, queue_id, info, local.real, own)

    if not (values["keep"] or (identity.job and not values["cores"])):
        return work()
    from pilotq.broker.slurm.end_reporter import AllocationEndReporter
    from pilotq.workers.machine.node_supervisor import NodeSupervisor

    name, eof, connection = local.name, values["until_eof"], Connection(address)
    # The supervisor knows about the end of the pilot's own allocation.
    joined = os.environ if identity.job != pilot_job else {}
    end_reporter = AllocationEndReporter(connection, joined, values["grace"], values["notice_signal"], settings())
    supervisor = NodeSupervisor(
        name, connection, end_reporter, work, lambda: clean_node(pilot.directory, name), settings(), until_eof=eof
    )
    return supervisor.run(pilot.log(f"worker-{name}"))


def _local_node(values: dict[str, Any], identity: NodeIdentity) -> LocalNode:
    """The node that the options describe."""
    named, virtual = values["cores"], values["virtual"]
    physical = threads_per_core() is not None
    numbers = _numbers(named) if named else identity.cores(physical=physical, grant=values["grant"])
    if values["system_core"] == (values["node"] or identity.name):
        numbers = numbers[1:]
    cpus = {core: core for core in numbers} | (_pairs(values["real"]) if values["real"] else {})
    if virtual:
        first = _host_number() * virtual
        cpus = {core: numbers[(first + core) % len(numbers)] for core in range(virtual)}
        numbers = list(cpus)
    shared = values["shared"] or virtual is not None or len(set(cpus.values())) < len(cpus)
    return LocalNode(values["node"] or identity.name, numbers, cpus, shared)


def _host_number() -> int:
    """The last number of this host's address: containers of one service have consecutive ones, and so, as long as there
    are enough CPUs, use different CPUs."""
    with suppress(OSError, ValueError):
        return int(socket.gethostbyname(socket.gethostname()).rpartition(".")[2])
    return 0


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
