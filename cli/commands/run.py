"""`pilotq run`: starts a pilot for one file of tasks, or for one command, and ends it."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import click
import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.fit import fit_is_known, nothing_left_fits
from pilotq.broker.client.output import end_of_output
from pilotq.broker.client.submit import check
from pilotq.broker.errors import InvalidInput, PilotFailed, UnknownTask, WaitTimedOut
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.start import LocalNode, StartedPilot, SupervisorOptions
from pilotq.broker.settings import load
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.taskfiles.batch import Batch
from pilotq.broker.tasks.model import Task, description
from pilotq.broker.tasks.submit_context import capture_context
from pilotq.cli import exit_codes, formatting, progress, stdin, summary
from pilotq.cli.failure_stop import FailureStop
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.lifetime import Lifetime
from pilotq.cli.options import (
    TASK_OPTIONS,
    file_of_tasks,
    file_options,
    json_option,
    open_replies,
    stop_on_failures_option,
    task_of,
    task_options,
)
from pilotq.cli.passthrough import Passthrough
from pilotq.cli.pilot_options import (
    CLUSTER_OPTIONS,
    cores_of,
    node_info,
    pilot_failure,
    pilot_options,
    plural,
    start,
    supervisor_options,
)

FIT_POLL_S = 0.05
OUTPUT_POLL_S = 0.05  # how often the output of the one command is passed on
STDIN = "stdin"  # in the pilot's directory: a link to the standard input of `pilotq run -- CMD`
STDERR_BYTES = 4096  # of each failed task, read for the summary


class FileOrCommand(click.Command):
    """A command that takes the words after ``--`` unchanged, as the user's own command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        here = args.index("--") if "--" in args else len(args)
        ctx.params["command"] = tuple(args[here + 1 :])
        return super().parse_args(ctx, args[:here])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "| -- CMD [ARGS]..."]


@click.command("run", cls=FileOrCommand)
@click.argument("files", nargs=-1, metavar="FILE")
@pilot_options
@file_options
@stop_on_failures_option
@task_options
@json_option
@click.pass_context
def run_command(
    ctx: click.Context, /, files: tuple[str, ...], command: tuple[str, ...], as_json: bool, **values: Any
) -> int:
    """Start a pilot, run the tasks of FILE or one CMD in it, wait, print a summary, end the pilot.

    CMD also takes the options of `pilotq enqueue` that describe a task, and the pilot those of
    `pilotq start` but --gpus (set PILOTQ_GPUS) and --foreground.
    After Ctrl-C nothing more starts and running tasks go on; a second one ends them. --resume continues later.

    \b
    Example: pilotq run tasks.txt
    Example: pilotq run --cores 2 --array 0-99 -- ./simulate --seed {index}
    """
    options = supervisor_options(values, owner_pid=os.getpid())
    batch = _batch(ctx, files, command, values)
    if batch.requests is not None:
        return _play(batch.requests, files[0] if files else "", values, options, as_json)
    _preflight(batch.tasks, options, fresh=not values["resume"])
    single = bool(command) and len(batch.tasks) == 1 and not batch.tasks[0].is_array
    with Interrupts(allocation=options.remote is not None) as interrupts:
        pilot = start(values, options)
        run = Run(pilot, interrupts, progress.display(quiet=single or as_json), batch.tasks, values["env_policy"])
        run.shows_output = single and not as_json
        run.failure_stop = FailureStop(values["stop_on_failures"])
        if single and values["stdin"] is None and values["script"] is None:
            run.stdin = stdin.source(local=options.remote is None)
        run.run_to_end()
        found = _summary(run, options.expected_nodes)
        found.commands = run.commands({line.submitted_as for line in found.failed})
        code = exit_codes.INTERRUPTED if interrupts.count else exit_codes.of_counts(found.counts)
    if run.passed is not None and run.passed.broken:
        _say("nobody reads the output any more: the command was ended")
        return exit_codes.BROKEN_PIPE
    if run.cut_short:
        code = exit_codes.ALL_FINISHED
        _say(f"the allocation is ending: go on in the next one with `{_again(pilot, files)}`")
    elif run.never_runs:
        code = exit_codes.INVALID
        left = plural(found.counts.left, "task")
        _say(f"{run.never_runs}; {left} left: go on with other nodes with `{_again(pilot, files)}`")
    if word := stdin.unread(passed=bool(run.stdin)):
        _say(word)
    if as_json:
        click.echo(formatting.to_json(summary.as_json(found, code)))
    elif single:
        _print_task(found, run.passed)
    else:
        _print_summary(found)
    return code


def _again(pilot: Pilot, files: Sequence[str]) -> str:
    """The command line that goes on with a run."""
    return " ".join(["pilotq run --resume", shlex.quote(pilot.directory), *map(shlex.quote, files)])


def _play(requests: Sequence[Any], file: str, values: dict[str, Any], options: SupervisorOptions, as_json: bool) -> int:
    """A file of QCG-PilotJob's requests: each is handled, and the run ends when all jobs have."""
    from pilotq.broker.taskfiles.qcg import check_submits
    from pilotq.cli.qcg.plan import Plan
    from pilotq.cli.qcg.play import Play

    if values["replies"] is None:  # with --replies each refusal is a reply
        check_submits(requests, file, cores_of(options.expected_nodes), len(options.expected_nodes))
    with ExitStack() as stack:
        replies = open_replies(values["replies"], stack)
        plan = Plan(requests, os.getcwd(), options, replies=replies, env_policy=values["env_policy"])
        interrupts = stack.enter_context(Interrupts(allocation=options.remote is not None))
        pilot = start(values, options)
        play = Play(pilot, interrupts, progress.display(quiet=as_json or values["replies"] == "-"), plan)
        play.failure_stop = FailureStop(values["stop_on_failures"])
        play.run_to_end()
    found = _summary(play, options.expected_nodes)
    found.omitted, found.refused = play.omitted(), play.played.refused
    code = play.code
    if found.refused and not found.counts.total and not found.omitted:
        code = exit_codes.INVALID
    if as_json:
        click.echo(formatting.to_json(summary.as_json(found, code)))
    else:
        for sentence in found.refused:
            _say(sentence)
        _print_summary(found)
    return code


def _batch(ctx: click.Context, files: Sequence[str], command: Sequence[str], values: dict[str, Any]) -> Batch:
    """The tasks that the command line names; raises InvalidInput."""
    if files and command:
        raise InvalidInput("give a FILE or a command after `--`, not both")
    if not files:
        for name in ("format", "shell", "replies"):
            if values[name]:
                raise InvalidInput(f"--{name} is for a FILE, not for a command")
        if not command and values["script"] is None:
            if values["resume"]:
                from pilotq.broker.qcg.service.registry import FILE

                # Only what is left.
                return Batch([], [] if os.path.exists(os.path.join(values["resume"], FILE)) else None)
            raise InvalidInput("give a FILE of tasks, or `--` and a command: see `pilotq run --help`")
        return Batch([task_of(command, {**values, "stop_on_failures": ""})])  # it counts all tasks
    if len(files) > 1 or (not os.path.exists(files[0]) and files[0] != "-" and shutil.which(files[0])):
        hint = f": for a command write `pilotq run -- {' '.join(files)}`"
        raise InvalidInput(("give one FILE" if len(files) > 1 else f"there is no file {files[0]}") + hint)
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") == click.core.ParameterSource.COMMANDLINE
        if given and parameter.name in TASK_OPTIONS:
            raise InvalidInput(f"{parameter.opts[0]} is for a command after `--`: with a FILE, set it in the file")
    return file_of_tasks(files[0], values["format"], values["shell"], values["replies"])


def _preflight(tasks: Sequence[Task], options: SupervisorOptions, *, fresh: bool) -> None:
    """Refuse what the pilot would refuse, before there is one: nothing is left behind then."""
    plan = check(tasks, [node_info(node) for node in options.nodes])
    for parent, _ in (d for dependencies in plan.parents.after.values() for d in dependencies):
        if fresh and isinstance(parent, str):  # the id of a task submitted before
            raise UnknownTask(f"after: there is no task {parent!r}: a new pilot has no tasks yet")


for option in run_command.params:
    if isinstance(option, click.Option) and (option.name in TASK_OPTIONS or option.name in CLUSTER_OPTIONS):
        option.hidden = True  # the help of enqueue, or of start, shows them; here they would not fit a screen


class Run(Lifetime):
    """One run of tasks."""

    def __init__(
        self, pilot: StartedPilot, interrupts: Interrupts, shown: progress.Silent, tasks: Sequence[Task], policy: str
    ) -> None:
        super().__init__(pilot, interrupts, shown)
        self.tasks = tasks
        self.policy = policy
        self.ids: list[str] = []
        self.never_runs = ""  # why nothing of what is left can run on the nodes of this pilot
        self.stdin = ""  # what the one task reads as its standard input, "" for nothing
        self.shows_output = False  # of the one task, while it runs
        self.passed: Passthrough | None = None

    def begin(self, broker: Broker) -> None:
        # The key makes a resumed run of the same file submit nothing twice.
        key = "run-" + hashlib.sha256(repr(self.tasks).encode()).hexdigest()[:24]
        self._await_fit(broker)
        tasks = self.tasks
        # A resumed run has a standard input of its own: the task names a link, which is turned.
        link = self.pilot.path(STDIN)
        self.close()
        os.symlink(self.stdin or os.devnull, link)
        if self.stdin:
            tasks = [msgspec.structs.replace(task, stdin=link) for task in tasks]
        self.ids = broker.enqueue_many(tasks, key=key, context=capture_context(self.policy))
        if self.shows_output:
            self.poll_s = OUTPUT_POLL_S
            named = {"stdout": self.tasks[0].stdout, "stderr": self.tasks[0].stderr}
            self.passed = Passthrough(self.ids[0], [name for name, file in named.items() if file is None])

    def close(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.pilot.path(STDIN))

    def done(self, broker: Broker) -> bool:
        if self.passed is not None:
            self.passed.poll(broker)
            if self.passed.broken:
                self.mode = "now"
                return True
        try:
            return super().done(broker)
        except WaitTimedOut:
            # Large tasks wait for nothing, while all nodes are idle; a moment ago something may have been on its way.
            self.never_runs, before = nothing_left_fits(broker.link), self.never_runs
            if self.never_runs and self.never_runs == before and self.counts.left:
                return True
            raise

    def _await_fit(self, broker: Broker) -> None:
        """Wait until the nodes are known on which the tasks are to fit: what can never run is refused then."""
        requests = {task.shape() for task in self.tasks}
        deadline = time.monotonic() + load(os.environ.get("PILOTQ_SETTINGS")).nodes_wait_s
        while not fit_is_known(broker.link, requests) and time.monotonic() < deadline:
            if self.interrupts.count or self.interrupts.end_mode:
                return
            if self._pilot_ended():
                raise pilot_failure(self.pilot)
            time.sleep(FIT_POLL_S)

    def commands(self, ids: set[str]) -> dict[str, str]:
        """The command lines of some of the tasks, by id."""
        return {name: description(task) for name, task in zip(self.ids, self.tasks, strict=True) if name in ids}


def _summary(life: Lifetime, nodes: Sequence[LocalNode]) -> summary.Summary:
    """Sum up from the journal of a pilot that has ended, which is complete then."""
    return summary.summarise(
        Journal(life.pilot.journal).entries(), counts=life.counts, cores=life.cores or cores_of(nodes),
        begin=life.began, end=life.ended, directory=life.pilot.directory,
    )  # fmt: skip


def _say(text: str) -> None:
    click.echo(f"pilotq: {formatting.clean(text)}", err=True)


def _print_summary(found: summary.Summary) -> None:
    pilot = Pilot(found.directory)
    ends = {line.id: _end(pilot, line) for line in found.failed}
    click.echo(summary.as_text(found, {name: end.decode("utf-8", "replace") for name, end in ends.items()}))


def _end(pilot: Pilot, line: JournalEntry) -> bytes:
    """The end of what a failed task wrote to stderr."""
    try:
        return end_of_output(pilot, line, "stderr", STDERR_BYTES)
    except (PilotFailed, OSError) as error:
        return str(error).encode()


def _print_task(found: summary.Summary, passed: Passthrough | None) -> None:
    """Pass the rest of the output of the one task on; everything about it goes to stderr."""
    if passed is not None:
        passed.finish(Pilot(found.directory))
    for line in found.failed:
        _say(summary.failure(line))
    _say(summary.short(found))
    if passed is not None and passed.lost:
        raise PilotFailed(passed.lost)
