"""Runs `pilotq-qcg-service` for tests, as users of QCG-PilotJob run theirs, and reads the files that it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import QCG_CASES

TIMEOUT_S = 100.0


def command(*args: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pilotq.cli.qcg.service", *args]


def environment(**more: str) -> dict[str, str]:
    ours = ("PILOTQ_", "QCG_PM_", "SLURM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | more


def job(name: str, execution: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    return {"name": name, "execution": execution or {"exec": "/bin/true"}, **parts}


def script(text: str, **more: Any) -> dict[str, Any]:
    return {"script": text, **more}


class Ran:
    """A service that has ended, in ``folder``."""

    def __init__(self, folder: Path, result: subprocess.CompletedProcess[str]) -> None:
        self.folder = folder
        self.code = result.returncode
        self.stdout = result.stdout
        self.stderr = result.stderr

    @property
    def home(self) -> Path:
        """The service's own directory; there is one, also after a resume."""
        (found,) = self.folder.glob(".qcgpjm-service-*")
        return found

    @property
    def replies(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / "jobs.report").read_text().splitlines()]

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        """The entries by name; each name stands there once."""
        found = {entry["name"]: entry for entry in self.entries}
        assert len(found) == len(self.entries)
        return found

    @property
    def states(self) -> dict[str, str]:
        return {name: entry["state"] for name, entry in self.report.items()}

    def history(self, name: str) -> list[str]:
        return [step["state"] for step in self.report[name]["history"]]

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()


def serve(folder: Path, *args: str | Path, **env: str) -> Ran:
    """Run it in ``folder``; replies go to its standard output."""
    result = subprocess.run(
        command("--replies", "-", *args), cwd=folder, env=environment(**env), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert "Traceback" not in result.stderr, result.stderr
    return Ran(folder, result)


def case(folder: Path, number: str, *args: str, **env: str) -> Ran:
    """Run one of the given request files."""
    (file,) = QCG_CASES.glob(f"{number}_*.json")
    shutil.copy(file, folder / file.name)
    return serve(folder, "--file-path", file.name, *args, **env)


def jobs(folder: Path, *described: dict[str, Any], nodes: str = "2", args: tuple[str, ...] = (), **env: str) -> Ran:
    """Run jobs that come with one submit."""
    return requests(folder, {"request": "submit", "jobs": list(described)}, nodes=nodes, args=args, **env)


def requests(folder: Path, *bodies: Any, nodes: str = "2", args: tuple[str, ...] = (), **env: str) -> Ran:
    (folder / "requests.json").write_text(json.dumps(list(bodies)))
    return serve(folder, "--file-path", "requests.json", "--nodes", nodes, *args, **env)
