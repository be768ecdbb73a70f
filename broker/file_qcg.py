"""Request files of QCG-PilotJob: a JSON list of requests; what each job means as a Task.

``submit`` becomes tasks, other requests are kept as they stand. An iteration job is one array, and has one Task per
element only where elements differ: under a scheduler, or where ``after`` names single elements of a job that has
other indices. Names, ``after``, and all texts have their request-time words filled in here, the others at launch.

Deliberately different from QCG-PilotJob: a request that it would refuse, accept and never run, or fail at launch
refuses the file; ``env`` may go with ``script``; ``${date}`` is the date and ``${time}`` the time.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar
from uuid import uuid4

import msgspec

from pilotq.broker.batch import Batch, FileRequest
from pilotq.broker.errors import InvalidInput
from pilotq.broker.file_errors import malformed_json, refuse_nul, utf8, wrong_field
from pilotq.broker.qcg_jobs import Draft, tasks_of
from pilotq.broker.qcg_schedulers import plan
from pilotq.broker.qcg_words import fill
from pilotq.broker.quantities import parse_duration
from pilotq.broker.task import ARRAY_LIMIT, ArrayRange, Request, Task, validate

Size = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Index = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
T = TypeVar("T")


class Scheduler(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    params: dict[str, Any] = {}


class Amount(msgspec.Struct, forbid_unknown_fields=True):
    """``exact``, or ``min`` and ``max``, or ``scheduler`` with or without ``min``."""

    exact: Size | None = None
    min: Size | None = None
    max: Size | None = None
    scheduler: Scheduler | None = None


class Resources(msgspec.Struct, forbid_unknown_fields=True):
    numCores: Size | Amount | None = None
    numNodes: Size | Amount | None = None
    wt: str | None = None
    nodeCrs: dict[str, Size] = {}


class Execution(msgspec.Struct, forbid_unknown_fields=True):
    exec: str | None = None
    args: list[Any] = []
    script: str | None = None
    env: dict[str, Any] = {}
    wd: str | None = None
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    modules: str | list[str] | None = None
    venv: str | None = None
    model: str | None = None
    model_opts: dict[str, str | list[str]] | None = None


class Iteration(msgspec.Struct, forbid_unknown_fields=True):
    start: Index | None = None
    stop: Index | None = None
    values: list[Any] | None = None


class Dependencies(msgspec.Struct, forbid_unknown_fields=True):
    after: list[str] = []


class Job(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    execution: Execution
    resources: Resources | None = None
    iteration: Iteration | None = None
    dependencies: Dependencies | None = None
    attributes: dict[str, Any] | None = None


KEYS = tuple(
    key
    for kind in (Job, Execution, Resources, Amount, Scheduler, Iteration, Dependencies)
    for key in kind.__struct_fields__
)


def read_qcg(
    data: bytes, file: str, *, base: Task, total_cores: int | None = None, now: datetime | None = None
) -> Batch:
    """The tasks and requests of a file. ``base`` holds what QCG-PilotJob has no key for (priority, retries...)."""
    utf8(data, file)
    data = data.removeprefix(b"\xef\xbb\xbf")
    now = now or datetime.now(timezone.utc)
    bodies = _decode(data, list[dict[str, msgspec.Raw]], file, "", data)
    if b"\\u0000" in data:  # rare, and dear to look for
        refuse_nul(_decode(data, Any, file, "", data), file)
    requests: list[FileRequest] = []
    drafts: list[Draft] = []
    submits = 0
    for number, raw in enumerate(bodies):
        where = f"[{number}]"
        name = _decode(raw.pop("request", msgspec.Raw(b'""')), str, file, f"{where}.request", data)
        if not name:
            raise InvalidInput(f"{file}: {where}: the key request is missing")
        if name != "submit":
            body = {key: _decode(value, Any, file, f"{where}.{key}", data) for key, value in raw.items()}
            requests.append(FileRequest(name, body))
            continue
        if set(raw) != {"jobs"}:
            raise InvalidInput(f"{file}: {where}: a submit has the keys request and jobs, and no other")
        jobs = _decode(raw["jobs"], list[Job], file, f"{where}.jobs", data)
        submits += 1
        words = request_words(submits, now)
        found = [
            draft_of(job, file, f"{where}.jobs[{place}]", words, base, total_cores) for place, job in enumerate(jobs)
        ]
        drafts += found
        requests.append(FileRequest(name, jobs=[draft.name for draft in found]))
    tasks, omitted = tasks_of(drafts, file)
    return Batch(tasks, requests, omitted)


def _decode(raw: msgspec.Raw | bytes, kind: type[T] | Any, file: str, prefix: str, data: bytes) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise wrong_field(error, file, prefix, KEYS) from None
    except msgspec.DecodeError:
        raise malformed_json(data, file) from None


def job_of(body: Any, file: str, path: str) -> Job:
    """A job that was decoded already, checked and typed; raises InvalidInput with its place."""
    refuse_nul(body, f"{file}: {path}" if path else file)
    try:
        return msgspec.convert(body, Job)
    except msgspec.ValidationError as error:
        raise wrong_field(error, file, path, KEYS) from None


def request_words(count: int, now: datetime) -> dict[str, str]:
    """The words that all jobs of submit number ``count`` share."""
    plain = now.replace(tzinfo=None)
    return {
        "rcnt": str(count),
        "uniq": str(uuid4()),
        "sname": "local",
        "date": str(plain.date()),
        "time": str(plain.time()),
        "dateTime": str(plain),
    }


def draft_of(job: Job, file: str, path: str, words: Mapping[str, str], base: Task, total_cores: int | None) -> Draft:
    """What a job means, with the words of its request filled in; raises InvalidInput with its place."""
    where = f"{file}: {path}"
    name = fill(job.name, words)
    if not name or any(character in "${}()'\":" or character.isspace() for character in name):
        raise InvalidInput(f"{where}.name: {name!r} must not be empty or have spaces or any of $ {{ }} ( ) ' \" :")
    words = {**words, "jname": name}
    array, values = _elements(job.iteration, f"{where}.iteration")
    resources = job.resources or Resources()
    request, wish = _request(resources, f"{where}.resources")
    cores = None
    if wish is not None:
        if job.iteration is None:
            raise InvalidInput(f"{where}.resources.numCores.scheduler: a scheduler is for jobs with an iteration")
        count = len(values) if values is not None else len(array or ())
        place = f"{where}.resources.numCores.scheduler"
        cores = plan(wish.scheduler.name, wish.scheduler.params, count, wish.min, total_cores, place)
    task = msgspec.structs.replace(
        base,
        name=name,
        request=request,
        array=array,
        values=values,
        time_request=_duration(resources.wt, f"{where}.resources.wt") if resources.wt else base.time_request,
        qcg=True,
        **_run(job.execution, words, base, f"{where}.execution"),
    )
    validate(task, where)
    after = [fill(text, words) for text in (job.dependencies or Dependencies()).after]
    return Draft(name, path, task, after, cores)


def _elements(iteration: Iteration | None, where: str) -> tuple[ArrayRange | None, list[str] | None]:
    if iteration is None:
        return None, None
    start = iteration.start or 0
    if iteration.values is not None:
        if iteration.start is not None or iteration.stop is not None:
            raise InvalidInput(f"{where}: give start and stop, or values, not both")
        return None, [_text(value) for value in iteration.values]
    if iteration.stop is None or iteration.stop <= start:
        raise InvalidInput(f"{where}: stop must be given, and be above start ({start})")
    if iteration.stop - start > ARRAY_LIMIT:
        raise InvalidInput(f"{where}: an iteration may have at most {ARRAY_LIMIT:,} elements")
    return ArrayRange(start, iteration.stop - 1), None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


class Wish(msgspec.Struct):
    scheduler: Scheduler
    min: int | None


def _request(resources: Resources, where: str) -> tuple[Request, Wish | None]:
    """The request, and the wish for a scheduler to say how many cores each element has.

    One core cannot be spread over nodes: it is the same shape as everybody's single core.
    """
    nodes = _span(resources.numNodes, f"{where}.numNodes")
    counters = dict(resources.nodeCrs)
    count = counters.pop("gpu", 0)
    if unknown := counters.keys() - {"mem"}:
        raise InvalidInput(f"{where}.nodeCrs: {', '.join(sorted(unknown))}: only gpu and mem can be asked for")
    if resources.nodeCrs and nodes is None:
        raise InvalidInput(f"{where}.nodeCrs: they are per node, so numNodes must be given")
    amount = resources.numCores
    if isinstance(amount, Amount) and amount.scheduler is not None:
        if nodes is not None or amount.max is not None or amount.exact is not None:
            raise InvalidInput(f"{where}.numCores: a scheduler goes with min only, without max, exact and numNodes")
        return Request(spread=True), Wish(amount.scheduler, amount.min)
    cores = _span(amount, f"{where}.numCores")
    if nodes is None:
        return Request(cores=cores or (1, 1), spread=cores is not None and cores[1] > 1), None
    use = tuple(counters.items())
    return Request(cores=cores or (1, 1), nodes=nodes, whole=cores is None, gpus=count, use=use), None


def _span(amount: int | Amount | None, where: str) -> tuple[int, int] | None:
    if amount is None or isinstance(amount, int):
        return None if amount is None else (amount, amount)
    if amount.scheduler is not None:
        raise InvalidInput(f"{where}.scheduler: a scheduler is for numCores")
    if amount.exact is not None and amount.min is None and amount.max is None:
        return amount.exact, amount.exact
    if amount.exact is None and amount.min is not None and amount.max is not None and amount.min <= amount.max:
        return amount.min, amount.max
    raise InvalidInput(f"{where}: give exact, or both min and max, with min not above max")


def _duration(text: str, where: str) -> float:
    try:
        return parse_duration(text)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _run(execution: Execution, words: Mapping[str, str], base: Task, where: str) -> dict[str, Any]:
    """The fields of Task that say what runs, and in which surroundings."""
    if (execution.exec is None) == (execution.script is None):
        raise InvalidInput(f"{where}: give exactly one of exec and script")
    if execution.script is not None and execution.args:
        raise InvalidInput(f"{where}: args go with exec, not with script")
    command, script = None, None
    setup = "".join(_setup(execution, words))
    if execution.script is not None:
        script = setup + fill(execution.script, words, script=True)
    else:
        command = [fill(_text(word), words) for word in [execution.exec, *execution.args]]
        if setup or execution.modules is not None or execution.venv is not None:
            # As there: bash reads the line, so the arguments are expanded; only their spaces are kept.
            line = " ".join([command[0], *(word.replace(" ", "\\ ") for word in command[1:])])
            command = ["bash", "-l", "-c", f"{setup}exec {line}"]
    opts = execution.model_opts or {}
    return {
        "command": command,
        "script": script,
        "login_shell": script is not None,
        "env": base.env | {name: fill(_text(value), words) for name, value in execution.env.items()},
        "cwd": _filled(execution.wd, words) or base.cwd,
        "stdin": _filled(execution.stdin, words) or base.stdin,
        "stdout": _filled(execution.stdout, words) or base.stdout,
        "stderr": _filled(execution.stderr, words) or base.stderr,
        "model": (execution.model or base.model).lower(),
        "model_opts": {name: opt if isinstance(opt, str) else shlex.join(opt) for name, opt in opts.items()},
    }


def _setup(execution: Execution, words: Mapping[str, str]) -> Iterator[str]:
    """What bash does first. Unlike there a module or environment that cannot be had ends the task."""
    if execution.modules:
        modules = [execution.modules] if isinstance(execution.modules, str) else execution.modules
        yield f"source /etc/profile; module load {fill(' '.join(modules), words)} || exit; "
    if execution.venv:
        yield f"source {fill(execution.venv, words)}/bin/activate || exit; "


def _filled(text: str | None, words: Mapping[str, str]) -> str | None:
    return None if text is None else fill(text, words)
