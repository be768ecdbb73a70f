"""Which ends of a parent release what waits for it, and which omit it, on a real server."""

from __future__ import annotations

import time

import pytest

from pilotq.broker.client import commit
from pilotq.broker.client.submit import submit
from pilotq.broker.errors import InvalidInput
from pilotq.broker.rq.repair import RqRepair
from pilotq.broker.store import keys
from pilotq.broker.store.requeue import requeue
from pilotq.broker.tasks.dependencies import FIELDS
from pilotq.broker.tasks.model import Task
from tests.support.engine import SHARED, Engine, array, fixtures, task

engine, server, node = fixtures

WORDS = {"finished": "k", "failed": "f", "stopped": "o", "canceled": "o"}


def kinds(*parents: str) -> list[Task]:
    """A task that waits for these in each way: that they finish, end, or end otherwise."""
    return [task(**{field: list(parents)}) for field in FIELDS]


def expected(end: str) -> list[str]:
    return ["queued" if WORDS[end] in ends else "canceled" for ends in FIELDS.values()]


def end(engine: Engine, parent: str, how: str) -> None:
    if how == "canceled":
        engine.cancel(parent)
    else:
        (handed,) = engine.claim(1)
        assert handed.id == parent
        engine.complete([handed], how, {"finished": "", "failed": "exit"}.get(how, how))
    engine.release_dependents()


@pytest.mark.parametrize("how", WORDS)
@pytest.mark.parametrize("ended_before", [False, True])
def test_each_end_releases_those_that_wait_for_it(engine: Engine, how: str, ended_before: bool) -> None:
    (parent,) = engine.submit(task())
    if ended_before:
        end(engine, parent, how)
    children = engine.submit(*kinds(parent))
    if not ended_before:
        assert engine.statuses(*children) == ["deferred"] * 3
        end(engine, parent, how)
    assert engine.statuses(*children) == expected(how)
    reasons = [engine.hash(child).get("pq_reason", "") for child in children]
    assert reasons == ["" if word == "queued" else "dependency" for word in expected(how)]
    engine.run_all()
    assert engine.nothing_left()


def test_all_elements_of_an_array_must_have_ended(engine: Engine) -> None:
    (parent,) = engine.submit(array(3))
    children = engine.submit(*kinds(parent), *kinds(f"{parent}_1"))
    first, second, third = engine.claim(3)
    engine.complete([second], "failed", "exit")
    engine.release_dependents()
    assert engine.statuses(*children) == ["deferred"] * 3 + expected("failed")
    engine.complete([first, third])
    engine.release_dependents()
    assert engine.statuses(*children[:3]) == expected("failed")
    assert engine.statuses(*engine.submit(*kinds(f"{parent}_0"))) == expected("finished")


def test_parents_of_several_kinds_are_all_waited_for(engine: Engine) -> None:
    a, b, c, child, other = engine.submit(
        task(name="a"), task(name="b"), task(name="c"), task(after=["a"], after_any=["b"], after_notok=["c"]),
        array(2, after=["a"], after_notok=["b"]),
    )  # fmt: skip
    end(engine, a, "finished")
    end(engine, b, "finished")
    assert engine.statuses(child, other) == ["deferred", "canceled"]
    end(engine, c, "failed")
    assert engine.status(child) == "queued"


def test_an_omitted_or_deleted_parent_has_ended(engine: Engine) -> None:
    first, omitted = engine.submit(task(name="a"), task(after=["a"]))
    children = engine.submit(*kinds(omitted))
    end(engine, first, "failed")
    assert engine.status(omitted) == "canceled"
    assert engine.statuses(*children) == expected("canceled")
    (gone,) = engine.submit(task())
    children = engine.submit(*kinds(gone))
    engine.link.call("DEL", keys.job(gone))
    RqRepair(engine.store).turn(["default"], 0.0)
    engine.release_dependents()
    assert engine.statuses(*children) == expected("canceled")


def test_what_is_omitted_within_a_submit_has_ended_for_those_behind_it(engine: Engine) -> None:
    (bad,) = engine.submit(task())
    end(engine, bad, "failed")
    _, _, *children = engine.submit(
        task(name="a", after=[bad]), array(2, name="b", after=[bad]), *kinds("a"), *kinds("b:1")
    )
    assert engine.statuses(*children) == expected("canceled") * 2


def test_parents_that_only_the_journal_knows(engine: Engine) -> None:
    for status in WORDS:
        known = dict.fromkeys(["7f"], status)
        children = submit(engine.link, engine.store, kinds("7f"), SHARED, None, lambda _, known=known: known)
        assert engine.statuses(*children) == expected(status)


def test_a_large_submit_waits_in_the_same_ways(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIECE_TASKS", "PIECE_PARENTS", "LARGE_TASKS", "LARGE_PARENTS"):
        monkeypatch.setattr(commit, name, 2)
    parents = engine.submit(*[task()] * 3)
    end(engine, parents[0], "failed")
    children = submit(
        engine.link,
        engine.store,
        [*kinds(*parents), *kinds("7f")],
        SHARED,
        None,
        lambda ids: dict.fromkeys(ids, "failed"),
    )
    assert engine.statuses(*children) == ["canceled", "deferred", "deferred", *expected("failed")]
    end(engine, parents[1], "failed")
    end(engine, parents[2], "finished")
    assert engine.statuses(*children[:3]) == ["canceled", "queued", "canceled"]


def test_running_again_asks_how_parents_ended(engine: Engine) -> None:
    (parent,) = engine.submit(task())
    children = engine.submit(*kinds(parent), array(2, after_any=[parent]))
    engine.cancel(*children)
    assert list(requeue(engine.store, children).values()) == ["deferred"] * 4
    end(engine, parent, "failed")
    assert engine.statuses(*children) == [*expected("failed"), "queued"]
    assert requeue(engine.store, [children[0]]) == {children[0]: "dependency"}
    engine.run_all(outcome="failed")
    assert requeue(engine.store, [children[2]]) == {children[2]: "queued"}
    assert requeue(engine.store, [parent, *children[:2]]) == {
        parent: "queued", children[0]: "deferred", children[1]: "deferred",
    }  # fmt: skip
    engine.run_all()
    assert engine.nothing_left()


def test_parents_whose_records_are_gone(engine: Engine) -> None:
    """What was released once had its way; what was omitted because its parent finished stays so."""
    first, second = engine.submit(task(), task())
    ran, omitted = engine.submit(task(after_notok=[first]), task(after_notok=[second]))
    end(engine, first, "failed")
    end(engine, second, "finished")
    engine.run_all(outcome="failed")
    engine.link.call("DEL", keys.job(first), keys.job(second))
    assert requeue(engine.store, [ran, omitted]) == {ran: "queued", omitted: "dependency"}


def test_what_rq_has_canceled_has_not_ended_while_it_runs(engine: Engine) -> None:
    (parent,) = engine.submit(task())
    (handed,) = engine.claim(1)
    engine.link.call("HSET", keys.job(parent), "status", "canceled")  # by RQ's button
    children = engine.submit(*kinds(parent))
    assert engine.statuses(*children) == ["deferred"] * 3
    engine.cancel(parent)
    engine.complete([handed], "canceled", "canceled")
    engine.release_dependents()
    assert engine.statuses(*children) == expected("canceled")


def test_what_can_never_be_is_refused_and_what_is_said_twice_counts_once(engine: Engine) -> None:
    (parent,) = engine.submit(task())
    with pytest.raises(InvalidInput, match="'1' is in after, too: it would have to end in two ways"):
        engine.submit(task(after=[parent], after_notok=[parent]))
    with pytest.raises(InvalidInput, match="give after"):
        engine.submit(array(2, name="a"), array(2, after_each=["a"], after_any=[parent]))
    ok, notok = engine.submit(task(after=[parent], after_any=[parent]), task(after_any=[parent], after_notok=[parent]))
    assert [engine.hash(i)["pq_open_parents"] for i in (ok, notok)] == ["1", "1"]
    end(engine, parent, "failed")
    assert engine.statuses(ok, notok) == ["canceled", "queued"]


def test_the_journal_says_when_what_waited_could_begin_and_of_nothing_else(engine: Engine) -> None:
    before, parents = engine.submit(task(), array(2, name="a"))
    begin = time.time()
    child, later, each = engine.submit(
        task(after=[before], retries=1), array(2, after=[before]), array(2, after_each=[parents])
    )
    runs = engine.claim(3)
    engine.complete(runs)
    engine.release_dependents()
    (handed,) = engine.claim(1)
    assert handed.id == child and engine.complete([handed], "failed", "exit") == ["retry"]
    engine.run_all()
    assert engine.nothing_left()
    lines = engine.journal()
    told = {line["id"]: line["released"] for line in lines if line["released"]}
    assert set(told) == {child, later, f"{each}_0", f"{each}_1"}
    assert all(begin <= moment <= time.time() for moment in told.values())
    assert len([line for line in lines if line["id"] == child and line["released"] == told[child]]) == 2
    assert {"pq_released" in engine.hash(i) for i in (before, parents)} == {False}
