"""Restart without loss: parts killed one after another, and all of a pilot at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pilotq.broker import ArrayRange
from pilotq.broker.store.journal import Journal
from tests.support.fault_rig import HELD, Rig, rig
from tests.support.waiting import wait_until

WITHIN_S = 45.0
TURNS = ("dispatcher", "n1", "launcher", "server")


def begun(r: Rig) -> int:
    return sum(event == "begin" for _, _, event, *_ in r.ledger())


def test_parts_that_are_killed_one_after_another_lose_nothing(tmp_path: Path) -> None:
    """A bundle, single ones, an array. Each of the parts is killed twice; what was running then may run once more."""
    with rig(tmp_path, bundle_above=300) as r:
        bundle = [r.probe(priority=1) for _ in range(400)]
        work = r.submit(
            [*bundle, *(r.probe(priority=-n // 300) for n in range(600)), r.probe(array=ArrayRange(0, 999))]
        )
        until = time.monotonic() + WITHIN_S
        for turn, part in enumerate(2 * TURNS):
            wait_until(lambda turn=turn: begun(r) > 100 + 150 * turn, seconds=60, what="some more have begun")
            os.kill(r.process(part), signal.SIGKILL)
        r.settle(work, seconds=max(until - time.monotonic(), 0.0))
        assert not r.judge(work, faults=len(TURNS) * 2, held=HELD)
        # With the worker of node n1 all is lost that its two cores hold. A launcher has reported to it each that had
        # ended, except the last one, and one may have begun after that.
        assert begun(r) <= 2000 + 2 * 2 * (HELD + 2)


def test_a_pilot_that_was_killed_as_a_whole_goes_on(tmp_path: Path) -> None:
    """Its tasks live on as orphans; the next pilot ends them before it starts the same ones again."""
    with rig(tmp_path, bundle_above=50) as r:
        long = r.submit([r.probe(60.0)])
        wait_until(lambda: begun(r) == 1, seconds=60, what="the long one has begun")
        work = r.submit(r.mixed(300))
        wait_until(lambda: begun(r) > 60, seconds=60, what="some have begun")
        r.kill_all()
        assert r.of_tasks()
        orphans = set(r.of_tasks())
        r.start()
        assert not orphans & set(r.of_tasks())
        r.settle(work, free=False)
        assert not r.judge(work, faults=1, alone=False, held=HELD)
        wait_until(lambda: [e for i, e, w, *_ in r.ledger() if (i, w) == (long.ids[0], "begin")] == ["1", "2"])
        assert not [line for line in r.ledger() if line[2] in ("core", "again")]


@pytest.mark.parametrize("times", [3])
def test_a_journal_has_one_line_for_each_counted_execution(tmp_path: Path, times: int) -> None:
    """The supervisor is killed again and again while it writes."""
    with rig(tmp_path) as r:
        work = r.submit([r.probe(array=ArrayRange(0, 599)), *(r.probe(code=3, retries=1) for _ in range(20))])
        for turn in range(times):
            wait_until(lambda turn=turn: begun(r) > 100 + 100 * turn, seconds=60, what="some more have begun")
            assert r.pilot is not None
            r.pilot.process.kill()
            r.pilot.process.wait()
            r.start()
        r.settle(work)
        assert not r.judge(work, faults=times, held=HELD)  # all parts end with their supervisor
        assert r.pilot is not None
        positions = [line.at for line in Journal(r.pilot.journal).entries()]
        assert len(positions) == len(set(positions))
