"""Options that several commands share, and the task that the options of a task describe."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TextIO, TypeVar

import click
import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.connection import parse_url
from pilotq.broker.taskfiles.batch import Batch
from pilotq.broker.taskfiles.directives import read_directives
from pilotq.broker.taskfiles.reader import FORMATS, read_tasks
from pilotq.broker.tasks.dependencies import FIELDS
from pilotq.broker.tasks.failure_limit import failures_allowed
from pilotq.broker.tasks.model import MODELS, ArrayRange, Request, Task
from pilotq.broker.tasks.quantities import parse_duration, parse_size, request_of
from pilotq.broker.tasks.submit_context import POLICIES

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
NOTES_MAX = 20  # sentences about directives that are printed for one file


def parsed(parse: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, str | None], T | None]:
    """A click callback that reads a value with one of the broker's parsers; what that refuses is a usage error."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> T | None:
        try:
            return None if value is None else parse(value)
        except InvalidInput as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


def failure_limit(text: str) -> str:
    """The value of --stop-on-failures; raises InvalidInput."""
    if text:
        failures_allowed(text, 1)
    return text


def all_of(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator that adds these options, in this order: `all_of(dir_option, json_option)`."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


dir_option = click.option("--dir", "directory", metavar="DIR", help="Pilot  [default: $PILOTQ_DIR or .pilotq/current]")
learn_option = click.option("--learn", is_flag=True, help="Ask for what tasks of its name have used before.")
counter_option = click.option(
    "--counter", "counters", multiple=True, metavar="NAME=N",
    help="Each node has N units for --use NAME.",
)  # fmt: skip
pool_option = click.option(
    "--pool", "pools", multiple=True, metavar="NAME=N",
    help="All nodes together: N units for --use NAME.",
)  # fmt: skip
stop_on_failures_option = click.option(
    "--stop-on-failures", metavar="N|P%", default="", callback=parsed(failure_limit),
    help="When more have failed cancel what waits.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

task_options = all_of(
    click.option("--script", metavar="FILE", help="Run FILE (- is stdin) as its #! says; not CMD."),
    click.option("--no-directives", is_flag=True, help="Pass over #SBATCH and #HQ in the script."),
    click.option("--name", help="A name to find it by."),
    click.option("--cores", metavar="N|MIN-MAX", help="Cores, all on one node.  [default: 1]"),
    click.option("--gpus", metavar="N|KIND:N", help="GPUs: 2, a share 0.25, or of a kind a100:2."),
    click.option("--memory", metavar="SIZE", help="Memory: 500M, 2G; below 1 MiB with a unit."),
    click.option("--spread/--pack", "spread", default=None, help="On all NUMA nodes, or few.  [default: few]"),
    click.option("--use", multiple=True, metavar="NAME=N", help="Units of a counter or pool; may be repeated."),
    click.option("--array", callback=parsed(ArrayRange.parse), metavar="A-B[:STEP],...[%N]",
                 help="A task for each {index}; at most N at a time."),
    click.option("--each-line", "--values", "each_line", metavar="FILE",
                 help="A task for each line: {value}, or $PILOTQ_VALUE."),
    click.option("--priority", type=int, default=0, metavar="P", help="Higher goes first."),
    click.option("--nice", is_flag=True, help="Fill idle cores, and give way to all others."),
    click.option("--time-limit", metavar="TIME", callback=parsed(parse_duration),
                 help="End it after 90s, 10m, 1:30:00, 2-00:00:00."),
    click.option("--time-request", metavar="TIME", callback=parsed(parse_duration),
                 help="It takes at most this long: helps to fill gaps."),
    click.option("--retries", type=int, default=0, metavar="N", help="How often to try again after a failure."),
    click.option("--backoff", metavar="TIME", callback=parsed(parse_duration),
                 help="Pause before the first retry; doubles each time."),
    click.option("--retry-on", metavar="LIST", default="",
                 help="Only after 75,100-110,signal,limit,memory."),
    click.option("--memory-grow", type=float, default=0.0, metavar="FACTOR",
                 help="Too little: ask for more, up to --memory-max."),
    click.option("--memory-max", callback=parsed(parse_size), metavar="SIZE", hidden=True),
    click.option("--time-grow", type=float, default=0.0, metavar="FACTOR",
                 help="Too short: ask for more, up to --time-max."),
    click.option("--time-max", callback=parsed(parse_duration), metavar="TIME", hidden=True),
    click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable; may be repeated."),
    click.option("--env-policy", type=click.Choice(POLICIES), default="submit", metavar="WHOSE",
                 help="submit (yours), worker (its own), or clean."),
    click.option("--cwd", metavar="DIR", help="Where it runs.  [default: here]"),
    click.option("--stdin", metavar="FILE", help="[default: /dev/null]"),
    click.option("--stdout", metavar="FILE", help="[default: captured, for `pilotq logs`]"),
    click.option("--stderr", metavar="FILE", help="[default: captured]"),
    click.option("--model", type=click.Choice(sorted(MODELS)), default="default", metavar="MODEL",
                 help="openmpi, intelmpi, mpich, srunmpi, or threads."),
    click.option("--model-opt", "model_opts", multiple=True, metavar="NAME=VALUE",
                 help="Of the model: mpirun_args=...; may be repeated."),
    click.option("--queue", default="default", metavar="QUEUE", help="The queue it waits in."),
)  # fmt: skip

# These describe a task, and have no meaning beside a file of tasks.
TASK_OPTIONS = frozenset(
    parameter.name for parameter in click.command("task")(task_options(lambda **_: None)).params
) - {
    "env_policy",
    "help",
}

file_options = all_of(
    click.option("--format", type=click.Choice(FORMATS), help="What FILE is.  [default: recognised]"),
    click.option("--shell", is_flag=True, help="Run each plain line by a shell (for pipes)."),
    click.option(
        "--replies",
        metavar="FILE",
        help="Write QCG-PilotJob's replies (- is stdout).",
    ),
)


def task_of(command: Sequence[str], options: dict[str, Any]) -> Task:
    """The task that a command and the values of `task_options` describe; raises InvalidInput."""
    if bool(command) == (options["script"] is not None):
        raise InvalidInput("give a command after `--`, or --script FILE" + (", not both" if command else ""))
    script, directives = None, None
    if options["script"] is not None:
        script = read_text(options["script"])
        where = "standard input" if options["script"] == "-" else options["script"]
        directives = None if options["no_directives"] else read_directives(script, where)
    values = None if options["each_line"] is None else _values(options["each_line"])
    use = dict(_counted("use", word) for word in options["use"]) or None
    try:
        request = request_of(
            Request() if directives is None else directives.request(Request()),
            cores=options["cores"],
            nodes=options.get("task_nodes"),
            gpus=options["gpus"],
            numa={True: "spread", False: "pack"}.get(options["spread"]),
            memory=options["memory"],
            use=use,
        )
    except InvalidInput as error:
        raise InvalidInput(f"--{error}") from None  # its text begins with the name of the option
    task = Task(
        command=list(command) or None,
        script=script,
        name=options["name"],
        request=request,
        array=options["array"],
        values=values,
        after=list(options.get("after", ())),
        after_any=list(options.get("after_any", ())),
        after_notok=list(options.get("after_notok", ())),
        join=options.get("join", False),
        priority=options["priority"],
        nice=options["nice"],
        time_limit=options["time_limit"],
        time_request=options["time_request"],
        retries=options["retries"],
        backoff=options["backoff"] or 0.0,
        retry_on=options["retry_on"],
        memory_grow=options["memory_grow"],
        memory_max=options["memory_max"] or 0,
        time_grow=options["time_grow"],
        time_max=options["time_max"] or 0.0,
        stop_on_failures=options.get("stop_on_failures") or "",
        env=dict(_variable(word) for word in options["env"]),
        cwd=options["cwd"],
        stdin=options["stdin"],
        stdout=options["stdout"],
        stderr=options["stderr"],
        model=options["model"],
        model_opts=dict(_model_opt(word) for word in options["model_opts"]),
        queue=options["queue"],
    )
    if directives is not None:
        _say(directives.complete(task, _given(options)))
    return task


def _given(options: Mapping[str, Any]) -> set[str]:
    """What of a task the command line says itself."""
    source = click.get_current_context().get_parameter_source
    # Not `nodes`: those of `pilotq run` are the pilot's.
    of_tasks = TASK_OPTIONS | {"task_nodes", "stop_on_failures", "join", *FIELDS}
    names = {n for n in options if n in of_tasks and source(n) == click.core.ParameterSource.COMMANDLINE}
    return {{"task_nodes": "nodes", "each_line": "values"}.get(name, name) for name in names}


def _say(notes: Sequence[str]) -> None:
    """Sentences about directives, on stderr; they quote words of the file."""
    from pilotq.cli.formatting import clean

    for note in notes[:NOTES_MAX]:
        click.echo(f"pilotq: {clean(note)}", err=True)
    if len(notes) > NOTES_MAX:
        click.echo(f"pilotq: and {len(notes) - NOTES_MAX:,} more of the kind", err=True)


def file_of_tasks(path: str, format: str | None, shell: bool, replies: str | None) -> Batch:
    """The tasks of a file, or the requests of one of QCG-PilotJob; raises InvalidInput, also when there is no task."""
    batch = read_tasks(path, format=format, shell=shell)
    _say(batch.notes)
    if batch.requests is not None and shell:
        raise InvalidInput("--shell is for plain lines: jobs of QCG-PilotJob have `script` for that")
    if batch.requests is None and replies is not None:
        raise InvalidInput("--replies is for files of QCG-PilotJob's requests: others have none")
    if not batch.tasks and batch.requests is None:
        raise InvalidInput(f"{'standard input' if path == '-' else path}: there is no task in it")
    return batch


def open_replies(path: str | None, stack: ExitStack) -> TextIO | None:
    """Where ``--replies`` says; to be opened before anything is done, as it may be the user's mistake."""
    if path is None or path == "-":
        return None if path is None else sys.stdout
    try:
        return stack.enter_context(open(path, "w", encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"--replies {path}: {error.strerror}") from None


def server_url(url: str | None) -> str | None:
    """The URL of the user's own server: ``--redis`` or PILOTQ_REDIS_URL, with the password of PILOTQ_PASSWORD_FILE.

    Raises InvalidInput when ``--redis`` holds a password: every user of the machine can read command lines.
    """
    if url and parse_url(url).password:
        raise InvalidInput(
            "--redis: everybody on this machine can read a password on a command line: put the URL into "
            "PILOTQ_REDIS_URL, or the password into a file that PILOTQ_PASSWORD_FILE names"
        )
    url = url or os.environ.get("PILOTQ_REDIS_URL")
    secret = os.environ.get("PILOTQ_PASSWORD_FILE")
    if not url or not secret:
        return url
    return msgspec.structs.replace(parse_url(url), password=read_text(secret).strip()).url()


def read_text(path: str) -> str:
    """The text of a file, or of stdin for ``-``, as a string of the system; raises InvalidInput."""
    try:
        if path == "-":
            return os.fsdecode(sys.stdin.buffer.read())
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None


def _values(path: str) -> list[str]:
    values = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
    if not values:
        raise InvalidInput(f"{path}: all lines are blank, so there is no task")
    return values


def counters_of(words: Iterable[str], option: str = "counter") -> dict[str, int]:
    """The counters of a node, or the pools of the pilot, by the values of their option; raises InvalidInput."""
    counters = dict(_counted(option, word) for word in words)
    try:
        request_of(Request(), use=counters)  # has the rule for their names
    except InvalidInput as error:
        raise InvalidInput(f"--{option}{str(error).removeprefix('use')}") from None
    return counters


def _counted(option: str, word: str) -> tuple[str, int]:
    name, _, number = word.partition("=")
    if not name or not re.fullmatch(r"[0-9]{1,15}", number):
        raise InvalidInput(f"--{option}: {word!r} does not say how many: write NAME=N, such as --{option} licence=1")
    return name, int(number)


def _model_opt(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise InvalidInput(f"--model-opt: {word!r} has no value: write NAME=VALUE, such as --model-opt mpi=pmix")
    return name, value


def _variable(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise InvalidInput(f"--env {name}: the variable is not set here; write --env {name}=VALUE")
    return name, os.environ[name]
