"""``#SBATCH``: what the options of sbatch come to for a task."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.directive_options import Option, Requested, Syntax, number_of
from pilotq.broker.tasks.model import PRIORITY_LIMIT, ArrayRange, Task
from pilotq.broker.tasks.quantities import parse_size, parse_span

_VALUES = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type
    mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks
    ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition prefer priority
    profile qos reservation segment signal sockets-per-node switches thread-spec threads-per-core time time-min
    tmp tres-bind tres-per-task uid wait-all-nodes wckey wrap
"""
_FLAGS = """
    contiguous help hold ignore-pbs no-requeue overcommit oversubscribe quiet reboot requeue spread-job stepmgr
    test-only usage use-min-nodes verbose version wait
"""
_OPTIONAL = "exclusive get-user-env nice no-kill parsable propagate resv-ports"
_SHORT = """
    A account a array b begin B extra-node-info c cpus-per-task C constraint d dependency D chdir e error
    F nodefile G gpus H hold i input J job-name k no-kill L licenses m distribution M clusters N nodes n ntasks
    O overcommit o output p partition q qos Q quiet S core-spec s oversubscribe t time v verbose V version
    w nodelist W wait x exclude
"""
_DEPENDENCIES = {
    "afterok": "after", "afterany": "after_any", "afternotok": "after_notok", "aftercorr": "after_each",
}  # fmt: skip
_RESOURCE_OPTIONS = """
    output error input nodes ntasks ntasks-per-node cpus-per-task exclusive mem mem-per-cpu mem-per-gpu gpus
    gpus-per-node gpus-per-task gres
"""
SYNTAX = Syntax(
    "#SBATCH",
    frozenset(_VALUES.split()),
    frozenset(_FLAGS.split()),
    frozenset(_OPTIONAL.split()),
    dict(zip(_SHORT.split()[::2], _SHORT.split()[1::2], strict=True)),
)
_TIME = re.compile(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?")
_PATTERN = re.compile(r"%(\d*)(.)", re.DOTALL)


def parse_time(text: str) -> float | None:
    """Minutes, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S`` -> seconds; None for no limit.

    >>> [parse_time(text) for text in ("90", "1:30", "1:30:00", "1-12", "0")]
    [5400.0, 90.0, 5400.0, 129600.0, None]
    """
    match = _TIME.fullmatch(text)
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if match is None:
        raise InvalidInput(f"{text!r} is no time: write minutes, H:M:S or D-H:M:S")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None:  # minutes, unless all three are there
        numbers = numbers if len(numbers) == 3 else [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return float(int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds) or None


def parse_dependency(text: str) -> dict[str, list[str]]:
    """``afterok:7:8,afterany:9`` -> the ids by field of Task.

    >>> parse_dependency("afterok:7:8_1,afterany:9")
    {'after': ['7', '8_1'], 'after_any': ['9']}
    """
    found: dict[str, list[str]] = {}
    if "?" in text:
        raise InvalidInput("a task waits for all that it names, not for one of them (?)")
    for word in text.split(","):
        kind, *ids = word.split(":")
        if kind not in _DEPENDENCIES:
            raise InvalidInput(f"{kind!r} is not known here: there are {', '.join(_DEPENDENCIES)}")
        if not ids or not all(ids):
            raise InvalidInput(f"{word!r} names no task: write {kind}:ID")
        found.setdefault(_DEPENDENCIES[kind], []).extend(ids)
    return found


def read(options: dict[str, Option], asked: Requested) -> None:
    """Enter what the options ask for; the last one of a name counts. Raises InvalidInput."""
    for name, option in options.items():
        if name in _SIMPLE:
            what, parse = _SIMPLE[name]
            asked.fields[what] = asked.parsed(option, parse)
            asked.obeyed[option] = what
        elif name == "dependency":
            asked.fields |= asked.parsed(option, parse_dependency)
            asked.obeyed[option] = "after"
        elif name in ("hetjob", "packjob"):
            raise InvalidInput(
                f"line {option.line}: {asked.word} {name}: a task has the same resources on all its nodes"
            )
        elif name == "export":
            _export(option, asked)
        elif name not in _RESOURCES:
            asked.ignored.append(option)
    _resources(options, asked)
    job = options["job-name"].value if "job-name" in options else ""
    for name, what in (("output", "stdout"), ("error", "stderr"), ("input", "stdin")):
        if name in options:
            path = _file(options[name].value, job)
            if path is None:
                asked.ignored.append(options[name])
            else:
                asked.fields[what] = path
                asked.obeyed[options[name]] = what
    if "stdout" in asked.fields:
        asked.fields.setdefault("stderr", asked.fields["stdout"])


def variables(task: Task, asked: Requested) -> dict[str, str]:
    """Variables that such a script reads. They are set for its whole array, whoever has asked for it."""
    found = dict(asked.env)
    if task.is_array:
        ranges = (task.array or ArrayRange(0, task.size - 1)).ranges
        found |= {
            "SLURM_ARRAY_TASK_ID": "{index}",
            "SLURM_ARRAY_TASK_COUNT": str(task.size),
            "SLURM_ARRAY_TASK_MIN": str(ranges[0][0]),
            "SLURM_ARRAY_TASK_MAX": str(ranges[-1][-1]),
            "SLURM_ARRAY_TASK_STEP": str(ranges[0].step if len(ranges) == 1 else 1),
        }
    return found


def _priority(value: str) -> int:
    nice = int(value) if re.fullmatch(r"-?\d{1,9}", value) else 100  # as Slurm: --nice alone
    return max(-PRIORITY_LIMIT, min(-nice, PRIORITY_LIMIT))


_SIMPLE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "array": ("array", ArrayRange.parse),
    "time": ("time_limit", parse_time),
    "job-name": ("name", str),
    "chdir": ("cwd", str),
    "nice": ("priority", _priority),
}
_RESOURCES = frozenset(_RESOURCE_OPTIONS.split())


def _export(option: Option, asked: Requested) -> None:
    words = option.value.split(",")
    if any(word in ("NONE", "NIL") for word in words):
        asked.ignored.append(option)
        return
    asked.env |= dict(word.split("=", 1) for word in words if "=" in word)
    asked.obeyed[option] = "env of the script"


def _resources(options: dict[str, Option], asked: Requested) -> None:
    """Cores, nodes, GPUs and memory. A task of Slurm is a process with its cores, by default one on each node."""

    def number(name: str) -> int | None:
        if name not in options:
            return None
        asked.obeyed[options[name]] = "cores"
        return asked.parsed(options[name], number_of)

    cpus, tasks, on_node = number("cpus-per-task"), number("ntasks"), number("ntasks-per-node")
    nodes = None
    if "nodes" in options:
        nodes = asked.parsed(options["nodes"], parse_span)
        asked.obeyed[options["nodes"]] = "nodes"
    elif tasks and on_node:
        nodes = (-(-tasks // on_node),) * 2
    least = nodes[0] if nodes else 1
    each = on_node or (-(-tasks // least) if tasks else 1)  # processes on a node
    cores = each * (cpus or 1)
    if nodes and nodes != (1, 1):
        asked.request |= {"nodes": nodes, "cores": (cores, cores)}
    elif cpus or tasks or on_node or nodes:
        asked.request["cores"] = (cores, cores)
        if tasks and tasks > 1 and not nodes and not on_node:
            asked.request["spread"] = True  # they may be on any nodes
    if (option := options.get("exclusive")) and option.value:
        asked.ignored.append(option)  # =user: nodes are this user's anyway
    elif option:
        asked.obeyed[option] = "cores"
        asked.request |= {"nodes": nodes or (1, 1), "whole": True, "cores": (1, 1)}
        asked.request.pop("spread", None)
    if cpus:
        asked.env["SLURM_CPUS_PER_TASK"] = str(cpus)
    if tasks:
        asked.env |= {"SLURM_NTASKS": str(tasks), "SLURM_NPROCS": str(tasks)}
    gpus = _gpus(options, asked, least, each)
    _memory(options, asked, cores, gpus)


def _gpus(options: dict[str, Option], asked: Requested, nodes: int, each: int) -> int:
    """GPUs on each node."""
    found = 0
    for name in ("gpus", "gpus-per-node", "gpus-per-task", "gres"):
        if (option := options.get(name)) is None:
            continue
        parts = option.value.split(":")
        count = parts[-1] if parts[-1].isdecimal() else "1"
        if "," in option.value or (name == "gres" and parts[0] != "gpu") or len(parts) - parts[-1].isdecimal() > 2:
            asked.ignored.append(option)
            continue
        number = int(count[:9])
        found = {"gpus": -(-number // nodes), "gpus-per-task": number * each}.get(name, number)
        asked.request["gpus"] = found
        asked.obeyed[option] = "gpus"
    return found


def _memory(options: dict[str, Option], asked: Requested, cores: int, gpus: int) -> None:
    """Memory on each node; a number without a unit is of megabytes."""
    for name, times in (("mem", 1), ("mem-per-cpu", cores), ("mem-per-gpu", gpus)):
        if (option := options.get(name)) is None:
            continue
        size = asked.parsed(option, lambda text: parse_size(text + "M" * text.isdecimal())) * times
        if size:
            asked.request["memory"] = size
            asked.obeyed[option] = "memory"
        else:
            asked.ignored.append(option)  # all memory of a node


def _file(text: str, job: str) -> str | None:
    """The path for a pattern of file names; None where something in it is not known here."""
    known = {
        "%": "%",
        "a": "{index}",
        "A": "{id}",
        "j": "{id}",
        "J": "{id}",
        "x": job,
        "s": "batch",
        "n": "0",
        "t": "0",
    }
    known["u"] = ""
    if "%u" in text:
        import getpass

        known["u"] = getpass.getuser()
    text = text.replace("%A_%a", "%j")  # that is how an element is called here, whoever has asked for the array
    if any(match[1] or not known.get(match[2]) for match in _PATTERN.finditer(text)):
        return None
    return _PATTERN.sub(lambda match: known[match[2]], text)
