"""Memory that tasks ask for is a limit: real hogs on a real pilot, measured by its workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import Request, Task
from pilotq.broker.errors import MemoryExceeded
from pilotq.broker.store.journal import JournalEntry
from tests.support import functions
from tests.support.command_line import in_background
from tests.support.live_pilot import LivePilot, live_pilot

MB = 1 << 20
# Uses so many MB at so many MB a second, then waits for so long.
HOG = """
import sys, time
size, rate, hold = map(float, sys.argv[1:4])
kept, begin = [], time.monotonic()
while len(kept) * 4 < size:
    piece = bytearray(4 << 20)
    piece[::4096] = b"1" * 1024
    kept.append(piece)
    time.sleep(max(begin + len(kept) * 4 / rate - time.monotonic(), 0))
time.sleep(hold)
"""
# One mapping of so many MB that the process and three children use, all of it, for two seconds.
SHARING = """
import mmap, os, sys, time
memory = mmap.mmap(-1, int(sys.argv[1]) << 20)
memory[::4096] = b"1" * (len(memory) // 4096)
for _ in range(3):
    if not os.fork():
        sum(memory[::4096])
        time.sleep(2)
        os._exit(0)
for _ in range(3):
    os.wait()
"""


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("memory"), "n1:2") as live:
        yield live


def limited(size: int, **fields: Any) -> dict[str, Any]:
    return {"request": Request(memory=size * MB), **fields}


def hog(pilot: LivePilot, size: float, rate: float, hold: float = 0, **fields: Any) -> str:
    return pilot.enqueue(sys.executable, "-I", "-S", "-c", HOG, str(size), str(rate), str(hold), **fields)


def ended(pilot: LivePilot, task_id: str) -> JournalEntry:
    pilot.ended(task_id)
    return pilot.lines(task_id)[0]


def test_a_task_above_its_limit_ends_and_says_so_everywhere(pilot: LivePilot) -> None:
    task = hog(pilot, 4000, 100, **limited(120))
    entry = ended(pilot, task)
    assert (entry.status, entry.reason, entry.exit_code, entry.signal) == ("failed", "memory", 137, None)
    assert entry.max_rss is not None and 120 * MB < entry.max_rss < 300 * MB
    assert entry.message.endswith(" of 120 MiB on n1: its worker has killed it.")
    assert "it used too much memory: It used " in pilot.cli("explain", task).stdout.decode()
    assert pilot.cli("list").stdout.decode().splitlines()[1].split()[1:4] == ["failed", "memory", "137"]
    assert json.loads(pilot.cli("show", task, "--json").stdout)[0]["exit_code"] == 137


def test_a_hog_that_is_faster_than_the_watcher(pilot: LivePilot) -> None:
    entry = ended(pilot, hog(pilot, 8000, 1000, **limited(100)))
    assert entry.reason == "memory"
    assert entry.max_rss is not None and entry.max_rss < 1.3 * 100 * MB + 256 * MB


def test_all_processes_count_also_those_that_have_left_the_session(pilot: LivePilot) -> None:
    script = f"for i in 1 2 3; do setsid {sys.executable} -I -S -c '{HOG}' 70 70 60 & done; wait"
    entry = ended(pilot, pilot.enqueue(script=script, **limited(160)))
    assert entry.reason == "memory"
    assert entry.max_rss is not None and 160 * MB < entry.max_rss < 300 * MB
    pilot.assert_calm()


def test_a_daemon_counts(pilot: LivePilot) -> None:
    """It has a session of its own, and its parent has ended before anybody looked."""
    script = f"(setsid {sys.executable} -I -S -c '{HOG}' 400 100 60 &) ; sleep 60"
    assert ended(pilot, pilot.enqueue(script=script, **limited(150))).reason == "memory"
    pilot.assert_calm()


def test_shared_memory_counts_once(pilot: LivePilot) -> None:
    task = pilot.enqueue(sys.executable, "-I", "-S", "-c", SHARING, "150", **limited(260))
    entry = ended(pilot, task)
    assert (entry.status, entry.message) == ("finished", "")
    assert entry.max_rss is not None and 150 * MB < entry.max_rss < 260 * MB


def test_the_peak_is_that_of_all_processes(pilot: LivePilot) -> None:
    script = f"for i in 1 2; do {sys.executable} -I -S -c '{HOG}' 60 1000 2 & done; wait"
    entry = ended(pilot, pilot.enqueue(script=script))
    assert entry.status == "finished"
    assert entry.max_rss is not None and 120 * MB < entry.max_rss < 200 * MB


def test_a_function_above_its_limit_ends_with_its_interpreter(pilot: LivePilot) -> None:
    broker = pilot.broker
    task = broker.enqueue(Task(function=functions.use_memory, args=(400, 30), **limited(150)))
    with pytest.raises(MemoryExceeded, match="used too much memory .*It used .* of 150 MiB on n1"):
        broker.result(task, timeout=60)
    assert broker.result(broker.enqueue(Task(function=functions.use_memory, args=(20, 0), **limited(150)))) == 20


def test_what_is_only_reserved_is_no_limit(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1", "--memory-policy", "reserve") as cli:
        task = cli("enqueue", "--memory", "50M", "--", sys.executable, "-I", "-S", "-c", HOG, "120", "1000", "1").stdout
        assert cli("wait", "--timeout", "60s").returncode == 0, task
        assert "nothing holds them to it" in cli("nodes").stdout
