"""Files of the server that are torn, damaged, older or gone, and a disk that is full: said in a sentence, or mended."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pilotq.broker.errors import PilotFailed, PilotqError, StateLost
from pilotq.broker.journal import Journal
from pilotq.broker.pilot import Pilot
from pilotq.broker.repair import good_length, repair
from tests.fault_rig import Rig, Work, rig
from tests.prompt import prompt
from tests.waiting import wait_until


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
        middle = data.index(b"\r\n*", len(data) // 2) + 2
        data[middle : middle + 1] = b"!"
        path.write_bytes(data)
        with pytest.raises(PilotFailed, match=r"is damaged, .*: `pilotq doctor --repair --dir \S+` cuts"):
            r.start()
        told = prompt(tmp_path)("doctor", "--repair", "--dir", str(tmp_path / "pilot"))
        assert told.returncode == 0, told.stderr
        assert "bytes are lost" in told.stdout and "the tasks" in told.stdout
        assert path.stat().st_size <= middle
        assert next(path.parent.glob("*.cut-*")).stat().st_size == len(data) - path.stat().st_size
        assert good_length(str(path)) == path.stat().st_size
        r.start()
        more = r.submit([r.probe() for _ in range(5)])
        r.settle(more)
        assert not r.judge(more)


def test_the_same_tasks_are_not_counted_twice_after_a_repair(tmp_path: Path) -> None:
    """What the server has forgotten runs again; the journal's lines of the first time are put aside."""
    with rig(tmp_path) as r:
        work = r.submit([r.probe() for _ in range(5)])
        r.settle(work)
        end(r)
        path = log_of(r)
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"pilotq:journal") - 40])  # before the first end
        with pytest.raises(StateLost, match="the server is older than .*journal.jsonl"):
            r.start()
        assert "put aside at the next start" in repair(Pilot(str(tmp_path / "pilot")))[-1]
        r.start()
        r.settle(work)
        lines = [line.id for line in Journal(str(tmp_path / "pilot" / "journal.jsonl")).lines() if line.final]
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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    place = tmp_path / "pilot"
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "pilotq", str(place)], check=True)
    for name in ("server", "logs", "output"):  # it is a pilot's directory, and may be taken
        (place / name).mkdir()
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_a_pause(tmp_path: Path, small_disk: Path) -> None:
    """Log, journal and output of the pilot share a disk that is full for a while: nothing is lost, and it is said."""
    with rig(tmp_path) as r:
        work = r.submit([r.probe(0.3) for _ in range(30)])
        wait_until(lambda: len(r.lines(work)) > 2, what="some have ended")
        filler = small_disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        with open(filler, "ab", buffering=0) as file, suppress(OSError):
            while file.write(b"x"):
                pass
        log = small_disk / "logs" / "supervisor.log"

        def refused() -> str:
            try:
                with r.broker() as broker:
                    broker.enqueue_many([r.probe() for _ in range(200)])
            except PilotqError as error:
                return str(error)
            return ""

        said = wait_until(refused, seconds=60, what="a submit is refused")
        assert "cannot take this now" in said and "MISCONF" in said
        assert r.pilot is not None
        assert r.pilot.process.poll() is None
        filler.unlink()
        r.settle(work)
        wrong = [text for text in r.judge(work, faults=1) if "nobody" not in text]
        assert not wrong, (wrong, log.read_text())


def test_files_that_are_gone_are_told(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        half(r)
        shutil.rmtree(tmp_path / "pilot" / "server" / "appendonlydir")
        with pytest.raises(StateLost, match="the server does not hold the tasks"):
            r.start()
