"""The native part: which launches it starts by itself, that nothing is lost between it and Python, and its parser."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from pilotq.broker.launcher_kind import VARIABLE, native_failure
from pilotq.workers.protocol import (
    Begun,
    Call,
    Element,
    Exited,
    Forget,
    GroupSwept,
    Launch,
    LaunchBase,
    LaunchRun,
    LaunchSlot,
    Quit,
    Retract,
    Signal,
    Started,
    encode_frame,
)
from tests.support.launcher_driver import CPUS, Driver, packed_strings, run_of
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

NATIVE = ROOT / "workers" / "launcher" / "native"
# A launcher that writes down which tasks are started in Python.
NOTING = """
import sys
from pilotq.workers.launcher import launcher, spawn
real = spawn.Spawner.spawn
def noting(self, launch, *more):
    with open(launch.cwd + b"/in-python", "a") as file: print(launch.id, file=file)
    return real(self, launch, *more)
spawn.Spawner.spawn = noting
launcher.main(sys.argv[1:])
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    if native_failure():
        pytest.skip("the native launcher is not built here")
    monkeypatch.setenv(VARIABLE, "native")
    driver = Driver(tmp_path, program=("-c", NOTING))
    yield driver
    driver.close()


def in_python(driver: Driver) -> list[str]:
    path = driver.folder / "in-python"
    return path.read_text().split() if path.exists() else []


def chained(driver: Driver, *commands: str, head: str = "read word <go") -> list[Launch]:
    """Launches of one chain, sent; the first one waits for the FIFO ``go``."""
    os.mkfifo(driver.folder / "go")
    launches = [driver.prepare("sh", "-c", command) for command in (head, *commands)]
    for before, launch in pairwise(launches):
        launch.after = before.key
    driver.send(*launches)
    return launches


def test_plain_launches_are_never_started_in_python(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("words")
    base = driver.base("own", umask=0o077, limits={7: 99})
    driver.run("true")
    driver.run("sh", "-c", "echo out; echo err >&2", env={"PILOTQ_INDEX": "7"}, base=base, cpus=CPUS[-1:])
    driver.run("/bin/cat", stdin=str(tmp_path / "in"), stdout=str(tmp_path / "out"), stderr=str(tmp_path / "out"))
    launches = chained(driver, *["exit 3"] * 20, head="exit 0")
    assert driver.get(Exited, launches[-1].key).status == 3 << 8
    key = driver.launch("sh", "-c", "echo long; exec sleep 1000")
    driver.get(Started, key)
    driver.signal(key, signal.SIGKILL)
    assert driver.get(Exited, key).stdout.data == b"long\n"
    assert in_python(driver) == []


def test_what_is_not_plain_is_started_in_python_and_its_chain_goes_on_natively(driver: Driver, tmp_path: Path) -> None:
    first = driver.prepare("true", id="first")
    script = driver.prepare("sh", id="script", script=b"echo here\n", after=first.key)
    last = driver.prepare("true", id="last", after=script.key)
    driver.send(first, script, last)
    assert driver.get(Exited, script.key).stdout.data == b"here\n"
    driver.get(Exited, last.key)
    suffixed = driver.prepare("true", id="suffixed", stdout=str(tmp_path / "out"), suffix=".2")
    folder = driver.prepare("true", id="folder", stdout=str(tmp_path / "deep" / "out"))
    driver.send(suffixed, folder)
    for launch in (suffixed, folder):
        driver.get(Exited, launch.key)
    assert set(in_python(driver)) <= {"first", "script", "suffixed", "folder"}
    assert {"script", "suffixed", "folder"} <= set(in_python(driver))


def test_a_chain_that_changes_hands_keeps_its_order_and_loses_nothing(driver: Driver, tmp_path: Path) -> None:
    """Handed over while its first launch runs, for a launch behind it, a retraction, and a signal."""
    head, one, two, three = chained(driver, "echo 1 >>order", "echo 2 >>order", "echo 3 >>order")
    four = driver.prepare("sh", "-c", "echo $0 >>order", id="four", script=b"echo 4 >>order", after=three.key)
    driver.send(four, Retract(two.key))
    (tmp_path / "go").write_text("now\n")
    exited = [driver.get(Exited, launch.key) for launch in (head, one, three, four)]
    assert [end.status for end in exited] == [0] * 4
    assert (tmp_path / "order").read_text().split()[:2] == ["1", "3"]
    assert driver.find(Begun, two.key) is None
    ends = [record.key for record in driver.seen if isinstance(record, Exited)]
    assert ends == [launch.key for launch in (head, one, three, four)]


def test_an_orphan_is_found_whoever_has_its_launch(driver: Driver) -> None:
    """Each end is one of a moment, with others around it that the native part has."""
    others = [driver.launch("sh", "-c", "sleep 0.01") for _ in range(30)]
    key = driver.launch("sh", "-c", "setsid sleep 1000 & exit 0")
    assert driver.get(Exited, key).remaining == 1
    for other in others:
        assert driver.get(Exited, other).remaining == 0
    driver.signal(key, signal.SIGTERM)
    driver.get(GroupSwept, key)


def test_a_program_in_front_on_the_path_is_found_within_a_second(driver: Driver, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "two" / "tool").write_text("#!/bin/sh\necho two\n")
    (tmp_path / "two" / "tool").chmod(0o755)
    base = driver.base("path", PATH=f"{tmp_path}/one:{tmp_path}/two:/bin")
    assert driver.run("tool", base=base).stdout.data == b"two\n"
    (tmp_path / "one" / "tool").write_text("#!/bin/sh\necho one\n")
    (tmp_path / "one" / "tool").chmod(0o755)
    wait_until(lambda: driver.run("tool", base=base).stdout.data == b"one\n", seconds=5)
    (tmp_path / "one" / "tool").unlink()
    assert driver.run("tool", base=base).stdout.data == b"two\n"


def test_a_run_is_started_by_the_native_part_alone(driver: Driver) -> None:
    run = run_of(driver, 40, "/bin/true")
    driver.send(run)
    driver.end_of(run.launch.key + 39)
    assert in_python(driver) == []


def test_frames_in_pieces_are_read_whole(driver: Driver) -> None:
    launches = [driver.prepare("true") for _ in range(5)]
    data = encode_frame(launches)
    for begin in range(0, len(data), 97):
        os.write(driver.down, data[begin : begin + 97])
    assert all(driver.get(Exited, launch.key).status == 0 for launch in launches)


# In one turn of the loop a launch is handed over, as it has ended with much output, and another one arrives.
HANDED_OVER = """
import os, select, sys
from pilotq.broker.launcher_kind import native_module
from pilotq.workers.protocol import Launch, encode_frame

class File:
    def __init__(self): self.fd = os.memfd_create("output")

native = native_module()
pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(4)]
(down, send), (_, up), (_, wake), (children, child_ended) = pipes
poll = select.epoll()
poll.register(down, select.EPOLLIN)
poll.register(children, select.EPOLLIN)
mains, cpus = {}, bytes([255]) * 128
null = os.open("/dev/null", os.O_RDONLY)
core = native.Core(down, up, wake, poll.fileno(), children, null, cpus, {}, mains, File, lambda file: None, None)
core.add_context(b"b\\0s", native.Context(None, [b"PATH=/bin:/usr/bin"], cpus, 0o22, []))

def launch(key, command, after=0):
    os.write(send, encode_frame([Launch(key, "t", 1, "b", "s", [b"sh", b"-c", command], {}, b"/", after=after)]))

launch(1, b"head -c 9999 /dev/zero")
core.run(0.0, True)
poll.poll(0)  # now it has found the pipe empty, and will tell of the end first
(pid,) = mains
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
os.write(child_ended, b"!")
launch(2, b"exit 0", int(sys.argv[1]))
messages, _, _, taken, _, _ = core.run(0.0, True)
print(len(messages or ()), len(taken or ()), list(mains.values()))
messages, _, _, _, _, _ = core.run(0.0, True)
print(len(messages or ()), list(mains.values()))
for pid in mains:
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize(("after", "expected"), [(1, ["1 1 []", "0 []"]), (0, ["0 1 []", "0 [2]"])])
def test_nothing_starts_before_a_launch_that_was_handed_over_is_known_to_python(
    after: int, expected: list[str]
) -> None:
    """What is chained behind it goes the same way; another one must not get a number that Python believes in use."""
    if native_failure():
        pytest.skip("the native launcher is not built here")
    command = [sys.executable, "-c", HANDED_OVER, str(after)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == expected


# The launcher under strace, which counts its own system calls, and not those of its tasks.
COUNTING = """
import os, sys
launcher = [sys.executable, "-m", "pilotq.workers.launcher.launcher", *sys.argv[1:]]
os.execvp("strace", ["strace", "--summary-only", "--output=" + os.environ["COUNTS"], *launcher])
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_short_task_costs_few_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_failure():
        pytest.skip("the native launcher is not built here")
    monkeypatch.setenv(VARIABLE, "native")
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts"))
    calls = {}
    for number in (1, 201):
        driver = Driver(tmp_path, program=("-c", COUNTING))
        launches = [driver.prepare("/bin/true") for _ in range(number)]
        for before, launch in pairwise(launches):
            launch.after = before.key
        driver.send(*launches)
        driver.get(Exited, launches[-1].key)
        driver.close()
        total = next(line for line in (tmp_path / "counts").read_text().splitlines() if line.endswith("total"))
        calls[number] = int(total.split()[3])
    assert (calls[201] - calls[1]) / 200 <= 16, calls


def sample_messages() -> list[bytes]:
    launch = Launch(
        70_000, "7_3", 2, "base", "n[0]", [b"/bin/echo", b"x" * 300], {b"A": b"1", b"PILOTQ_INDEX": b"3"}, b"/tmp",
        b"/in", b"/out", b"", after=69_999,
    )  # fmt: skip
    scripted = msgspec.structs.replace(launch, script=b"#!/bin/sh\n", files={b"/f": b"content"}, make_cwd=True)
    call = Call(1, "f", 1, "base", "n[0]", {}, b"/", payload=bytes(range(256)), element=-5, rq_fields={b"a": b"b"})
    template = msgspec.structs.replace(
        launch,
        id="7_\0i",
        env={b"PILOTQ_INDEX": b"\0i", b"QCG_PM_STEP_ID": b"ab\0n"},
        argv=[b"/bin/echo", b"a\0ib\0i", b"\0n"],
        element=Element(3, 1, 1e9),
    )
    run = LaunchRun(300, 7, template)
    argued = LaunchRun(
        3,
        7,
        msgspec.structs.replace(template, argv=[], cwd=b"\0A", stdin=b"\0B", stdout=b"\0C", stderr=b"\0D"),
        [packed_strings("/tmp", "", "/o", "", "/bin/echo", "a"), *[packed_strings("/", "", "", "", "b")] * 2],
    )
    valued = msgspec.structs.replace(template, argv=[b"/bin/echo", b"<\0A>"], stdout=b"/out/\0A\0i")
    own = [argued, LaunchRun(2, 1, valued, [packed_strings("x" * 300), packed_strings("")])]
    others = [run, *own, LaunchBase("base", {b"PATH": b"/bin"}, 0o22, {7: 1 << 40}),
              LaunchSlot("n[0]", {}, {}, [0, 5000]),
              Retract(1), Signal(1 << 40, 9, "x"), Forget(), Quit()]  # fmt: skip
    return [msgspec.msgpack.encode(message) for message in (launch, scripted, call, *others)]


def test_the_parser_survives_bytes_of_any_kind(tmp_path: Path) -> None:
    """Messages with random changes, by the compiled parser alone, with checks of each access to memory."""
    if shutil.which("cc") is None:
        pytest.skip("the native launcher is not built here")
    program = tmp_path / "fuzz"
    sources = [NATIVE / "launch.c", NATIVE / "records.c", ROOT / "tests" / "support" / "fuzz_records.c"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *checks, f"-I{NATIVE}", "-o", program, *sources], check=True)
    for number, message in enumerate(sample_messages()):
        (tmp_path / f"seed{number}").write_bytes(message)
    seeds = [str(tmp_path / f"seed{number}") for number in range(len(sample_messages()))]
    done = subprocess.run([program, "20000", *seeds], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, all_of_them = map(int, done.stdout.split())
    assert 0 < plain < all_of_them == 20_000 * len(seeds)
