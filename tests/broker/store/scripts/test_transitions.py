"""Every transition of the table through its script on a real server, and nothing else changes anything."""

from __future__ import annotations

import time

import pytest

from pilotq.broker.client.submit import submit
from pilotq.broker.store import keys
from pilotq.broker.store.leases import TaskLease, task_leases
from pilotq.broker.store.messages import Run, Stop
from pilotq.broker.store.store import Store, iso
from pilotq.broker.tasks.states import ENDED, EVENT_SCRIPTS, RQ_EVENTS, STATUSES, TABLE
from tests.support.engine import NODE, ONE, QUEUE_ID, SHARED, Engine, fixtures, task

engine, server, node = fixtures
EVENTS = tuple(event for event in EVENT_SCRIPTS if event not in RQ_EVENTS)  # the others: tests/test_stock_*.py
KEY = "submission-of-the-task"
PARENTS = "default.p5.1c"  # the class of what a deferred task waits for
PARENT = "zzz"  # no such task: only its list of dependents is used


class NeverCommitted(Exception):
    pass


class Stager(Store):
    def commit(self, *_: object) -> list[object]:
        raise NeverCommitted


def stage(engine: Engine) -> str:
    """A task that was staged and not committed; returns its id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pilotq.broker.client.submit.CARRIED_TASKS", 0)
        with pytest.raises(NeverCommitted):
            submit(engine.link, Stager(engine.link, QUEUE_ID, engine.settings), [task()], SHARED, KEY)
    (name,) = (k for k in engine.all_keys() if k.startswith("rq:job:"))
    return name.removeprefix("rq:job:")


def bring(engine: Engine, status: str, *, retries: int = 0) -> tuple[str, Run | None]:
    """A task in this status, and its execution if it has one. ``canceled-running`` is the work of RQ's button."""
    if status == "created":
        return stage(engine), None
    if status == "deferred":
        parent = engine.submit(task(priority=5))[0]
        return engine.submit(task(after=[parent]), key=KEY)[0], None
    task_id = engine.submit(task(retries=retries), key=KEY)[0]
    if status in ("scheduled", "rate_limited", "ready_to_enqueue"):
        engine.link.call("HSET", keys.job(task_id), "status", status)
        engine.link.call("DEL", keys.queue(ONE))
        return task_id, None
    if status == "queued":
        return task_id, None
    (handed,) = engine.claim()
    assert handed.id == task_id
    if status in ENDED:
        assert engine.complete([handed], status, "exit" if status == "failed" else "") == ["ok"]
        engine.link.call("DEL", keys.RELEASE)
    elif status == "canceled-running":
        engine.link.call("HSET", keys.job(task_id), "status", "canceled")
    return task_id, handed


def do(engine: Engine, event: str, task_id: str, handed: Run | None, status: str) -> None:
    """Let the event's script meet the task, wherever the task is."""
    script = EVENT_SCRIPTS[event]
    if script == "commit":
        engine.store.commit(KEY, 1, 1, 1, {"groups": [(ONE, [task_id])], "waits": [], "elementwise": [], "extra": []})
    elif script == "release_dependents":
        if status not in ("created", "deferred"):
            engine.link.call("RPUSH", keys.dependents(PARENT), task_id)
            engine.link.call("RPUSH", keys.RELEASE, f"{'k' if event == 'release' else 'o'}:{PARENT}")
        engine.release_dependents()
    elif script == "cancel":
        engine.cancel(task_id)
    elif script == "requeue":
        engine.store.requeue([[task_id]])
    elif script == "claim":
        if status not in ("created", "queued"):
            engine.link.call("RPUSH", keys.queue(ONE), task_id)
        engine.claim(5)
    else:
        h = handed or Run(task_id, 1, 1, "n1[0]", ONE, "", 0, 0, "", "", -1, 0, 0, KEY, b"")  # type: ignore[arg-type]
        if script == "return_unstarted":
            engine.return_unstarted([h])
        elif event in ("lost", "crash_limit"):
            engine.report_lost([h])
        else:
            engine.complete([h], {"end_retried": "failed"}.get(event, event.removeprefix("end_")))


def without_mail(engine: Engine) -> dict[str, object]:
    """All that is known of tasks: without what a worker's call leaves for the dispatcher, and lists of ids."""
    return engine.dump(without=(keys.EVENTS, keys.WAKEUP, "rq:worker:", "rq:queue:", keys.dependents(""), keys.SEQ))


# -- transitions of the table -----------------------------------------------------------------------------------------


def test_commit(engine: Engine) -> None:
    task_id = bring(engine, "queued")[0]
    assert (engine.status(task_id), engine.list(), engine.ttl(keys.job(task_id))) == ("queued", [task_id], -1)
    assert engine.counts() == {"total": 1} == engine.counts(keys.submission(KEY))


def test_commit_deferred(engine: Engine) -> None:
    task_id = bring(engine, "deferred")[0]
    assert (engine.status(task_id), engine.registry("deferred")) == ("deferred", [task_id])
    assert engine.hash(task_id)["origin"] == "default"


def test_commit_omitted(engine: Engine) -> None:
    parent = bring(engine, "failed")[0]
    child, grandchild = engine.submit(task(name="child", after=[parent]), task(after=["child"]))
    assert engine.statuses(child, grandchild) == ["canceled", "canceled"]
    assert engine.hash(child)["pq_reason"] == "dependency"
    assert engine.ttl(keys.job(child)) > 0
    assert engine.registry("canceled") == [child, grandchild]
    assert engine.counts() == {"total": 3, "failed": 1, "canceled": 2}
    assert {entry["id"] for entry in engine.journal()} == {parent, child, grandchild}


def test_release(engine: Engine) -> None:
    child = bring(engine, "deferred")[0]
    engine.complete(engine.claim(class_name=PARENTS))
    engine.release_dependents()
    assert (engine.status(child), engine.list(), engine.registry("deferred")) == ("queued", [child], [])
    assert engine.hash(child)["origin"] == ONE


@pytest.mark.parametrize("outcome", ["failed", "stopped", "canceled"])
def test_omit(engine: Engine, outcome: str) -> None:
    child = bring(engine, "deferred")[0]
    engine.complete(engine.claim(class_name=PARENTS), outcome)
    engine.release_dependents()
    assert (engine.status(child), engine.hash(child)["pq_reason"]) == ("canceled", "dependency")
    assert (engine.list(), engine.registry("deferred")) == ([], [])
    assert engine.registry("canceled")[-1] == child


@pytest.mark.parametrize("status", ["queued", "deferred"])
def test_cancel_of_what_waits(engine: Engine, status: str) -> None:
    task_id = bring(engine, status)[0]
    assert engine.cancel(task_id) == ["canceled"]
    assert (engine.status(task_id), engine.registry("canceled"), engine.registry("deferred")) == (
        "canceled",
        [task_id],
        [],
    )
    assert engine.journal()[-1]["reason"] == "canceled"
    assert task_id not in [h.id for h in engine.claim(5)]
    assert engine.counts(keys.submission(KEY)) == {"total": 1, "canceled": 1}


def test_claim(engine: Engine) -> None:
    task_id, handed = bring(engine, "started")
    assert handed is not None
    assert (handed.id, handed.execution, handed.slot, handed.allocation, handed.class_name) == (
        task_id,
        1,
        1,
        "n1[0]",
        ONE,
    )
    assert (engine.list(), engine.registry("wip")) == ([], [f"{task_id}:1"])
    assert engine.link.call("ZSCORE", keys.registry("wip", "default"), f"{task_id}:1") == b"-3"  # first node, slot
    assert task_leases(engine.link, [(f"{task_id}:1", "default")]) == [TaskLease(1, NODE, True)]
    assert engine.hash(task_id)["status"] == "queued"  # nothing is written until it needs that
    assert engine.store.run("report_started", task_id, 1, "n1[0]", iso(time.time()), b"", b"") == 1
    record = engine.hash(task_id)
    assert (record["status"], record["pq_node"], record["worker_name"], record["origin"]) == (
        "started",
        NODE,
        "n1",
        "default",
    )
    assert engine.link.call("ZSCORE", keys.registry("wip", "default"), f"{task_id}:1") == b"inf"


def test_cancel_of_what_runs(engine: Engine) -> None:
    task_id, handed = bring(engine, "started")
    assert handed is not None
    assert engine.cancel(task_id) == ["stopping"]
    assert engine.inbox() == [Stop(task_id, 1, "canceled")]
    assert engine.status(task_id) == "started"
    assert engine.complete([handed], "failed", "signal") == ["ok"]  # whatever the worker calls it
    assert engine.status(task_id) == "canceled"


@pytest.mark.parametrize("status", ["queued", "deferred"])
def test_cancel_by_rq_of_what_waits(engine: Engine, status: str) -> None:
    """RQ sets the status and takes the id out of list and registry; our script counts it, once."""
    task_id = bring(engine, status)[0]
    engine.link.call("HSET", keys.job(task_id), "status", "canceled")
    for _ in range(2):
        assert engine.cancel(task_id) == ["canceled"]
        assert engine.counts(keys.submission(KEY)) == {"total": 1, "canceled": 1}
    assert [entry["id"] for entry in engine.journal()] == [task_id]
    assert engine.ttl(keys.job(task_id)) > 0


def test_cancel_by_rq_of_what_runs(engine: Engine) -> None:
    task_id, handed = bring(engine, "canceled-running")
    assert handed is not None
    assert engine.cancel(task_id) == ["stopping"]
    assert engine.inbox() == [Stop(task_id, 1, "canceled")]
    assert engine.cancel(task_id) == ["canceled"]  # known: no message is sent again
    assert engine.inbox() == []
    assert engine.complete([handed]) == ["ok"]
    assert (engine.status(task_id), engine.registry("wip"), engine.counts()) == (
        "canceled",
        [],
        {"total": 1, "canceled": 1},
    )


def test_give_back(engine: Engine) -> None:
    first, second, third = engine.submit(task(), task(), task())
    handed = engine.claim(2)
    assert engine.return_unstarted(handed) == 2
    assert (engine.list(), engine.registry("wip")) == ([first, second, third], [])
    record = engine.hash(first)
    assert (record["status"], record["origin"]) == ("queued", ONE)
    assert not {"worker_name", "pq_node", "pq_slot"} & set(record)
    assert engine.claim()[0].execution == 2


@pytest.mark.parametrize("canceled", ["by us", "by RQ"])
def test_return_of_what_was_canceled(engine: Engine, canceled: str) -> None:
    task_id, handed = bring(engine, "started" if canceled == "by us" else "canceled-running")
    assert handed is not None
    if canceled == "by us":
        engine.cancel(task_id)
    for _ in range(2):
        assert engine.return_unstarted([handed]) == 0
        assert (engine.status(task_id), engine.list(), engine.registry("wip")) == ("canceled", [], [])
        assert engine.counts() == {"total": 1, "canceled": 1}


@pytest.mark.parametrize("status", ["failed", "stopped", "canceled"])
def test_retry(engine: Engine, status: str) -> None:
    task_id = bring(engine, status)[0]
    do(engine, "requeue", task_id, None, status)
    assert (engine.status(task_id), engine.list(), engine.counts()) == ("queued", [task_id], {"total": 1})


@pytest.mark.parametrize("status", ["failed", "stopped", "canceled"])
def test_retry_deferred(engine: Engine, status: str) -> None:
    """It ended though its parent runs again: only a parent's retry can bring that about."""
    task_id = bring(engine, status)[0]
    parent = engine.submit(task(priority=5))[0]
    engine.link.call("HSET", keys.job(task_id), "pq_after", parent)
    do(engine, "requeue_deferred", task_id, None, status)
    assert (engine.status(task_id), engine.list(), engine.registry("deferred")) == ("deferred", [], [task_id])


@pytest.mark.parametrize("outcome", ["finished", "failed", "stopped", "canceled"])
def test_end(engine: Engine, outcome: str) -> None:
    task_id, handed = bring(engine, "started")
    assert handed is not None
    assert engine.complete([handed], outcome, "exit" if outcome == "failed" else "") == ["ok"]
    record = engine.hash(task_id)
    assert (record["status"], record["pq_cpus"], record.get("pq_exit", "0")) == (
        outcome,
        "n1[0]",
        "0" if outcome == "finished" else "1",
    )
    assert engine.registry("failed" if outcome == "stopped" else outcome) == [task_id]
    assert engine.registry("wip") == []
    assert 0 < engine.ttl(keys.job(task_id)) <= (3600 if outcome == "finished" else 7 * 86400)
    assert engine.counts() == {"total": 1, "failed" if outcome == "stopped" else outcome: 1}
    assert [(entry["id"], entry["status"], entry["final"]) for entry in engine.journal()] == [(task_id, outcome, True)]


def test_end_retried(engine: Engine) -> None:
    task_id, handed = bring(engine, "started", retries=2)
    for execution in (1, 2):
        assert handed is not None
        assert handed.execution == execution
        assert engine.complete([handed], "failed", "exit") == ["retry"]
        assert (engine.list(), engine.registry("wip")) == ([task_id], [])
        assert engine.hash(task_id)["pq_retries"] == str(2 - execution)
        (handed,) = engine.claim()
    assert handed.retries == 0
    assert engine.complete([handed], "failed", "exit") == ["ok"]
    assert engine.counts() == {"total": 1, "failed": 1}
    assert [entry["final"] for entry in engine.journal()] == [False, False, True]


def test_end_free(engine: Engine) -> None:
    task_id, handed = bring(engine, "started", retries=1)
    second = engine.submit(task())[0]
    assert handed is not None
    assert engine.complete([handed], "requeue", "pilot ended") == ["retry"]
    assert engine.list() == [task_id, second]  # it keeps its place, and its retry
    assert engine.hash(task_id)["pq_retries"] == "1"


def test_lost_and_crash_limit(engine: Engine) -> None:
    task_id, handed = bring(engine, "started")
    for crash in (1, 2, 3):
        assert handed is not None
        if crash > 1:  # from the second time on its worker says when it begins
            began = (handed.id, handed.execution, "n1[0]", iso(1.0), "", "")
            assert engine.store.run("report_started", *began) == 1
        assert engine.report_lost([handed]) == (["retry"] if crash < 3 else ["ok"])
        if crash < 3:
            assert (engine.status(task_id), engine.list()) == ("queued", [task_id])
            assert engine.report_lost([handed]) == ["retry"]  # reported again: nothing more happens
            (handed,) = engine.claim()
    assert (engine.status(task_id), engine.hash(task_id)["pq_reason"]) == ("failed", "crash limit")


def test_what_was_handed_ahead_did_not_kill_its_worker(engine: Engine) -> None:
    (task_id,) = engine.submit(task())
    for _ in range(5):
        assert engine.report_lost(engine.claim(slot=0)) == ["retry"]
    assert "pq_crashes" not in engine.hash(task_id)


def test_what_was_lost_before_is_charged_only_when_it_has_begun(engine: Engine) -> None:
    """It may have waited for the end of another one's isolated run, with a slot."""
    task_id, handed = bring(engine, "started")
    for _ in range(5):
        assert handed is not None
        assert engine.report_lost([handed]) == ["retry"]
        (handed,) = engine.claim()
    assert engine.hash(task_id)["pq_crashes"] == "1"


def test_what_a_worker_calls_lost_had_begun(engine: Engine) -> None:
    """Also when it had been prefetched: a task that kills its launcher each time must come to its limit."""
    (task_id,) = engine.submit(task())
    for answer in ("retry", "retry", "ok"):
        assert engine.complete(engine.claim(slot=0), "lost") == [answer]
    assert engine.hash(task_id)["pq_reason"] == "crash limit"


@pytest.mark.parametrize("outcome", ["failed", "requeue", "lost"])
def test_a_reported_launch_is_forgotten_when_the_task_waits_again(engine: Engine, outcome: str) -> None:
    (task_id,) = engine.submit(task(retries=1))
    (handed,) = engine.claim(slot=0)
    launch = (task_id, 1, "n1[3]", "2026-01-31T12:00:00.000000Z", "/out", "/err")
    assert engine.store.run("report_started", *launch, task_id, 2, *launch[2:], "none", 1, *launch[2:]) == 1
    record = engine.hash(task_id)
    assert (record["status"], record["pq_cpus"], record["started_at"]) == ("started", "n1[3]", launch[3])
    assert engine.report_lost([handed]) if outcome == "lost" else engine.complete([handed], outcome)
    record = engine.hash(task_id)
    assert not {"worker_name", "pq_node", "pq_slot", "pq_running", "pq_out", "pq_err"} & set(record)
    assert record.get("pq_crashes") == ("1" if outcome == "lost" else None)  # it was prefetched, but it ran
    assert engine.store.run("report_started", *launch) == 0


@pytest.mark.parametrize("event", ["end", "retry", "return", "cancel"])
def test_what_the_dispatcher_must_look_at_rings_its_bell(engine: Engine, event: str) -> None:
    parent, _ = engine.submit(task(name="p", retries=1), task(after=["p"]))
    handed = engine.claim() if event != "cancel" else []
    engine.drop_classes(ONE, at=0)
    engine.link.call("DEL", keys.WAKEUP)
    if event == "end":
        engine.complete(handed)
    elif event == "retry":
        engine.complete(handed, "failed", "exit")
    elif event == "return":
        engine.return_unstarted(handed)
    else:
        engine.cancel(parent)
    assert engine.link.call("LLEN", keys.WAKEUP) == 1
    if event in ("retry", "return"):  # the list is one of RQ's queues again
        assert engine.link.call("SISMEMBER", keys.QUEUES, keys.queue(ONE)) == 1


def test_a_task_that_was_deleted_while_it_ran_counts_as_canceled_once(engine: Engine) -> None:
    task_id, handed = bring(engine, "started")
    assert handed is not None
    engine.link.call("DEL", keys.job(task_id))
    assert engine.report_lost([handed]) == ["stale"]  # a report that does not name the class: wip cannot be asked
    for _ in range(2):
        assert engine.complete([handed]) == ["stale"]
        assert (engine.registry("wip"), engine.counts()) == ([], {"total": 1, "canceled": 1})
    assert [(entry["id"], entry["status"]) for entry in engine.journal()] == [(task_id, "canceled")]


# -- everything else changes nothing ----------------------------------------------------------------------------------

IMPOSSIBLE = [(s, e) for s in sorted(STATUSES) for e in EVENTS if (s, e) not in TABLE and s != "created"]
# One script decides between its events: what leads from a status elsewhere is the other event.
IMPOSSIBLE = [
    (s, e) for s, e in IMPOSSIBLE if not any(EVENT_SCRIPTS[other] == EVENT_SCRIPTS[e] for st, other in TABLE if st == s)
]


@pytest.mark.parametrize(("status", "event"), IMPOSSIBLE)
def test_no_other_event_changes_anything(engine: Engine, status: str, event: str) -> None:
    task_id, handed = bring(engine, status)
    before = without_mail(engine)
    do(engine, event, task_id, handed, status)
    assert without_mail(engine) == before
    assert engine.inbox() == []


@pytest.mark.parametrize("event", [e for e in EVENTS if EVENT_SCRIPTS[e] != "commit"])
def test_what_is_not_committed_cannot_be_met(engine: Engine, event: str) -> None:
    task_id = stage(engine)
    before = without_mail(engine)
    do(engine, event, task_id, None, "created")
    assert without_mail(engine) == before


@pytest.mark.parametrize("status", sorted(ENDED))
def test_an_ended_task_stays_as_it_ended_for_every_execution_number(engine: Engine, status: str) -> None:
    handed = bring(engine, status)[1]
    assert handed is not None
    before = without_mail(engine)
    for execution, answer in ((0, "stale"), (1, "ok"), (2, "stale")):
        handed.execution = execution
        for outcome in ("finished", "failed", "stopped", "canceled", "lost", "requeue"):
            assert engine.complete([handed], outcome) == [answer]
        assert engine.return_unstarted([handed]) == 0
    assert without_mail(engine) == before


def test_a_stale_execution_changes_nothing(engine: Engine) -> None:
    engine.submit(task())
    (old,) = engine.claim()
    engine.return_unstarted([old])
    assert engine.complete([old]) == ["retry"]
    (new,) = engine.claim()
    before = without_mail(engine)
    assert engine.complete([old]) == ["stale"]
    assert engine.return_unstarted([old]) == 0
    assert without_mail(engine) == before
    assert engine.complete([new]) == ["ok"]


# -- a call whose reply was lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["finished", "failed", "stopped", "canceled", "requeue", "lost"])
def test_a_repeated_end_answers_the_same_and_writes_nothing(engine: Engine, outcome: str) -> None:
    engine.register()
    engine.submit(task(), task(retries=1))
    handed = engine.claim(2)
    answer = engine.complete(handed, outcome, call=7)
    before = engine.dump()
    assert engine.complete(handed, outcome, call=7) == answer
    assert engine.dump() == before


def test_a_repeated_give_back_writes_nothing(engine: Engine) -> None:
    engine.register()
    engine.submit(task(), task())
    handed = engine.claim(2)
    engine.cancel(handed[0].id)
    engine.inbox()
    assert engine.return_unstarted(handed, call=7) == 1
    before = engine.dump()
    assert engine.return_unstarted(handed, call=7) == 0
    assert engine.dump() == before


def test_a_worker_without_a_record_leaves_no_ghost(engine: Engine) -> None:
    """Its record may have expired: what it reports counts, and makes no key that stays for ever."""
    engine.submit(task(), task())
    handed = engine.claim(2)
    engine.complete(handed[:1], call=1)
    engine.return_unstarted(handed[1:], call=2)
    assert keys.worker("n1") not in engine.all_keys()
    assert engine.events() == [b"event", b"event"]


@pytest.mark.parametrize("status", ["queued", "deferred", "started"])
def test_a_repeated_cancel_counts_once(engine: Engine, status: str) -> None:
    task_id = bring(engine, status)[0]
    engine.cancel(task_id)
    before = without_mail(engine)
    engine.inbox()
    engine.cancel(task_id)
    engine.inbox()
    after = without_mail(engine)
    before.pop(keys.inbox("n1", 1), None)
    assert after == before
