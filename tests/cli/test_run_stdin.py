"""What `pilotq run` does with its standard input, and with output that is no file."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import IO, Any

import pytest

from pilotq.broker.client.output import end_of_output
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.journal import JournalEntry
from tests.support.command_line import TIMEOUT, command, environment

WORD = "standard input was not read"


def run(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", "--nodes", "1", *words), cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=TIMEOUT, check=False, **options,
    )  # fmt: skip


def test_one_command_reads_the_standard_input(tmp_path: Path) -> None:
    text = "hi\n" * 100_000  # more than a pipe holds
    done = run(tmp_path, "--dir", "p", "--", "cat", input=text)
    assert (done.returncode, done.stdout) == (0, text), done.stderr
    assert WORD not in done.stderr and not (tmp_path / "p" / "stdin").is_symlink()
    (tmp_path / "file").write_text("from a file")
    with open(tmp_path / "file") as file:
        assert run(tmp_path, "--", "cat", stdin=file).stdout == "from a file"


def test_a_command_that_does_not_read_it_takes_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"left")
    os.close(writer)
    with open(reader, "rb") as left:
        done = run(tmp_path, "--", "true", stdin=left)
        assert done.returncode == 0 and WORD not in done.stderr
        assert left.read() == b"left"


@pytest.mark.parametrize("kind", ["array", "FILE", "--stdin", "socket", "begun", "nothing"])
def test_what_cannot_be_passed_on_is_said(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tasks").write_text("cat\n")
    (tmp_path / "input").write_text("named\n")
    words = {
        "array": ["--array", "0-1", "--", "cat"], "FILE": ["tasks"], "--stdin": ["--stdin", "input", "--", "cat"],
    }.get(kind, ["--", "cat"])  # fmt: skip
    if kind == "socket":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(b"hi")
            done = run(tmp_path, *words, stdin=theirs)
    elif kind == "begun":
        with open(tmp_path / "input", "rb", buffering=0) as file:
            file.read(1)
            done = run(tmp_path, *words, stdin=file)
    else:
        done = run(tmp_path, *words, **({"stdin": subprocess.DEVNULL} if kind == "nothing" else {"input": "hi\n"}))
    assert done.returncode == 0, done.stderr
    assert (WORD in done.stderr) is (kind not in ("begun", "nothing")), done.stderr
    assert ("named" in done.stdout) is (kind == "--stdin")


def test_a_fifo_as_stderr_of_a_task_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading: IO[bytes]
    with open(tmp_path / "pipe", "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as reading:
        (tmp_path / "t.toml").write_text(
            "[[tasks]]\ncommand = ['sh', '-c', 'echo oops >&2; exit 3']\nstderr = 'pipe'\n"
        )
        done = run(tmp_path, "t.toml", stdin=subprocess.DEVNULL)
        assert done.returncode == 1 and "1 failed" in done.stdout
        assert reading.read() == b"oops\n"


@pytest.mark.parametrize("place", ["named", "captured", "inline"])
def test_of_a_long_output_only_the_end_is_read(tmp_path: Path, place: str) -> None:
    path, size = tmp_path / "err", 1 << 40
    with open(path, "wb") as file:
        file.seek(size)
        file.write(b"the end")
    entry = JournalEntry(id="1")
    if place == "named":
        entry.stderr_at = [str(path)]
    elif place == "captured":
        entry.stderr_at = ["err", 7, size]
    else:
        entry.stderr = "x" * 5000 + "the end"
    found = end_of_output(Pilot(str(tmp_path)), entry, "stderr", 4096)
    assert len(found) == 4096 and found.endswith(b"the end")
