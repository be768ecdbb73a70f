"""`pilotq doctor`: checks this machine, the directory and the pilot, and repairs a damaged log and journal."""

from __future__ import annotations

import os
import sys

import click

from pilotq.broker.errors import InvalidInput, NoPilot
from pilotq.broker.pilot.directory import HOME, Pilot, find
from pilotq.cli import exit_codes, formatting
from pilotq.cli.doctor_checks import Check, examine
from pilotq.cli.options import dir_option, json_option

COLOURS = {"good": "green", "note": "yellow", "bad": "red"}


@click.command("doctor")
@dir_option
@click.option(
    "--repair",
    is_flag=True,
    help="Cut a damaged log after its last valid command, move lines of the journal that "
    "cannot be read to a file beside it, and list what is lost.",
)
@json_option
def doctor_command(directory: str | None, repair: bool, as_json: bool) -> int:
    """Check the server, libraries, limits, disks, Slurm, MPI, and the pilot found here or named by --dir.

    Changes nothing without --repair. A note may cost speed or convenience; anything bad keeps a pilot from working, and
    the exit code is 3.

    \b
    Example: pilotq doctor
    """
    if repair:
        click.echo("\n".join(_repair(find(directory))))
        return exit_codes.ALL_FINISHED
    pilot = _pilot(directory)
    checks = examine(pilot, pilot.directory if pilot is not None else os.path.abspath(HOME))
    if as_json:
        click.echo(formatting.to_json(checks))
    else:
        click.echo("\n".join(map(_line, checks)))
    return exit_codes.PILOT_FAILED if any(check.level == "bad" for check in checks) else exit_codes.ALL_FINISHED


def _repair(pilot: Pilot) -> list[str]:
    from pilotq.broker.pilot import aof_repair

    done = aof_repair.repair_journal(pilot)
    try:
        return done + aof_repair.repair(pilot)
    except InvalidInput:  # it has no log of a server (--durability none): then the journal alone can be repaired
        if not done:
            raise
        return done


def _pilot(directory: str | None) -> Pilot | None:
    try:
        return find(directory)
    except NoPilot:
        if directory is not None:
            raise
        return None  # the machine is usually checked before there is a pilot


def _line(check: Check) -> str:
    level = f"{check.level:<4}"
    if formatting.coloured(sys.stdout):
        level = click.style(level, fg=COLOURS[check.level])
    hint = f"\n{'':21}{formatting.clean(check.hint)}" if check.hint else ""
    return f"{level}  {check.name:<15}{formatting.clean(check.text)}{hint}"
