"""Knows which of the user's files an interpreter has imported, and whether they have changed since.

Only files outside Python's own folders and those of installed packages count: what users edit while a pilot runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

_INSTALLED = ("/site-packages/", "/dist-packages/")
CLOCK_S = 0.01  # the kernel's clock for files is late by up to a tick
_STANDARD = os.path.dirname(os.__file__) + "/"
_Version = tuple[int, int, int]  # time of change, size, inode


class UserModules:
    """The imported files of the user, each with the version that was imported; ``began``: the start of this process."""

    def __init__(self, began: float) -> None:
        self._names: set[str] = set()
        self._files: dict[str, _Version | None] = {}
        self.note(began)

    def note(self, began: float) -> None:
        """Remember what was imported since the last time; all of it after ``began`` (unix seconds)."""
        if len(sys.modules) == len(self._names):
            return
        modules = sys.modules.copy()
        for name in modules.keys() - self._names:
            path = _file_of(modules[name])
            if path is not None and name.partition(".")[0] != "pilotq" and is_users(path):
                if (version := _version(path)) is None:
                    continue  # made, imported and removed: nobody edits that
                # What has changed since ``began`` may have changed after it was imported: that version is not known. A
                # time that has not come yet (a clock of a file server) says nothing.
                known = not (began - CLOCK_S) * 1e9 <= version[0] <= time.time_ns()
                self._files[path] = version if known else None
        self._names = set(modules)

    def changed(self) -> str:
        """A file that is not what was imported; empty when there is none."""
        for path, version in self._files.items():
            if version is None or _version(path) != version:
                return path
        return ""


def is_users(path: str) -> bool:
    return not path.startswith(_STANDARD) and not any(part in path for part in _INSTALLED)


def _file_of(module: Any) -> str | None:
    if not isinstance(module, ModuleType):
        return None
    # A lazy module would be loaded by any other way to look at it.
    path = object.__getattribute__(module, "__dict__").get("__file__")
    return path if isinstance(path, str) else None


def _version(path: str) -> _Version | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def distrust_old_bytecode() -> None:
    """Let no bytecode be used that was written before its source changed.

    Python compares whole seconds and sizes only: of a source that was edited within a second it may take the old one.
    """
    path_stats = SourceFileLoader.path_stats

    def checked(self: SourceFileLoader, path: str) -> Any:
        found = path_stats(self, path)
        if is_users(path):
            try:
                cached = importlib.util.cache_from_source(path)
                if os.stat(cached).st_mtime_ns <= os.stat(path).st_mtime_ns:
                    os.unlink(cached)  # it is made anew
            except (OSError, NotImplementedError):
                pass  # there is none, or it is not ours to remove
        return found

    SourceFileLoader.path_stats = checked  # type: ignore[method-assign]
