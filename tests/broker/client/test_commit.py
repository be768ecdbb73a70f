"""Large submissions: accepted in one call, made tasks in pieces, whoever dies in between."""

from __future__ import annotations

from typing import Any

import pytest

from pilotq.broker.client import commit
from pilotq.broker.client.submit import submit
from pilotq.broker.errors import InvalidInput, ServerUnavailable, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.model import Task
from tests.support.engine import ONE, SHARED, Engine, array, fixtures, task

engine, server, node = fixtures
LATER = "default.p0.1c-t60"  # what waits is of another class


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECE_TASKS": 5, "PIECE_PARENTS": 7, "LARGE_TASKS": 20, "LARGE_PARENTS": 20}.items():
        monkeypatch.setattr(commit, name, value)


def shapes(*before: str) -> list[Task]:
    """Tasks, arrays with values, and what waits for all of them in every way, in the order of no rule."""
    first = [task(name=f"t{n}") for n in range(22)]
    return [
        task(name="reduce", after=[f"t{n}" for n in range(22)] + list(before), time_limit=60),
        *first[:11],
        array(9, name="a"),
        task(values=[str(n) for n in range(2500)], name="v"),
        *first[11:],
        *[task(after=[f"t{n}", "a:3"], time_limit=60) for n in range(22)],
        array(9, after_each=["a"], time_limit=60, name="b"),
        task(after=["reduce", "b", "v:7"], time_limit=60),
    ]


class Dying(Store):
    """Its process dies before the call that ``dies`` counts."""

    dies = 0

    def commit(self, *args: Any) -> Any:
        Dying.dies -= 1
        if Dying.dies == 0:
            raise ServerUnavailable("the process has died")
        return super().commit(*args)


def pieces_left(engine: Engine) -> int:
    return sum(engine.link.call("LLEN", key) for key in engine.all_keys() if key.startswith("pilotq:staged:"))


def run_all(engine: Engine) -> list[str]:
    """Until nothing is left that can run."""
    engine.release_dependents()
    ran: list[str] = []
    while more := engine.run_all() + engine.run_all(LATER):
        ran += more
    return ran


def test_all_shapes_run_in_their_order(engine: Engine) -> None:
    tasks = shapes()
    ids = engine.submit(*tasks, key="k")
    assert pieces_left(engine) == 0 and len(engine.list()) == 24 and len(engine.registry("deferred")) == 25
    assert engine.list() == [i for i, t in zip(ids, tasks, strict=True) if not t.after and not t.after_each]
    assert all(engine.ttl(keys.job(i)) < 0 for i in ids)
    ran = run_all(engine)
    assert engine.counts() == {"total": 1 + 22 + 9 + 2500 + 22 + 9 + 1, "finished": 2564}
    assert ran.index(ids[0]) > max(ran.index(i) for i, t in zip(ids, tasks, strict=True) if (t.name or "")[:1] == "t")
    assert ran[-1] == ids[-1] and engine.nothing_left()


def test_what_waits_for_what_failed_is_omitted(engine: Engine) -> None:
    (bad,) = engine.submit(task())
    engine.complete(engine.claim(), "failed", "exit")
    ids = engine.submit(*shapes(bad))
    assert engine.status(ids[0]) == "canceled"
    run_all(engine)
    assert (engine.status(ids[-1]), engine.counts()["canceled"]) == ("canceled", 2) and engine.nothing_left()


@pytest.mark.parametrize("dies", [1, 2, 3, 9])
def test_whoever_dies_all_or_nothing_is_there(engine: Engine, dies: int) -> None:
    store = Dying(engine.link, engine.store.queue_id, engine.settings)
    Dying.dies = dies
    with pytest.raises(ServerUnavailable):
        submit(engine.link, store, shapes(), SHARED, "k")
    if dies == 1:
        assert not engine.list() and not engine.counts()
        assert all(engine.ttl(key) > 0 for key in engine.all_keys() if key.startswith(("rq:job:", "pilotq:staged:")))
        return
    assert engine.counts()["total"] == 2564 and pieces_left(engine) > 0
    run_all(engine)  # the dispatcher goes on
    assert engine.counts()["finished"] == 2564 and engine.nothing_left()


def test_the_same_key_goes_on(engine: Engine) -> None:
    store = Dying(engine.link, engine.store.queue_id, engine.settings)
    Dying.dies = 3
    with pytest.raises(ServerUnavailable):
        submit(engine.link, store, shapes(), SHARED, "k")
    engine.link.call("DEL", keys.RELEASE)  # no dispatcher comes
    ids = engine.submit(*shapes(), key="k")
    assert ids == engine.submit(*shapes(), key="k") and len(engine.list()) == 24
    assert engine.counts() == {"total": 2564}
    run_all(engine)
    assert engine.counts()["finished"] == 2564


def test_records_that_expired_meanwhile_count_as_canceled(engine: Engine) -> None:
    store = Dying(engine.link, engine.store.queue_id, engine.settings)
    Dying.dies = 2
    with pytest.raises(ServerUnavailable):
        submit(engine.link, store, shapes(), SHARED, "k")
    engine.link.call("DEL", *(key for key in engine.all_keys() if key.startswith("rq:job:")))
    run_all(engine)
    assert engine.counts() == {"total": 2564, "canceled": 2564}
    assert engine.link.call("HGET", keys.submission("k"), "left") == b"0"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (task(after=["vvvv"]), UnknownTask),
        (task(after=["vvvv_3"]), UnknownTask),
        (array(3, after_each=["vvvv"]), UnknownTask),
        (array(3, after_each=["=4"]), InvalidInput),
    ],
)
def test_a_refusal_leaves_nothing(engine: Engine, wrong: Task, error: type[Exception]) -> None:
    engine.submit(task(), task(), task(), array(4))
    before = engine.dump(without=(keys.SEQ,))
    with pytest.raises(error):
        engine.submit(*shapes(), wrong)
    assert engine.dump(without=(keys.SEQ,)) == before


def test_parents_of_the_journal(engine: Engine) -> None:
    asked: list[list[str]] = []

    def statuses(ids: Any) -> dict[str, str]:
        asked.append(ids)
        return dict.fromkeys(ids, "finished")

    old = [f"v{n}" for n in range(30)]
    ids = submit(
        engine.link, engine.store, [task(after=old), task(name="x"), task(after=["x", *old])], SHARED, None, statuses
    )
    assert asked == [old]
    assert engine.list(ONE) == ids[:2]
    assert engine.run_all() == ids
