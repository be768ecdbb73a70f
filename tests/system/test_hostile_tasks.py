"""Tasks that behave as badly as they can, in a real pilot: each ends with the right reason, and nothing stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker import Task
from tests.support.live_pilot import LivePilot, left_of, live_pilot
from tests.support.waiting import wait_until

FOREVER = "1000"  # seconds; nothing waits so long


@pytest.fixture(scope="module")
def shared_pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("hostile"), restart_limit=20) as pilot:
        yield pilot


@pytest.fixture
def pilot(shared_pilot: LivePilot) -> Iterator[LivePilot]:
    """After each test nothing of its tasks lives, and all cores are free."""
    yield shared_pilot
    shared_pilot.assert_calm()


# what does not want to end


def test_it_ignores_sigterm(pilot: LivePilot) -> None:
    task = pilot.ended(pilot.enqueue("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done", time_limit=0.5))
    assert (task.status, task.reason, task.signal, task.exit_code) == ("failed", "time limit", 9, None)


def test_it_stops_itself(pilot: LivePilot) -> None:
    task = pilot.ended(pilot.enqueue("sh", "-c", f"kill -STOP $$; sleep {FOREVER}", time_limit=0.5))
    assert (task.status, task.reason, task.signal) == ("failed", "time limit", 9)


def test_a_stopped_one_is_canceled(pilot: LivePilot, tmp_path: Path) -> None:
    task_id = pilot.enqueue("sh", "-c", f"touch {tmp_path}/begun; kill -STOP $$")
    wait_until((tmp_path / "begun").exists)
    wait_until(lambda: sorted(n["used"] for n in json.loads(pilot.cli("nodes", "--json").stdout)) == [0, 1])
    pilot.broker.cancel([task_id])
    task = pilot.ended(task_id)
    assert (task.status, task.reason, task.signal) == ("canceled", "canceled", 9)


@pytest.mark.parametrize("hidden", ["", "env -i PATH=$PATH "], ids=["marked", "without its environment"])
def test_it_leaves_a_daemon(pilot: LivePilot, tmp_path: Path, hidden: str) -> None:
    """Forked twice, in a session of its own, deaf to SIGTERM; the task is over when that is dead."""
    daemon, pid = tmp_path / "daemon", tmp_path / "pid"
    daemon.write_text(f"trap '' TERM; echo $$ > {pid}; sleep {FOREVER}; sleep {FOREVER}")
    script = f"({hidden}setsid sh {daemon} &); while [ ! -s {pid} ]; do sleep 0.02; done"
    task = pilot.ended(pilot.enqueue("sh", "-c", script))
    assert (task.status, task.reason, task.exit_code) == ("finished", "", 0)
    assert not os.path.exists(f"/proc/{pid.read_text().strip()}")


def test_it_forks_and_forks(pilot: LivePilot, tmp_path: Path) -> None:
    """A tree of 63 processes, every second one with a session of its own; all of them ignore SIGTERM."""
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for depth in range(5):
    for side in range(2):
        if os.fork() == 0:
            if side:
                os.setsid()
            break
    else:
        break
os.open("{tmp_path}/%d" % os.getpid(), os.O_CREAT)
time.sleep({FOREVER})
"""
    task = pilot.ended(pilot.python(code, time_limit=2))
    assert (task.status, task.reason, task.signal) == ("failed", "time limit", 9)
    assert len(list(tmp_path.iterdir())) == 63


def test_it_runs_away(pilot: LivePilot, tmp_path: Path) -> None:
    """Each process forks the next one, in a session of its own, and ends: whoever is to be killed has gone already."""
    code = f"""
import os, time
end = time.time() + {FOREVER}
while time.time() < end:
    os.open("{tmp_path}/ran", os.O_CREAT)
    if os.fork():
        while not os.path.exists("{tmp_path}/ran"):  # the first one lives until another has run
            time.sleep(0.001)
        os._exit(0)
    os.setsid()
"""
    task = pilot.ended(pilot.python(code))
    assert (task.status, task.exit_code) == ("finished", 0)
    assert (tmp_path / "ran").exists()


def test_it_is_a_bomb(pilot: LivePilot, tmp_path: Path) -> None:
    """Every process forks and forks; the bomb has a limit, counted in a file, or the machine would end with it."""
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
count = os.open("{tmp_path}/count", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
while os.fstat(count).st_size < 300:
    if os.fork() == 0:
        os.write(count, b"x")
        if os.getpid() % 2:
            os.setsid()
time.sleep({FOREVER})
"""
    task = pilot.ended(pilot.python(code, time_limit=2))
    assert (task.status, task.reason, task.signal) == ("failed", "time limit", 9)
    assert (tmp_path / "count").stat().st_size >= 300


def test_it_leaves_zombies(pilot: LivePilot) -> None:
    """Its own, and those of a child that outlives it."""
    code = f"""
import os, time
def zombies():
    for _ in range(10):
        if os.fork() == 0:
            os._exit(0)
zombies()
if os.fork() == 0:
    os.setsid()
    zombies()
    time.sleep({FOREVER})
"""
    task = pilot.ended(pilot.python(code))
    assert (task.status, task.exit_code) == ("finished", 0)


def test_it_kills_its_parent(pilot: LivePilot) -> None:
    """The launcher dies with all it runs. Whoever does this again and again fails; its neighbours pay nothing."""
    neighbours = [Task(command=["sleep", "0.3"]) for _ in range(100)]
    killer = Task(command=["sh", "-c", f"kill -9 $PPID; sleep {FOREVER}"])
    ids = pilot.broker.enqueue_many([*neighbours[:50], killer, *neighbours[50:]])
    killer_id = ids.pop(50)
    task = pilot.ended(killer_id)
    assert (task.status, task.reason) == ("failed", "crash limit")
    assert len(pilot.lines(killer_id)) == 3
    pilot.broker.wait(ids, timeout=60)
    assert {pilot.broker.task(i).status for i in ids} == {"finished"}
    # The last trials were made in launchers of their own; these end with their task. Those of the two cores of each
    # node are left.
    wait_until(lambda: sum("workers.launcher" in p for p in left_of(pilot.pilot.directory)) == 2 * len(pilot.nodes))


# what comes in and goes out


def test_it_floods_its_output(pilot: LivePilot) -> None:
    """52 MB without a newline and without sense as UTF-8: every byte arrives."""
    code = """
import os
block = bytes(i * 7 % 256 for i in range(1 << 16)).replace(b"\\n", b"\\xff")
for _ in range(800):
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(1, rest):]
os.write(2, b"\\xfe\\xff" * 10)
"""
    task_id = pilot.python(code)
    assert pilot.ended(task_id).status == "finished"
    block = bytes(i * 7 % 256 for i in range(1 << 16)).replace(b"\n", b"\xff")
    logs = pilot.cli("logs", task_id)
    assert hashlib.sha256(logs.stdout).digest() == hashlib.sha256(block * 800).digest(), logs.stderr
    assert pilot.cli("logs", "--stderr", task_id).stdout == b"\xfe\xff" * 10


def test_it_closes_its_descriptors(pilot: LivePilot) -> None:
    task = pilot.ended(pilot.enqueue("sh", "-c", "exec 0<&- 1>&- 2>&-; sleep 0.2; exit 4"))
    assert (task.status, task.reason, task.exit_code) == ("failed", "exit", 4)


def test_nobody_writes_to_its_stdin(pilot: LivePilot, tmp_path: Path) -> None:
    """A FIFO that nobody opens stops neither the task nor the 200 beside it."""
    os.mkfifo(tmp_path / "fifo")
    reader, *others = pilot.broker.enqueue_many(
        [Task(command=["cat"], stdin=str(tmp_path / "fifo")), *(Task(command=["true"]) for _ in range(200))]
    )
    assert pilot.broker.wait(others, timeout=60).finished == 200
    assert pilot.ended(reader).status == "finished"


def test_nobody_reads_its_stdout(pilot: LivePilot, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    task = pilot.ended(pilot.enqueue("echo", "hello", stdout=str(tmp_path / "fifo")))
    assert (task.status, task.reason, task.exit_code) == ("failed", "output", None)
    assert "fifo" in task.message


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_its_output_cannot_be_written(pilot: LivePilot, tmp_path: Path, stream: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "out")
    task = pilot.ended(pilot.enqueue("touch", str(tmp_path / "ran"), **{stream: path}))
    assert (task.status, task.reason, task.exit_code) == ("failed", "output", None)
    assert path in task.message
    assert not (tmp_path / "ran").exists()


# how it is called


@pytest.mark.parametrize("program", ["no-such-program", "/no/such/program", "./no-such-program"])
def test_its_program_is_missing(pilot: LivePilot, program: str) -> None:
    task = pilot.ended(pilot.enqueue(program, "argument"))
    assert (task.status, task.reason, task.exit_code) == ("failed", "not found", None)
    assert program in task.message


def test_its_directory_is_missing(pilot: LivePilot, tmp_path: Path) -> None:
    task = pilot.ended(pilot.enqueue("true", cwd=str(tmp_path / "nowhere")))
    assert (task.status, task.reason) == ("failed", "not found")
    assert f"{tmp_path}/nowhere" in task.message


def test_its_name_is_odd(pilot: LivePilot, tmp_path: Path) -> None:
    program = tmp_path / 'it\'s a "näme" $HOME; \\ *'
    shutil.copy(shutil.which("printf") or "", program)
    arguments = ["", " ", "'", '"', "$HOME", "a;b", "*", "ü\n", "\udc80"]
    task_id = pilot.enqueue(str(program), "<%s>", *arguments)
    assert pilot.ended(task_id).status == "finished"
    assert pilot.output(task_id) == b"".join(b"<" + os.fsencode(a) + b">" for a in arguments)


def test_it_enqueues_others(pilot: LivePilot) -> None:
    """They are tasks like any other: they outlive it, and have nothing of its own environment."""
    code = """
from pilotq.broker import Broker, Task
with Broker.connect() as broker:
    print(*broker.enqueue_many([Task(command=["sh", "-c", "sleep 0.2; echo $PILOTQ_TASK_ID $PILOTQ_EXECUTION"])] * 3))
"""
    parent = pilot.enqueue(sys.executable, "-c", code)
    assert pilot.ended(parent).status == "finished", pilot.output(parent, "stderr")
    children = pilot.output(parent).decode().split()
    assert len(children) == 3
    for child in children:
        assert pilot.ended(child).status == "finished"
        assert pilot.output(child).decode() == f"{child} 1\n"
