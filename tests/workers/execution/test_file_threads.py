"""What is done with files beside the loop of the worker process."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pilotq.workers.execution.file_threads import THREADS_MAX, FileThreads
from tests.support.waiting import wait_until


def test_what_hangs_holds_up_nothing_else_and_the_end_waits_for_it_with_a_bound() -> None:
    threads = FileThreads(0.0)
    go_on = threading.Event()
    done: list[int] = []
    try:
        for _ in range(THREADS_MAX - 1):
            threads.run(go_on.wait)  # type: ignore[arg-type]
        for number in range(100):
            threads.run(lambda n=number: done.append(n))  # type: ignore[misc]
        wait_until(lambda: done == list(range(100)), what="what does not hang, in order")
        began = time.monotonic()
        assert not threads.finish(0.05)
        assert time.monotonic() - began < 5
    finally:
        go_on.set()
    assert threads.finish()


def test_an_error_ends_no_thread(capfd: Any) -> None:
    threads = FileThreads(0.0)
    for _ in range(THREADS_MAX + 1):
        threads.run(lambda: os.unlink("/no/such/file"))
    assert threads.finish()
    assert capfd.readouterr().err.count("/no/such/file: No such file or directory") == THREADS_MAX + 1


def test_what_nobody_thought_of_ends_no_thread(capfd: Any) -> None:
    threads = FileThreads(0.0)
    for _ in range(THREADS_MAX + 1):
        threads.run(lambda: os.unlink("a\0b"))
    assert threads.finish()
    assert capfd.readouterr().err.count("ValueError") == THREADS_MAX + 1


def test_where_no_thread_can_be_started_it_is_tried_again(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = FileThreads(0.0)
    done: list[int] = []
    with monkeypatch.context() as shortage:
        shortage.setattr(threading.Thread, "start", start)
        threads.run(lambda: done.append(1))
    assert "a thread for files cannot be started: can't start new thread" in capfd.readouterr().err
    threads.run(lambda: done.append(2))
    assert threads.finish()
    assert sorted(done) == [1, 2]


def test_a_file_that_cannot_be_opened_keeps_no_other_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pack, no_directory = tmp_path / "n1.7.pack", tmp_path / "n1.7.pack" / "file"
    pack.touch()
    synced: list[int] = []
    monkeypatch.setattr("pilotq.workers.execution.file_threads.os.fsync", synced.append)
    threads = FileThreads(0.0)
    threads.sync(bytes(tmp_path / "a" / "file"))
    threads.sync(bytes(no_directory))
    threads.sync(bytes(tmp_path / "z"))
    (tmp_path / "z").touch()
    assert threads.finish()
    assert "Not a directory" in capfd.readouterr().err
    assert len(synced) >= 2


def test_output_is_written_to_disk_once_for_many_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pack, gone = tmp_path / "n1.7.pack", tmp_path / "gone"
    pack.touch()
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr("pilotq.workers.execution.file_threads.os.fsync", fsync)
    threads = FileThreads(60.0)
    for _ in range(100):
        threads.sync(bytes(pack))
    threads.sync(bytes(gone))
    assert synced == [], "not before many have ended"
    assert threads.finish()
    assert synced == [str(pack), str(tmp_path)]
    assert capfd.readouterr().err == ""
