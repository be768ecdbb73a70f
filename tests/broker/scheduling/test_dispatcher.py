"""The real dispatcher with nodes that have no processes: who gets what, and that nothing is lost or run twice."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rq.job import Job

import pilotq.broker.store.connection as link_module
from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import ServerRefused, StateLost, Superseded
from pilotq.broker.pilot.server import RunningServer, start_server, wait_ready
from pilotq.broker.store import keys
from pilotq.broker.store.messages import ControlChanged, NodeLost, StateReport
from pilotq.broker.store.store import pack
from pilotq.broker.tasks.model import Request
from tests.support.engine import QUEUE_ID, Engine, FakeNode, array, fixtures, pump, task, wide
from tests.support.running_dispatcher import RunningDispatcher
from tests.support.waiting import wait_until

engine, server, node = fixtures
Make = Callable[..., FakeNode]
NEVER = 1_000_000  # ends before anything is prefetched


def ended(engine: Engine, count: int) -> bool:
    counts = engine.counts()
    return counts["total"] - sum(counts.get(k, 0) for k in ("finished", "failed", "canceled")) == 0 and (
        counts["total"] >= count
    )


def executions(engine: Engine) -> Counter[str]:
    """How many lines of the journal each task has."""
    return Counter(line["id"] for line in engine.journal())


def say(engine: Engine, message: Any) -> None:
    engine.link.call("RPUSH", keys.EVENTS, pack(message))


# -- order ------------------------------------------------------------------------------------------------------------


def test_priorities_are_strict(engine: Engine, node: Make) -> None:
    low = engine.submit(*[task()] * 10)
    high = engine.submit(*[task(priority=10)] * 10)
    middle = engine.submit(*[task(priority=5)] * 10)
    with RunningDispatcher(engine):
        n1 = node(cores=1, quick=True)
        pump([n1], lambda: ended(engine, 30))
    assert n1.started == high + middle + low


def test_equal_priorities_go_in_the_order_of_submission_over_all_kinds(engine: Engine, node: Make) -> None:
    engine.reset(prefetch_after=NEVER)
    kinds = [{}, {"time_limit": 60}, {"queue": "other"}]
    ids = engine.submit(*[task(**kinds[n % 3]) for n in range(30)])
    with RunningDispatcher(engine):
        n1 = node(cores=1, quick=True)
        pump([n1], lambda: ended(engine, 30))
    assert n1.started == ids


def test_tasks_behind_an_array_keep_their_place(engine: Engine, node: Make) -> None:
    engine.reset(prefetch_after=NEVER)
    elements, other, behind, last = engine.submit(array(3), task(time_limit=60), task(), task(time_limit=60))
    with RunningDispatcher(engine):
        n1 = node(cores=1, quick=True)
        pump([n1], lambda: ended(engine, 6))
    assert n1.started == [*(f"{elements}_{n}" for n in range(3)), other, behind, last]


def test_a_thousand_kinds_of_tasks_run_in_their_order(engine: Engine, node: Make) -> None:
    """More than a pass looks at; the first ones can never run here."""
    engine.submit(*[task(request=Request(cores=(9, 9), memory=n)) for n in range(300)])
    with RunningDispatcher(engine):
        n1 = node(cores=8, quick=True)
        ids = engine.submit(*[task(request=Request(memory=1 + n)) for n in range(1000)])
        pump([n1], lambda: engine.counts().get("finished") == 1000)
        assert sorted(n1.started) == sorted(ids) and n1.started[:8] == ids[:8]
        (again,) = engine.submit(task(request=Request(memory=500)))
        pump([n1], lambda: engine.status(again) == "finished")


def test_cores_are_never_given_twice(engine: Engine, node: Make) -> None:
    engine.submit(*[wide(1 + n % 4) for n in range(200)], array(50))
    with RunningDispatcher(engine):
        nodes = [node("n1", 4), node("n2", 7)]
        while not ended(engine, 250):
            pump(nodes, lambda: any(n.running for n in nodes) or ended(engine, 250))
            for n in nodes:
                used = [
                    a for _, _, allocation in n.running.values() for a in allocation.partition("[")[2][:-1].split(":")
                ]
                assert len(used) == len(set(used)) <= len(n.info.cores)
                for task_id in list(n.running)[:2]:
                    n.finish(task_id)
    assert engine.counts() == {"total": 250, "finished": 250}


def test_nothing_is_prefetched_before_five_ends_of_its_kind(engine: Engine, node: Make) -> None:
    engine.submit(*[task()] * 50)
    with RunningDispatcher(engine):
        n1 = node(cores=1)
        for end in range(5):
            pump([n1], lambda: n1.running)
            assert n1.most_prefetched == 0, f"after {end} ends"
            n1.finish(*n1.running)
        pump([n1], lambda: n1.most_prefetched)
        engine.submit(task(priority=3))  # another kind: it waits for a slot
        n1.quick = True
        pump([n1], lambda: ended(engine, 51))
    assert max(executions(engine).values()) == 1


def test_what_is_prefetched_and_stuck_is_retracted(engine: Engine, node: Make) -> None:
    engine.reset(retract_after_s=0.2, reconcile_s=0.1)
    ids = engine.submit(*[task()] * 40)
    with RunningDispatcher(engine):
        n1 = node(cores=1)
        for _ in range(6):
            pump([n1], lambda: n1.running)
            n1.finish(*n1.running)
        pump([n1], lambda: n1.running and any(n1.prefetched.values()))
        n2 = node("n2", 2, quick=True)
        pump([n1, n2], lambda: len(n2.started) == 33)
        assert n1.retractions and len(n1.running) == 1
        n1.finish(*n1.running)
        pump([n1, n2], lambda: ended(engine, 40))
    assert sorted(n1.started + n2.started) == sorted(ids)
    assert {h for h, n in executions(engine).items() if n > 1} == set()


# -- nodes come and go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["seen to die", "left", "started again"])
def test_a_node_that_is_gone_gives_everything_back(engine: Engine, node: Make, how: str) -> None:
    ids = engine.submit(*[task()] * 5)
    with RunningDispatcher(engine):
        n1 = node("n1", 3)
        pump([n1], lambda: len(n1.running) == 3)
        if how == "seen to die":
            say(engine, NodeLost("n1", n1.info.incarnation, "its process was killed"))
        elif how == "left":
            n1.link.deregister()
        n2 = node("n1" if how == "started again" else "n2", 1, quick=True)
        pump([n2], lambda: ended(engine, 5))
        assert n2.started == ids  # they have kept their places
        n1.finish(ids[0])
        pump([n1], lambda: n1.verdicts)
    assert n1.verdicts[0][2] in ("ok", "stale")
    assert engine.counts() == {"total": 5, "finished": 5}
    assert engine.link.call("HKEYS", keys.NODES) == [n2.info.name.encode()]
    assert engine.link.call("SMEMBERS", keys.WORKERS) == [keys.worker(n2.info.name).encode()]


def test_more_than_one_call_of_lost_tasks_keeps_their_order(engine: Engine, node: Make) -> None:
    engine.reset(prefetch_after=NEVER)
    ids = engine.submit(*[task()] * 600, array(600))
    with RunningDispatcher(engine):
        n1 = node("n1", 1200)
        pump([n1], lambda: len(n1.running) == 1200)
        say(engine, NodeLost("n1", n1.info.incarnation, "its process was killed"))
        wait_until(lambda: len(engine.list()) == 1200)
    assert engine.list() == [*ids[:600], *(f"{ids[600]}_{n}" for n in range(600))]


def test_a_state_that_is_reported_again_does_not_free_what_is_taken(engine: Engine, node: Make) -> None:
    """A worker sends again what had no answer when its connection broke; the dispatcher knows better by then."""
    engine.submit(*[task()] * 4)
    with RunningDispatcher(engine) as running:
        n1 = node(cores=2)
        pump([n1], lambda: len(n1.running) == 2)
        for term in (0, running.dispatcher.store.term):
            n1.link.post_state(StateReport("n1", n1.info.incarnation, term, [], {}))
        engine.submit(task(priority=9))
        pump([n1], lambda: not n1.link.unsent() and not engine.link.call("EXISTS", keys.EVENTS))
        say(engine, ControlChanged())
        wait_until(lambda: not engine.link.call("EXISTS", keys.EVENTS))
        n1.turn()
        assert len(n1.running) == 2
        n1.quick = True
        pump([n1], lambda: ended(engine, 5))


def test_a_node_that_joins_costs_the_same_whatever_the_number_of_nodes(engine: Engine, node: Make) -> None:
    engine.admin.call("CONFIG", "RESETSTAT")
    with RunningDispatcher(engine) as running:
        nodes = [node(f"n{number}") for number in range(20)]
        pump(nodes, lambda: len(running.dispatcher.inventory.nodes) == 20)
    reads_of_all = engine.admin.call("INFO", "commandstats").decode().partition("cmdstat_hvals:calls=")[2]
    assert int(reads_of_all.partition(",")[0] or 0) < 10


def test_a_worker_record_that_expired_is_made_again(engine: Engine, node: Make) -> None:
    n1 = node()
    engine.link.call("DEL", keys.worker("n1"))
    engine.link.call("SREM", keys.WORKERS, keys.worker("n1"))
    n1.link.post_heartbeat({"last_heartbeat": "now", "state": "busy"})
    pump([n1], lambda: not n1.link.unsent())
    record = engine.link.call("HGETALL", keys.worker("n1"))
    assert b"birth" in record and b"busy" in record and engine.ttl(keys.worker("n1")) > 0
    assert engine.link.call("SMEMBERS", keys.WORKERS) == [keys.worker("n1").encode()]
    engine.store.run("deregister", "n1", n1.info.incarnation, "")  # the dispatcher gave it up
    n1.link.post_heartbeat({"state": "busy"})
    with pytest.raises(Superseded):
        pump([n1], lambda: not n1.link.unsent())


# -- another dispatcher, another server -------------------------------------------------------------------------------


def test_a_new_dispatcher_takes_over_what_runs(engine: Engine, node: Make) -> None:
    ids = engine.submit(*[task()] * 60)
    with RunningDispatcher(engine) as old:
        n1 = node(cores=2)
        for _ in range(6):
            pump([n1], lambda: n1.running)
            n1.finish(next(iter(n1.running)))
        pump([n1], lambda: len(n1.running) == 2 and any(n1.prefetched.values()))
        held = dict(n1.running)
        with RunningDispatcher(engine) as new:
            pump([n1], lambda: old.ended and new.dispatcher.inventory.slots)
            assert isinstance(old.error, Superseded)
            assert set(new.dispatcher.inventory.slots) == {slot for _, slot, _ in held.values()}
            while not ended(engine, 60):
                pump([n1], lambda: n1.running or ended(engine, 60))
                assert len(n1.running) <= 2
                for task_id in list(n1.running):
                    n1.finish(task_id)
    assert sorted(n1.started) == sorted(ids)
    assert set(executions(engine).values()) == {1}


def test_tasks_of_nodes_that_are_no_more_go_back_when_a_dispatcher_starts(engine: Engine, node: Make) -> None:
    ids = engine.submit(*[task()] * 3)
    with RunningDispatcher(engine):
        n1 = node(cores=2)
        pump([n1], lambda: len(n1.running) == 2)
    engine.store.run("deregister", "n1", n1.info.incarnation, "")  # nobody was there to hear of it
    with RunningDispatcher(engine):
        n2 = node("n2", 1, quick=True)
        pump([n2], lambda: ended(engine, 3))
    assert n2.started == ids


def test_broken_connections_lose_nothing(engine: Engine, node: Make) -> None:
    ids = engine.submit(*[task()] * 3000)
    with RunningDispatcher(engine) as running:
        nodes = [node("n1", 2, quick=True), node("n2", 2, quick=True)]
        for share in range(1, 6):
            pump(nodes, lambda share=share: engine.counts().get("finished", 0) > 500 * share)  # type: ignore[misc]
            engine.admin.call("FUNCTION", "FLUSH")
            engine.admin.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            engine.link.close()
        pump(nodes, lambda: ended(engine, 3000))
        assert running.error is None
    assert engine.counts() == {"total": 3000, "finished": 3000}
    assert sorted(nodes[0].started + nodes[1].started) == sorted(ids)
    assert set(executions(engine).values()) == {1}
    wait_until(lambda: not engine.registry("wip"))


@pytest.fixture
def lasting(tmp_path: Any) -> Iterator[RunningServer]:
    running = start_server(str(tmp_path), durability="everysec")
    yield running
    running.stop()


def test_a_server_that_is_killed_and_started_again(lasting: RunningServer) -> None:
    with contextlib.closing(Engine(lasting)) as engine:
        ids = engine.submit(*[task()] * 1500, array(500))
        with (
            RunningDispatcher(engine) as running,
            contextlib.closing(FakeNode(engine, cores=2, quick=True).register()) as n1,
        ):
            for done in (300, 1200):
                pump([n1], lambda done=done: engine.counts().get("finished", 0) > done)  # type: ignore[misc]
                assert lasting.process is not None
                lasting.process.kill()
                lasting.process.wait()
                lasting.part.close()
                lasting.start()
                wait_ready(lasting.address, lasting.part)
                engine.link.close()
            pump([n1], lambda: ended(engine, 2000))
            assert running.error is None
        assert engine.counts() == {"total": 2000, "finished": 2000}
        assert sorted(n1.started) == sorted([*ids[:1500], *(f"{ids[1500]}_{n}" for n in range(500))])
        assert set(executions(engine).values()) == {1}


def test_a_server_without_our_state_stops_everybody(engine: Engine, node: Make) -> None:
    engine.reset(reconcile_s=0.05)
    with RunningDispatcher(engine) as running:
        n1 = node()
        engine.admin.call("FLUSHALL")
        wait_until(lambda: running.ended)
        assert isinstance(running.error, StateLost)
        n1.link.post_heartbeat({"state": "idle"})
        with pytest.raises(StateLost):
            pump([n1], lambda: False)


# -- control ----------------------------------------------------------------------------------------------------------


def test_pause_retracts_what_is_prefetched_and_starts_nothing(engine: Engine, node: Make) -> None:
    engine.submit(*[task()] * 50)
    broker = Broker(engine.running.address, QUEUE_ID, None)
    with RunningDispatcher(engine), contextlib.closing(broker):
        n1 = node(cores=1)
        for _ in range(6):
            pump([n1], lambda: n1.running)
            n1.finish(*n1.running)
        pump([n1], lambda: n1.running and any(n1.prefetched.values()))
        broker.pause(True)
        pump([n1], lambda: not any(n1.prefetched.values()))
        n1.finish(*n1.running)
        pump([n1], lambda: engine.link.call("HGET", keys.STATUS, "busy") == b"0")
        assert not n1.running
        n1.quick = True
        broker.pause(False)
        pump([n1], lambda: ended(engine, 50))
    assert set(executions(engine).values()) == {1}


def test_nothing_starts_before_the_expected_nodes_are_there(engine: Engine, node: Make) -> None:
    """Two nodes of three must be n1 and n2, whichever worker was up first."""
    engine.reset(initial_nodes_wait_s=60)
    engine.link.call("RPUSH", keys.EXPECTED_NODES, "n1", "n2", "n3")
    (task_id,) = engine.submit(task(request=Request(nodes=(2, 2))))
    with RunningDispatcher(engine) as running:
        n1, n3 = node("n1"), node("n3")
        pump([n1, n3], lambda: len(running.dispatcher.inventory.nodes) == 2)
        assert engine.status(task_id) == "queued"
        n2 = node("n2")
        pump([n1, n2, n3], lambda: n1.running)
        assert [share.node for slot in running.dispatcher.inventory.slots.values() for share in slot.shares] == [
            "n1",
            "n2",
        ]


@pytest.mark.parametrize("expected", [(), ("n1", "n9")], ids=["none expected", "one never comes"])
def test_the_wait_for_expected_nodes_is_bounded(engine: Engine, node: Make, expected: tuple[str, ...]) -> None:
    engine.reset(initial_nodes_wait_s=0.1 if expected else 60)
    if expected:
        engine.link.call("RPUSH", keys.EXPECTED_NODES, *expected)
    engine.submit(task())
    with RunningDispatcher(engine):
        n1 = node("n1")
        pump([n1], lambda: n1.running)


def test_rq_suspend_pauses(engine: Engine, node: Make) -> None:
    engine.reset(reconcile_s=0.05)
    engine.link.call("SET", keys.SUSPENDED, 1)
    engine.submit(task())
    with RunningDispatcher(engine) as running:
        n1 = node(quick=True)
        pump([n1], lambda: running.dispatcher.inventory.nodes)
        assert running.dispatcher.paused and not n1.started
        engine.link.call("DEL", keys.SUSPENDED)
        pump([n1], lambda: ended(engine, 1))


def test_all_goes_on_when_the_memory_is_full(engine: Engine, node: Make) -> None:
    """Nothing new is accepted; what was accepted runs, with a new dispatcher and a new worker, and can be paused."""
    engine.submit(*[task()] * 50, array(50))
    broker = Broker(engine.running.address, QUEUE_ID, None)
    engine.admin.call("CONFIG", "SET", "maxmemory", "1mb")
    try:
        with RunningDispatcher(engine) as running, contextlib.closing(broker):
            n1 = node(quick=True)
            broker.pause(True)
            pump([n1], lambda: running.dispatcher.paused)
            broker.pause(False)
            n1.link.post_heartbeat({"state": "busy"})
            pump([n1], lambda: ended(engine, 100))
            assert running.error is None
            with pytest.raises(ServerRefused):
                broker.enqueue(task())
            broker.request_stop("drain")
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", "0")
    assert engine.counts() == {"total": 100, "finished": 100}
    assert set(executions(engine).values()) == {1}


# -- RQ's tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["cancel", "delete"])
def test_rqs_cancel_and_delete_reach_what_runs_and_what_waits(engine: Engine, node: Make, tool: str) -> None:
    """Plain tasks, a whole array, one element; afterwards everything has ended and is counted."""
    engine.reset(reconcile_s=0.05)
    runs, keeps, waits, many, whole = engine.submit(task(), task(), task(), array(4), array(3))
    broker = Broker(engine.running.address, QUEUE_ID, None)
    with RunningDispatcher(engine), contextlib.closing(broker):
        n1 = node(cores=9)
        pump([n1], lambda: len(n1.running) == 9)
        n1.report_started(f"{many}_1")  # RQ's tools see only what has a record
        wait_until(lambda: engine.status(f"{many}_1") == "started")
        for name in (runs, f"{many}_1", whole):
            getattr(Job.fetch(name, connection=broker.redis), tool)()
        pump([n1], lambda: {s.id for s in n1.stops} >= {runs, f"{many}_1", whole})
        (late,) = engine.submit(task())
        getattr(Job.fetch(late, connection=broker.redis), tool)()
        n1.quick = True
        pump([n1], lambda: ended(engine, 11))
    assert engine.counts()["total"] == 11
    assert engine.counts()["finished"] >= 5 and engine.counts()["canceled"] >= 4
    gone = None if tool == "delete" else "canceled"
    assert engine.statuses(runs, late, keeps, waits) == [gone, gone, "finished", "finished"]
    assert engine.outcomes(many, 4) == "1311" and engine.status(many) == "failed"
    assert (engine.registry("wip"), engine.list()) == ([], [])


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_what_a_task_costs_the_server(engine: Engine, node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At load: at most 12 commands inside scripts and 0.1 round trips a task, staging and watching left out."""
    count = 5000
    for first in range(0, count, 500):  # more at once would share a record
        engine.submit(*[task(str(n)) for n in range(first, first + 500)])
    sent: Counter[str] = Counter()
    pack_command, send = link_module.hiredis.pack_command, link_module.Connection._send

    def packed(command: tuple[Any, ...]) -> bytes:
        sent["commands"] += 1
        return pack_command(command)

    def sending(link: link_module.Connection, data: bytes) -> None:
        sent["round trips"] += 1
        send(link, data)

    n1 = node(cores=2, quick=True)
    with RunningDispatcher(engine):
        engine.admin.call("CONFIG", "RESETSTAT")
        monkeypatch.setattr(link_module.hiredis, "pack_command", packed)
        monkeypatch.setattr(link_module.Connection, "_send", sending)
        pump([n1], lambda: len(n1.verdicts) == count, seconds=60)
        monkeypatch.undo()
        stats = engine.admin.call("INFO", "commandstats").decode().splitlines()
    calls = sum(int(line.partition("calls=")[2].partition(",")[0]) for line in stats if "calls=" in line)
    assert engine.counts() == {"total": count, "finished": count}
    assert sent["round trips"] / count <= 0.1
    assert (calls - sent["commands"]) / count <= 12, "\n".join(stats)


def test_a_node_gets_nothing_that_does_not_fit_before_the_end_of_its_allocation(engine: Engine, node: Make) -> None:
    """That is told before the node registers, but after the dispatcher has last read such ends."""
    engine.reset(reconcile_s=1000.0, prefetch_after=NEVER)
    long, short = engine.submit(task(time_request=600), task(time_request=10))
    with RunningDispatcher(engine) as running:
        wait_until(lambda: running.dispatcher.reconciler.next_turn)
        engine.link.call("HSET", keys.ALLOCATION_ENDS, "77", f"{time.time() + 300} 60 15")
        n1 = node("n1", job="77")
        pump([n1], lambda: n1.started)
        assert n1.started == [short] and engine.status(long) == "queued"
