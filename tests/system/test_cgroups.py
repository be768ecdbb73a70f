"""Memory limits by cgroups of version 2, where this machine lets us make some: as root in a container, or delegated.

Where it does not, `tests/support/user-mode-linux` emulates one that does; with PILOTQ_TEST_CGROUPS=1 that is a failure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker import Broker, Request, Task
from pilotq.broker.errors import MemoryExceeded
from pilotq.workers.cgroups import find_base
from tests.support import functions
from tests.support.command_line import Cli, command, environment, in_background, prompt
from tests.support.waiting import wait_until

MB = 1 << 20
USE = "kept = bytearray(400 << 20); kept[::4096] = kept[1::4096]"
PYTHON = f"{sys.executable} -I -S -c"
ASKED = "PILOTQ_TEST_CGROUPS"
pytestmark = pytest.mark.skipif(
    bool(find_base()[1]) and os.environ.get(ASKED) != "1", reason="tasks cannot have cgroups here"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cgroups")


@pytest.fixture(scope="module")
def cli(folder: Path) -> Iterator[Cli]:
    with in_background(folder, "--nodes", "2,1") as found:
        yield found


def run(cli: Cli, *command: str) -> str:
    """What is known of the task when it has ended."""
    task = cli("enqueue", *command).stdout.strip()
    cli("wait", task, "--timeout", "100s")
    return cli("explain", task).stdout


def test_it_is_told_how_limits_hold(cli: Cli) -> None:
    assert "the kernel limits their cgroups" in cli("nodes").stdout
    assert "each task that asks for memory gets a cgroup" in cli("doctor").stdout


def test_the_kernel_ends_what_uses_too_much(cli: Cli) -> None:
    task = cli("enqueue", "--memory", "100M", "--", "sh", "-c", f"setsid {PYTHON} '{USE}' & wait; sleep 60").stdout
    cli("wait", task.strip(), "--timeout", "100s")
    said = cli("explain", task.strip()).stdout
    assert re.search("It used all of 100 MiB on n[01]: the kernel has killed it, in its cgroup", said), said
    assert cli("list").stdout.splitlines()[1].split()[1:4] == ["failed", "memory", "137"]
    peak = json.loads(cli("show", task.strip(), "--json").stdout)[0]["max_rss"]
    assert 90 * MB < peak < 130 * MB


def test_no_cgroup_is_left(cli: Cli) -> None:
    base = Path(find_base()[0])
    assert "it finished" in run(cli, "--memory", "100M", "--", "true")
    assert [
        path.name for path in base.iterdir() if path.name.startswith("pilotq-") and "members" not in path.name
    ] == []


def test_what_others_have_read_does_not_count(cli: Cli, tmp_path: Path) -> None:
    """The kernel's count decides, by which a page of a file belongs to whoever has read it first: here to this test."""
    file = tmp_path / "read by many"
    file.write_bytes(bytes(60 * MB))
    use = "import mmap, sys, time; kept = bytearray(80 << 20); kept[::4096] = kept[1::4096]; "
    read = "f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); sum(m[::4096]); time.sleep(1.5)"
    assert "it finished" in run(cli, "--memory", "100M", "--", sys.executable, "-I", "-S", "-c", use + read, str(file))


def test_a_function_is_measured(cli: Cli, folder: Path) -> None:
    with Broker.connect(str(folder / ".pilotq" / "current")) as broker:
        task = broker.enqueue(Task(function=functions.use_memory, args=(400, 30), request=Request(memory=150 * MB)))
        with pytest.raises(MemoryExceeded, match="It used .* of 150 MiB on n[01]: its worker has killed it"):
            broker.result(task, timeout=100)


def test_a_part_on_another_node_is_measured(cli: Cli) -> None:
    use = f"{USE}; import time; time.sleep(60)"
    script = f"$HYDRA_LAUNCHER_EXEC n1 \"{PYTHON} '{use}'\"; sleep 60"
    said = run(cli, "--nodes", "2", "--memory", "150M", "--", "sh", "-c", script)
    assert "of 150 MiB on n1: its worker has killed it" in said


@pytest.fixture(scope="module")
def confined(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A pilot that is in a cgroup of 300 MB, as in a job step of a batch system, and only measures its tasks."""
    group = Path(find_base()[0]) / f"pilotq-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.max").write_text(str(300 * MB))
    folder = tmp_path_factory.mktemp("confined")
    start = command("start", "--nodes", "1", "--memory-policy", "watch")
    enter = ["sh", "-c", 'echo 0 >"$0/cgroup.procs"; exec "$@"', str(group)]
    subprocess.run([*enter, *start], cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=60)
    run = prompt(folder)
    yield run
    run("stop", "--now")
    wait_until(lambda: not (group / "cgroup.procs").read_text(), what="the cgroup is empty")
    group.rmdir()


def test_a_kill_in_the_pilots_cgroup_is_named(confined: Cli) -> None:
    """It takes the task, and leaves the worker."""
    said = run(confined, "--", sys.executable, "-I", "-S", "-c", USE)
    assert "It was killed by the kernel for memory, probably: a process of its worker's cgroup was, on n0" in said
    assert "it finished" in run(confined, "--", "true")


def test_a_kill_of_a_neighbour_is_not_claimed(confined: Cli) -> None:
    """The task lets a process be killed in another cgroup, and then kills itself."""
    group = Path(find_base()[0]) / f"pilotq-test-{os.getpid()}-neighbour"
    group.mkdir()
    (group / "memory.max").write_text(str(30 * MB))
    neighbour = f'echo 0 >{group}/cgroup.procs; exec {PYTHON} "{USE}"'
    said = run(confined, "--", "sh", "-c", f"sh -c '{neighbour}'; kill -9 $$")
    assert "oom_kill 1" in (group / "memory.events").read_text()
    assert "probably" not in said and "Signal 9 (SIGKILL) killed it" in said
    group.rmdir()
