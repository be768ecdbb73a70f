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


def unpack(place: Path, package: str) -> Path:
    """Unpack a package of this Debian, without installing it; returns the folder of its programs."""
    place.mkdir()
    quietly(["apt-get", "download", package], dict(os.environ), place)
    (file,) = place.glob("*.deb")
    quietly(["dpkg-deb", "--extract", str(file), str(place)], dict(os.environ))
    return place / "usr" / "bin"


def quietly(command: Sequence[str], environment: dict[str, str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=WAIT_S, env=environment, cwd=folder
        )
    except FileNotFoundError as error:
        raise SystemExit(f"{' '.join(command)} cannot be started: {error}") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
