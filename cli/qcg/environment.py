"""Lets programs and batch scripts of QCG-PilotJob run on pilotq in a Python environment, and takes that away again.

Two files of the environment make `import qcg.pilotjob...`, `python -m qcg.pilotjob.service` and `qcg-pm-service` ours:
one whose name ends in .pth, which Python reads when it starts, and a program. A program of that name that was there
before, QCG-PilotJob's own, is kept beside it and put back.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from contextlib import suppress
from typing import NamedTuple

from pilotq.broker.errors import InvalidInput

PROGRAM = "qcg-pm-service"
# One line, for every start of Python. Without pilotq it does nothing: that may have been uninstalled first.
_CODE = """try:
    from pilotq.broker.qcg import install
except ModuleNotFoundError:
    pass
else:
    install()
"""
_LINE = f"import sys; exec({_CODE!r})\n"
_SCRIPT = "#!{python}\n# Made by `pilotq qcg install`.\nfrom pilotq.cli.qcg.service import main\n\nmain()\n"


class Files(NamedTuple):
    """Files of an environment that make QCG-PilotJob's names ours; ``kept`` is the program that was there before."""

    path_file: str
    program: str
    kept: str


def files_of(site_packages: str, scripts: str) -> Files:
    program = os.path.join(scripts, PROGRAM)
    return Files(os.path.join(site_packages, "pilotq-qcg.pth"), program, f"{program}.before-pilotq")


def active_files() -> Files:
    """Those of the environment whose Python runs this."""
    return files_of(sysconfig.get_path("purelib"), sysconfig.get_path("scripts"))


def install(files: Files) -> None:
    """Write both files; nothing is changed when one cannot be written (InvalidInput). May be repeated."""
    for folder in {os.path.dirname(files.path_file), os.path.dirname(files.program)}:
        if not os.access(folder, os.W_OK):
            raise InvalidInput(f"{folder} is not yours to write to: make a virtual environment, and run this in it")
    if os.path.lexists(files.program) and not is_ours(files.program):
        os.rename(files.program, files.kept)
    _write(files.program, _SCRIPT.format(python=sys.executable), 0o755)
    _write(files.path_file, _LINE, 0o644)


def uninstall(files: Files) -> bool:
    """Remove both files, and put back the program that was there before; whether anything was there."""
    found = False
    with suppress(FileNotFoundError):
        os.unlink(files.path_file)
        found = True
    if is_ours(files.program):
        os.unlink(files.program)
        found = True
        with suppress(FileNotFoundError):
            os.rename(files.kept, files.program)
    return found


def is_ours(program: str) -> bool:
    """Whether `install` has written this program."""
    try:
        with open(program, "rb") as file:
            return b"pilotq.cli.qcg.service" in file.read(1000)
    except FileNotFoundError:
        return False


def _write(path: str, text: str, mode: int) -> None:
    """Write a file so that it is there whole or not at all: Python may be starting meanwhile."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
    os.rename(temporary, path)
