"""A damaged record of a node, or something else in the place of a class list, ends nothing and loses nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pilotq.broker.store import keys
from tests.support.engine import ONE, Engine, FakeNode, array, fixtures, pump, task
from tests.support.running_dispatcher import RunningDispatcher
from tests.support.waiting import wait_until

engine, server, node = fixtures
Make = Callable[..., FakeNode]


@pytest.mark.parametrize("record", [b"\xff", b"{}", b'{"name": "n2", "incarnation": 1}', None])
def test_a_damaged_node_keeps_what_it_runs(engine: Engine, node: Make, record: bytes | None) -> None:
    """Also for the next dispatcher; it gets new tasks when its worker has written the record again."""
    engine.reset(reconcile_s=0.05)
    (first,) = engine.submit(task())
    with RunningDispatcher(engine) as running:
        n1, n2 = node("n1", cores=1), node("n2", cores=1)
        pump([n1], lambda: n1.started)
        engine.link.call(*(("HSET", keys.NODES, "n1", record) if record else ("HDEL", keys.NODES, "n1")))
        running.stop()
        assert running.error is None
    with RunningDispatcher(engine) as running:
        (second,) = engine.submit(task())
        pump([n2], lambda: second in n2.started)
        assert engine.status(first) == "started" and list(n1.running) == [first]
        n1.link.post_heartbeat({})
        pump([n1, n2], lambda: "n1" in running.dispatcher.inventory.nodes)
        n1.finish(first)
        third, fourth = engine.submit(task(), task())
        pump([n1, n2], lambda: n1.started == [first, third] or n1.started == [first, fourth])
        assert running.error is None
    assert [line["id"] for line in engine.journal()] == [first]


def test_what_is_no_list_costs_no_task(engine: Engine, node: Make) -> None:
    engine.reset(reconcile_s=0.05)
    waiting = engine.submit(task(), array(3), task())
    engine.link.call("SET", keys.queue(ONE), "a string")
    with RunningDispatcher(engine) as running:
        n1 = node("n1", cores=1, quick=True)
        wait_until(lambda: engine.link.call("HGET", keys.DAMAGED_CLASSES, ONE))
        pump([n1], lambda: engine.counts().get("finished") == 5)
        # Set in the place of the list while something runs, and something is pushed.
        n1.quick = False
        (runs,) = engine.submit(task())
        pump([n1], lambda: runs in n1.running)
        engine.link.call("DEL", keys.queue(ONE))
        engine.link.call("HSET", keys.queue(ONE), "x", "y")
        (behind,) = engine.submit(task())
        n1.finish(runs, "lost")
        n1.quick = True
        pump([n1], lambda: engine.counts().get("finished") == 7)
        assert running.error is None
    assert n1.started[0] == waiting[0] and n1.started.count(runs) == 2 and n1.started.count(behind) == 1
    assert engine.ttl(f"pilotq:set-aside:{ONE}") > 0 and engine.nothing_left()
