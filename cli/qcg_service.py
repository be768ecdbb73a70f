"""`pilotq-qcg-service`: QCG-PilotJob's service on a pilot of its own, with its options, files and replies."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any, NoReturn, TextIO

import click
import msgspec

from pilotq.broker.client import Broker
from pilotq.broker.errors import InvalidInput, PilotqError, ServerUnavailable, WaitTimedOut
from pilotq.broker.pilot import write_private
from pilotq.broker.qcg.play import Played, play, read_requests
from pilotq.broker.qcg.registry import Finish
from pilotq.broker.qcg.report import NAMED_MAX, Report
from pilotq.broker.qcg.requests import Reply, Requests
from pilotq.broker.qcg.states import QUEUED, SUCCEED, stamp
from pilotq.broker.start import StartedPilot, SupervisorOptions, start_pilot
from pilotq.cli import exit_codes, progress, render
from pilotq.cli.pilots import await_nodes, failure, pilot_options, supervisor_options
from pilotq.cli.qcg_options import directory, env_schema, parse, pilot_arguments, without_meaning, without_system_core
from pilotq.cli.run import Interrupts

LOOK_S = 0.2
LOGGED_MAX = 10_000  # characters of a request: the jobs of a submit stand in qcg-jobs.jsonl
PROGRAM = "pilotq-qcg-service"


def main(argv: list[str] | None = None) -> NoReturn:
    sys.exit(call(argv))


def call(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Expected errors are printed to stderr, as one sentence."""
    try:
        return run(parse(argv))
    except PilotqError as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        # The boundary to the user's files and disks: full, forbidden, gone.
        _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return exit_codes.PILOT_FAILED


def run(options: argparse.Namespace) -> int:
    """The whole life of a service; raises PilotqError."""
    for sentence in without_meaning(options):
        _say(sentence)
    bodies = _bodies(options.file_path)
    supervisor = _supervisor(options)
    wd = os.path.abspath(options.wd)
    os.makedirs(wd, exist_ok=True)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        # Before anything is started: a file that cannot be written is the user's mistake.
        replies = _open_replies(options.replies, stack)
        pilot = start_pilot(directory(options), supervisor)
        log = stack.enter_context(open(pilot.path("service.log"), "a", encoding="utf-8", errors="backslashreplace"))
        os.chmod(log.name, 0o600)
        service = Service(options, wd, pilot, supervisor, interrupts)

        def tell(request: Any, reply: Reply) -> None:
            text = json.dumps(reply)
            for line in (f"request {json.dumps(request)[:LOGGED_MAX]}", f"reply {text}"):
                print(f"{stamp(time.time())}: {line}", file=log, flush=True)
            if replies is not None:
                print(text, file=replies, flush=True)

        played = service.live(bodies, tell)
        return service.code(played)


def _bodies(path: str | None) -> list[Any]:
    try:
        return [] if path is None else read_requests(path)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None


def _open_replies(path: str | None, stack: ExitStack) -> TextIO | None:
    if path is None or path == "-":
        return None if path is None else sys.stdout
    return stack.enter_context(open(path, "w", encoding="utf-8"))


def _supervisor(options: argparse.Namespace) -> SupervisorOptions:
    command = click.command("nodes")(pilot_options(lambda **_: None))
    try:
        values = command.make_context(PROGRAM, pilot_arguments(options)).params
    except click.ClickException as error:
        raise InvalidInput(error.format_message()) from None
    supervisor = supervisor_options(values, owner_pid=os.getpid())
    if options.system_core:
        supervisor.nodes = without_system_core(supervisor.nodes)
    return supervisor


class Service:
    """A started pilot, from the first request to its end, and its report."""

    def __init__(
        self, options: argparse.Namespace, wd: str, pilot: StartedPilot, supervisor: SupervisorOptions,
        interrupts: Interrupts,
    ) -> None:  # fmt: skip
        self.options = options
        self.wd = wd
        self.pilot = pilot
        self.supervisor = supervisor
        self.interrupts = interrupts
        self.shown = progress.shown(quiet=not options.show_progress)
        self.report: Report | None = None

    def live(self, bodies: list[Any], tell: Any) -> Played:
        """Handle the requests, wait until their jobs have ended, end the pilot, and complete the report."""
        try:
            with Broker.connect(self.pilot.directory) as broker:
                await_nodes(broker, self.pilot, self.supervisor)
                requests = self._requests(broker)
                try:
                    played = play(requests, bodies, tell)
                    self._follow(broker, requests)
                    self._end(broker)
                    self._complete(requests)
                finally:
                    requests.close()
        except BaseException:
            # Whatever it is, the pilot was for this service alone.
            self.pilot.process.terminate()
            self.pilot.process.wait()
            raise
        finally:
            self.shown.close()
        if self.pilot.process.returncode:
            raise failure(self.pilot)
        return played

    def _requests(self, broker: Broker) -> Requests:
        requests = Requests(
            broker, wd=self.wd, env_schema=env_schema(self.options), resume=self.options.resume is not None,
            instance=self.pilot.id.removeprefix(".qcgpjm-service-"), interfaces=["FILE"],
        )  # fmt: skip
        with requests.registry.locked():
            if requests.registry.finish:
                requests.registry.write(Finish(wanted=False))  # the wish of an earlier life
        path = os.path.join(self.pilot.directory, self.options.report_file)
        self.report = Report(
            requests.registry, self.pilot.journal, self.wd, path=path, form=self.options.report_format
        )  # fmt: skip
        return requests

    def _follow(self, broker: Broker, requests: Requests) -> None:
        """Until all jobs have ended, the pilot has, or the user does not want to wait any more."""
        stays = self.options.net and self.options.file_path is None
        while not self.interrupts.count and self.pilot.process.poll() is None:
            try:
                broker.wait(timeout=LOOK_S)
                requests.registry.refresh()
                if not stays or requests.registry.finish:
                    requests.settle()
                    if requests.all_finished:
                        return
                time.sleep(LOOK_S)
            except WaitTimedOut:
                self._look(broker)
            except ServerUnavailable:
                # The supervisor starts it again, or ends. A refused connection comes back at once.
                time.sleep(LOOK_S)
            if self.report is not None:
                self.report.pump()

    def _look(self, broker: Broker) -> None:
        if self.options.show_progress:
            self.shown.update(broker.counts(), broker.running())

    def _end(self, broker: Broker) -> None:
        """End the pilot. After one Ctrl-C when nothing runs any more, after the next at once."""
        said = ""
        while self.pilot.process.poll() is None:
            mode = ("stop", "drain", "now")[min(self.interrupts.count, 2)]
            if mode != said:
                said = mode
                if mode == "drain":
                    _say("waiting for running tasks; Ctrl-C again ends them")
                try:
                    broker.request_stop(mode)
                except ServerUnavailable:
                    pass  # it is ending already
            time.sleep(0.01)

    def _complete(self, requests: Requests) -> None:
        """The journal is complete: so is the report now, and what has not ended is known by that."""
        report = self.report
        assert report is not None
        report.pump()
        jobs = Counter(report.jobs)
        jobs[QUEUED] += max(len(requests.registry.jobs) - sum(jobs.values()), 0)
        tasks = Counter(report.tasks)
        every = sum(len(job.indices or (None,)) for job in requests.registry.jobs.values())
        tasks[QUEUED] += max(every - sum(tasks.values()), 0)
        cores = sum(len(node.cores) for node in self.supervisor.nodes)
        status = requests.status_of((len(self.supervisor.nodes), cores, 0), +jobs, +tasks)
        write_private(self.pilot.path("final_status.json"), msgspec.json.format(msgspec.json.encode(status), indent=2))

    def code(self, played: Played) -> int:
        """The exit code; says on stderr what was refused, and what did not succeed."""
        assert self.report is not None
        for sentence in played.refused:
            _say(sentence)
        for sentence in self.report.failures:
            _say(f"job {sentence}")
        bad = sum(self.report.tasks.values()) - self.report.tasks[SUCCEED]
        if bad > NAMED_MAX:
            _say(f"{bad:,} in all did not succeed: see {self.pilot.path(self.options.report_file)}")
        if self.interrupts.count:
            return exit_codes.INTERRUPTED
        failed = bool(played.refused) or bad > 0
        return exit_codes.TASKS_FAILED if failed and not self.options.qcg_exit_codes else exit_codes.ALL_FINISHED


def _say(text: str) -> None:
    click.echo(f"{PROGRAM}: {render.clean(text)}", err=True)


if __name__ == "__main__":
    main()
