"""Pretended launchers: they end tasks after their time, in the order of their chains, and answer as real ones do."""

from __future__ import annotations

import signal
import time

import pytest

from benchmarks.pretended.launcher import PretendedLauncher
from benchmarks.pretended.pilot import pretended_pilot
from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.store.journal import Journal
from pilotq.workers.protocol import Begun, Exited, Launch, LaunchBase, LaunchSlot, Retract, Retracted, Signal
from tests.support.waiting import wait_until

BASE, SLOT = LaunchBase("b", {}, 0, {}), LaunchSlot("n[0]", {}, {}, [0])


class Driver:
    def __init__(self) -> None:
        self.launcher = PretendedLauncher(1, 0)
        self.began = time.monotonic()

    def launch(self, key: int, seconds: float, after: int = 0) -> None:
        argv = [b"sleep", b"%f" % seconds]
        self.launcher.launch(BASE, SLOT, Launch(key, f"t{key}", 1, "b", "n[0]", argv, {}, b"/", after=after))

    def told(self, seconds: float) -> list[tuple[str, int]]:
        """What it has said by so many seconds after the start."""
        self.launcher.advance(self.began + seconds)
        return [(type(record).__name__, record.key) for record in self.launcher.receive()]


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_a_task_ends_after_its_time(driver: Driver) -> None:
    driver.launch(1, 60.0)
    assert driver.told(30.0) == [("Begun", 1), ("Started", 1)]
    driver.launcher.advance(driver.began + 90.0)
    (record,) = driver.launcher.receive()
    assert isinstance(record, Exited) and record.status == 0 and record.seconds == pytest.approx(60.0)


def test_a_chain_is_started_in_order_and_without_what_was_retracted(driver: Driver) -> None:
    for key in (1, 2, 3):
        driver.launch(key, 0.01, after=key - 1)
    driver.launcher.send(Retract(2))
    assert driver.told(60.0) == [("Begun", 1), ("Retracted", 2), ("Exited", 1), ("Begun", 3), ("Exited", 3)]
    driver.launch(4, 0.0, after=3)  # what it names has ended: at once
    assert driver.told(120.0)[0] == ("Begun", 4)


def test_a_signal_ends_what_runs(driver: Driver) -> None:
    driver.launch(1, 60.0)
    driver.launcher.send(Signal(1, signal.SIGTERM))
    begun, exited = driver.launcher.receive()
    assert isinstance(begun, Begun) and isinstance(exited, Exited) and exited.status == signal.SIGTERM
    assert driver.launcher.due() == 0.0 or not driver.told(120.0)
    assert Retracted not in map(type, driver.launcher.receive())


def test_the_real_parts_run_tasks_on_nodes_that_pretend() -> None:
    with pretended_pilot(3, 4) as pilot:
        broker = pilot.broker
        whole = broker.enqueue(Task(command=["sleep", "0.05"], request=Request(cores=(4, 4)), array=ArrayRange(1, 3)))
        stopped = broker.enqueue(Task(command=["sleep", "600"]))
        wait_until(lambda: broker.task(stopped).status == "started", what="the start of the long one")
        broker.cancel([stopped])
        counts = broker.wait(timeout=60)
        assert (counts.finished, counts.canceled) == (3, 1)
        report = pilot.report()
        assert report["launched"] == 4 and report["messages"] >= 4
        lines = Journal(f"{pilot.directory}/journal.jsonl")
        wait_until(lambda: len(list(lines.find(f"{whole}_1"))) == 1, what="the journal")
        (line,) = lines.find(f"{whole}_1")
        assert line.cpus.endswith("[0:1:2:3]") and (line.ended or 0) - (line.started or 0) == pytest.approx(
            0.05, abs=1e-6
        )
