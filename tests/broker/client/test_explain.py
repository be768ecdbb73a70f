"""`pilotq explain`: each reason for which a task waits, and each way in which it ended, on a real pilot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.client.explain import PREDICATES, Explainer, duration
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.client.submit import submit
from pilotq.broker.client.views import Explanation
from pilotq.broker.errors import NeverFits
from pilotq.broker.scheduling.status import HoldStatus
from pilotq.broker.store import keys
from pilotq.broker.tasks.states import REASONS
from tests.support.engine import ONE, SHARED, Engine, FakeNode, array, fixtures, pump, task, wide
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.running_dispatcher import RunningDispatcher
from tests.support.waiting import wait_until

engine, server, node = fixtures


def explain(engine: Engine, task_id: str) -> Explanation:
    queries = TaskQueries(engine.link, None)
    view = queries.task(task_id)
    assert view is not None
    return Explainer(engine.link, queries, "/pilot", time.time()).explain(view)


def why(engine: Engine, task_id: str) -> str:
    return "\n".join(explain(engine, task_id).why)


def running(engine: Engine, cores: str, class_name: str = ONE, since: float = 0.0) -> str:
    """Claim the next task of a class, and say that it runs there for so long."""
    (handed,) = engine.claim(class_name=class_name)
    began = engine.store.run  # as a worker says it
    from pilotq.broker.store.store import iso

    began("report_started", handed.id, handed.execution, cores, iso(time.time() - since), "", "")
    return handed.id


# -- what waits -------------------------------------------------------------------------------------------------------


def test_no_node(engine: Engine) -> None:
    (a,) = engine.submit(task())
    assert "no node is there" in why(engine, a)
    engine.link.call("RPUSH", keys.EXPECTED_NODES, "n1", "n2")
    engine.register("n2")
    assert "not all nodes have joined yet: n1" in why(engine, a)


def test_cores_that_are_missing_and_when_they_come(engine: Engine) -> None:
    engine.register("n1", cores=4)
    engine.register("n2", cores=8)
    short, long, big = engine.submit(
        wide(3, time_limit=60), wide(8, time_limit=1200), wide(8, priority=-1), key="k"
    )  # fmt: skip
    assert running(engine, "n2[0:1:2]", "default.p0.3c-t60", since=20) == short
    found = explain(engine, big)
    assert found.why[0] == "needs 8 cores free on one node; the most free is 5 cores, on n2"
    assert found.until == pytest.approx(time.time() + 40, abs=5)
    assert found.why[1] == f"by the time limits of what runs there is room in {duration(40)} at the latest" or (
        "there is room in 39 s" in found.why[1]
    )
    assert "1 task or array of higher priority may go first" in found.why
    assert long in [v.id for v in TaskQueries(engine.link, None).tasks("queued", 9)]


def test_what_has_no_limit_is_said(engine: Engine) -> None:
    engine.register("n1", cores=4)
    first, second, third = engine.submit(wide(4), wide(4), wide(4))
    running(engine, "n1[0:1:2:3]", "default.p0.4c")
    found = explain(engine, third)
    assert found.until is None and "nobody knows when there will be room" in found.why[1]
    assert found.why[2] == "1 task or array like it came earlier"
    assert first and second


def test_cores_of_what_has_just_begun_count_as_used(engine: Engine) -> None:
    engine.register("n1", cores=4)
    engine.link.call("HSET", keys.USAGE, "n1", "3 3")
    (a,) = engine.submit(wide(2))
    assert why(engine, a).startswith("needs 2 cores free on one node; the most free is 1 core, on n1")


def test_memory_gpus_and_counters(engine: Engine) -> None:
    engine.register("n1", cores=4)
    info = msgspec.json.decode(engine.link.call("HGET", keys.NODES, "n1"))
    info.update(memory=8 << 30, counters={"licence": 1}, gpus=["0"])
    engine.link.call("HSET", keys.NODES, "n1", msgspec.json.encode(info))
    first = Request(memory=6 << 30, use=(("licence", 1),), gpus=1)
    engine.submit(task(request=first))
    running(engine, "n1[0;0]", f"default.p0.{first.label()}")
    for request, text in (
        (Request(memory=3 << 30), "needs 3 GiB of memory free on one node; the most free is 2 GiB of memory, on n1"),
        (Request(use=(("licence", 1),)), "needs 1 of licence free on one node; no node has any free"),
        (Request(gpus=1), "needs 1 GPU free on one node; no node has any free"),
    ):
        (a,) = engine.submit(task(request=request))
        assert explain(engine, a).why[0] == text
    with pytest.raises(NeverFits, match="needs 1,023 GiB of memory on one node; the largest, n1, has 8 GiB of memory"):
        engine.submit(task(request=Request(memory=1023 << 30)))


def test_what_fits_on_no_node_any_more(engine: Engine) -> None:
    engine.register("n1", cores=8)
    (a,) = engine.submit(wide(8))
    engine.link.call("DEL", keys.NODES)
    engine.register("n1", 2, cores=2)
    assert why(engine, a) == (
        "needs 8 cores on one node; the largest, n1, has 2 cores\n"
        "as the nodes are it can never run: it waits for a node that is large enough"
    )


def test_nodes_that_get_nothing_new(engine: Engine) -> None:
    engine.register("n1", cores=4)
    engine.register("n2", cores=2)
    engine.link.call("HSET", keys.DRAINED, "n1", "drained a new disk")
    engine.link.call("HSET", keys.CONTROL, "min_nodes", 3)
    (a,) = engine.submit(wide(3))
    text = why(engine, a)
    assert "nothing begins before 3 nodes have joined: 2 have" in text
    assert "node n1 gets nothing new: it is drained (a new disk)" in text
    assert "needs 3 cores free on one node; the most free is 2 cores, on n2" in text


def test_the_end_of_the_allocation(engine: Engine) -> None:
    engine.register("n1", cores=4)
    info = msgspec.json.decode(engine.link.call("HGET", keys.NODES, "n1"))
    engine.link.call("HSET", keys.NODES, "n1", msgspec.json.encode({**info, "job": "77"}))
    engine.link.call("HSET", keys.ALLOCATION_ENDS, "77", f"{time.time() + 300} 60 15")
    long, short = engine.submit(task(time_request=3600), task(time_request=60))
    assert "it may take 3600 s, but the nodes that could hold it take nothing new in" in why(engine, long)
    assert why(engine, short).startswith("what it needs is free")


def test_held_cores(engine: Engine) -> None:
    engine.register("n1", cores=4)
    first, big, small = engine.submit(wide(3), wide(4), task())
    running(engine, "n1[0:1:2]", "default.p0.3c")
    now = time.time()
    held = HoldStatus("default.p0.4c", now - 5, "n1[0:1:2:3]", now + 30)
    engine.link.call("HSET", keys.STATUS, "hold", msgspec.json.encode(held))
    assert "n1[0:1:2:3] is being kept free for the first task like it" in why(engine, big)
    assert explain(engine, big).until == pytest.approx(now + 30)
    assert "kept free for a task that has waited longer; with a --time-limit" in why(engine, small)
    assert first


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (("HSET", keys.CONTROL, "paused", 1), "the pilot is paused"),
        (("HSET", keys.CONTROL, "stop", "stop"), "`pilotq start --resume /pilot`"),
        (("HSET", keys.STATUS, "journal", "disk full"), "while the journal cannot be written: disk full"),
        (("SET", keys.SUSPENDED, 1), "until `pilotq exec -- rq resume`"),
    ],
)
def test_held_up(engine: Engine, command: tuple[Any, ...], text: str) -> None:
    engine.register()
    (a,) = engine.submit(task())
    engine.link.call(*command)
    assert text in why(engine, a)


def test_dependencies(engine: Engine) -> None:
    engine.register()
    parents = engine.submit(*[task(name=f"p{n}") for n in range(7)])
    (child,) = engine.submit(task(after=parents))
    found = explain(engine, child)
    assert found.tasks == parents
    assert found.why == [*(f"it waits for task {p} (p{n}), which is queued" for n, p in enumerate(parents[:5])),
                         "and for 2 more"]  # fmt: skip
    (handed,) = engine.claim()
    engine.complete([handed], "failed", "exit")
    engine.release_dependents()
    (grandchild,) = engine.submit(task(after=[child]))
    for task_id in (child, grandchild):
        found = explain(engine, task_id)
        assert found.tasks == [parents[0]]
        assert found.why[0] == "a task it depends on did not end as required"
        assert found.why[1].startswith(f"task {parents[0]} (p0) failed: it ended with a non-zero exit code (1), after")


def test_how_it_waits(engine: Engine) -> None:
    engine.register()
    a, b, c = engine.submit(*[task(name=name) for name in "abc"])
    waits, omitted = engine.submit(task(after=["=" + c], after_any=[a], after_notok=[b]), task(after_notok=[a]))
    assert explain(engine, waits).why == [
        f"it waits for task {c} (c), which is queued",
        f"it waits for task {a} (a), which is queued, however that ends",
        f"it waits for task {b} (b), which is queued, and runs only if that does not finish",
    ]
    engine.complete(engine.claim(1))
    engine.release_dependents()
    found = explain(engine, omitted)
    assert found.why[0] == "a task it depends on did not end as required"
    assert found.why[1].startswith(f"task {a} (a) finished, after ") and found.tasks == [a]
    assert found.why[1].endswith("; this task runs only if that does not finish") and not found.commands


def test_elements_wait_for_elements(engine: Engine) -> None:
    engine.register()
    a, b = engine.submit(array(3, name="a"), array(3, after_each=["a"]))
    assert explain(engine, f"{b}_1").why == [f"it waits for task {a}_1 (a), which is queued"]
    assert explain(engine, b).tasks == [a]
    assert "what it needs is free" in why(engine, f"{a}_2")
    assert explain(engine, a).why[0] == "elements waiting: 0-2"


def test_an_element_waits_for_the_one_at_its_position(engine: Engine) -> None:
    a, b = engine.submit(
        task(array=ArrayRange.parse("1,5-6"), name="a"), task(array=ArrayRange.parse("0,3,9"), after_each=["a"])
    )
    assert explain(engine, f"{b}_9").tasks == [f"{a}_6"] and explain(engine, f"{b}_3").tasks == [f"{a}_5"]


def test_statuses_of_rqs_own_producers(engine: Engine) -> None:
    a, b, c, d = engine.submit(*[task()] * 4)
    for task_id, status in ((a, "scheduled"), (b, "rate_limited"), (c, "ready_to_enqueue"), (d, "deferred")):
        engine.link.call("HSET", keys.job(task_id), "status", status, "origin", "default", "rate_limit_key", "shop")
    engine.link.call("ZADD", keys.registry("scheduled", "default"), int(time.time()) + 100, a)
    assert explain(engine, a).why[0].startswith("it is scheduled: its time comes in 1 min")
    assert "rate limit 'shop'" in why(engine, b)
    assert "has not finished to submit" in why(engine, c)
    assert "is not known any more" in why(engine, d)
    engine.link.call("SADD", keys.dependencies(d), a)
    assert explain(engine, d).why == [f"it waits for task {a}, which is scheduled"]


def test_what_the_dispatcher_tells(engine: Engine, node: Callable[..., FakeNode]) -> None:
    """A large task that small ones would starve: its cores are kept free, and both sides of that are told."""
    engine.reset(backfill_wait_s=0.05)
    here = node("n1", 2)
    with RunningDispatcher(engine):
        engine.submit(task())
        pump([here], lambda: here.running)
        (big,) = engine.submit(wide(2))
        wait_until(lambda: engine.link.call("HGET", keys.STATUS, "hold") is None)
        engine.submit(*[task()] * 3)
        pump([here], lambda: engine.link.call("HGET", keys.STATUS, "hold") is not None)
        assert "is being kept free for the first task like it" in why(engine, big)
        pump([here], lambda: here.finish(next(iter(here.running))) if here.running else engine.nothing_left())
        pump([here], lambda: engine.link.call("HGET", keys.STATUS, "hold") is None)


# -- what runs, and what has ended ------------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LivePilot]:
    with live_pilot(tmp_path, "n1:2") as pilot:
        yield pilot


def sentences(live: LivePilot, task_id: str) -> str:
    return "\n".join(live.broker.explain(task_id).why)


def test_a_life(live: LivePilot, tmp_path: Path) -> None:
    hold = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo sorry >&2; exit 3"
    first = live.broker.enqueue(Task(script=hold, name="first", time_limit=600))
    wait_until(lambda: live.broker.task(first).times.get("started"))
    big = live.enqueue("true", request=Request(cores=(2, 2)))
    child = live.enqueue("true", after=[first])
    assert sentences(live, first).startswith("it runs on n1[0], for ")
    assert "it ends in 9 min 5" in sentences(live, first) or "it ends in 10 min" in sentences(live, first)
    assert "needs 2 cores free on one node; the most free is 1 core, on n1" in sentences(live, big)
    assert live.broker.explain(big).until is not None
    (tmp_path / "go").touch()
    live.ended(first)
    live.ended(big)
    found = live.broker.explain(first)
    assert found.why[0].startswith("it ended with a non-zero exit code (3), after ") and found.output == "sorry\n"
    assert found.commands == [f"pilotq logs {first}", f"pilotq retry {first}"]
    assert f"task {first} (first) failed" in sentences(live, child)
    assert sentences(live, big).startswith("it finished, after")
    done = live.cli("explain", first, child)
    assert done.returncode == 0
    text = done.stdout.decode()
    assert text.startswith(f"task {first} (first) failed\n  it ended") and "\n    sorry\n" in text
    assert f"\n\ntask {child} is canceled\n  a task it depends on did not end as required\n" in text
    assert json.loads(live.cli("explain", first, "--json").stdout)[0]["why"] == found.why


def test_ways_to_end(live: LivePilot) -> None:
    ways = {
        "signal": (Task(script="kill -9 $$"), "was killed by a signal: "),
        "time limit": (Task(command=["sleep", "100"], time_limit=0.2), "ran longer than its time limit"),
        "not found": (Task(command=["no-such-program-at-all"]), "its program, directory or input file does not exist"),
        "elements": (Task(script="exit {index}", array=ArrayRange(0, 2)), "some of its tasks did not finish"),
    }
    ids = {word: live.broker.enqueue(task) for word, (task, _) in ways.items()}
    for word, (_, text) in ways.items():
        live.ended(ids[word])
        assert text in sentences(live, ids[word]), word
    assert "elements failed: 1-2" in sentences(live, ids["elements"])
    canceled = live.enqueue("sleep", "100")
    wait_until(lambda: live.broker.task(canceled).status == "started")
    live.broker.cancel([canceled])
    live.ended(canceled)
    assert "it was canceled by its user" in sentences(live, canceled)


def test_afterwards(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as live:
        bad = live.enqueue("false")
        live.ended(bad)
        left = live.enqueue("sleep", "100")
        wait_until(lambda: live.broker.task(left).status == "started")
    done = live.cli("explain", bad, left)
    assert done.returncode == 0
    assert "it ended with a non-zero exit code (1)" in done.stdout.decode()
    assert f"the pilot ended before it did: `pilotq start --resume {live.pilot.directory}`" in done.stdout.decode()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"),
     (90_000, "1 d 1 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_sentence_of_a_reason_goes_on_from_it_or_has_a_subject() -> None:
    subjects = ("a ", "its ", "one ", "some ", "starting ", "the ", "more tasks ")
    for reason, sentence in REASONS.items():
        assert not reason or sentence.startswith(PREDICATES) != sentence.startswith(subjects), reason


def test_what_joins(engine: Engine) -> None:
    (parent,) = engine.submit(task(join=True))
    (handed,) = engine.claim()
    children = submit(engine.link, engine.store, [task(name="bad"), *[task()] * 6], SHARED, None, submitter=parent)
    engine.complete([handed])
    engine.complete(engine.claim(), "failed", "exit")
    engine.release_dependents()
    found = explain(engine, parent)
    assert found.why[:2] == ["its process has ended: finished", "it waits for 6 of its 7 children"]
    assert found.why[2:7] == [f"task {child} is queued" for child in children[1:6]]
    assert found.why[7:] == [f"it will have failed: 1 child did not finish, the first of them {children[0]}"]
    assert found.tasks == children[1:]
    engine.cancel(parent)
    assert "it was canceled, and its children with it: it ends when they have" in explain(engine, parent).why


def test_what_waits_for_itself_is_found(engine: Engine) -> None:
    """No submission can bring that about: somebody has written it."""
    (parent,) = engine.submit(task(join=True))
    (handed,) = engine.claim()
    (child,) = submit(engine.link, engine.store, [task()], SHARED, None, submitter=parent)
    engine.complete([handed])
    engine.link.call("HSET", keys.job(child), "status", "deferred", "pq_after", parent)
    circle = f"it can never end by itself, as it waits for itself: {parent} -> {child} -> {parent}; cancel one of them"
    assert circle in explain(engine, parent).why
    assert "it can never end" in why(engine, child)
