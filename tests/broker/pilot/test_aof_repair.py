"""Files of the server that are torn, damaged, older or gone, and a full disk: reported in a sentence, or repaired."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pilotq.broker import Task
from pilotq.broker.errors import PilotFailed, PilotqError, StateLost
from pilotq.broker.pilot.aof_repair import good_length, repair
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.journal import Journal
from pilotq.cli import doctor_checks
from tests.support.command_line import prompt
from tests.support.fault_rig import Rig, Work, rig
from tests.support.waiting import wait_until


def log_of(r: Rig) -> Path:
    """The server's log that grows."""
    return max((r.folder / "pilot" / "server" / "appendonlydir").glob("*.incr.aof"), key=lambda p: p.stat().st_size)


def end(r: Rig) -> None:
    assert r.pilot is not None
    r.pilot.process.terminate()
    r.pilot.process.wait()


def half(r: Rig) -> Work:
    """A pilot that has ended in the middle of its work: ten tasks have finished, ten have not begun."""
    work = r.submit([r.probe() for _ in range(10)])
    r.settle(work)
    with r.broker() as broker:
        broker.pause(True)
    waiting = r.submit([r.probe() for _ in range(10)])
    end(r)
    return waiting


@pytest.mark.parametrize("bytes_lost", [1, 7, 40])
def test_a_log_whose_end_is_torn_starts(tmp_path: Path, bytes_lost: int) -> None:
    with rig(tmp_path) as r:
        half(r)
        path = log_of(r)
        os.truncate(path, path.stat().st_size - bytes_lost)
        r.start()
        more = r.submit([r.probe()])
        r.settle(more)
        assert not r.judge(more)


def test_a_log_that_is_damaged_in_the_middle_is_refused_and_repaired(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        half(r)
        path = log_of(r)
        data = bytearray(path.read_bytes())
        behind_scripts = data.rindex(b"define('pilotq_")
        middle = data.index(b"\r\n*", (behind_scripts + len(data)) // 2) + 2
        data[middle : middle + 1] = b"!"
        path.write_bytes(data)
        with pytest.raises(PilotFailed, match=r"is damaged, .*: `pilotq doctor --repair --dir \S+` cuts"):
            r.start()
        done = prompt(tmp_path)("doctor", "--repair", "--dir", str(tmp_path / "pilot"))
        assert done.returncode == 0, done.stderr
        assert "bytes are lost" in done.stdout and "the tasks" in done.stdout
        assert path.stat().st_size <= middle
        assert next(path.parent.glob("*.cut-*")).stat().st_size == len(data) - path.stat().st_size
        assert good_length(str(path)) == path.stat().st_size
        r.start()
        more = r.submit([r.probe() for _ in range(5)])
        r.settle(more)
        assert not r.judge(more)


def test_the_same_tasks_are_not_counted_twice_after_a_repair(tmp_path: Path) -> None:
    """What the server has forgotten runs again; the journal's lines of the first run are moved away."""
    with rig(tmp_path) as r:
        work = r.submit([r.probe() for _ in range(5)])
        r.settle(work)
        end(r)
        path = log_of(r)
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"\r\npilotq:journal\r\n") - 40])  # before the first end
        with pytest.raises(StateLost, match="the server is older than .*journal.jsonl"):
            r.start()
        assert "moved out of the journal" in repair(Pilot(str(tmp_path / "pilot")))[-1]
        r.start()
        r.settle(work)
        lines = [line.id for line in Journal(str(tmp_path / "pilot" / "journal.jsonl")).entries() if line.final]
        assert sorted(lines) == sorted(work.ids)
        assert len(list((tmp_path / "pilot").glob("journal.lost-*.jsonl"))) == 1


def test_a_server_that_comes_back_older_stops_everybody(tmp_path: Path) -> None:
    """While the pilot runs, its server dies, and starts with files of an earlier time."""
    with rig(tmp_path) as r:
        r.settle(r.submit([r.probe()]))
        early = log_of(r).read_bytes()
        work = r.submit([r.probe() for _ in range(5)] + [r.probe(60.0)])
        wait_until(lambda: len(r.lines(work)) == 5, what="five in the journal")
        server = r.process("server")
        os.kill(server, 19)
        log_of(r).write_bytes(early)
        os.kill(server, 9)
        assert r.pilot is not None
        assert r.pilot.process.wait(60) == 3
        assert (
            "StateLost: the server came back without the tasks it had"
            in (tmp_path / "pilot" / "logs" / "supervisor.log").read_text()
        )
        wait_until(lambda: not r.of_tasks(), what="no task lives")


def test_a_log_that_is_whole_is_left_alone(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        half(r)
        before = log_of(r).read_bytes()
        assert "are whole: nothing was changed" in repair(Pilot(str(tmp_path / "pilot")))[0]
        assert log_of(r).read_bytes() == before


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    """The directory of a pilot, on a small file system. Its server, output and logs are on others, so that each can be
    full by itself, and what is said about it has a place."""
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    place = tmp_path / "pilot"
    made = [place, place / "server", place / "output", place / "logs"]
    for folder in made:
        folder.mkdir(mode=0o700)
        options = "size=16m,nr_inodes=60,mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "pilotq", str(folder)], check=True)
    yield place
    for folder in reversed(made):
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> list[Path]:
    """Take the last byte, and the last file; returns what is to be removed."""
    made = [folder / "filler"]
    for size in (1 << 16, 1):
        with open(made[0], "ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(size)):
                pass
    if folder.name == "output":
        with suppress(OSError):
            while True:
                made.append(folder / f"filler{len(made)}")
                made[-1].touch()
        made.pop()
    return made


def says(place: Path, part: str, text: str) -> None:
    wait_until(lambda: text in (place / "logs" / f"{part}.log").read_text(), seconds=60, what=f"{part} says {text!r}")


def complaints(place: Path) -> list[str]:
    return [check.text for check in doctor_checks.examine(Pilot(str(place)), str(place)) if check.level == "bad"]


def test_a_full_disk_of_the_server_is_a_pause(tmp_path: Path, disks: Path) -> None:
    """Nothing is accepted or started, each part logs why, and all goes on when there is room."""
    with rig(tmp_path) as r:
        work = r.submit([r.probe(0.3) for _ in range(30)])
        wait_until(lambda: len(r.lines(work)) > 2, what="some have ended")
        filled = fill(disks / "server")

        def refused() -> str:
            try:
                with r.broker() as broker:
                    broker.enqueue_many([r.probe() for _ in range(200)])
            except PilotqError as error:
                return str(error)
            return ""

        text = wait_until(refused, seconds=60, what="a submit is refused")
        assert text.startswith("the server cannot take this now: MISCONF ")
        says(disks, "dispatcher", "the server cannot take this now: MISCONF ")
        assert "waiting up to 60 s for it" in (disks / "logs" / "dispatcher.log").read_text()
        assert "the server cannot write (aof_last_write_status is err)" in complaints(disks)
        assert r.pilot is not None
        assert r.pilot.process.poll() is None
        for path in filled:
            path.unlink()
        says(disks, "server", "AOF write error looks solved")
        r.settle(work)
        assert "the server cannot write (aof_last_write_status is err)" not in complaints(disks)
        assert not [text for text in r.judge(work, faults=1) if "nobody" not in text]


def test_a_full_disk_of_the_journal_is_told_and_loses_no_line(tmp_path: Path, disks: Path) -> None:
    with rig(tmp_path) as r:
        first = r.submit([r.probe()])
        r.settle(first)
        filled = fill(disks)
        journal = disks / "journal.jsonl"
        work = r.submit([Task(script="head -c 3000 /dev/zero") for _ in range(30)])  # more than one page of lines
        says(
            disks, "supervisor", f"{journal} cannot be written (No space left on device); trying again, nothing is lost"
        )
        wait_until(lambda: r.ended(work), seconds=60, what="tasks go on meanwhile")
        assert len(r.lines(work)) < 30
        assert any(text.startswith("0 KiB and ") for text in complaints(disks)), complaints(disks)
        for path in filled:
            path.unlink()
        says(disks, "supervisor", f"journal: {journal} can be written again")
        r.settle(work)
        lines = [line for found in r.lines(work).values() for line in found]
        assert len(lines) == 30 and all(len(line.stdout) == 3000 for line in lines)


def test_a_pilot_ends_in_good_order_on_a_full_disk(tmp_path: Path, disks: Path) -> None:
    """What the journal could not take stays in the server, for the next start."""
    with rig(tmp_path) as r:
        r.settle(r.submit([r.probe()]))
        filled = fill(disks)
        work = r.submit([Task(script="head -c 3000 /dev/zero") for _ in range(30)])
        says(disks, "supervisor", "cannot be written (No space left on device)")
        wait_until(lambda: r.ended(work), seconds=60, what="all ended")
        assert r.pilot is not None
        end(r)
        assert r.pilot.process.returncode == 0
        text = (disks / "logs" / "supervisor.log").read_text()
        assert "the journal is not complete; the rest stays in" in text
        assert "the number of tasks cannot be written (No space left on device)" in text
        for path in filled:
            path.unlink()
        r.start()
        r.settle(work)


def test_output_that_has_no_room_fails_its_task_in_a_sentence(tmp_path: Path, disks: Path) -> None:
    with rig(tmp_path) as r:
        filled = fill(disks / "output")
        work = r.submit([Task(script="echo never")])
        wait_until(lambda: r.lines(work), seconds=60, what="its end")
        (line,) = r.lines(work)[work.ids[0]]
        assert (line.status, line.reason) == ("failed", "output")
        assert line.message == "Its output cannot be captured: No space left on device."
        for path in filled:
            path.unlink()
        with r.broker() as broker:
            assert broker.retry(work.ids) == {work.ids[0]: "queued"}
        wait_until(lambda: r.ended(work), seconds=60, what="its end")
        assert not r.of_tasks()
        wait_until(lambda: r.lines(work)[work.ids[0]][-1].status == "finished", what="it has run")


def test_files_that_are_gone_are_told(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        half(r)
        shutil.rmtree(tmp_path / "pilot" / "server" / "appendonlydir")
        with pytest.raises(StateLost, match="the server does not hold the tasks"):
            r.start()
