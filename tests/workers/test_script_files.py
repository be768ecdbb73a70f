"""The files of scripts: who can read them, what runs them, and that none is left, whatever ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.workers.machine.cleanup import clean_node
from pilotq.workers.process_tree import kill_marked
from pilotq.workers.protocol import Exited, Refused
from tests.support.launcher_driver import Driver
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("each_launcher")

SHOW = b'stat -c "%a %n" "$0" "$(dirname "$0")"; echo "$#"'


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    yield driver
    driver.close()
    assert files_in(tmp_path) == [] and list((tmp_path / "scripts").iterdir()) == []


def files_in(folder: Path) -> list[Path]:
    return list((folder / "scripts").glob("*/*"))


def test_a_script_is_a_private_file_until_its_task_has_ended(driver: Driver, tmp_path: Path) -> None:
    base = driver.base("open", umask=0)
    exited = driver.run("bash", script=SHOW, id="1f_7", attempt=2, base=base)
    file = tmp_path / "scripts" / f"n1.{driver.process.pid}" / "1f_7.2"
    assert exited.stdout.data.decode() == f"700 {file}\n700 {file.parent}\n0\n"
    assert files_in(tmp_path) == []
    key = driver.launch("bash", script=b"(trap '' TERM; exec sleep 1000) &\n", id="left")
    assert driver.get(Exited, key).remaining == 1
    assert [path.name for path in files_in(tmp_path)] == ["left.1"]
    driver.signal(key, signal.SIGKILL)
    wait_until(lambda: not files_in(tmp_path))


def test_a_script_that_cannot_start_leaves_no_file(driver: Driver, tmp_path: Path) -> None:
    refused = driver.refused("/no/such/shell", "-e", script=b"x")
    assert refused.reason == "not found"
    assert refused.message.endswith("'/no/such/shell'. Its script is to be run by that program.")
    assert driver.refused("sh", script=b"x", stdout="/dev/null/x").reason == "output"
    assert files_in(tmp_path) == []
    (tmp_path / "scripts" / f"n1.{driver.process.pid}" / "d.1").mkdir()
    refused = driver.get(Refused, driver.launch("sh", script=b"x", id="d"))
    assert refused.message == "Its script cannot be written to a file: Is a directory."
    assert driver.run("sh", script=b"rm -r $0 ${0%/*}/d.1; exit 3").status == 3 << 8


def test_what_a_killed_launcher_leaves_goes_with_the_next_or_with_its_node(tmp_path: Path) -> None:
    def killed() -> None:
        driver = Driver(tmp_path)
        driver.launch("sh", script=b"echo > here; exec sleep 1000")
        wait_until((tmp_path / "here").exists)
        driver.process.kill()
        driver.process.wait()
        assert kill_marked({"PILOTQ_DIR": str(tmp_path)}) == []
        for end in (driver.down, driver.up, driver.wake):
            os.close(end)
        (tmp_path / "here").unlink()
        assert len(files_in(tmp_path)) == 1

    killed()
    (tmp_path / "scripts" / "n1.x.1").mkdir()  # of a node called n1.x
    first, second = Driver(tmp_path), Driver(tmp_path)
    for driver in (first, second):
        key = driver.launch("sh", script=b"read line", stdin="/dev/null", id=f"d{driver.process.pid}")
        driver.get(Exited, key)
        folders = {path.name for path in (tmp_path / "scripts").iterdir()}
    assert folders == {"n1.x.1", f"n1.{first.process.pid}", f"n1.{second.process.pid}"}
    first.close()
    second.close()
    killed()
    clean_node(str(tmp_path), "n1")
    assert [path.name for path in (tmp_path / "scripts").iterdir()] == ["n1.x.1"]
