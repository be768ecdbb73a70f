"""The options of `pilotq-qcg-service`: those of QCG-PilotJob's service, and what has become of each."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

from pilotq import __version__
from pilotq.broker.errors import InvalidInput
from pilotq.broker.qcg.report import FORMATS
from pilotq.broker.start import LocalNode

AUX = re.compile(r"\.qcgpjm-service-.*")
LEVELS = ("critical", "error", "warning", "info", "debug", "notset")

_NET = "no port is opened: programs reach the pilot by its directory, which PILOTQ_DIR names in every task"
_DIVIDED = "one dispatcher serves all nodes, so nothing is divided among managers"
_WHOLE = "all nodes are used: name others with --nodes"
_STATS = "times, CPU time and memory of every task stand in the journal anyway: see `pilotq show` and `pilotq report`"
_JOINS = "there are no node launchers: the worker of a node joins by itself when it is ready"
# option -> (its type; bool is a flag), what there is instead
_WITHOUT_MEANING: Final[dict[str, tuple[type, str]]] = {
    "--net-port": (int, _NET),
    "--net-pub-port": (int, _NET),
    "--net-port-min": (int, _NET),
    "--net-port-max": (int, _NET),
    "--disable-pub": (bool, "nothing is published: see `pilotq top` and `pilotq status`"),
    "--disable-nl": (bool, _JOINS),
    "--nl-init-timeout": (int, _JOINS),
    "--nl-ready-threshold": (float, _JOINS),
    "--nl-ready-treshold": (float, _JOINS),  # as its documentation spells it
    "--nl-start-method": (str, _JOINS),
    "--governor": (bool, _DIVIDED),
    "--parent": (str, _DIVIDED),
    "--tags": (str, _DIVIDED),
    "--slurm-partition-nodes": (int, _DIVIDED),
    "--slurm-limit-nodes-range-begin": (int, _WHOLE),
    "--slurm-limit-nodes-range-end": (int, _WHOLE),
    "--enable-proc-stats": (bool, _STATS),
    "--enable-rt-stats": (bool, _STATS),
    "--wrapper-rt-stats": (str, _STATS),
    "--log": (str, "what is logged does not depend on a level: service.log has requests and replies, logs/ the rest"),
}

_OF_NET: Final = [name for name, (_, instead) in _WITHOUT_MEANING.items() if instead == _NET]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message}; see `{self.prog} --help`")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; raises InvalidInput."""
    parser = _Parser(
        prog="pilotq-qcg-service",
        description="Run a request file of QCG-PilotJob on a pilot of its own. Takes the options of qcg-pm-service.",
        epilog="Exit code 0: all jobs succeeded; 1: some did not, or a submit was refused; 2: usage or no such file; "
        "3: the pilot failed; 130: interrupted.",
    )
    add = parser.add_argument
    add("--file-path", metavar="FILE", help="the requests, a JSON list")
    add("--file", action="store_true", help="implied by --file-path")
    add("--net", action="store_true", help="without --file-path: stay until a program asks to finish")
    add("--wd", default=".", metavar="DIR", help="the directory of jobs [default: here]")
    add("--nodes", metavar="SPEC", help="cores: 4, or 4,2,2, or n1:4,n2:4 [default: all there are]")
    add("--resources", choices=("auto", "slurm", "local", "file"), default="auto", help="where the nodes come from")
    add("--slurm-resources-file", metavar="FILE", help="not supported: use --nodes")
    add("--envschema", default="auto", metavar="LIST", help="auto, common or slurm: variables that tasks get")
    add("--report-format", choices=FORMATS, default="json", help="form of the report [default: json]")
    add("--report-file", default="jobs.report", metavar="FILE", help="below the service's directory [%(default)s]")
    add("--system-core", action="store_true", help="leave one core to the pilot itself")
    add("--show-progress", action="store_true", help="tell on standard error how far it is")
    add("--id", metavar="NAME", help="what the service's directory is called: .qcgpjm-service-NAME")
    add("--resume", metavar="DIR", help="go on in that service's directory, or the latest one in DIR")
    add("--replies", metavar="FILE", help="write the reply to each request there, one a line (-: standard output)")
    add("--qcg-exit-codes", action="store_true", help="exit with 0 however the jobs end, as qcg-pm-service does")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    for name, (kind, _) in _WITHOUT_MEANING.items():
        if kind is bool:
            add(name, action="store_true", default=None, help=argparse.SUPPRESS)
        else:
            choices = {"choices": LEVELS} if name == "--log" else {}
            add(name, type=kind, help=argparse.SUPPRESS, **choices)  # type: ignore[arg-type]
    options = parser.parse_args(argv)
    options.net = options.net or any(getattr(options, _key(name)) is not None for name in _OF_NET)
    _check(options)
    return options


def _key(name: str) -> str:
    return name[2:].replace("-", "_")


def _check(options: argparse.Namespace) -> None:
    if options.resources == "file" or options.slurm_resources_file:
        raise InvalidInput("--resources file: a file of Slurm resources cannot be read: name the nodes with --nodes")
    if options.file_path is None and not options.net and options.resume is None:
        raise InvalidInput("give a file of requests with --file-path FILE")
    for name in _schemas(options):
        if name not in ("auto", "common", "slurm"):
            raise InvalidInput(f'environment "{name}" not available: --envschema takes auto, common and slurm')
    if options.id is not None and ("/" in options.id or not options.id):
        raise InvalidInput(f"--id {options.id}: it is a part of a file name, so it must not be empty or have a /")


def without_meaning(options: argparse.Namespace) -> Iterator[str]:
    """A sentence for each option that was given and does nothing here."""
    if options.net:
        yield f"--net: {_NET}"
    for name, (_, instead) in _WITHOUT_MEANING.items():
        if name not in _OF_NET and getattr(options, _key(name)) is not None:
            yield f"{name}: {instead}"


def _schemas(options: argparse.Namespace) -> list[str]:
    return [name.strip().lower() for name in options.envschema.split(",")]


def env_schema(options: argparse.Namespace) -> str:
    """``slurm`` where it is asked for, or by ``auto`` inside an allocation; else ``common``."""
    names = _schemas(options)
    return "slurm" if "slurm" in names or ("auto" in names and "SLURM_NODELIST" in os.environ) else "common"


def directory(options: argparse.Namespace) -> str:
    """The directory of the service, which is its pilot's: a new one, or the one to resume. Raises InvalidInput."""
    if options.resume is None:
        name = options.id or f"{socket.gethostname()}.{int.from_bytes(os.urandom(3), 'big')}"
        return f"{os.path.abspath(options.wd)}/.qcgpjm-service-{name}"
    path: str = os.path.abspath(options.resume)
    if AUX.fullmatch(os.path.basename(path)) and os.path.isdir(path):
        return path
    found = [entry.path for entry in os.scandir(path) if AUX.fullmatch(entry.name)] if os.path.isdir(path) else []
    if not found:
        raise InvalidInput(
            f"--resume {options.resume}: there is no directory .qcgpjm-service-*: name one, or the one that has it"
        )
    return max(found, key=os.path.getmtime)


def without_system_core(nodes: Sequence[LocalNode]) -> list[LocalNode]:
    """The nodes without the first core; raises InvalidInput when none is left."""
    first, *others = nodes
    left = first.cores[1:]
    if not left and not others:
        raise InvalidInput("--system-core: there is only one core, and the tasks need one")
    if not left:
        return others
    return [LocalNode(first.name, left, {core: first.real[core] for core in left}, first.shared), *others]


def pilot_arguments(options: argparse.Namespace) -> list[Any]:
    """The same wishes as arguments of `pilotq start`."""
    return ["--resources", options.resources, *(["--nodes", options.nodes] if options.nodes else [])]
