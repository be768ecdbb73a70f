"""Arrays of which only so many elements may fail, and canceling only what waits, on a real server."""

from __future__ import annotations

import pytest

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.client.views import Counts
from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.messages import Stop
from pilotq.broker.store.requeue import requeue
from tests.support.engine import Engine, array, fixtures, task

engine, server, node = fixtures


def test_what_waits_is_canceled_and_what_runs_goes_on(engine: Engine) -> None:
    (name,) = engine.submit(array(8, stop_on_failures="25%"))
    runs = engine.claim(5)
    engine.complete(runs[:2], "failed", "exit")
    engine.release_dependents()
    assert engine.outcomes(name, 8) == "22000000", "two may fail"
    engine.complete(runs[2:3], "failed", "exit")
    engine.release_dependents()
    assert engine.outcomes(name, 8) == "22200333"
    assert engine.inbox() == [Stop(name, 0, "failures", unstarted=True)], "what its node has not begun is not begun"
    assert engine.claim(5) == []
    engine.complete(runs[3:4])
    engine.complete(runs[4:], "failed", "exit")
    assert engine.outcomes(name, 8) == "22212333"
    assert (engine.status(name), engine.hash(name)["pq_reason"]) == ("failed", "failures")
    assert engine.counts() == {"total": 8, "finished": 1, "failed": 4, "canceled": 3}
    assert engine.nothing_left()
    view = TaskQueries(engine.link, None).task(name)
    assert view is not None and view.elements == {"failed": "0-2,4", "finished": "3", "canceled": "5-7"}


def test_elements_that_wait_again_are_canceled_too(engine: Engine) -> None:
    (name,) = engine.submit(array(4, stop_on_failures="0", retries=1))
    runs = engine.claim(3)
    assert engine.complete(runs[:1], "failed", "exit") == ["retry"]
    engine.complete(runs[1:2], "stopped", "stopped")
    engine.release_dependents()
    assert engine.outcomes(name, 4) == "3203"
    engine.complete(runs[2:])
    assert engine.status(name) == "failed" and engine.claim(5) == [] and engine.nothing_left()


def test_an_array_that_waits_element_by_element(engine: Engine) -> None:
    _, second = engine.submit(array(3, name="a"), array(3, after_each=["a"], stop_on_failures="0"))
    (child,) = engine.submit(task(after_any=[second]))
    runs = engine.claim(3)
    engine.complete(runs[:2])
    engine.release_dependents()
    (one, other) = engine.claim(2)
    engine.complete([one], "failed", "exit")
    engine.release_dependents()
    assert engine.outcomes(second, 3) == "203"
    engine.complete([runs[2], other])
    engine.release_dependents()
    assert engine.outcomes(second, 3) == "213" and engine.statuses(second, child) == ["failed", "queued"]
    engine.run_all()
    assert engine.nothing_left()


def test_a_retry_counts_anew(engine: Engine) -> None:
    (name,) = engine.submit(array(4, stop_on_failures="1"))
    runs = engine.claim(4)
    engine.complete(runs[:1], "failed", "exit")
    assert requeue(engine.store, [f"{name}_0"]) == {f"{name}_0": "queued"}
    engine.complete(runs[1:2], "failed", "exit")
    engine.release_dependents()
    assert engine.outcomes(name, 4) == "0200", "the first one has not failed any more"
    engine.complete(engine.claim(1), "failed", "exit")
    assert requeue(engine.store, [f"{name}_1"]) == {f"{name}_1": "ending"}
    engine.complete(runs[2:])
    assert engine.status(name) == "failed"
    assert requeue(engine.store, [name]) == {name: "queued"}
    first, second = engine.claim(2)
    engine.complete([first], "failed", "exit")
    engine.release_dependents()
    assert engine.outcomes(name, 4) == "2011"
    engine.complete([second])
    assert (engine.status(name), engine.hash(name)["pq_reason"]) == ("failed", "elements")


def test_a_retry_of_one_element_after_the_other_counts_them_all(engine: Engine) -> None:
    (name,) = engine.submit(array(4, stop_on_failures="3"))
    engine.complete(engine.claim(4), "failed", "exit")
    for number, left in ((0, "3"), (2, "2"), (1, "1")):
        assert requeue(engine.store, [f"{name}_{number}"]) == {f"{name}_{number}": "queued"}
        assert engine.hash(name)["pq_failures"] == left
    assert TaskQueries(engine.link, None).counts([name]) == Counts(total=4, failed=1)
    engine.complete(engine.claim(4), "failed", "exit")
    assert requeue(engine.store, [name]) == {name: "queued"}
    assert TaskQueries(engine.link, None).counts([name]) == Counts(total=4)


@pytest.mark.parametrize("how", ["retry", "return"])
def test_what_waits_again_after_the_stop_is_canceled_too(engine: Engine, how: str) -> None:
    (name,) = engine.submit(array(4, stop_on_failures="0", retries=1))
    runs = engine.claim(3)
    engine.complete(runs[:1], "stopped", "stopped")
    engine.release_dependents()
    if how == "retry":
        assert engine.complete(runs[1:2], "failed", "exit") == ["retry"]
    else:
        engine.return_unstarted(runs[1:2])
    assert engine.claim(5) == [] and engine.outcomes(name, 4) == "2303"
    engine.complete(runs[2:])
    assert engine.outcomes(name, 4) == "2313" and engine.status(name) == "failed"
    assert engine.counts() == {"total": 4, "finished": 1, "failed": 1, "canceled": 2} and engine.nothing_left()


def test_only_what_waits_is_canceled(engine: Engine) -> None:
    runs_on, waits, name, held = engine.submit(task(name="t"), task(after=["t"]), array(4), array(2))
    runs = engine.claim(3)
    engine.inbox()
    assert engine.store.cancel([runs_on, waits, f"{name}_1", name, held, "7v"], waiting=True) == [
        "started", "canceled", "started", "canceled", "canceled", "unknown",
    ]  # fmt: skip
    assert engine.inbox() == [
        Stop(runs_on, 1, "canceled", unstarted=True), Stop(f"{name}_1", 1, "canceled", unstarted=True),
        Stop(name, 0, "canceled", unstarted=True),
    ]  # fmt: skip
    assert engine.outcomes(name, 4) == "0033"
    assert (engine.status(held), engine.hash(held)["pq_reason"]) == ("canceled", "canceled")
    engine.complete(runs)
    engine.release_dependents()
    assert engine.statuses(runs_on, waits, name) == ["finished", "canceled", "canceled"]
    assert engine.claim() == [] and engine.nothing_left()


def test_everything_may_still_be_canceled_afterwards(engine: Engine) -> None:
    (name,) = engine.submit(array(4))
    runs = engine.claim(2)
    engine.store.cancel([name], waiting=True)
    assert engine.cancel(name) == ["stopping"]
    engine.complete(runs, "canceled", "canceled")
    engine.release_dependents()
    assert engine.outcomes(name, 4) == "3333" and engine.claim() == [] and engine.nothing_left()


@pytest.mark.parametrize("limit", ["x", "-1", "101%", "5 %", "1.5"])
def test_what_is_no_limit_is_refused(engine: Engine, limit: str) -> None:
    said = "a percentage is from 0 to 100" if limit == "101%" else "no number of tasks and no percentage: write 20"
    with pytest.raises(InvalidInput, match=said):
        engine.submit(array(2, stop_on_failures=limit))
    with pytest.raises(InvalidInput, match="stop_on_failures is for arrays"):
        engine.submit(task(stop_on_failures="1"))


def test_what_is_canceled_as_others_have_failed_says_so(engine: Engine) -> None:
    one, name, bad = engine.submit(task(), array(4), task(priority=1))
    (handed,) = engine.claim(1, "default.p1.1c")
    assert handed.id == bad
    runs = engine.claim(3)
    ids = [run.id for run in runs]
    assert ids == [one, f"{name}_0", f"{name}_1"]
    (more,) = engine.submit(task())
    answers = engine.store.cancel([one, name, more], waiting=True, reason="failures")
    assert answers == ["started", "canceled", "canceled"]
    assert (engine.status(more), engine.hash(more)["pq_reason"]) == ("canceled", "failures")
    assert engine.final_entry(more)["reason"] == "failures"
    stops = [message for message in engine.inbox() if isinstance(message, Stop)]
    assert {(stop.id, stop.reason, stop.unstarted) for stop in stops} == {
        (one, "failures", True), (name, "failures", True)
    }  # fmt: skip
    engine.complete(runs[:2])
    engine.complete(runs[2:], "canceled", "failures")
    assert engine.final_entry(f"{name}_1")["reason"] == "failures"
    assert (engine.status(name), engine.hash(name)["pq_reason"]) == ("canceled", "failures"), "none of its own failed"
    view = TaskQueries(engine.link, None).task(f"{name}_3")
    assert view is not None and (view.status, view.reason) == ("canceled", "failures")
