"""What was acknowledged outlives the server, however slow the disk is; and it gets onto the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pilotq.broker.pilot import aof_sync
from pilotq.broker.pilot.aof_sync import AofSync
from pilotq.broker.pilot.server import start_server, wait_ready
from pilotq.broker.store.connection import Connection
from tests.support.waiting import wait_until


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_disk_that_hangs_costs_nothing_when_the_server_is_killed(tmp_path: Path) -> None:
    """Each fsync of the server's own hangs for a while: what it has answered stands in its log all the same."""
    server = start_server(str(tmp_path))
    link = Connection(server.address)
    trace = tmp_path / "trace"
    assert server.process is not None
    slow = ["strace", "-f", "-q", "-o", str(trace), "-e", "trace=fdatasync,fsync", "-e"]
    slow += ["inject=fdatasync,fsync:delay_enter=15s", "-p", str(server.process.pid)]
    tracer = subprocess.Popen(slow, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _traced(server.part.pid), what="a tracer at the server")
        written = 0
        # A server that fsyncs each second does so once in this while, and then puts its writes off.
        while written < 3_000 and not trace.read_text():
            link.call("SET", f"k{written}", "v")
            written += 1
        for _ in range(100):
            link.call("SET", f"k{written}", "v")
            written += 1
        server.process.kill()
        server.process.wait()
        server.start()
        wait_ready(server.address, server.part)
        with_it = Connection(server.address)
        try:
            assert with_it.call("EXISTS", *(f"k{number}" for number in range(written))) == written
        finally:
            with_it.close()
    finally:
        link.close()
        server.stop()
        tracer.terminate()
        tracer.wait()


def _traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return "TracerPid:\t0\n" not in status


def test_the_log_is_put_onto_the_disk_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = recorded(monkeypatch)
    monkeypatch.setattr(aof_sync, "INTERVAL_S", 0.01)
    server = start_server(str(tmp_path))
    link = Connection(server.address)
    log = "appendonly.aof.1.incr.aof"
    try:
        wait_until(lambda: log in synced and "appendonlydir" in synced)
        synced.clear()
        link.call("SET", "k", "v")
        wait_until(lambda: log in synced)
    finally:
        link.close()
        server.stop()


def test_only_what_has_changed_is_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = recorded(monkeypatch)
    for name in ("base", "incr"):
        (tmp_path / name).write_text("some")
    made = AofSync(str(tmp_path))
    made.sync()
    assert sorted(synced) == sorted(["base", "incr", tmp_path.name])
    made.sync()
    assert len(synced) == 3
    (tmp_path / "incr").write_text("some more")
    made.sync()
    assert synced[3:] == ["incr"]
    (tmp_path / "new").write_text("another log of the same size")
    (tmp_path / "new").rename(tmp_path / "base")
    made.sync()
    assert synced[4:] == ["base"]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files and folders that are synced from now on."""
    synced: list[str] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        really(fd)

    monkeypatch.setattr(aof_sync.os, "fsync", fsync)
    return synced


def test_a_disk_that_fails_is_said_once_and_its_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = AofSync(str(tmp_path / "log"))
    made.sync()  # there is no log yet
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "file").write_text("x")

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(aof_sync.os, "fsync", fails)
        made.sync()
        made.sync()
    said = capfd.readouterr().err
    assert said.count("writing the server's log to the disk fails: Input/output error; until that is better") == 1, said
    made.sync()
    assert "the server's log is on the disk again" in capfd.readouterr().err
