"""Which processes are moved into a cgroup, which cgroups are left alone, and what the kernel's counters mean."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from pilotq.workers import cgroups
from pilotq.workers.process_tree import processes
from tests.support.waiting import wait_until


@pytest.fixture
def mount() -> Path:
    try:
        return Path(cgroups._own_cgroup()[1])
    except (OSError, StopIteration):
        pytest.skip("tasks cannot have cgroups here")


def test_what_a_process_has_started_before_it_is_moved_is_moved_too(mount: Path) -> None:
    path = mount / f"pilotq-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError:
        pytest.skip("tasks cannot have cgroups here")
    script = "sleep 1000 & setsid sleep 1000 & wait"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:

        def started() -> list[int]:
            return [process.pid, *(p.pid for p in processes().values() if p.parent == process.pid)]

        try:
            wait_until(lambda: len(started()) == 3, what="both have started")
            cgroups.enter(str(path), process.pid)
            assert {int(pid) for pid in (path / "cgroup.procs").read_text().split()} == set(started())
        finally:
            for pid in started():
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cgroups.remove(str(path)) is None and not path.exists(), what="the cgroup is removed")
