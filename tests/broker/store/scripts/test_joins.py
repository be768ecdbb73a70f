"""Tasks that join: between the end of their process and their own they wait for their children, on a real server."""

from __future__ import annotations

import msgspec
import pytest

from pilotq.broker.client import commit
from pilotq.broker.client.submit import submit
from pilotq.broker.errors import InvalidInput
from pilotq.broker.rq.repair import RqRepair
from pilotq.broker.store import keys
from pilotq.broker.store.messages import Run, Stop
from pilotq.broker.store.requeue import requeue
from pilotq.broker.tasks.model import Task
from tests.support.engine import ONE, SHARED, Engine, array, fixtures, task

engine, server, node = fixtures


def within(engine: Engine, submitter: str, *tasks: Task, key: str | None = None) -> list[str]:
    """Submit from within a task."""
    return submit(engine.link, engine.store, tasks, SHARED, key, submitter=submitter)


def started(engine: Engine, **fields: object) -> Run:
    """A task that joins, and runs."""
    engine.submit(task(join=True, **fields))
    (handed,) = engine.claim()
    return handed


def finish(engine: Engine, *ids: str, outcome: str = "finished") -> None:
    """Claim until these were handed out, and end them."""
    handed = engine.claim(20)
    assert sorted({h.array or h.id for h in handed}) == sorted(ids)
    engine.complete(handed, outcome, {"finished": "", "failed": "exit"}.get(outcome, outcome))
    engine.release_dependents()


def open_children(engine: Engine, task_id: str) -> int:
    return int(engine.hash(task_id)["pq_open_children"])


def test_it_ends_with_its_last_child(engine: Engine) -> None:
    parent = started(engine)
    (child,) = within(engine, parent.id, task())
    (span,) = within(engine, parent.id, array(3))
    (waiting,) = engine.submit(task(after=[parent.id]))
    engine.complete([parent])
    engine.release_dependents()
    record = engine.hash(parent.id)
    assert (record["status"], record["pq_joining"], record["pq_children"]) == ("deferred", "finished:", "2")
    assert (engine.registry("wip"), engine.registry("deferred")) == ([], [waiting, parent.id])
    assert engine.ttl(keys.job(parent.id)) == -1
    finish(engine, child, span)
    assert engine.statuses(parent.id, waiting) == ["finished", "queued"]
    assert 0 < engine.ttl(keys.job(parent.id)) <= engine.settings.finished_ttl_s
    assert engine.ttl(keys.children(parent.id)) > 0
    assert engine.final_entry(parent.id)["status"] == "finished"
    finish(engine, waiting)
    assert engine.nothing_left()


def test_children_that_have_ended_before_its_process(engine: Engine) -> None:
    parent = started(engine)
    finish(engine, *within(engine, parent.id, task()))
    assert engine.status(parent.id) == "started"
    assert engine.complete([parent]) == ["ok"]
    assert engine.complete([parent]) == ["ok"]  # a repeated report
    engine.release_dependents()
    assert engine.status(parent.id) == "finished"
    assert engine.complete([parent]) == ["ok"]
    assert engine.nothing_left()


def test_without_children_nothing_is_waited_for(engine: Engine) -> None:
    parent = started(engine)
    engine.complete([parent])
    assert engine.status(parent.id) == "finished"
    other = started(engine)
    engine.submit(task(priority=1))  # by somebody else
    engine.complete([other])
    assert engine.status(other.id) == "finished"


def test_only_a_task_that_joins_and_has_not_ended_has_children(engine: Engine) -> None:
    plain, over = engine.submit(task(), task(join=True))
    handed = engine.claim(2)
    engine.complete(handed)
    for submitter in (plain, over, "7f", "7f_3"):
        (child,) = within(engine, submitter, task())
        assert "pq_has_dependents" not in engine.hash(child)
    assert [key for key in engine.all_keys() if key.startswith("pilotq:children:")] == []


@pytest.mark.parametrize("outcome", ["failed", "stopped", "canceled"])
def test_it_fails_when_a_child_did_not_finish(engine: Engine, outcome: str) -> None:
    parent = started(engine)
    bad, good = within(engine, parent.id, task(priority=1), task())
    engine.complete([parent])
    (handed,) = engine.claim(1, "default.p1.1c")
    engine.complete([handed], outcome, {"failed": "exit"}.get(outcome, outcome))
    engine.release_dependents()
    assert engine.status(parent.id) == "deferred"
    finish(engine, good)
    assert (engine.status(parent.id), engine.hash(parent.id)["pq_reason"]) == ("failed", "children")
    assert engine.hash(parent.id)["pq_bad_child"] == bad
    assert engine.final_entry(parent.id)["reason"] == "children"
    assert engine.registry("failed")[-1] == parent.id
    assert engine.nothing_left()


@pytest.mark.parametrize("outcome", ["failed", "stopped"])
def test_its_own_outcome_goes_before_that_of_children(engine: Engine, outcome: str) -> None:
    parent = started(engine, retries=1)
    (first,) = within(engine, parent.id, task(priority=1))
    if outcome == "failed":
        assert engine.complete([parent], "failed", "exit") == ["retry"]
        (parent,) = engine.claim()
    (second,) = within(engine, parent.id, task(priority=1))  # those of all executions count
    assert engine.complete([parent], outcome, "exit") == ["ok"]
    assert (engine.status(parent.id), engine.hash(parent.id)["pq_children"]) == ("deferred", "2")
    handed = engine.claim(2, "default.p1.1c")
    assert [h.id for h in handed] == [first, second]
    engine.complete(handed, "failed", "exit")
    engine.release_dependents()
    assert (engine.status(parent.id), engine.hash(parent.id)["pq_reason"]) == (outcome, "exit")
    assert engine.nothing_left()


def test_children_of_children(engine: Engine) -> None:
    """A child that joins ends after its own; of another one those are tasks of nobody."""
    parent = started(engine)
    joining, plain = within(engine, parent.id, task(join=True), task())
    handed = engine.claim(2)
    (grandchild,) = within(engine, joining, task())
    (other,) = within(engine, plain, task(priority=1))
    engine.complete([*handed, parent])
    engine.release_dependents()
    assert engine.statuses(parent.id, joining, plain, other) == ["deferred", "deferred", "finished", "queued"]
    finish(engine, grandchild)
    assert engine.statuses(parent.id, joining) == ["finished", "finished"]


@pytest.mark.parametrize("moment", ["running", "joining", "again"])
def test_cancel_cancels_children(engine: Engine, moment: str) -> None:
    parent = started(engine, retries=1)
    waiting, running = within(engine, parent.id, task(), task(priority=1))
    (handed,) = engine.claim(1, "default.p1.1c")
    if moment != "running":
        engine.complete(
            [parent], "finished" if moment == "joining" else "failed", "" if moment == "joining" else "exit"
        )
        engine.release_dependents()
    assert engine.cancel(parent.id) == ["stopping"]
    engine.release_dependents()
    stops = {m.id for m in engine.inbox() if isinstance(m, Stop)}
    assert engine.statuses(waiting, running) == ["canceled", "started"]
    assert stops == {running, parent.id} if moment == "running" else stops == {running}
    if moment == "running":
        (late,) = within(engine, parent.id, task())
        engine.complete([parent], "canceled", "canceled")
        engine.release_dependents()
        assert engine.status(late) == "canceled"
    assert engine.status(parent.id) == "deferred"
    engine.complete([handed], "canceled", "canceled")
    engine.release_dependents()
    assert (engine.status(parent.id), engine.hash(parent.id)["pq_reason"]) == ("canceled", "canceled")
    assert engine.cancel(parent.id) == ["canceled"]
    assert not engine.run_all()
    assert engine.nothing_left()


def test_cancel_by_rq_of_what_joins(engine: Engine) -> None:
    parent = started(engine)
    (child,) = within(engine, parent.id, task())
    engine.complete([parent])
    engine.link.call("HSET", keys.job(parent.id), "status", "canceled")
    engine.link.call("ZREM", keys.registry("deferred", "default"), parent.id)
    assert engine.cancel(parent.id) == ["stopping"]
    engine.release_dependents()
    assert engine.statuses(parent.id, child) == ["canceled", "canceled"]
    assert not engine.run_all()
    assert engine.nothing_left()


def test_only_what_waits_is_canceled(engine: Engine) -> None:
    parent = started(engine)
    (child,) = within(engine, parent.id, task())
    engine.complete([parent])
    assert engine.store.cancel([parent.id], waiting=True) == ["started"]
    engine.release_dependents()
    assert engine.statuses(parent.id, child) == ["deferred", "queued"]


def test_a_child_that_runs_again_is_waited_for_again(engine: Engine) -> None:
    parent = started(engine)
    bad, good = within(engine, parent.id, task(priority=1), array(2, priority=1))
    engine.complete([parent])
    engine.complete(engine.claim(3, "default.p1.1c"), "failed", "exit")
    assert requeue(engine.store, [bad]) == {bad: "queued"}  # before its end was told
    engine.release_dependents()
    assert open_children(engine, parent.id) == 1
    assert requeue(engine.store, [good]) == {good: "queued"}
    assert (open_children(engine, parent.id), engine.hash(parent.id)["pq_bad_children"]) == (2, "0")
    engine.run_all("default.p1.1c")
    assert engine.status(parent.id) == "finished"
    assert engine.nothing_left()


def test_running_again_has_other_children(engine: Engine) -> None:
    parent = started(engine)
    (old,) = within(engine, parent.id, task())
    engine.complete([parent])
    finish(engine, old, outcome="failed")
    assert requeue(engine.store, [parent.id, old]) == {parent.id: "queued", old: "queued"}
    handed = engine.claim(2)
    (child,) = within(engine, parent.id, task())
    engine.complete(handed)
    engine.release_dependents()
    assert (engine.status(parent.id), engine.hash(parent.id)["pq_children"]) == ("deferred", "1")
    finish(engine, child)
    assert engine.status(parent.id) == "finished"
    assert engine.nothing_left()


def test_deleted_records(engine: Engine) -> None:
    parent = started(engine)
    (child,) = within(engine, parent.id, task())
    engine.complete([parent])
    engine.release_dependents()
    engine.link.call("DEL", keys.job(child))
    RqRepair(engine.store).turn(["default"], 0.0)
    engine.release_dependents()
    assert engine.hash(parent.id)["pq_reason"] == "children"
    other = started(engine)
    (child,) = within(engine, other.id, task())
    engine.complete([other])
    engine.link.call("DEL", keys.job(other.id))
    finish(engine, child)
    assert keys.children(other.id) not in engine.all_keys()


def test_a_large_submit_has_children_from_its_first_call_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIECE_TASKS", "PIECE_PARENTS", "LARGE_TASKS", "LARGE_PARENTS"):
        monkeypatch.setattr(commit, name, 2)
    parent = started(engine)
    within(engine, parent.id, task(name="a"), task(after_any=["a"]), array(2), *[task()] * 4)
    assert engine.hash(parent.id)["pq_children"] == "7"
    engine.complete([parent])
    engine.release_dependents()
    engine.run_all()
    assert engine.status(parent.id) == "finished"
    assert engine.nothing_left()


def test_staged_records_that_are_gone_have_ended(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIECE_TASKS", "PIECE_PARENTS", "LARGE_TASKS", "LARGE_PARENTS"):
        monkeypatch.setattr(commit, name, 2)
    parent = started(engine)

    class Accepted(Exception):
        pass

    def no_rest(*_: object) -> None:
        raise Accepted

    real = engine.store.commit
    monkeypatch.setattr(engine.store, "commit", lambda *a, **f: no_rest() if a[5:6] == ("rest",) else real(*a, **f))
    with pytest.raises(Accepted):
        within(engine, parent.id, *[task()] * 5)
    engine.complete([parent])
    first = min(k for k in engine.all_keys() if k.startswith("rq:job:") and k != keys.job(parent.id))
    engine.link.call("DEL", first)
    engine.release_dependents()
    engine.run_all()
    assert engine.hash(parent.id)["pq_reason"] == "children"
    assert engine.nothing_left()


def test_waits_that_lead_back_are_refused(engine: Engine) -> None:
    top = started(engine)
    (parent,) = within(engine, top.id, task(join=True))
    behind, span = engine.submit(task(after=[parent], name="x"), array(2, after_any=["x"]))
    engine.claim()
    before = engine.counts()
    for field, name in (("after", parent), ("after_any", top.id), ("after_notok", behind), ("after", f"{span}_1")):
        with pytest.raises(InvalidInput, match="each would wait for the other"):
            within(engine, parent, task(**{field: [name]}))
    with pytest.raises(InvalidInput, match=f"cannot wait for {parent} .by {span} -> {behind} -> {parent}"):
        within(engine, parent, array(2, after_each=[span]))
    assert engine.counts() == before
    within(engine, parent, task(name="a"), task(after=["a"]))
    assert engine.submit(task(after=[parent]))  # from elsewhere


def test_a_wait_for_what_joins_a_task_that_waits_is_refused(engine: Engine) -> None:
    """It would wait for a task whose child waits for the one that joins it."""
    one, other = started(engine), started(engine)
    within(engine, other.id, task(after=[one.id]))
    with pytest.raises(InvalidInput, match="each would wait for the other"):
        within(engine, one.id, task(after=[other.id]))


def test_arrays_are_refused_and_bundles_have_no_member_that_joins(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="join is for single tasks"):
        engine.submit(array(2, join=True))
    engine.store.settings = msgspec.structs.replace(engine.settings, bundle_above=1)
    first, *_ = engine.submit(*[task(str(n), join=True) for n in range(3)])
    assert "_" not in first
    assert engine.list(ONE)[0] == first


def test_what_an_executor_calls_returns_to_it_with_the_end(engine: Engine) -> None:
    (parent_id,) = engine.submit(task(join=True), key="@0123456789ab.1")
    (parent,) = engine.claim()
    (child,) = within(engine, parent_id, task())
    engine.complete([parent], text="value")
    engine.release_dependents()
    assert engine.link.call("XLEN", keys.completed("0123456789ab")) == 0
    finish(engine, child)
    ((_, (_, packed)),) = engine.link.call("XRANGE", keys.completed("0123456789ab"), "-", "+")
    assert msgspec.msgpack.decode(packed) == [[parent_id, "finished", "", "value"]]


def test_a_joining_task_that_was_hidden_by_a_producer_of_rq(engine: Engine) -> None:
    """Its end does not ask for the status, which RQ may have written over."""
    parent = started(engine)
    (child,) = within(engine, parent.id, task())
    engine.complete([parent])
    engine.link.call("HSET", keys.job(parent.id), "status", "queued")
    finish(engine, child)
    assert engine.status(parent.id) == "finished"


def test_a_damaged_record_of_one_that_joins_ends_it_alone(engine: Engine) -> None:
    parent = started(engine)
    (child,) = within(engine, parent.id, task())
    engine.complete([parent])
    engine.link.call("HSET", keys.job(parent.id), "pq_open_children", "many")
    finish(engine, child)
    assert engine.statuses(parent.id, child) == ["failed", "finished"]
    assert engine.hash(parent.id)["pq_reason"] == "refused"
    assert engine.cancel(parent.id) == ["failed"]
    assert engine.nothing_left()
