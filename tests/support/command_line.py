"""Runs `pilotq` for tests as a person types it: real processes, in a folder of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 120.0
Cli = Callable[..., subprocess.CompletedProcess[str]]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "pilotq", *args]


def environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PILOTQ_")}, **more}


def prompt(folder: Path) -> Cli:
    """Runs `pilotq ARGS` in the folder; more variables as keywords."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args), cwd=folder, env=environment(**env), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip

    return run


@contextmanager
def in_background(folder: Path, *args: str, **env: str) -> Iterator[Cli]:
    """A pilot started with these options, and the prompt it was started from."""
    cli = prompt(folder)
    started = cli("start", *args, **env)
    assert started.returncode == 0, started.stderr
    try:
        yield cli
    finally:
        cli("stop", "--now")
