"""Installs other tools, each into a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WAIT_S = 600.0


def install(place: Path, requirement: str) -> Path:
    """Make an environment at ``place`` with this package; returns the folder of its programs."""
    programs = place / "bin"
    # pip's temporary files lie in it, too: they go with it even if pip is killed.
    environment = {**os.environ, "TMPDIR": str(place)}
    quietly([sys.executable, "-m", "venv", str(place)], environment)
    quietly([str(programs / "pip"), "install", "--quiet", requirement], environment)
    return programs


def quietly(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=WAIT_S, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
