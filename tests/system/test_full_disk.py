"""Tasks that write more than there is room for: one gigabyte, and all that a small disk has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker import Task
from pilotq.broker.errors import ServerUnavailable
from pilotq.broker.pilot.directory import Pilot
from pilotq.cli import doctor_checks
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

GIGABYTE = 1 << 30
DISK = 64 << 20
LATER_S = 90.0  # a full disk is tried again and again; nothing hurries


def test_it_floods_a_gigabyte(tmp_path: Path) -> None:
    """Captured in one file of its own, without a copy; what runs beside it is not disturbed."""
    size = GIGABYTE if shutil.disk_usage(tmp_path).free > 4 * GIGABYTE else GIGABYTE // 16
    with live_pilot(tmp_path, "n1:2") as pilot:
        flood = pilot.enqueue("head", "-c", str(size), "/dev/zero")
        beside = pilot.broker.enqueue_many([Task(command=["true"]) for _ in range(50)])
        assert pilot.broker.wait(beside, timeout=LATER_S).finished == 50
        assert pilot.ended(flood, LATER_S).status == "finished"
        (line,) = pilot.lines(flood)
        assert line.stdout == "" and len(line.stdout_at) >= 1
        kept = Path(pilot.pilot.directory, str(line.stdout_at[0]))
        assert kept.stat().st_size == size and kept.stat().st_mode & 0o077 == 0
        logs = subprocess.Popen(
            ["sh", "-c", f"{sys.executable} -m pilotq logs {flood} | wc -c"], stdout=subprocess.PIPE,
            env={**os.environ, "PILOTQ_DIR": pilot.pilot.directory},
        )  # fmt: skip
        assert logs.communicate(timeout=LATER_S)[0].strip() == str(size).encode()
        kept.unlink()
        pilot.assert_calm()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system, with a file that can make room."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "tmpfs", str(place)]
    if subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        (place / "ballast").write_bytes(bytes(DISK // 4))
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_it_fills_the_disk(disk: Path) -> None:
    """The pilot's own: server, journal and output have no room left. It says so, and goes on when there is."""
    with live_pilot(disk, "n1:2") as pilot:
        first = pilot.ended(pilot.enqueue("true"))
        assert first.status == "finished"
        filler = pilot.enqueue("sh", "-c", "cat /dev/zero; exit 5")
        wait_until(lambda: shutil.disk_usage(disk).free == 0, seconds=LATER_S, what="the disk to be full")
        directory = Pilot(pilot.pilot.directory)
        wait_until(
            lambda: any(
                c.level == "bad" for c in doctor_checks.examine(directory, directory.directory) if c.name != "disk"
            ),
            seconds=LATER_S, what="somebody to say so",
        )  # fmt: skip
        os.unlink(disk / "ballast")
        later = _when_possible(pilot)
        assert pilot.ended(later, LATER_S).status == "finished"
        task = pilot.ended(filler, LATER_S)
        assert (task.status, task.reason, task.exit_code) == ("failed", "exit", 5)
        assert [line.id for line in pilot.lines(first.id) if line.final] == [first.id]
        pilot.assert_calm()


def _when_possible(pilot: LivePilot) -> str:
    def submit() -> str:
        try:
            return pilot.enqueue("true")
        except ServerUnavailable:
            return ""  # it has not tried again to write yet

    return wait_until(submit, seconds=LATER_S, what="the server to take a task again")
