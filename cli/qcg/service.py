"""`pilotq-qcg-service`: QCG-PilotJob's service on a pilot of its own, with its options, files and replies."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any, NoReturn

import click

from pilotq.broker.errors import InvalidInput, PilotqError
from pilotq.broker.pilot.start import SupervisorOptions, start_pilot
from pilotq.cli import exit_codes, formatting, progress
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.main import open_closed_streams, use_utf8
from pilotq.cli.options import file_of_tasks, open_replies
from pilotq.cli.pilot_options import pilot_options, supervisor_options
from pilotq.cli.qcg.options import PROGRAM, directory, ignored_options, parse, pilot_arguments
from pilotq.cli.qcg.plan import Plan


def main(argv: list[str] | None = None) -> NoReturn:
    open_closed_streams()
    use_utf8()
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
    for sentence in ignored_options(options):
        _say(sentence)
    bodies = _bodies(options.file_path)
    supervisor = _supervisor(options)
    wd = os.path.abspath(options.wd)
    os.makedirs(wd, exist_ok=True)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts(allocation=supervisor.remote is not None))
        plan = Plan(
            bodies, wd, supervisor, replies=open_replies(options.replies, stack),
            report_file=options.report_file, report_format=options.report_format, net=options.net,
            stays=options.net and options.file_path is None, owner=options.owner,
            system_cores=int(options.system_core),
        )  # fmt: skip
        # What is needed from here on loads while the pilot does: four processes start one after the other otherwise.
        loading = threading.Thread(target=import_module, args=("pilotq.cli.qcg.play",))
        loading.start()
        try:
            pilot = start_pilot(directory(options), supervisor)
        finally:
            loading.join()
        from pilotq.cli.qcg.play import Play

        service = Play(pilot, interrupts, progress.display(quiet=not options.show_progress), plan)
        service.program = PROGRAM
        service.run_to_end()
    service.print_failures()
    quiet = options.qcg_exit_codes and service.code == exit_codes.TASKS_FAILED
    return exit_codes.ALL_FINISHED if quiet else service.code


def _bodies(path: str | None) -> Sequence[Any]:
    return [] if path is None else file_of_tasks(path, "qcg", shell=False, replies=None).requests or []


def _supervisor(options: argparse.Namespace) -> SupervisorOptions:
    command = click.command("nodes")(pilot_options(lambda **_: None))
    try:
        values = command.make_context(PROGRAM, pilot_arguments(options)).params
    except click.ClickException as error:
        raise InvalidInput(error.format_message()) from None
    return supervisor_options(values, owner_pid=os.getpid())


def _say(text: str) -> None:
    click.echo(f"{PROGRAM}: {formatting.clean(text)}", err=True)


if __name__ == "__main__":
    main()
