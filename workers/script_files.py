"""Keeps the scripts of running tasks as files of this launcher, which only this user can read.

A launcher has a folder of its own below the pilot's directory. A file goes when no process of its task is left, the
folder with the launcher. What a killed launcher leaves is removed by the next one of its node, and what a killed worker
leaves with the processes of its tasks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress

from pilotq.workers.process_tree import read_process
from pilotq.workers.whole_writes import write_whole

FOLDER = "scripts"  # below the pilot's directory


class ScriptFiles:
    """Writes and removes scripts. ``output`` is the launcher's output directory, beside which they lie.

    path = scripts.write("7.1", b"#!/bin/sh\\n...")    # raises OSError
    scripts.remove(path)
    """

    def __init__(self, output: str, node: str) -> None:
        self._parent = os.path.join(os.path.dirname(output), FOLDER)
        self._folder = os.path.join(self._parent, f"{node}.{os.getpid()}")
        _remove_folders(self._parent, node, _serves)

    def write(self, name: str, text: bytes) -> str:
        """A file with this text; its path."""
        path = os.path.join(self._folder, name)
        try:
            self._write(path, text)
        except FileNotFoundError:
            for folder in (self._parent, self._folder):
                os.makedirs(folder, mode=0o700, exist_ok=True)
                os.chmod(folder, 0o700)  # the umask is a task's
            self._write(path, text)
        except OSError:
            self.remove(path)
            raise
        return path

    def remove(self, path: str) -> None:
        """Its task has ended."""
        with suppress(OSError):  # the task has removed it, or the directory fails
            os.unlink(path)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _write(path: str, text: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o700)
        try:
            os.fchmod(fd, 0o700)
            write_whole(fd, text)
        finally:
            os.close(fd)


def remove_left(directory: str, node: str) -> None:
    """Remove what the launchers of a node have left; none of them lives. ``directory`` is the pilot's."""
    _remove_folders(os.path.join(directory, FOLDER), node, lambda _: False)


def _remove_folders(parent: str, node: str, in_use: Callable[[int], bool]) -> None:
    with suppress(OSError):  # there are none, or nothing can be done about it
        for name in os.listdir(parent):
            pid = name.removeprefix(f"{node}.")
            if name != pid and pid.isdecimal() and not in_use(int(pid)):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _serves(pid: int) -> bool:
    """Whether that is a launcher of our worker, beside this one."""
    process = read_process(pid)
    return process is not None and process.alive and process.parent == os.getppid() and pid != os.getpid()
