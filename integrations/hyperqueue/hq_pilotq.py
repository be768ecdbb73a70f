"""The command `hq` on a pilot: as much of HyperQueue's command line as Nextflow and aiida-hyperqueue use.

A job's number is the place of its task in the pilot's order of submission: task `1f` is job 47. Outputs are those of
HyperQueue's modes: `cli` for people, `quiet` and `json` for programs.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

import pilotq
from pilotq.broker import Broker, Request, Task
from pilotq.broker.client.views import TaskView
from pilotq.broker.errors import InvalidInput, PilotqError, UnknownTask
from pilotq.broker.taskfiles import hq_directives
from pilotq.broker.taskfiles.directive_options import Option, Requested
from pilotq.broker.taskfiles.directives import read_directives
from pilotq.broker.tasks.array_outcomes import count_indices
from pilotq.broker.tasks.model import id_of, order_of
from pilotq.broker.tasks.submit_context import capture_context

JOBS_MAX = 100_000  # in a list
MODES = ("cli", "quiet", "json")
STATES = ("running", "finished", "failed", "canceled", "waiting")  # of tasks, in the order of HyperQueue's JSON
# The state of a job is the first of these in which it has a task.
ORDER = ("running", "waiting", "canceled", "failed", "finished")
OF_STATUS = {
    "queued": "waiting", "deferred": "waiting", "scheduled": "waiting", "started": "running", "finished": "finished",
    "failed": "failed", "stopped": "canceled", "canceled": "canceled",
}  # fmt: skip
GLOBAL = ("output-mode", "server-dir", "colors")  # options that may stand anywhere; the last two have no meaning here
REFUSED = ("stdin", "job", "task-dir", "cpus", "resource")  # what cannot be obeyed of these is not left out
SCRIPT_HEAD = 4096  # bytes of a file in which its first line is looked for
USAGE = """\
hq: on a pilot of pilotq. Known are:
  hq submit [OPTIONS] [--] COMMAND...   hq submit --directives=file SCRIPT
  hq job list [--all | --filter STATES]   hq job info|cancel|wait JOBS
  hq server start|stop|info   hq worker start|list   hq --version
JOBS is 1,3-5, all or last. Options of submit are those of `#HQ` lines; --output-mode is cli, quiet or json."""


class Job(NamedTuple):
    """One job as HyperQueue shows it: ``tasks`` are numbers by state."""

    number: int
    name: str
    tasks: dict[str, int]

    @property
    def state(self) -> str:
        return next((state for state in ORDER if self.tasks[state]), "waiting")

    def shown(self) -> dict[str, Any]:
        """What stands in HyperQueue's JSON."""
        stats = {state: self.tasks[state] for state in STATES}
        return {"id": self.number, "name": self.name, "task_count": sum(stats.values()), "task_stats": stats}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, and exit as HyperQueue does: with 1 after an error, which it tells."""
    mode, words = "cli", list(sys.argv[1:] if arguments is None else arguments)
    try:
        mode, words = _global_options(words)
        sys.exit(_run(words, mode))
    except PilotqError as error:
        if mode == "json":
            _print_json({"error": str(error)})
        print(f"hq: {error}", file=sys.stderr)
        sys.exit(1)


def _global_options(words: list[str]) -> tuple[str, list[str]]:
    """The output mode, and the words without such options; none is looked for behind `--` or a command to submit."""
    mode, rest = os.environ.get("HQ_OUTPUT_MODE", "cli"), list[str]()
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--" or (rest[:1] == ["submit"] and not word.startswith("-") and not _is_value(rest)):
            rest += [word, *words]
            break
        if not word.startswith("--") or name not in GLOBAL:
            rest.append(word)
            continue
        value = value if equals else words.pop(0) if words else ""
        mode = value if name == "output-mode" else mode
    if mode not in MODES:
        raise InvalidInput(f"--output-mode {mode}: give one of {', '.join(MODES)}")
    return mode, rest


def _is_value(words: list[str]) -> bool:
    """Whether the word behind these is the value of the last of them."""
    last = words[-1]
    return last.startswith("--") and "=" not in last and last[2:] in hq_directives.SYNTAX.values


def _run(words: list[str], mode: str) -> int:
    verb = " ".join(words[:1] if words[:1] == ["submit"] else words[:2])
    rest = words[len(verb.split()) :]
    commands: dict[str, Callable[[list[str], str], int]] = {
        "submit": submit, "job list": job_list, "job info": job_info, "job cancel": job_cancel, "job wait": job_wait,
        "server info": server_info,
    }  # fmt: skip
    if verb in commands:
        return commands[verb](rest, mode)
    if verb == "--version":
        print(f"hq on pilotq {pilotq.__version__}")
        return 0
    if verb in ("server start", "server stop", "worker start", "worker stop", "worker list"):
        print(f"hq: `{verb}` does nothing: `pilotq start` and `pilotq stop` begin and end a pilot", file=sys.stderr)
        return 0
    asked = verb in ("", "--help", "help", "-h")
    print(USAGE if asked else f"hq: `{verb}` is not known here\n{USAGE}", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


# -- submit -----------------------------------------------------------------------------------------------------------


def submit(words: list[str], mode: str) -> int:
    """Submit one job, and print its number."""
    options, command = _split(words)
    task = _task_of(options, command, mode)
    with Broker.connect() as broker:
        number = order_of(broker.enqueue_many([task], context=capture_context())[0])
        if mode == "quiet":
            print(number)
        elif mode == "json":
            _print_json({"id": number})
        else:
            print(f"Job submitted successfully, job ID: {number}")
        if "wait" not in options and "progress" not in options:
            return 0
        sys.stdout.flush()
        return 0 if broker.wait([id_of(number)]).finished else 1


def _split(words: list[str]) -> tuple[dict[str, Option], list[str]]:
    """The options of submit, and the command behind them. Of one option the last counts, but --env and --resource."""
    syntax, options = hq_directives.SYNTAX, {}
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        if name in syntax.values and not equals:
            if not rest:
                raise InvalidInput(f"submit: {word} has no value")
            value = rest.pop(0)
        elif name not in syntax.values and name not in syntax.flags:
            raise InvalidInput(f"submit: there is no option {word} here")
        repeated = name in hq_directives.REPEATED
        options[f"{name} {value}" if repeated else name] = Option(name, value, word, 0)
    return options, rest[1:] if rest[:1] == ["--"] else rest


def _task_of(options: dict[str, Option], command: list[str], mode: str) -> Task:
    """The task that the options describe; those of a script's `#HQ` lines are weaker."""
    if not command:
        raise InvalidInput("submit: give a command, or a script with `#HQ` lines")
    if "from-json" in options:
        raise InvalidInput("submit: --from-json is not known here: give --each-line or --array")
    lines = options.pop("each-line", None)
    directives = options.pop("directives", None)
    wanted = "auto" if directives is None else directives.value
    script = _script(command[0], wanted)
    asked = Requested("submit")
    try:
        hq_directives.read(options, asked)
    except InvalidInput as error:
        raise InvalidInput(str(error).removeprefix("line 0: ")) from None
    _say_what_is_ignored(asked.ignored, mode)
    found = None if script is None or wanted == "off" else read_directives(script, command[0])
    request = Request() if found is None else found.request(Request())
    if asked.request:
        request = msgspec.structs.replace(request, **{"whole": False, **asked.request})
    task = Task(
        command=command if script is None else [*_interpreter(script), os.path.abspath(command[0]), *command[1:]],
        request=request,
        values=None if lines is None else _lines(lines.value),
        **asked.fields,
    )
    given = set(asked.fields) | set(asked.request) | ({"values"} if lines is not None else set())
    if found is not None:
        found.complete(task, given)  # its sentences are for people, and programs would take them for errors
    task.env = {**task.env, **hq_directives.variables(task, asked)}
    task.env["HQ_SUBMIT_DIR"] = os.getcwd()
    task.name = task.name or os.path.basename(command[0])
    return task


def _say_what_is_ignored(ignored: Iterable[Option], mode: str) -> None:
    """Raises InvalidInput for options without which the job would be another one; names the others to a person."""
    left = [option for option in ignored if option.name not in (*GLOBAL, "wait", "progress")]
    texts = {option: option.text if "=" in option.text else f"{option.text} {option.value}".strip() for option in left}
    for option in left:
        if option.name in REFUSED:
            hint = "give a number" if option.name in ("cpus", "resource") else "leave it out"
            raise InvalidInput(f"submit: {texts[option]}: a pilot does not have this: {hint}")
    if texts and mode == "cli":
        print(f"hq: not obeyed, it has no meaning here: {' '.join(texts.values())}", file=sys.stderr)


def _script(path: str, wanted: str) -> str | None:
    """The text of a script that is to be run as its first line says; None for a program."""
    if wanted not in ("auto", "file", "off"):
        raise InvalidInput(f"submit: --directives={wanted}: give auto, file or off")
    try:
        with open(path, "rb") as file:
            head = file.read(SCRIPT_HEAD)
            if wanted != "file" and not path.endswith(".sh") and not (head.startswith(b"#!") and "/" in path):
                return None
            return os.fsdecode(head + file.read())
    except OSError as error:
        if wanted == "file":
            raise InvalidInput(f"submit: {path}: {error.strerror}") from None
        return None  # a program that is looked for when the job runs


def _interpreter(script: str) -> list[str]:
    first = script.partition("\n")[0]
    return shlex.split(first[2:]) if first.startswith("#!") else ["bash"]


def _lines(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).splitlines()
    except OSError as error:
        raise InvalidInput(f"submit: --each-line {path}: {error.strerror}") from None


# -- jobs -------------------------------------------------------------------------------------------------------------


def job_list(words: list[str], mode: str) -> int:
    """List jobs: those that wait or run, all with --all, or those in the states of --filter."""
    wanted = {"waiting", "running"}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--filter":
            wanted = set((value if equals else rest.pop(0) if rest else "").split(","))
        elif name == "--all":
            wanted = set(STATES)
        elif name not in ("--verbose",):
            raise InvalidInput(f"job list: there is no option {word} here")
    if odd := wanted - set(STATES):
        raise InvalidInput(f"job list: there is no state {', '.join(sorted(odd))}: give {', '.join(STATES)}")
    with Broker.connect() as broker:
        views = list(broker.tasks(limit=JOBS_MAX))
        jobs = [job for job in _jobs(broker, views) if job.state in wanted]
    if len(views) == JOBS_MAX and mode != "quiet":  # Nextflow reads stderr as part of the list
        print(f"hq: only the jobs of the last {JOBS_MAX:,} tasks are in this list", file=sys.stderr)
    if mode == "json":
        _print_json([job.shown() for job in jobs])
    elif mode == "quiet":
        for job in jobs:
            print(job.number, job.state.upper())
    else:
        for job in jobs:
            print(f"{job.number:>6}  {job.state.upper():<8}  {sum(job.tasks.values()):>6}  {job.name}")
    return 0


def job_info(words: list[str], mode: str) -> int:
    """Tell what is known of jobs."""
    with Broker.connect() as broker:
        ids = _selected(broker, words)
        with _numbers_in_errors(broker, ids):
            views = [broker.task(task_id) for task_id in ids]
        jobs = _jobs(broker, views)
        for view in views:
            view.times = {name: at for name, at in view.times.items() if at is not None}
    found: list[dict[str, Any]] = [
        {"info": job.shown(), "started_at": view.times.get("queued"), "finished_at": view.times.get("ended"),
         "exit_code": view.exit_code, "reason": view.reason, "cores": view.cores, "command": view.command}
        for job, view in zip(jobs, sorted(views, key=lambda view: order_of(view.id)), strict=True)
    ]  # fmt: skip
    if mode == "json":
        _print_json(found)
    elif mode == "cli":
        for job, one in zip(jobs, found, strict=True):
            one["info"] = f"job {job.number} ({job.name}) {job.state}; tasks: {_in_words(job.tasks)}"
            one |= {name: _as_date(one[name]) for name in ("started_at", "finished_at")}
            print("\n".join(f"{name:<12} {value}" for name, value in one.items() if value not in (None, "")))
    return 0


def _in_words(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in numbers.items() if number)


def _as_date(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def job_cancel(words: list[str], mode: str) -> int:
    """Cancel jobs."""
    with Broker.connect() as broker:
        answers = broker.cancel(broker.open_ids() if words == ["all"] else _selected(broker, words))
    for task_id, answer in answers.items():
        if mode == "cli":
            print(f"Job {order_of(task_id)}: {answer}")
        if answer == "unknown":
            print(f"hq: there is no job {order_of(task_id)}", file=sys.stderr)
    return 1 if answers and set(answers.values()) == {"unknown"} else 0


def job_wait(words: list[str], mode: str) -> int:
    """Wait until jobs have ended; 1 when one did not finish."""
    with Broker.connect() as broker:
        ids = None if words == ["all"] else _selected(broker, words)
        with _numbers_in_errors(broker, ids or []):
            counts = broker.wait(ids)
    if mode == "cli" and counts.finished < counts.total:
        ends = {"finished": counts.finished, "failed": counts.failed, "canceled": counts.canceled}
        print(f"hq: not all tasks have finished: {_in_words(ends)}", file=sys.stderr)
    if mode == "json":
        _print_json({"finished": counts.finished, "failed": counts.failed, "canceled": counts.canceled, "invalid": 0})
    return 0 if counts.finished == counts.total else 1


def server_info(words: list[str], mode: str) -> int:  # noqa: ARG001
    """Where the pilot is."""
    with Broker.connect() as broker:
        directory = broker.pilot.directory if broker.pilot is not None else ""
    if mode == "json":
        _print_json({"server_dir": directory})
    else:
        print(directory)
    return 0


def _selected(broker: Broker, words: list[str]) -> list[str]:
    """The tasks of the jobs that a selector names; raises UnknownTask for something else."""
    if len(words) != 1:
        raise InvalidInput("name the jobs: 1,3-5, all or last")
    [selector] = words
    if selector in ("all", "last"):
        ids = {view.array or view.id for view in broker.tasks(limit=JOBS_MAX)}
        ordered = sorted(ids, key=order_of)
        return ordered[-1:] if selector == "last" else ordered
    numbers: list[int] = []
    for part in selector.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UnknownTask(f"{part!r} is no number of a job: give 1,3-5, all or last")
        numbers += range(int(first), int(last or first) + 1)
    return [id_of(number) for number in dict.fromkeys(numbers)]


@contextmanager
def _numbers_in_errors(broker: Broker, ids: list[str]) -> Iterator[None]:
    """An UnknownTask names the jobs, and not the tasks."""
    try:
        yield
    except UnknownTask:
        gone = [str(order_of(task_id)) for task_id, status in broker.statuses(ids).items() if status == "unknown"]
        raise UnknownTask(f"there is no job {', '.join(gone)}: `hq job list --all` shows those there are") from None


def _jobs(broker: Broker, views: Iterable[TaskView]) -> list[Job]:
    """The jobs of these tasks, oldest first; an element stands for its array."""
    found: dict[str, Job] = {}
    for view in views:
        task_id = view.array or view.id
        if task_id in found:
            continue
        tasks = dict.fromkeys(STATES, 0)
        whole = broker.task(task_id) if view.array or view.array_size else view
        if whole.elements:
            for status, indices in whole.elements.items():
                tasks[OF_STATUS.get(status, "waiting")] += count_indices(indices)
        else:
            tasks[OF_STATUS.get(whole.status, "waiting")] = max(whole.array_size, 1)
        found[task_id] = Job(order_of(task_id), whole.name, tasks)
    return sorted(found.values())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
