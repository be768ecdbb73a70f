"""How processes are found by their marks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from pilotq.workers import process_tree
from pilotq.workers.process_tree import environment, kill_marked, read_process
from pilotq.workers.protocol import Exited, GroupSwept
from tests.support.dead_mount import unreadable_environment
from tests.support.launcher_driver import Driver
from tests.support.waiting import wait_until


def test_where_no_thread_can_be_started_processes_are_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit of processes reached a worker goes on: it scans for what a dead launcher or a sweep has left."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    mark = {"PILOTQ_TASK_ID": uuid.uuid4().hex}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=mark) as process:
        monkeypatch.setattr(threading.Thread, "start", start)
        try:
            assert kill_marked(mark) == []
            assert process.wait(10) == -9
        finally:
            process.kill()


def test_a_process_whose_environment_cannot_be_read_stops_no_scan(tmp_path: Path) -> None:
    mark = {"PILOTQ_TASK_ID": uuid.uuid4().hex}
    with (
        subprocess.Popen(["sleep", "600"], env={**os.environ, **mark}) as hangs,
        subprocess.Popen(["sleep", "600"], env={**os.environ, **mark}) as other,
    ):
        try:
            with unreadable_environment(hangs.pid, tmp_path):
                for _ in range(2):
                    assert kill_marked(mark, seconds=5) == []
                assert other.wait(10) == -signal.SIGKILL and hangs.poll() is None
        finally:
            hangs.kill()
            other.kill()


def test_a_thread_that_only_gets_no_cpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no progress for a while, but the kernel does not hold it: the process is no hung one."""

    def starved(pid: int) -> bytes:
        if pid == process.pid:
            until = time.monotonic() + 4 * process_tree.READ_S
            while time.monotonic() < until:
                pass
        return environment(pid)

    mark = {"PILOTQ_TASK_ID": uuid.uuid4().hex}
    with subprocess.Popen(["sleep", "600"], env=mark) as process:
        monkeypatch.setattr(process_tree, "environment", starved)
        try:
            assert kill_marked(mark, seconds=0) == [process.pid]
            assert process.wait(10) == -signal.SIGKILL
        finally:
            process.kill()


def test_an_orphan_whose_environment_cannot_be_read_stops_no_launcher(tmp_path: Path) -> None:
    with closing(Driver(tmp_path)) as driver:
        # It has a session of its own, so only its environment, and then its CPUs, can tell whose it is.
        os.mkfifo(tmp_path / "go")
        key = driver.launch("sh", "-c", "(setsid sh -c 'echo $$ >pid; exec sleep 1000' &); read word <go")
        pid = pid_in(tmp_path / "pid")
        wait_until(lambda: parent_of(pid) == driver.process.pid)
        with unreadable_environment(pid, tmp_path):
            (tmp_path / "go").write_text("now\n")
            assert driver.get(Exited, key).remaining == 1
            assert driver.run("true").status == 0
            driver.signal(key, signal.SIGKILL)
            driver.get(GroupSwept, key)


def pid_in(path: Path) -> int:
    return int(wait_until(lambda: path.exists() and path.read_text().endswith("\n") and path.read_text()))


def parent_of(pid: int) -> int:
    process = read_process(pid)
    return process.parent if process is not None else 0
