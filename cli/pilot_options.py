"""Options of a pilot, and how one is started and waited for: what `run`, `start` and `stop` share."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from pilotq.broker.errors import InvalidInput, NoPilot, PilotFailed
from pilotq.broker.launcher_kind import launcher_kind
from pilotq.broker.log import log_form
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.pilot.lock import await_holder_state
from pilotq.broker.pilot.server import DURABILITY
from pilotq.broker.pilot.start import METHODS, LocalNode, Remote, StartedPilot, SupervisorOptions, start_pilot
from pilotq.broker.processes import tail
from pilotq.broker.settings import load
from pilotq.broker.slurm.allocation import (
    address_for,
    choose_nodes,
    job_id,
    read_allocation,
    unused_components,
)
from pilotq.broker.slurm.step_environment import ENV_SCHEMA
from pilotq.broker.store.registry import read_nodes
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.tasks.quantities import MEMORY_POLICIES, parse_duration
from pilotq.cli.options import all_of, counter_option, counters_of, parsed, pool_option, server_url
from pilotq.workers.machine.gpus import add_gpus, find_gpus
from pilotq.workers.machine.memory_policy import memory_by
from pilotq.workers.machine.topology import (
    memory_bytes,
    numa_groups,
    siblings,
    usable_cpus,
    virtual_nodes,
    without_siblings,
)

if TYPE_CHECKING:
    from pilotq.broker.client.broker import Broker

COUNTERS = "PILOTQ_COUNTERS"  # NAME=N, with spaces between: what every node has
MEMORY_POLICY = "PILOTQ_MEMORY_POLICY"  # one of MEMORY_POLICIES
GPUS = "PILOTQ_GPUS"  # how many GPUs each node has, whatever is found there
MACHINE_ROOT = "PILOTQ_MACHINE_ROOT"  # where tests have another /proc, /sys and /dev, in which GPUs are looked for
POOLS = "PILOTQ_POOLS"  # NAME=N, with spaces between: what all nodes have together
THREADS = "PILOTQ_THREADS"  # of a physical core, those that tasks get; not set: each is a core of its own
ALL_THREADS = 1024
GPU_NODE = "PILOTQ_GPU_NODE"  # of several nodes on one machine, the one that has its GPUs
ENV_SCHEMAS = ("auto", "slurm", "common")
CLUSTER_OPTIONS = (
    "min_nodes",
    "start_method",
    "smt",
    "threads_per_core",
    "bind",
)  # options that only some clusters need
POLL_S = 0.05
NODES_S = 30.0  # for nodes of this machine to join; others have `nodes_wait_s` more
LATE_S = 10.0  # the command no longer waits for nodes of an allocation that have not joined by then


def signal_number(text: str) -> int:
    """The number of a signal by its name (``USR1``, ``SIGUSR1``) or number; raises InvalidInput."""
    try:
        if text.isdigit():
            return signal.Signals(int(text)).value
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value
    except (KeyError, ValueError):
        raise InvalidInput(f"there is no signal {text!r}: write a name such as USR1 or TERM") from None


grace_option = click.option(
    "--grace", metavar="TIME", default="60s", show_default=True, callback=parsed(parse_duration),
    help="End the pilot this long before the allocation ends.",
)  # fmt: skip
notice_option = click.option(
    "--notice-signal", metavar="NAME", default="TERM", show_default=True, callback=parsed(signal_number),
    help="Sent to running tasks then.",
)  # fmt: skip
gpus_option = click.option(
    "--gpus", "node_gpus", type=click.IntRange(0, 1024), metavar="N",
    help="Each machine has N GPUs (its first node).",
)  # fmt: skip
own_gpus_option = click.option(
    "--gpus", "node_gpus", type=click.IntRange(0, 1024), metavar="N",
    help="This node has N GPUs.",
)  # fmt: skip
smt_options = all_of(
    click.option("--smt", type=click.Choice(["yes", "no"]), default="yes", metavar="yes|no",
                 help="no: a core is a physical core, all of it."),
    click.option("--no-smt", is_flag=True, hidden=True, help="The same as --smt no."),
    click.option("--threads-per-core", type=click.IntRange(1), metavar="N",
                 help="With that, N hardware threads of it."),
)  # fmt: skip
pilot_options = all_of(
    click.option("--nodes", metavar="SPEC", help="Cores of its nodes: 4, or 4,2,2, or n1:4,n2:4. In an "
                 "allocation which nodes: 3, or 2-4, or n[1-2].  [default: all]"),
    click.option("--resources", type=click.Choice(["auto", "local", "slurm"]), default="auto",
                 help="Where its nodes come from."),
    click.option("--min-nodes", type=click.IntRange(1), default=1, metavar="N",
                 help="Start tasks only when N nodes have joined."),
    click.option("--start-method", type=click.Choice(METHODS), default="srun", help="How workers get onto nodes."),
    smt_options,
    click.option("--bind", metavar="ADDRESS", help="Listen on this address.  [default: the one Slurm's nodes reach]"),
    grace_option,
    notice_option,
    click.option("--server", metavar="FILE", help="The server's executable.  [default: $PILOTQ_SERVER, else found]"),
    click.option("--redis", metavar="URL", help="Use this server.  [default: $PILOTQ_REDIS_URL, else a private one]"),
    click.option("--durability", type=click.Choice(sorted(DURABILITY)), default="everysec", metavar="HOW",
                 help="To disk at once (strict), everysec, or none."),
    counter_option,
    pool_option,
    click.option("--memory-policy", type=click.Choice(MEMORY_POLICIES), metavar="HOW",
                 help="What --memory does: limit (ends what exceeds it; default), watch (no cgroups), reserve."),
    click.option("--system-core", is_flag=True, help="Leave the first core to the pilot itself."),
    click.option("--envschema", type=click.Choice(ENV_SCHEMAS), default="auto", metavar="WHOSE",
                 help="Variables of tasks: auto, common, slurm."),
    click.option("--contact", type=click.FloatRange(min=10.0), metavar="SECONDS",
                 help="A node out of touch for this long ends its tasks.  [default: 120; on one machine never]"),
    click.option("--resume", metavar="DIR", help="Go on with the pilot that has ended in DIR."),
    click.option("--dir", "directory", metavar="DIR", help="The pilot's directory.  [default: .pilotq/<id>]"),
)  # fmt: skip


def supervisor_options(values: dict[str, Any], *, owner_pid: int = 0) -> SupervisorOptions:
    """The pilot that the values of `pilot_options` describe; raises InvalidInput. It ends with process ``owner_pid``.

    Counters, which node has the GPUs, and the schema of variables reach the workers by the environment: of this
    process, and of the pilot that it starts.
    """
    launcher_kind()  # a variable that no worker could follow is refused before anything starts
    log_form()
    os.environ[ENV_SCHEMA] = env_schema(values["envschema"])
    slurm = values["resources"] == "slurm" or (values["resources"] == "auto" and bool(job_id(os.environ)))
    set_resources(values)
    memory_policy()
    options = SupervisorOptions(
        bind=[values["bind"]] if values["bind"] else [],
        server=_server(values),
        redis=server_url(values["redis"]) or "",
        durability=values["durability"],
        contact=values["contact"],
        owner_pid=owner_pid,
        grace=values["grace"],
        notice=values["notice_signal"],
    )
    if slurm:
        _in_allocation(values, options)
    else:
        _on_this_machine(values, options)
    return options


def _on_this_machine(values: dict[str, Any], options: SupervisorOptions) -> None:
    if values["min_nodes"] > 1:
        raise InvalidInput("--min-nodes is for an allocation: nodes of this machine are all there, or the pilot fails")
    cpus = usable_cpus() if threads_per_core() is None else without_siblings(usable_cpus(), machine_root())
    plans = virtual_nodes(values["nodes"], cpus, socket.gethostname())
    nodes = [LocalNode(plan.name, plan.cores, plan.real, plan.shared) for plan in plans]
    options.nodes = without_system_core(nodes) if values["system_core"] else nodes
    os.environ[GPU_NODE] = options.nodes[0].name


def _in_allocation(values: dict[str, Any], options: SupervisorOptions) -> None:
    allocation = read_allocation(os.environ)
    if unused := unused_components(os.environ):
        click.echo(f"pilotq: {unused}", err=True)
    if values["nodes"]:
        allocation = choose_nodes(allocation, values["nodes"])
    if values["min_nodes"] > len(allocation.nodes):
        raise InvalidInput(f"--min-nodes {values['min_nodes']}: there are only {len(allocation.nodes)} nodes")
    if not options.bind and not options.redis:
        here = (os.environ.get("SLURMD_NODENAME"), socket.gethostname(), socket.gethostname().partition(".")[0])
        options.bind = [address_for([name for name in allocation.names if name not in here], os.environ)]
    system = ["--system-core", allocation.names[0]] if values["system_core"] else []
    options.remote = Remote(
        nodes=allocation.names,
        method=values["start_method"],
        min_nodes=values["min_nodes"],
        options=system,
        grants={node.name: node.cpus for node in allocation.nodes},
    )


def without_system_core(nodes: Sequence[LocalNode]) -> list[LocalNode]:
    """The nodes without the first core; raises InvalidInput when none is left."""
    first, *others = nodes
    left = first.cores[1:]
    if not left and not others:
        raise InvalidInput("--system-core: there is only one core, and the tasks need one")
    if not left:
        return others
    return [LocalNode(first.name, left, {core: first.real[core] for core in left}, first.shared), *others]


def env_schema(wanted: str) -> str:
    """``slurm`` where it is asked for, or with ``auto`` inside an allocation; else ``common``."""
    return "slurm" if wanted == "slurm" or (wanted == "auto" and "SLURM_JOB_ID" in os.environ) else "common"


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
        raise NoPilot(
            f"--resume {values['resume']}: there was never a pilot in that directory: name another one"
        ) from None


def _server(values: dict[str, Any]) -> str:
    """The path of the server that the user names, checked before anything is made; empty when they name none."""
    named = values["server"] or os.environ.get("PILOTQ_SERVER")
    if not named:
        return ""
    from pilotq.broker.pilot.server import find_server

    try:
        return os.path.abspath(find_server(named))  # the supervisor runs in another directory
    except PilotFailed as error:
        raise InvalidInput(str(error)) from None


def set_resources(values: Mapping[str, Any]) -> None:
    """Give the nodes their counters, pools, threads, GPUs and memory policy, in this process and its children.

    Raises InvalidInput.
    """
    counters, pools = counters_of(values["counters"]), counters_of(values["pools"], "pool")
    for name in sorted(counters.keys() & pools.keys()):
        raise InvalidInput(f"--pool {name}: each node has a counter of that name: give one of them another")
    for variable, words in ((COUNTERS, values["counters"]), (POOLS, values["pools"])):
        if words:
            os.environ[variable] = " ".join(words)
    if values["threads_per_core"] and values["smt"] == "yes" and not values["no_smt"]:
        raise InvalidInput("--threads-per-core is for --smt no: else each hardware thread is a core of its own")
    if values["smt"] == "no" or values["no_smt"]:
        os.environ[THREADS] = str(values["threads_per_core"] or ALL_THREADS)
    if values.get("node_gpus") is not None:  # `run` has no such option: there --gpus is the task's
        os.environ[GPUS] = str(values["node_gpus"])
    if values.get("memory_policy"):
        os.environ[MEMORY_POLICY] = values["memory_policy"]


def memory_policy() -> str:
    """How nodes hold tasks to the memory that they ask for; raises InvalidInput."""
    policy = os.environ.get(MEMORY_POLICY) or MEMORY_POLICIES[0]
    if policy not in MEMORY_POLICIES:
        raise InvalidInput(f"{MEMORY_POLICY}={policy}: it must be one of {', '.join(MEMORY_POLICIES)}")
    return policy


def machine_root() -> str:
    """The directory in which GPUs, NUMA nodes and hardware threads are looked for."""
    return os.environ.get(MACHINE_ROOT, "/")


def threads_per_core() -> int | None:
    """How many hardware threads of a physical core tasks get; None where each hardware thread is a core of its own."""
    text = os.environ.get(THREADS, "")
    return int(text) if text.isdecimal() else None


def start(values: dict[str, Any], options: SupervisorOptions) -> StartedPilot:
    """Start the pilot that the values of `pilot_options` describe; raises as `start_pilot`."""
    directory = _directory_of(values)
    if directory is not None:
        await_holder_state(os.path.join(directory, "lock"), lambda text: click.echo(f"pilotq: {text}", err=True))
    pilot = start_pilot(directory, options)
    from pilotq.broker.pilot.directory import forget_total

    forget_total(pilot)
    return pilot


def await_nodes(broker: Broker, pilot: StartedPilot, options: SupervisorOptions) -> None:
    """Wait until all nodes have joined; raises PilotFailed when the pilot ends, or they do not come.

    In an allocation only the least number is waited for: the others are named, and join when they come.
    """
    wanted = {node.name for node in options.expected_nodes}
    least = options.remote.min_nodes if options.remote else len(wanted)
    begin = time.monotonic()
    longest = NODES_S + (load(os.environ.get("PILOTQ_SETTINGS")).nodes_wait_s if options.remote else 0.0)
    while missing := wanted - {node.name for node in broker.nodes()}:
        if pilot.process.poll() is not None:
            raise pilot_failure(pilot)
        waited = time.monotonic() - begin
        if waited > LATE_S and len(wanted) - len(missing) >= least and options.remote:
            click.echo(f"pilotq: going on without {', '.join(sorted(missing))}: they join when they come", err=True)
            return
        if waited > longest:
            raise PilotFailed(f"nodes {', '.join(sorted(missing))} have not joined: see {pilot.log('supervisor')}")
        time.sleep(0.005)


def differences(broker: Broker) -> Iterator[str]:
    """A sentence for CPUs, and one for GPUs, of which a batch system has granted more or fewer than workers can use."""
    nodes = read_nodes(broker.link)
    if cpus := _withheld(nodes):
        yield cpus
    noted = [node for node in nodes if node.gpu_note]
    if noted:
        more = f", and likewise on {plural(len(noted) - 1, 'more node')}" if len(noted) > 1 else ""
        remedy = "`PILOTQ_GPUS=N`, or `--gpus N` of `pilotq start`, says how many a node has"
        yield f"GPUs of {noted[0].name}: {noted[0].gpu_note}{more}; {remedy}"


def _withheld(nodes: Sequence[NodeInfo]) -> str:
    short = [node for node in nodes if node.withheld]
    if not short:
        return ""
    found = ", ".join(f"{node.withheld} of {node.name}" for node in short[:5])
    more = f" and of {len(short) - 5} more" if len(short) > 5 else ""
    return (
        f"CPUs that Slurm has granted cannot be used: {found}{more}; compare "
        "`srun --overlap --cpu-bind=none -N1 -n1 sh -c 'taskset -cp $$'`"
    )


def node_info(node: LocalNode, cpus: Sequence[int] | None = None) -> NodeInfo:
    """What a worker registers. Memory is counted only for a node that is this whole machine, and of several nodes of
    one machine the first has its GPUs. ``cpus`` are those that were granted, if not all that can be used."""
    root, threads = machine_root(), threads_per_core()
    usable = usable_cpus() if cpus is None else cpus
    others = {} if threads is None else {core: siblings(cpu, usable, root) for core, cpu in node.real.items()}
    whole = not node.shared and all(core == cpu for core, cpu in node.real.items())
    whole = whole and {*node.cores, *chain(*others.values())} == {*usable_cpus()}
    by_cpu = {cpu: core for core, cpu in node.real.items()}
    groups = [] if node.shared else [[by_cpu[cpu] for cpu in group] for group in numa_groups(sorted(by_cpu), root)]
    info = NodeInfo(
        node.name, 0, socket.gethostname(), os.getpid(), node.cores, shared_cores=node.shared, numa=groups,
        cpus=[node.real.get(core, core) for core in node.cores],
        threads={core: more[: threads - 1] for core, more in others.items()} if threads and not node.shared else {},
        memory=memory_bytes() if whole else 0, memory_by=memory_by(memory_policy()),
        counters=counters_of(os.environ.get(COUNTERS, "").split()),
        pools=counters_of(os.environ.get(POOLS, "").split(), "pool"),
    )  # fmt: skip
    if os.environ.get(GPU_NODE, node.name) == node.name:
        count = os.environ.get(GPUS, "")
        if count and not re.fullmatch(r"[0-9]{1,4}", count):
            raise InvalidInput(f"{GPUS}={count}: write how many GPUs each node has, such as 4")
        add_gpus(info, find_gpus(os.environ, root, int(count) if count else None), by_cpu)
    return info


def await_end(
    pilot: Pilot, *, timeout: float | None, say: Callable[[], str] = lambda: "", ended: Callable[[], bool] | None = None
) -> None:
    """Wait until the pilot is gone; raises PilotFailed after ``timeout`` seconds.

    What ``say`` returns goes to stderr, once a second at most, and only when it has changed.
    """
    begin = printed_at = time.monotonic()
    printed = ""
    while not (ended() if ended is not None else not pilot.alive()):
        now = time.monotonic()
        if timeout is not None and now - begin > timeout:
            raise PilotFailed(
                f"the pilot in {pilot.directory} has not ended after {timeout:g} s: "
                f"`pilotq stop --now` kills what runs; {pilot.log('supervisor')} says what it is doing"
            )
        if now - printed_at >= 1.0:
            printed_at, text = now, say()
            if text and text != printed:
                printed = text
                click.echo(f"pilotq: {text}", err=True)
        time.sleep(POLL_S)


def pilot_failure(pilot: Pilot) -> PilotFailed:
    """The error for a pilot that has ended by itself, with the last lines of its supervisor's log."""
    log = pilot.log("supervisor")
    return PilotFailed(f"the pilot failed; {log} ends with:\n{tail(log, 5)}")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def cores_of(nodes: Sequence[LocalNode]) -> int:
    return sum(len(node.cores) for node in nodes)
