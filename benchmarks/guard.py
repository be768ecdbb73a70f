"""Runs a program in a home directory of its own and removes all of its processes and files, however it ends.

``python -m benchmarks.guard PARENT SECONDS COMMAND...``: PARENT is the caller's number. The program finds a new folder
as its working directory, ``HOME`` and (in it) ``TMPDIR``. The exit code is that of the program; the end of its output
is printed when that is not 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from pilotq.broker.processes import become_subreaper, terminate_with

TAIL = 2_000  # characters
END_S = 30.0
ENDINGS = (signal.SIGTERM, signal.SIGINT)


def guarded(command: Sequence[str], environment: dict[str, str], seconds: float) -> None:
    """Run it; it must succeed."""
    guard = [sys.executable, "-m", "benchmarks.guard", str(os.getpid()), str(seconds), *command]
    root = Path(__file__).parent.parent
    with subprocess.Popen(guard, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.terminate()  # not killed, as `run` would: it has to tidy up
            raise
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said}")


def main(parent: int, seconds: float, command: list[str]) -> int:
    for number in ENDINGS:
        signal.signal(number, leave)
    terminate_with(parent)
    become_subreaper()
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as name:
        home = Path(name)
        (home / "tmp").mkdir()
        environment = {**os.environ, "HOME": name, "PWD": name, "TMPDIR": str(home / "tmp")}
        try:
            with (home / "said").open("wb") as said:
                code = subprocess.run(
                    command, check=False, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                    timeout=seconds,
                ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 1
            print(f"it had not ended after {seconds:g} s", file=sys.stderr)
        finally:
            end_all()
        if code:
            print((home / "said").read_text(errors="replace")[-TAIL:], file=sys.stderr)
    return code


def leave(number: int, _: FrameType | None) -> None:
    for other in ENDINGS:  # what follows is not interrupted again
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def end_all() -> None:
    """Kill all descendants. Orphans become children of this process, so that the next pass finds those just missed."""
    deadline = time.monotonic() + END_S
    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=1.0)
        if time.monotonic() > deadline:
            raise SystemExit(f"processes that do not end: {', '.join(str(process.pid) for process in left)}")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
