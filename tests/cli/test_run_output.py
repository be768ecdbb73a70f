"""The output of the one command of `pilotq run`: it is shown while it is written, and a closed pipe ends the run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.command_line import TIMEOUT, command, environment


def test_it_is_shown_while_the_command_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    script = "echo first; echo aside >&2; read word <go; echo last; yes | head -c 3000000"
    with subprocess.Popen(
        command("run", "--nodes", "1", "--", "sh", "-c", script), cwd=tmp_path, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == b"first\n" and run.stderr.readline() == b"aside\n"
        (tmp_path / "go").write_text("now\n")
        out, err = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 0 and out == b"last\n" + b"y\n" * 1_500_000
    assert err.startswith(b"pilotq: 1 task: 1 finished")


def test_what_is_tried_again_shows_each_try(tmp_path: Path) -> None:
    script = "echo try; sleep 0.5; [ -e again ] || { touch again; exit 1; }"
    done = subprocess.run(
        command("run", "--nodes", "1", "--retries", "1", "--", "sh", "-c", script), cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    assert done.stdout == "try\ntry\n"


def test_a_closed_pipe_ends_the_run(tmp_path: Path) -> None:
    """As `pilotq run -- yes | head -1`; the command ends as by SIGPIPE, whatever it makes of SIGTERM."""
    with subprocess.Popen(
        command("run", "--nodes", "1", "--", "sh", "-c", "trap '' TERM; echo y; sleep 0.1; yes"), cwd=tmp_path,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.read(2) == b"y\n"
        run.stdout.close()
        assert run.wait(TIMEOUT) == 141
        assert run.stderr.read() == b"pilotq: nobody reads the output any more: the command was ended\n"


def test_a_pipe_that_does_not_block_gets_all(tmp_path: Path) -> None:
    """As `ssh` and some terminals leave it."""
    begin, end = os.pipe()
    os.set_blocking(end, False)
    with open(begin, "rb") as out, subprocess.Popen(
        command("run", "--nodes", "1", "--", "sh", "-c", "yes | head -c 3000000"), cwd=tmp_path, env=environment(),
        stdout=end, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        os.close(end)
        assert out.read().count(b"y\n") == 1_500_000
        assert run.wait(TIMEOUT) == 0
