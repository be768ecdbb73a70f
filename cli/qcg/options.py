"""The options of `pilotq-qcg-service`: those of QCG-PilotJob's service, and what each means here."""

from __future__ import annotations

import argparse
import math
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

from pilotq import __version__
from pilotq.broker.errors import InvalidInput
from pilotq.broker.qcg.service.address import AUXILIARY
from pilotq.broker.qcg.service.states import REPORT_FORMATS
from pilotq.broker.slurm.allocation import job_id, read_allocation
from pilotq.cli.pilot_options import ENV_SCHEMAS

PROGRAM = "pilotq-qcg-service"
FILE = "qcg_pm_reqs.json"  # what --file alone means
LEVELS = ("critical", "error", "warning", "info", "debug", "notset")

_NET = "no port is opened: programs reach the pilot by its directory, which PILOTQ_DIR names in every task"
_DIVIDED = "one dispatcher serves all nodes, so nothing is divided among managers"
_ALLOCATION = "it chooses among the nodes of a Slurm allocation, and this is none, or --nodes names them"
_STATS = "times, CPU time and memory of every task are in the journal anyway: see `pilotq show` and `pilotq report`"
_JOINS = "there are no node launchers: the worker of a node joins by itself when it is ready"
# option -> (its type; bool is a flag), what there is instead
_IGNORED: Final[dict[str, tuple[type, str]]] = {
    "--net-port": (int, _NET),
    "--net-pub-port": (int, _NET),
    "--net-port-min": (int, _NET),
    "--net-port-max": (int, _NET),
    "--disable-pub": (bool, "nothing is published: see `pilotq top` and `pilotq status`"),
    "--disable-nl": (bool, _JOINS),
    "--nl-init-timeout": (int, _JOINS),
    "--nl-ready-threshold": (float, _ALLOCATION),
    "--nl-ready-treshold": (float, _ALLOCATION),  # as its documentation spells it
    "--nl-start-method": (str, _ALLOCATION),
    "--governor": (bool, _DIVIDED),
    "--parent": (str, _DIVIDED),
    "--tags": (str, _DIVIDED),
    "--slurm-partition-nodes": (int, _DIVIDED),
    "--slurm-limit-nodes-range-begin": (int, _ALLOCATION),
    "--slurm-limit-nodes-range-end": (int, _ALLOCATION),
    "--enable-proc-stats": (bool, _STATS),
    "--enable-rt-stats": (bool, _STATS),
    "--wrapper-rt-stats": (str, _STATS),
    "--log": (str, "logging has no levels: service.log has requests and replies, logs/ the rest"),
}

_METHODS: Final = {"slurm": "srun", "ssh": "ssh"}
_OF_NET: Final = [name for name, (_, instead) in _IGNORED.items() if instead == _NET]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The parser of the options; it raises InvalidInput."""
    found = _Parser(
        prog=PROGRAM,
        description="Run a request file of QCG-PilotJob on a pilot of its own. Takes the options of qcg-pm-service.",
        epilog="Exit code 0: all jobs succeeded; 1: some did not, or a submit was refused; 2: usage or no such file; "
        "3: the pilot failed; 130: interrupted.",
    )
    add = found.add_argument
    add("--file-path", metavar="FILE", help="the requests, a JSON list")
    add("--file", action="store_true", help=f"--file-path {FILE}, where no other is given")
    add("--net", action="store_true", help="without --file-path: stay until a program asks to finish")
    add("--wd", default=".", metavar="DIR", help="the directory of jobs [default: here]")
    add("--nodes", metavar="SPEC", help="cores: 4, or 4,2,2, or n1:4,n2:4 [default: all there are]")
    add("--resources", choices=("auto", "slurm", "local", "file"), default="auto", help="where the nodes come from")
    add("--slurm-resources-file", metavar="FILE", help="not supported: use --nodes")
    add("--envschema", default="auto", metavar="LIST", help="auto, common or slurm: variables that tasks get")
    add("--report-format", choices=REPORT_FORMATS, default="json", help="form of the report [default: json]")
    add("--report-file", default="jobs.report", metavar="FILE", help="below the service's directory [%(default)s]")
    add("--system-core", action="store_true", help="leave one core to the pilot itself")
    add("--show-progress", action="store_true", help="show the progress on standard error")
    add("--id", metavar="NAME", help="what the service's directory is called: .qcgpjm-service-NAME")
    add("--resume", metavar="DIR", help="go on in that service's directory, or the latest one in DIR")
    add("--replies", metavar="FILE", help="write the reply to each request to FILE, one per line (-: standard output)")
    add("--qcg-exit-codes", action="store_true", help="exit with 0 however the jobs end, as qcg-pm-service does")
    add("--owner", type=int, default=0, help=argparse.SUPPRESS)  # ends with this process; says when it is ready
    add("--version", action="version", version=f"%(prog)s {__version__}")
    for name, (kind, _) in _IGNORED.items():
        if kind is bool:
            add(name, action="store_true", default=None, help=argparse.SUPPRESS)
        else:
            choices = {"choices": LEVELS} if name == "--log" else {}
            add(name, type=kind, help=argparse.SUPPRESS, **choices)  # type: ignore[arg-type]
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; raises InvalidInput."""
    options = parser().parse_args(argv)
    options.net = options.net or any(getattr(options, _key(name)) is not None for name in _OF_NET)
    options.file_path = options.file_path or (FILE if options.file else None)
    _check(options)
    return options


def _key(name: str) -> str:
    return name[2:].replace("-", "_")


def _check(options: argparse.Namespace) -> None:
    if options.resources == "file" or options.slurm_resources_file:
        raise InvalidInput("--resources file: a file of Slurm resources cannot be read: name the nodes with --nodes")
    if options.file_path is None and not options.net and options.resume is None:
        raise InvalidInput("give a file of requests with --file-path FILE")
    for name in schemas(options):
        if name not in ENV_SCHEMAS:
            raise InvalidInput(f'environment "{name}" not available: --envschema takes {", ".join(ENV_SCHEMAS)}')
    if options.nl_start_method is not None and options.nl_start_method.lower() not in _METHODS:
        raise InvalidInput(f"--nl-start-method {options.nl_start_method}: it is one of {', '.join(_METHODS)}")
    if options.id is not None and ("/" in options.id or not options.id):
        raise InvalidInput(f"--id {options.id}: it is a part of a file name, so it must not be empty or have a /")


def ignored_options(options: argparse.Namespace) -> Iterator[str]:
    """A sentence for each given option that has no effect here."""
    if options.net:
        yield f"--net: {_NET}"
    silent = {_NET, _ALLOCATION} if in_allocation(options) else {_NET}
    for name, (_, instead) in _IGNORED.items():
        if instead not in silent and getattr(options, _key(name)) is not None:
            yield f"{name}: {instead}"


def directory(options: argparse.Namespace) -> str:
    """The directory of the service, which is its pilot's: a new one, or the one to resume. Raises InvalidInput."""
    if options.resume is None:
        name = options.id or f"{socket.gethostname()}.{int.from_bytes(os.urandom(3), 'big')}"
        return os.path.join(os.path.abspath(options.wd), AUXILIARY + name)
    path: str = os.path.abspath(options.resume)
    if _auxiliary(path):
        return path
    found = [entry.path for entry in os.scandir(path) if _auxiliary(entry.path)] if os.path.isdir(path) else []
    if not found:
        raise InvalidInput(
            f"Resume directory {path} not exists or is not valid QCG-PilotJob auxiliary directory: name "
            f"a directory {AUXILIARY}*, or the one that has it"
        )
    return max(found, key=os.path.getmtime)


def _auxiliary(path: str) -> bool:
    return os.path.basename(path).startswith(AUXILIARY) and os.path.isdir(os.path.join(path, "server"))


def pilot_arguments(options: argparse.Namespace) -> list[Any]:
    """The options as arguments of `pilotq start`."""
    names = schemas(options)
    schema = "slurm" if "slurm" in names else "auto" if "auto" in names else "common"
    found = ["--envschema", schema, *(["--system-core"] if options.system_core else [])]
    if options.nodes:
        # As there: who names nodes means this machine, also in an allocation.
        return [*found, "--resources", "local", "--nodes", options.nodes]
    found += ["--resources", options.resources]
    return [*found, *_of_allocation(options)] if in_allocation(options) else found


def in_allocation(options: argparse.Namespace) -> bool:
    """Whether the nodes are those of a Slurm allocation."""
    wanted = options.resources == "slurm" or (options.resources == "auto" and bool(job_id(os.environ)))
    return wanted and not options.nodes


def _of_allocation(options: argparse.Namespace) -> list[str]:
    """Which of its nodes, how many of them before it begins, and how workers get there."""
    count = len(read_allocation(os.environ).nodes)
    first, last = options.slurm_limit_nodes_range_begin or 0, options.slurm_limit_nodes_range_end or count
    last = min(last, count)
    found = ["--nodes", f"{first + 1}-{last}"] if (first, last) != (0, count) else []
    share = options.nl_ready_threshold if options.nl_ready_threshold is not None else options.nl_ready_treshold
    if share is not None:
        found += ["--min-nodes", str(min(max(math.ceil(share * (last - first)), 1), last - first))]
    if options.nl_start_method is not None:
        found += ["--start-method", _METHODS[options.nl_start_method.lower()]]
    return found


def schemas(options: argparse.Namespace) -> list[str]:
    return [name.strip().lower() for name in options.envschema.split(",")]
