"""Captured output is exact to the byte whatever its size, never mixed, and never ends the launcher."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.workers.launcher.capture import PACK_BYTES, Capture
from pilotq.workers.protocol import END_BYTES, INLINE_BYTES, Captured, Exited, GroupSwept, Started, tail
from tests.support.launcher_driver import Driver
from tests.support.waiting import wait_until

WRITE = """
import os, sys
for fd, seed in ((1, sys.argv[2]), (2, sys.argv[3])):
    data = (seed * int(sys.argv[1])).encode()[:int(sys.argv[1])]
    while data: data = data[os.write(fd, data):]
"""


@pytest.fixture
def driver(tmp_path: Path, each_launcher: str) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    yield driver
    driver.close()


@pytest.fixture
def capture(tmp_path: Path) -> Iterator[Capture]:
    capture = Capture(str(tmp_path), "n1")
    yield capture
    capture.close()


def content(captured: Captured) -> bytes:
    if not captured.path:
        assert len(captured.data) == captured.length
        return captured.data
    assert captured.data == b""
    with open(captured.path, "rb") as file:
        file.seek(captured.offset)
        data = file.read(captured.length)
    assert len(data) == captured.length
    return data


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES, INLINE_BYTES + 1, PACK_BYTES, PACK_BYTES + 1, 2 << 20])
def test_both_streams_are_captured_to_the_byte(driver: Driver, size: int) -> None:
    key = driver.launch(sys.executable, "-c", WRITE, str(size), "out", "err", id="big", attempt=2)
    exited = driver.get(Exited, key)
    assert content(exited.stdout) == (b"out" * size)[:size]
    assert content(exited.stderr) == (b"err" * size)[:size]
    kept = {path.name for path in driver.output.iterdir() if path.suffix in (".out", ".err")}
    assert kept == ({"big.2.out", "big.2.err"} if size > PACK_BYTES else set())
    if INLINE_BYTES < size <= PACK_BYTES:
        assert exited.stdout.path == exited.stderr.path
        assert exited.stdout.path.endswith(f"n1.{driver.process.pid}.pack".encode())


def test_tasks_that_follow_each_other_on_one_file_do_not_mix(driver: Driver) -> None:
    sizes = [5000, 3, 0, 4096, 100_000, 1, 0]
    records = []
    for number, size in enumerate(sizes):
        key = driver.launch(sys.executable, "-c", WRITE, str(size), chr(65 + number), chr(97 + number))
        records.append(driver.get(Exited, key))
    assert len(list(driver.output.glob("*.pool"))) == 2
    for number, (size, exited) in enumerate(zip(sizes, records, strict=True)):
        assert content(exited.stdout) == chr(65 + number).encode() * size
        assert content(exited.stderr) == chr(97 + number).encode() * size


def test_tasks_that_run_at_once_have_files_of_their_own(driver: Driver) -> None:
    keys = [driver.launch("sh", "-c", f"echo {n}; sleep 0.1; echo {n} >&2") for n in range(20)]
    for number, key in enumerate(keys):
        exited = driver.get(Exited, key)
        assert (exited.stdout.data, exited.stderr.data) == (b"%d\n" % number, b"%d\n" % number)


def test_a_position_or_a_hole_that_a_task_leaves_does_not_reach_the_next_one(driver: Driver) -> None:
    seek = "import os; os.lseek(1, 1000, 0); os.write(1, b'x'); os.lseek(1, 500, 0)"
    assert driver.run(sys.executable, "-c", seek).stdout.data == b"x"
    tell = "import os; print(os.lseek(1, 0, 1), os.lseek(2, 0, 1))"
    assert driver.run(sys.executable, "-c", tell).stdout.data == b"0 0\n"


def test_output_can_be_read_while_the_task_runs(driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    key = driver.launch("sh", "-c", "echo early; read word <go; echo late", stderr="/dev/null")
    started = driver.get(Started, key)
    path = Path(os.fsdecode(started.stdout_path))
    assert started.stderr_path == b""
    assert path.stat().st_mode & 0o777 == 0o600
    wait_until(lambda: path.read_bytes() == b"early\n")
    (tmp_path / "go").write_text("now\n")
    assert driver.get(Exited, key).stdout.data == b"early\nlate\n"


def test_what_a_leftover_writes_is_of_its_task_and_no_other(driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    key = driver.launch("sh", "-c", "echo main; setsid sh -c 'read word <go; echo stray; exec sleep 1000' & exit 0")
    exited = driver.get(Exited, key)
    assert (exited.remaining > 0, exited.stdout) == (True, Captured(end=b"main\n"))
    assert driver.run("echo", "other").stdout.data == b"other\n"
    (tmp_path / "go").write_text("now\n")
    path = Path(os.fsdecode(driver.get(Started, key).stdout_path))
    wait_until(lambda: path.read_bytes() == b"main\nstray\n")
    driver.signal(key, signal.SIGKILL)
    assert driver.get(GroupSwept, key).stdout.data == b"main\nstray\n"


def test_a_refused_launch_leaves_its_files_to_the_next_one(driver: Driver) -> None:
    for _ in range(5):
        driver.refused("/no/such/program")
    driver.run("true")
    assert len(list(driver.output.iterdir())) == 2


def test_output_without_a_directory_is_refused_and_the_launcher_lives(driver: Driver) -> None:
    driver.output.rmdir()
    refused = driver.refused("true")
    assert refused.reason == "output"
    assert "cannot be captured: No such file or directory" in refused.message
    driver.output.mkdir()
    assert driver.run("echo", "back").stdout.data == b"back\n"


def test_a_full_disk_keeps_the_file_where_it_is(capture: Capture, tmp_path: Path) -> None:
    (tmp_path / f"n1.{os.getpid()}.pack").symlink_to("/dev/full")
    file = capture.take()
    os.write(file.fd, b"x" * 5000)
    kept = capture.collect(file, "a.1.out")
    assert (kept.path, kept.offset, kept.length) == (bytes(tmp_path / "a.1.out"), 0, 5000)
    assert content(kept) == b"x" * 5000
    assert capture.take().path != kept.path


def test_what_can_be_kept_nowhere_is_cut(capture: Capture, tmp_path: Path) -> None:
    (tmp_path / f"n1.{os.getpid()}.pack").symlink_to("/dev/full")
    (tmp_path / "a.1.out").mkdir()
    file = capture.take()
    os.write(file.fd, b"x" * 5000)
    assert capture.collect(file, "a.1.out") == Captured(b"x" * INLINE_BYTES, length=5000)
    again = capture.take()
    assert again is file
    assert capture.collect(again, "a.2.out") == Captured()


def test_closing_removes_the_pool_and_keeps_what_messages_point_to(tmp_path: Path) -> None:
    capture = Capture(str(tmp_path), "n1")
    files = [capture.take() for _ in range(3)]
    os.write(files[0].fd, b"p" * 5000)
    os.write(files[1].fd, b"k" * (PACK_BYTES + 1))
    packed, kept = capture.collect(files[0], "a.1.out"), capture.collect(files[1], "b.1.out")
    capture.close()
    assert {bytes(path) for path in tmp_path.iterdir()} == {packed.path, kept.path}
    assert content(packed) == b"p" * 5000


def test_the_end_of_large_output_travels_with_its_place(capture: Capture) -> None:
    for size in (INLINE_BYTES + 1, PACK_BYTES + 1):
        file = capture.take()
        os.write(file.fd, b"x" * (size - 4) + b"end\n")
        kept = capture.collect(file, f"{size}.1.out")
        assert kept.data == b"" and tail(kept, 4) == b"end\n" and len(kept.end) == END_BYTES
    small = capture.take()
    os.write(small.fd, b"small")
    assert tail(capture.collect(small, "a.1.out"), 3) == b"all"


def test_the_pack_of_an_earlier_process_is_kept(tmp_path: Path) -> None:
    """Pids come again, above all in a container that is started again: what was kept is somebody's output."""
    kept = []
    for content_of in (b"a", b"b"):
        capture = Capture(str(tmp_path), "n1")
        file = capture.take()
        os.write(file.fd, content_of * 10_000)
        kept += [capture.collect(file, "1.1.out"), capture.keep(content_of.upper() * 10_000, "1.1.result")]
        capture.close()
    assert [content(captured) for captured in kept] == [letter * 10_000 for letter in (b"a", b"A", b"b", b"B")]
