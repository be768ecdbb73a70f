"""`pilotq run`: a pilot of its own for one file of tasks, or for one command."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from pilotq.broker.batch import Batch
from pilotq.broker.client import Broker
from pilotq.broker.errors import InvalidInput, ServerUnavailable, UnknownTask, WaitTimedOut
from pilotq.broker.journal import Journal
from pilotq.broker.output import of_line
from pilotq.broker.pilot import Pilot
from pilotq.broker.start import StartedPilot, SupervisorOptions
from pilotq.broker.submit import check
from pilotq.broker.surroundings import capture
from pilotq.broker.task import Task
from pilotq.broker.views import Counts
from pilotq.cli import exit_codes, progress, render, summary
from pilotq.cli.options import TASK_WORDS, file_of_tasks, file_options, json_option, task_of, task_options
from pilotq.cli.pilots import (
    cores_of,
    failure,
    node_info,
    pilot_options,
    plural,
    start,
    supervisor_options,
)

LOOK_S = 0.25  # how often the progress is looked at


class FileOrCommand(click.Command):
    """A command whose words after ``--`` are the user's own command line, and taken as they are."""

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
@task_options
@json_option
@click.pass_context
def run_command(
    ctx: click.Context, /, files: tuple[str, ...], command: tuple[str, ...], as_json: bool, **values: Any
) -> int:
    """Start a pilot, run the tasks of FILE or one CMD in it, wait, sum up, end.

    CMD takes the options of `pilotq enqueue` that describe a task. Ctrl-C starts nothing more and lets running
    tasks end; once more ends them. --resume goes on later.

    \b
    Example: pilotq run tasks.txt
    Example: pilotq run --cores 2 --array 0-99 -- ./simulate --seed {index}
    """
    options = supervisor_options(values, owner_pid=os.getpid())
    batch = _batch(ctx, files, command, values, options)
    _preflight(batch.tasks, options, fresh=not values["resume"])
    single = bool(command) and len(batch.tasks) == 1 and not batch.tasks[0].is_array
    with Interrupts() as interrupts:
        pilot = start(values, options)
        run = Run(pilot, cores_of(options.nodes), interrupts, progress.shown(quiet=single or as_json))
        found = run.whole(batch.tasks, values["env_policy"])
        found.omitted = batch.omitted
        code = exit_codes.INTERRUPTED if interrupts.count else exit_codes.of_counts(found.counts)
    if batch.omitted:
        code = code or exit_codes.TASKS_FAILED
    if as_json:
        click.echo(render.to_json(summary.as_json(found, code)))
    elif single:
        _tell_one(found, run.ids[0], batch.tasks[0])
    else:
        _tell(found)
    return code


def _batch(
    ctx: click.Context, files: Sequence[str], command: Sequence[str], values: dict[str, Any], options: SupervisorOptions
) -> Batch:
    """The tasks that the command line names; raises InvalidInput."""
    if files and command:
        raise InvalidInput("give a FILE or a command after `--`, not both")
    if not files:
        if not command and values["script"] is None:
            if values["resume"]:
                return Batch([])  # only what is left
            raise InvalidInput("give a FILE of tasks, or `--` and a command: see `pilotq run --help`")
        return Batch([task_of(command, values)])
    if len(files) > 1 or (not os.path.exists(files[0]) and files[0] != "-" and shutil.which(files[0])):
        hint = f": for a command write `pilotq run -- {' '.join(files)}`"
        raise InvalidInput(("give one FILE" if len(files) > 1 else f"there is no file {files[0]}") + hint)
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") == click.core.ParameterSource.COMMANDLINE
        if given and parameter.name in TASK_WORDS:
            raise InvalidInput(f"{parameter.opts[0]} is for a command after `--`: for a FILE write it into the file")
    return file_of_tasks(files[0], values["format"], values["shell"], cores_of(options.nodes))


def _preflight(tasks: Sequence[Task], options: SupervisorOptions, *, fresh: bool) -> None:
    """Refuse what the pilot would refuse, before there is one: nothing is left behind then."""
    plan = check(tasks, [node_info(node) for node in options.nodes], set())
    for parent in (p for parents in plan.parents for p in parents):
        if fresh and isinstance(parent, str) and not parent.startswith("@"):  # "@" is an element of this submission
            raise UnknownTask(f"after: there is no task {parent!r}: a new pilot has no tasks yet")


for option in run_command.params:
    if isinstance(option, click.Option) and option.name in TASK_WORDS:
        option.hidden = True  # the help of enqueue has them; twice they would not fit a screen


class Interrupts:
    """Counts the user's wishes to end: Ctrl-C is one; SIGTERM and a closed terminal are as good as two."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1 if number == signal.SIGINT else 2


class Run:
    """One run, from the submit to the end of its pilot."""

    def __init__(self, pilot: StartedPilot, cores: int, interrupts: Interrupts, shown: progress.Silent) -> None:
        self.pilot = pilot
        self.cores = cores
        self.interrupts = interrupts
        self.shown = shown
        self.counts = Counts()
        self.ids: list[str] = []

    def whole(self, tasks: Sequence[Task], env_policy: str) -> summary.Summary:
        """Submit, wait, end the pilot, and sum up from its journal, which is complete then."""
        begin = time.time()
        try:
            with Broker.connect(self.pilot.directory) as broker:
                # The key makes a resumed run of the same file submit nothing twice.
                key = "run-" + hashlib.sha256(repr(tasks).encode()).hexdigest()[:24]
                self.ids = broker.enqueue_many(tasks, key=key, shared=capture(env_policy))
                self._follow(broker)
                end = time.time()
                self._end(broker)
        except BaseException:
            # Whatever it is, the pilot was for this run alone.
            self.pilot.process.terminate()
            self.pilot.process.wait()
            raise
        finally:
            self.shown.close()
        if self.pilot.process.returncode:
            raise failure(self.pilot)
        lines = Journal(self.pilot.journal).lines()
        return summary.summarise(
            lines, counts=self.counts, cores=self.cores, begin=begin, end=end, directory=self.pilot.directory
        )

    def _ended(self) -> bool:
        return self.pilot.process.poll() is not None

    def _follow(self, broker: Broker) -> None:
        """Until all tasks have ended, the pilot has, or the user does not want to wait any more."""
        while not self.interrupts.count and not self._ended():
            try:
                self.counts = broker.wait(timeout=LOOK_S)
                return
            except WaitTimedOut:
                self._look(broker)
            except ServerUnavailable:
                # The supervisor starts it again, or ends. A refused connection comes back at once.
                time.sleep(LOOK_S)

    def _look(self, broker: Broker) -> None:
        try:
            self.counts = broker.counts()
            self.shown.update(self.counts, broker.running())
        except ServerUnavailable:
            pass  # it has ended, or is on its way back: the next look tells

    def _end(self, broker: Broker) -> None:
        """End the pilot. After one Ctrl-C when nothing runs any more, after the next at once."""
        said = 0
        while not self._ended():
            count = min(self.interrupts.count, 2)
            if said <= count:
                self._ask(broker, ("stop", "drain", "now")[count])
                said = count + 1
            if count:
                self._look(broker)
                time.sleep(LOOK_S)
            else:
                time.sleep(0.01)

    def _ask(self, broker: Broker, mode: str) -> None:
        try:
            if mode == "drain":
                # At once, and not when the supervisor looks: what ends from here on is followed by nothing.
                broker.pause(True)
            broker.request_stop(mode)
            if mode == "drain":
                running = broker.running()
                whom = "it" if running == 1 else "them"
                _say(f"waiting for {plural(running, 'running task')}; Ctrl-C again ends {whom}")
            elif mode == "now":
                _say("ending what runs")
        except ServerUnavailable:
            pass  # it is ending already


def _say(text: str) -> None:
    click.echo(f"pilotq: {text}", err=True)


def _tell(found: summary.Summary) -> None:
    pilot = Pilot(found.directory)
    ends = {line.id: b"".join(of_line(pilot, line, "stderr"))[-4096:] for line in found.failed}
    click.echo(summary.as_text(found, {name: end.decode("utf-8", "replace") for name, end in ends.items()}))


def _tell_one(found: summary.Summary, task_id: str, task: Task) -> None:
    """What the one task wrote goes where ours goes; what there is to say about it goes to stderr."""
    pilot = Pilot(found.directory)
    for line in Journal(pilot.journal).find(task_id)[:1]:
        for stream, file, out in (("stdout", task.stdout, sys.stdout), ("stderr", task.stderr, sys.stderr)):
            for piece in of_line(pilot, line, stream) if file is None else ():
                out.buffer.write(piece)
            out.flush()
    for line in found.failed:
        _say(summary.failure(line))
    _say(summary.short(found))
