"""`pilotq qcg`: lets programs and batch scripts of QCG-PilotJob run on pilotq unchanged."""

from __future__ import annotations

import sys

import click

from pilotq.cli.qcg import environment


@click.group("qcg")
def qcg_command() -> None:
    """Let programs and batch scripts of QCG-PilotJob run on pilotq unchanged, in this Python environment.

    \b
    Example: pilotq qcg install
    """


@qcg_command.command("install")
def install_command() -> None:
    """Make QCG-PilotJob's names pilotq's, for every program of this Python environment.

    From then on `import qcg.pilotjob.api.manager`, `python -m qcg.pilotjob.service` and `qcg-pm-service` are pilotq's.
    QCG-PilotJob itself may be installed or not; a `qcg-pm-service` of its own is kept, and put back by `uninstall`.

    \b
    Example: pilotq qcg install
    """
    files = environment.active_files()
    environment.install(files)
    click.echo(f"QCG-PilotJob's programs run on pilotq in {sys.prefix}: {files.path_file} and {files.program}")


@qcg_command.command("uninstall")
def uninstall_command() -> None:
    """Take away what `pilotq qcg install` has written.

    \b
    Example: pilotq qcg uninstall
    """
    if environment.uninstall(environment.active_files()):
        click.echo(f"QCG-PilotJob's names are no longer pilotq's in {sys.prefix}")
    else:
        click.echo(f"there was nothing to take away in {sys.prefix}", err=True)
