"""Reader of QCG-PilotJob's request files, JSON lists of requests: each job of a submit becomes a draft of tasks.

An iteration job is one array, and has one Task per element only where elements differ: under a scheduler, or where
``after`` names single elements of a job that has other indices (see qcg_tasks.py). Variables that are known when the
request is read are filled in here, in names, ``after`` and all other texts; the others are filled in at launch.

Deliberately different from QCG-PilotJob: a job that it would refuse, accept and never run, or fail at launch refuses
its submit; ``env`` may go with ``script``; ``${date}`` is the date and ``${time}`` the time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import repeat
from typing import Annotated, Any
from uuid import uuid4

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.decode_errors import malformed_json, refuse_nul, utf8, wrong_field
from pilotq.broker.taskfiles.qcg_schedulers import plan
from pilotq.broker.taskfiles.qcg_tasks import JobDraft
from pilotq.broker.taskfiles.qcg_variables import escape_script, fill
from pilotq.broker.tasks.model import ARRAY_LIMIT, ONE_PROCESS_MODELS, ArrayRange, Request, Task
from pilotq.broker.tasks.quantities import parse_duration
from pilotq.broker.tasks.validation import validate

Size = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Index = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class Scheduler(msgspec.Struct, forbid_unknown_fields=True):
    """An iteration scheduler, see qcg_schedulers.py."""

    name: str
    params: dict[str, Any] = {}


class Amount(msgspec.Struct, forbid_unknown_fields=True):
    """``exact``, or ``min`` and ``max``, or ``scheduler`` with or without ``min``."""

    exact: Size | None = None
    min: Size | None = None
    max: Size | None = None
    scheduler: Scheduler | None = None


class Resources(msgspec.Struct, forbid_unknown_fields=True):
    """What a job asks for; ``wt`` is its wall time, ``nodeCrs`` are consumable resources of each node."""

    numCores: Size | Amount | None = None
    numNodes: Size | Amount | None = None
    wt: str | None = None
    nodeCrs: dict[str, Size] | None = None


class Execution(msgspec.Struct, forbid_unknown_fields=True):
    """What a job runs, and how."""

    exec: str | None = None
    args: list[Any] | None = None
    script: str | None = None
    env: dict[str, Any] | None = None
    wd: str | None = None
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    modules: str | list[str] | None = None
    venv: str | None = None
    model: str | None = None
    model_opts: dict[str, Any] | None = None


class Iteration(msgspec.Struct, forbid_unknown_fields=True):
    """The elements of a job: indices from ``start`` up to, and without, ``stop``; or values, or letters of a text."""

    start: Index | None = None
    stop: Index | None = None
    values: list[Any] | str | None = None


class Dependencies(msgspec.Struct, forbid_unknown_fields=True):
    """The jobs, or elements of jobs, that a job waits for."""

    after: list[str] | None = None


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """A job in QCG-PilotJob's standard form."""

    name: str
    execution: Execution
    resources: Resources | None = None
    iteration: Iteration | None = None
    dependencies: Dependencies | None = None
    attributes: dict[str, Any] | None = None


_BEGIN = re.compile(r"(?:\d+h)?(?:\d+m)?(?:\d+s)?")
KEYS = tuple(
    key
    for kind in (Job, Execution, Resources, Amount, Scheduler, Iteration, Dependencies)
    for key in kind.__struct_fields__
)


def read_requests(data: bytes, file: str) -> list[Any]:
    """The requests of a file, not checked yet; raises InvalidInput."""
    utf8(data, file)
    try:
        requests = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"))
    except msgspec.DecodeError:
        raise malformed_json(data, file) from None
    if not isinstance(requests, list):
        raise InvalidInput(f"{file}: this is no list of requests: it must begin with [")
    return requests


def check_submits(requests: Sequence[Any], file: str, total_cores: int, total_nodes: int) -> None:
    """Raise InvalidInput when all that would be submitted is refused for what it says, whatever the pilot.

    Then there is no need for one. When one submit may do, it is left to the pilot to answer each.
    """
    first: InvalidInput | None = None
    variables = request_variables(1, datetime.now(timezone.utc))
    for number, request in enumerate(requests):
        if not isinstance(request, dict) or request.get("request") != "submit":
            continue
        try:
            for place, job in enumerate(request.get("jobs") or ()):
                path = f"[{number}].jobs[{place}]"
                draft_of(job_of(job, file, path), file, path, variables, total_cores, total_nodes)
            return
        except InvalidInput as error:
            first = first or error
    if first is not None:
        raise first


def job_of(body: Any, file: str, path: str) -> Job:
    """A job that was decoded already, checked and typed; raises InvalidInput with its place."""
    refuse_nul(body, f"{file}: {path}" if path else file)
    try:
        return msgspec.convert(body, Job)
    except msgspec.ValidationError as error:
        raise wrong_field(error, file, path, KEYS) from None


def request_variables(count: int, now: datetime) -> dict[str, str]:
    """The variables that all jobs of submit number ``count`` share."""
    plain = now.replace(tzinfo=None)
    return {
        "rcnt": str(count),
        "uniq": str(uuid4()),
        "sname": "local",
        "date": str(plain.date()),
        "time": str(plain.time()),
        "dateTime": str(plain),
    }


def draft_of(
    job: Job,
    file: str,
    path: str,
    variables: Mapping[str, str],
    total_cores: int | None,
    total_nodes: int | None = None,
) -> JobDraft:
    """The draft of a job, with the variables of its request filled in; raises InvalidInput with its place."""
    where = f"{file}: {path}"
    name = fill(job.name, variables)
    if not name or any(character in "${}()'\"" or character.isspace() for character in name):
        raise InvalidInput(
            f"{where}.name: Job identifier '({name})' contains invalid characters or unknown variables: it must not "
            "be empty or have spaces or any of $ { } ( ) ' \""
        )
    if ":" in name:
        raise InvalidInput(f"{where}.name: {name!r} has a :, which stands between a job and its iteration")
    variables = {**variables, "jname": name}
    array, values = _elements(job.iteration, variables, f"{where}.iteration")
    resources = _resources(job)
    unrunnable = _unrunnable_reason(resources, job.iteration is not None)
    request, scheduled = (Request(), {}) if unrunnable else _request(resources, f"{where}.resources")
    requests = None
    if scheduled:
        count = len(values) if values is not None else len(array or ())
        totals = {"numCores": total_cores, "numNodes": total_nodes}
        requests = _scheduled_requests(request, scheduled, count, totals, f"{where}.resources")
    task = Task(
        name=name,
        request=request,
        array=array,
        values=values,
        time_request=None
        if resources.wt is None
        else _duration(fill(resources.wt, variables), f"{where}.resources.wt"),
        qcg=True,
        **_execution_fields(job.execution, variables, f"{where}.execution"),
    )
    validate(task, where)
    after = [fill(text, variables) for text in (job.dependencies or Dependencies()).after or ()]
    return JobDraft(name, path, task, after, requests, unrunnable)


def _elements(
    iteration: Iteration | None, variables: Mapping[str, str], where: str
) -> tuple[ArrayRange | None, list[str] | None]:
    if iteration is None:
        return None, None
    if iteration.values is not None:
        # As there: values count from 0, whatever start says.
        if iteration.stop is not None:
            raise InvalidInput(f"{where}: give start and stop, or values, not both")
        return None, [fill(_text(value), variables) for value in iteration.values]
    start = iteration.start or 0
    if iteration.stop is None or iteration.stop <= start:
        raise InvalidInput(f"{where}: stop must be given, and be above start ({start})")
    if iteration.stop - start > ARRAY_LIMIT:
        raise InvalidInput(f"{where}: an iteration may have at most {ARRAY_LIMIT:,} elements")
    return ArrayRange(start, iteration.stop - 1), None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _resources(job: Job) -> Resources:
    """What a job asks for, without the parts that QCG-PilotJob ignores.

    Nodes with 0 cores each are entire nodes, cores on 0 nodes are anywhere; a scheduler is for iterations.
    """
    found = job.resources or Resources(numCores=1)
    cores, nodes = found.numCores, found.numNodes
    if job.iteration is None and isinstance(cores, Amount) and cores.min is not None and cores.max is not None:
        cores = msgspec.structs.replace(cores, scheduler=None)
    if cores is not None and nodes is not None:
        cores, nodes = (cores if _least(cores) != 0 else None), (nodes if _least(nodes) != 0 else None)
        if cores is None and nodes is None:
            nodes = 0
    return msgspec.structs.replace(found, numCores=cores, numNodes=nodes)


def _least(amount: int | Amount) -> int | None:
    """The least number of an amount; None where a scheduler chooses it."""
    if isinstance(amount, int):
        return amount
    if amount.scheduler is not None:
        return None
    return amount.min if amount.exact is None else amount.exact


class ScheduledAmount(msgspec.Struct):
    """A number of cores or nodes that a scheduler chooses for each element."""

    scheduler: Scheduler
    min: int | None


def _request(resources: Resources, where: str) -> tuple[Request, dict[str, ScheduledAmount]]:
    """The request, and the amounts that schedulers choose for each element.

    One core cannot be spread over nodes: it is the same shape as everybody's single core.
    """
    if resources.numCores is None and resources.numNodes is None:
        raise InvalidInput(f"{where}: it asks for nothing: give numCores or numNodes")
    amounts = {"numCores": resources.numCores, "numNodes": resources.numNodes}
    scheduled: dict[str, ScheduledAmount] = {}
    for key, amount in amounts.items():
        if isinstance(amount, Amount) and amount.scheduler is not None:
            if amount.max is not None or amount.exact is not None:
                raise InvalidInput(f"{where}.{key}: a scheduler goes with min only, without max and exact")
            scheduled[key] = ScheduledAmount(amount.scheduler, amount.min)
            amounts[key] = 1
    nodes = _span(amounts["numNodes"], f"{where}.numNodes")
    counters = {name.lower(): number for name, number in (resources.nodeCrs or {}).items()}
    count = counters.pop("gpu", 0)
    if unknown := counters.keys() - {"mem"}:
        raise InvalidInput(f"{where}.nodeCrs: {', '.join(sorted(unknown))}: only gpu and mem can be asked for")
    cores = _span(amounts["numCores"], f"{where}.numCores")
    if nodes is None:
        return Request(cores=cores or (1, 1), spread=cores is not None and cores[1] > 1), scheduled
    use = tuple(counters.items())
    return Request(cores=cores or (1, 1), nodes=nodes, whole=cores is None, gpus=count, use=use), scheduled


def _scheduled_requests(
    request: Request, scheduled: Mapping[str, ScheduledAmount], count: int, totals: Mapping[str, int | None], where: str
) -> list[Request]:
    """The request of each of ``count`` elements."""
    if not count:
        raise InvalidInput(f"{where}.{next(iter(scheduled))}: it says no number: a scheduler is for iterations")
    plans = {
        key: plan(
            amount.scheduler.name, amount.scheduler.params, count, amount.min, totals[key], f"{where}.{key}.scheduler"
        )
        for key, amount in scheduled.items()
    }
    found = []
    for cores, nodes in zip(plans.get("numCores", repeat(0)), plans.get("numNodes", repeat(0)), strict=False):
        here = msgspec.structs.replace(request, nodes=(nodes, nodes)) if nodes else request
        if cores:
            here = msgspec.structs.replace(here, cores=(cores, cores), spread=here.nodes is None and cores > 1)
        found.append(here)
    return found


def _unrunnable_reason(resources: Resources, iterates: bool) -> str:
    """Why a job can run nowhere at all; QCG-PilotJob accepts such a one, and it fails while others run."""
    for what, amount in (("core", resources.numCores), ("node", resources.numNodes)):
        if amount is not None and _least(amount) == 0:
            return "Missing node and cores specification: a job cannot have 0 of them"
        if isinstance(amount, Amount) and amount.exact is None and amount.min is not None and amount.max is None:
            if amount.scheduler is None:
                return f"Both {what}'s range boundaries (min, max) must be defined"
            if not iterates:
                return "Both core's range boundaries (min, max) must be defined: a scheduler is for iterations"
    if resources.nodeCrs and resources.numNodes is None:
        return "Number of nodes is required when CR are used"
    return ""


def _span(amount: int | Amount | None, where: str) -> tuple[int, int] | None:
    if amount is None or isinstance(amount, int):
        return None if amount is None else (amount, amount)
    if amount.exact is not None and amount.min is None and amount.max is None:
        return amount.exact, amount.exact
    if amount.exact is not None:
        raise InvalidInput(f"{where}: give exact, or both min and max")
    if amount.min is None or amount.max is None:
        raise InvalidInput(f"{where}: it says no number: give exact, or both min and max")
    if amount.min > amount.max:
        raise InvalidInput(f"{where}: min is above max")
    return amount.min, amount.max


def _duration(text: str, where: str) -> float:
    try:
        seconds = parse_duration(text)
    except InvalidInput as error:
        # As there: what follows the duration is ignored.
        begin = _BEGIN.match(text)
        if begin is None or not begin[0]:
            raise InvalidInput(f"{where}: {error}") from None
        seconds = parse_duration(begin[0])
    if seconds <= 0:
        raise InvalidInput(f"{where}: {text!r} is no time at all")
    return seconds


def _execution_fields(execution: Execution, variables: Mapping[str, str], where: str) -> dict[str, Any]:
    """The fields of Task that say what runs, and in which environment."""
    program, text = execution.exec or None, execution.script or None
    if program is None and text is None:
        raise InvalidInput(f"{where}: exec or script is missing")
    if program is not None and text is not None:
        raise InvalidInput(f"{where}: give exec or script, not both")
    if text is not None and execution.args:
        raise InvalidInput(f"{where}: args go with exec, not with script")
    command, script = None, None
    setup = "".join(_setup(execution, variables))
    launch_at = 0
    model = fill(execution.model or "default", variables).lower()
    # Where a launcher starts ranks, it is appended to the line: what is set up is for the launcher, too.
    ranks, launcher = ([], "") if model in ONE_PROCESS_MODELS else (["pilotq"], '"$@" ')
    if text is not None and setup and ranks:
        text = fill(text, variables, script=True)
        command = ["bash", "-l", "-c", f"{setup}exec {launcher}", *ranks, "bash", "-l", "-c", escape_script(text)]
        launch_at = 5
    elif text is not None:
        script = setup + fill(text, variables, script=True)
    else:
        command = [fill(_text(word), variables) for word in [program, *(execution.args or ())]]
        if setup or execution.modules is not None or execution.venv is not None:
            # As there: bash reads the line, so the arguments are split and expanded, and may bring their quotes.
            line = " ".join(command)
            command = ["bash", "-l", "-c", f"{setup}exec {launcher}{line}", *ranks]
            launch_at = len(command) if ranks else 0
    opts = execution.model_opts or {}
    return {
        "command": command,
        "script": script,
        "launch_at": launch_at,
        "login_shell": script is not None,
        "env": {fill(name, variables): fill(_text(value), variables) for name, value in (execution.env or {}).items()},
        "cwd": _filled(execution.wd, variables),
        "stdin": _filled(execution.stdin, variables),
        "stdout": _filled(execution.stdout, variables),
        "stderr": _filled(execution.stderr, variables),
        "model": model,
        "model_opts": {name: fill(_option(opt), variables) for name, opt in opts.items()},
    }


def _option(value: Any) -> str:
    return shlex.join(map(_text, value)) if isinstance(value, list) else _text(value)


def _setup(execution: Execution, variables: Mapping[str, str]) -> Iterator[str]:
    """What bash does first. Unlike there a module or environment that cannot be loaded ends the task."""
    if execution.modules:
        modules = [execution.modules] if isinstance(execution.modules, str) else execution.modules
        yield f"source /etc/profile; module load {fill(' '.join(modules), variables)} || exit; "
    if execution.venv:
        yield f"source {fill(execution.venv, variables)}/bin/activate || exit; "


def _filled(text: str | None, variables: Mapping[str, str]) -> str | None:
    return fill(text, variables) if text else None
