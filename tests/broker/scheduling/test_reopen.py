"""Slots that are released while tasks of their class are on their way to the node. No timer takes part: nothing that is
stuck is ever retracted here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pilotq.broker.store import keys
from pilotq.broker.store.messages import Reopen
from tests.support.engine import ONE, Engine, FakeNode, array, fixtures, pump, task
from tests.support.running_dispatcher import RunningDispatcher
from tests.support.waiting import wait_until

engine, server, node = fixtures
Make = Callable[..., FakeNode]
NEVER_S = 1e6


@pytest.fixture(autouse=True)
def _nothing_is_stuck(engine: Engine) -> None:
    engine.reset(retract_after_s=NEVER_S)


def known(engine: Engine, n1: FakeNode) -> None:
    """Let enough tasks end for others to be prefetched."""
    engine.submit(*[task()] * 5)
    n1.quick = True
    pump([n1], lambda: engine.counts().get("finished") == 5)
    n1.quick = False


def read_by_dispatcher(engine: Engine) -> bool:
    """Whether all that was submitted is known to it."""
    waits = engine.link.call("EXISTS", keys.EVENTS, keys.WAKEUP, keys.CHANGED_CLASSES)
    return not waits


@pytest.mark.parametrize("kind", ["tasks", "array"])
def test_a_slot_goes_on_with_what_was_on_its_way_when_it_was_released(engine: Engine, node: Make, kind: str) -> None:
    with RunningDispatcher(engine) as running:
        n1 = node(cores=2)
        known(engine, n1)
        engine.submit(task(), task())
        pump([n1], lambda: len(n1.running) == 2)
        engine.submit(*([task()] * 4 if kind == "tasks" else [array(4)]))
        wait_until(lambda: not engine.list())  # all are in the inbox, which the node has not read
        n1.finish(next(iter(n1.running)))
        n1.finish(next(iter(n1.running)))
        pump([n1], lambda: len(n1.running) == 2)
        assert sorted(slot for message in n1.reopened for slot, _ in message.slots) == sorted(
            slot for _, slot, _ in n1.running.values()
        )
        n1.quick = True
        pump([n1], lambda: engine.counts().get("finished") == 11)
        pump([n1], lambda: not running.dispatcher.inventory.busy)
    assert not n1.retractions and len(set(n1.started)) == len(n1.started) == 11


def test_one_of_several_slots_is_not_left_with_all_the_work(engine: Engine, node: Make) -> None:
    with RunningDispatcher(engine) as running:
        n1 = node(cores=4)
        known(engine, n1)
        engine.submit(*[task()] * 4)
        pump([n1], lambda: len(n1.running) == 4)
        engine.submit(*[task()] * 4)
        wait_until(lambda: not engine.list())
        for task_id in list(n1.running)[:3]:
            n1.finish(task_id)
        pump([n1], lambda: len(n1.running) == 4)
        cores = sorted(allocation for _, _, allocation in n1.running.values())
        assert cores == [f"n1[{core}]" for core in range(4)]
        n1.quick = True
        pump([n1], lambda: not running.dispatcher.inventory.busy)


def test_a_slot_is_free_when_nothing_is_left_for_it(engine: Engine, node: Make) -> None:
    """What is chained behind another task counts as prefetched, too."""
    with RunningDispatcher(engine) as running:
        n1 = node(cores=2)
        known(engine, n1)
        engine.submit(task(), task())
        pump([n1], lambda: len(n1.running) == 2)
        engine.submit(task(), task())
        pump([n1], lambda: len(n1.prefetched[ONE]) == 2)
        chained, n1.prefetched[ONE] = n1.prefetched[ONE], type(n1.prefetched[ONE])()
        n1.finish(next(iter(n1.running)))
        pump([n1], lambda: len(running.dispatcher.inventory.slots) == 1 and n1.reopened)
        engine.submit(task(priority=1))
        pump([n1], lambda: len(n1.running) == 2)
        assert [type(message) for message in n1.reopened] == [Reopen]
        n1.prefetched[ONE], n1.quick = chained, True
        pump([n1], lambda: engine.counts().get("finished") == 10)
        pump([n1], lambda: not running.dispatcher.inventory.busy)
    assert not n1.retractions


def test_what_must_not_go_on_is_retracted_at_once(engine: Engine, node: Make) -> None:
    with RunningDispatcher(engine) as running:
        n1 = node(cores=1)
        known(engine, n1)
        engine.submit(task())
        pump([n1], lambda: n1.running)
        (low,) = engine.submit(task())
        wait_until(lambda: not engine.list())
        (high,) = engine.submit(task(priority=9))
        wait_until(lambda: read_by_dispatcher(engine))
        n1.finish(*n1.running)
        n1.quick = True
        pump([n1], lambda: engine.counts().get("finished") == 8)
        pump([n1], lambda: not running.dispatcher.inventory.busy)
    assert n1.started[-2:] == [high, low]
    assert len(n1.retractions) == 1 and not n1.reopened
