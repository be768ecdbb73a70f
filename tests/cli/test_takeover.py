"""A pilot takes over from one on another machine, as soon as that one is proved dead."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from tests.support.command_line import prompt


def leave_lock(folder: Path, silent_s: float) -> Path:
    """As a pilot leaves it that was killed on another machine."""
    lock = folder / "p" / "lock"
    lock.write_text(json.dumps({"host": "n17", "machine": "elsewhere", "pid": 1, "start": 1, "token": "t"}))
    os.utime(lock, (time.time() - silent_s,) * 2)
    return lock


def test_a_pilot_of_a_killed_allocation_is_waited_out(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    assert cli("run", "--dir", "p", "--", "true").returncode == 0
    leave_lock(tmp_path, 57)
    ran = cli("run", "--dir", "p", "--", "echo", "again")
    assert (ran.returncode, ran.stdout) == (0, "again\n"), ran.stderr
    assert "is held from n17: waiting until the pilot there shows that it lives" in ran.stderr


def test_one_that_beats_is_left_alone(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    assert cli("run", "--dir", "p", "--", "true").returncode == 0
    lock = leave_lock(tmp_path, 10)
    # Beats of another machine: a process that lives as long as this test does.
    beat = f"while :; do touch {lock}; sleep 0.3; done"
    with subprocess.Popen(["bash", "-c", beat]) as other:
        try:
            refused = cli("start", "--dir", "p")
        finally:
            other.kill()
    assert refused.returncode == 2
    assert "a pilot lives here already (process 1 on n17)" in refused.stderr
