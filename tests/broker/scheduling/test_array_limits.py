"""Arrays of which only so many elements may run at a time: the real dispatcher, with nodes that have no processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from pilotq.broker.client.explain import Explainer
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.scheduling.backlog import CLASSES_MAX
from pilotq.broker.store import keys
from pilotq.broker.store.messages import NodeLost
from pilotq.broker.store.resources import class_info
from pilotq.broker.store.store import pack
from pilotq.broker.tasks.model import ArrayRange, Task
from tests.support.engine import Engine, FakeNode, fixtures, pump, task
from tests.support.running_dispatcher import RunningDispatcher

engine, server, node = fixtures
Make = Callable[..., FakeNode]
NEVER = 1_000_000  # ends before anything is prefetched


def limited(text: str, **fields: object) -> Task:
    return task(array=ArrayRange.parse(text), **fields)


def running(nodes: Sequence[FakeNode], array: str) -> list[str]:
    return [i for n in nodes for i in n.running if i.startswith(f"{array}_")]


def work(nodes: Sequence[FakeNode], engine: Engine, array: str, most: int, *, ends: str = "finished") -> int:
    """End one element after the other until the array has ended; returns how many ran at a time at most."""
    seen = 0

    def step() -> bool:
        nonlocal seen
        now = running(nodes, array)
        assert len(now) <= most
        seen = max(seen, len(now))
        for one in nodes:
            for task_id in [i for i in one.running if i in now][:1]:
                one.finish(task_id, ends)
        return engine.status(array) in ("finished", "failed", "canceled")

    pump(nodes, step)
    return seen


def why(engine: Engine, task_id: str) -> str:
    queries = TaskQueries(engine.link, None)
    view = queries.task(task_id)
    assert view is not None
    return "\n".join(Explainer(engine.link, queries, "/pilot", time.time()).explain(view).why)


@pytest.mark.parametrize("prefetch_after", [1, NEVER])
def test_at_most_so_many_run_on_all_nodes_together(engine: Engine, node: Make, prefetch_after: int) -> None:
    engine.reset(prefetch_after=prefetch_after, retract_after_s=0.2)
    a, b = engine.submit(limited("0-39%3"), limited("7,9-20:3%2", retries=1))
    name = engine.hash(a)["pq_class"]
    assert name == f"default.p0.1c-3at{a}" and (info := class_info(name)) is not None and info.at_most == 3
    with RunningDispatcher(engine):
        nodes = [node("n1", cores=4), node("n2", cores=4)]
        pump(nodes, lambda: len(running(nodes, a)) == 3 and len(running(nodes, b)) == 2)
        assert work(nodes, engine, a, 3) == 3
        assert len(running(nodes, b)) == 2
        assert work(nodes, engine, b, 2, ends="failed") == 2
    assert (sum(one.most_prefetched for one in nodes) > 0) == (prefetch_after == 1)
    started = Counter(i for one in nodes for i in one.started)
    assert {i for i in started if i.startswith(f"{a}_")} == {f"{a}_{n}" for n in range(40)}
    assert all(started[f"{b}_{n}"] == 2 for n in (7, *range(9, 21, 3)))
    assert engine.nothing_left()


def test_a_limit_holds_up_nobody_else(engine: Engine, node: Make) -> None:
    """Not even very many of them: those that have all they may have take no place in a pass."""
    arrays = engine.submit(*[limited("0-9%1") for _ in range(2 * CLASSES_MAX + 50)])
    with RunningDispatcher(engine):
        one = node(cores=len(arrays) + 4)
        pump([one], lambda: len(one.running) == len(arrays))
        assert sorted(one.running) == sorted(f"{i}_0" for i in arrays)
        (other,) = engine.submit(task())
        pump([one], lambda: other in one.running)
        (late,) = engine.submit(limited("5%1", priority=-5))
        pump([one], lambda: f"{late}_5" in one.running)
        one.finish(f"{arrays[-1]}_0")
        pump([one], lambda: f"{arrays[-1]}_1" in one.running)


def test_others_are_prefetched_while_one_of_a_higher_priority_has_all_it_may_have(engine: Engine, node: Make) -> None:
    engine.reset(prefetch_after=1)
    high, low = engine.submit(limited("0-9%1", priority=9), task(array=ArrayRange(0, 199)))
    with RunningDispatcher(engine):
        one = node(cores=2)

        def work_on_low() -> bool:
            for task_id in [i for i in one.running if i.startswith(f"{low}_")]:
                one.finish(task_id)
            return any(handed.array == low for waiting in one.prefetched.values() for handed in waiting)

        pump([one], work_on_low)
        assert running([one], high) == [f"{high}_0"]


def test_the_limit_holds_when_a_node_is_lost_and_when_the_dispatcher_is_another(engine: Engine, node: Make) -> None:
    engine.reset(prefetch_after=NEVER)
    (a,) = engine.submit(limited("0-20:4%2"))
    one, two, three = node("n1", cores=1), node("n2", cores=1), node("n3", cores=4)
    with RunningDispatcher(engine):
        pump([one, two], lambda: len(running([one, two], a)) == 2)
        pump([three], lambda: engine.link.call("HGET", keys.STATUS, "full") not in (None, b"{}"))
        assert not three.running
    # The next one hears of n3 first: it must not give what n1 and n2 have.
    with RunningDispatcher(engine) as second:
        pump([three], lambda: "n3" in second.dispatcher.inventory.nodes)
        (b,) = engine.submit(task())
        pump([three], lambda: b in three.running)
        assert not running([three], a)
        pump([one, two, three], lambda: len(second.dispatcher.inventory.nodes) == 3)
        one.finish(*running([one], a))
        pump([one, two, three], lambda: len(running([one, two, three], a)) == 2)
        engine.link.call("RPUSH", keys.EVENTS, pack(NodeLost("n2", two.info.incarnation, "gone")))
        lost = running([two], a)
        pump([one, three], lambda: len(running([one, three], a)) == 2)
        assert work([one, three], engine, a, 2) == 2
        assert set(lost) <= set(three.started + one.started)
    assert engine.final_entry(a)["elements"] == {"finished": "0-20:4"}


def test_explain_names_the_limit(engine: Engine, node: Make) -> None:
    (a,) = engine.submit(limited("0-9%2"))
    with RunningDispatcher(engine):
        one = node(cores=4)
        pump([one], lambda: len(one.running) == 2 and "and as many do" in why(engine, f"{a}_9"))
        assert "at most 2 elements of its array may run at a time, and as many do" in why(engine, a)
        (wide,) = engine.submit(limited("3-9%3"))
        pump([one], lambda: len(one.running) == 4 and "needs 1 core" in why(engine, f"{wide}_9"))
        assert why(engine, wide).startswith("elements")
        assert "at most 3 elements of its array may run at a time, and fewer do" in why(engine, f"{wide}_9")


def test_a_limit_that_no_array_reaches_is_none(engine: Engine) -> None:
    a, b = engine.submit(limited("0-9%10"), limited("3%1"))
    assert {engine.hash(i)["pq_class"] for i in (a, b)} == {"default.p0.1c"}
