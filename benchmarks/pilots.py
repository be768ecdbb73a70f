"""Starts and ends a pilot for one measurement."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import msgspec

from pilotq.broker import Broker


@contextlib.contextmanager
def pilot(*options: str) -> Iterator[str]:
    """Start a pilot with these options of `pilotq start`; gives its directory, and ends it."""
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder:
        directory = os.path.join(folder, "pilot")
        command("start", "--dir", directory, *options)
        try:
            yield directory
        finally:
            command("stop", "--dir", directory)


def command(*arguments: str, cwd: str | None = None) -> str:
    """Run a `pilotq` command that must succeed; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pilotq", *arguments], check=False, capture_output=True, text=True, cwd=cwd
    )
    if done.returncode:
        raise SystemExit(f"pilotq {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def keep_records(broker: Broker) -> None:
    """What this broker submits from now on has a record for each task: many that are alike would share one."""
    if hasattr(broker.store.settings, "bundle_above"):  # an older pilotq, that `scale` compares with, shares none
        broker.store.settings = msgspec.structs.replace(broker.store.settings, bundle_above=sys.maxsize)
