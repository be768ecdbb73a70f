"""No script call does more than a bounded number of commands, whatever waits for what: nobody is served meanwhile."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pilotq.broker.rq.repair import RqRepair
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Connection
from pilotq.broker.store.requeue import requeue
from pilotq.broker.store.store import Store
from tests.support.engine import ONE, QUEUE_ID, Engine, array, fixtures, task

engine, server, node = fixtures
LIMITS = "rq:rl-keys"


class Counting(Store):
    """Counts the commands of each script call; ``most``: of the largest one."""

    admin: Connection
    most = calls = 0

    def run(self, name: str, *args: Argument) -> Any:
        self.admin.call("CONFIG", "RESETSTAT")
        answer = super().run(name, *args)
        stats = self.admin.call("INFO", "commandstats").decode().splitlines()
        made = sum(int(line.partition("calls=")[2].partition(",")[0]) for line in stats if "calls=" in line)
        self.most, self.calls = max(self.most, made), self.calls + 1
        return answer


@pytest.fixture
def counted(engine: Engine) -> Counting:
    """The store of the engine from now on; `most` may be set to 0 where what is to be counted begins."""
    store = Counting(engine.link, QUEUE_ID, engine.settings, term=engine.store.term)
    store.admin = engine.admin
    engine.store = store
    return store


# -- deleted records --------------------------------------------------------------------------------------------------


def plant_vanished(engine: Engine, classes: int) -> None:
    engine.link.call("HSET", keys.COUNTS, "total", 1)
    engine.link.call("HSET", keys.CLASSES, *(text for n in range(classes) for text in (f"default.p0.1c-m{n + 1}", "")))


def test_vanished_tasks_among_very_many_classes_and_limits(engine: Engine, counted: Counting) -> None:
    plant_vanished(engine, 6000)
    engine.link.call("SADD", LIMITS, *(f"limit {n}" for n in range(6000)))
    assert counted.count_vanished(["default"]) == 1 and engine.counts() == {"total": 1, "canceled": 1}
    assert counted.calls >= 4 and counted.most < 4000


@pytest.mark.parametrize("open_key", [keys.queue("default.p0.1c-m5999"), "rq:rl:limit 5999:rate_limited"])
def test_nothing_has_vanished_while_something_waits(engine: Engine, open_key: str) -> None:
    plant_vanished(engine, 6000)
    engine.link.call("SADD", LIMITS, *(f"limit {n}" for n in range(6000)))
    engine.link.call(*(("RPUSH", open_key, "1") if "queue" in open_key else ("ZADD", open_key, 1, "1")))
    assert engine.store.count_vanished(["default"]) == 0 and engine.counts() == {"total": 1}


def test_what_is_queued_during_the_walk_ends_it(engine: Engine) -> None:
    plant_vanished(engine, 6000)
    number, *rest = engine.store.run("count_vanished", engine.store.term, 60, "classes", 0, "default")
    assert number == 0 and rest[0] == b"classes" and rest[1] != b"0"
    engine.submit(task())
    assert engine.store.run("count_vanished", engine.store.term, 60, *rest, "default") == [0, b"", b""]
    assert engine.counts() == {"total": 2}


# -- rate limits ------------------------------------------------------------------------------------------------------


def free_rate_slots(engine: Engine) -> None:
    cursor = b"0"
    while True:
        cursor = engine.store.run("free_rate_slots", engine.store.term, f"{time.time()}", "now", cursor)
        if cursor == b"0":
            return


def test_very_many_rate_limits(engine: Engine, counted: Counting) -> None:
    names = [f"limit {n}" for n in range(3000)]
    engine.link.call("SADD", LIMITS, *names)
    engine.link.pipeline([("HSET", f"rq:rl:{n}", "concurrency", 1) for n in names])
    engine.link.pipeline([("ZADD", f"rq:rl:{n}:allowed", 1, f"gone {n}") for n in names])
    free_rate_slots(engine)
    assert counted.calls > 10 and counted.most < 5000
    assert not [k for k in engine.all_keys() if k.startswith("rq:rl")]


def test_a_rate_limit_with_very_many_jobs(engine: Engine, counted: Counting) -> None:
    waiting = [f"job {n}" for n in range(5000)]
    engine.link.call("SADD", LIMITS, "api")
    engine.link.call("HSET", "rq:rl:api", "concurrency", 5000)
    engine.link.call("ZADD", "rq:rl:api:allowed", *(text for n in range(5000) for text in (1, f"gone {n}")))
    engine.link.call("ZADD", "rq:rl:api:rate_limited", *(text for n in waiting for text in (1, n)))
    engine.link.pipeline([("HSET", keys.job(i), "status", "rate_limited", "origin", "default") for i in waiting])
    for _ in range(100):
        free_rate_slots(engine)
        if not engine.link.call("EXISTS", "rq:rl:api:rate_limited"):
            break
    assert sorted(engine.list("default")) == sorted(waiting)
    assert counted.most < 20_000


# -- dependents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_an_element_that_very_many_arrays_wait_for(engine: Engine, counted: Counting, outcome: str) -> None:
    a, *children = engine.submit(array(2, name="a"), *(array(2, after_each=["a"]) for _ in range(900)))
    engine.release_dependents()
    counted.most = 0
    first, second = engine.claim(2)
    engine.complete([first])
    engine.complete([second], outcome, "" if outcome == "finished" else "exit")
    assert engine.release_dependents() > 5
    assert counted.most < 200 * 30
    ran = 2 if outcome == "finished" else 1
    assert sorted(engine.list()) == sorted(f"{child}_{n}" for child in children for n in range(ran))
    assert {engine.outcomes(child, 2) for child in children} == {"00" if ran == 2 else "03"}
    assert engine.ttl(keys.job(a)) > 0


def test_very_many_arrays_that_wait_for_one_that_was_deleted(engine: Engine, counted: Counting) -> None:
    a, *children = engine.submit(array(2, name="a"), *(array(2, after_each=["a"]) for _ in range(1200)))
    engine.release_dependents()
    counted.most = 0
    engine.link.call("DEL", keys.job(a))
    RqRepair(counted).turn(["default"], 0.0)
    engine.release_dependents()
    assert set(engine.statuses(*children)) == {"canceled"}
    assert counted.most < 250 * 30


# -- requeue ----------------------------------------------------------------------------------------------------------


class Fan:
    """A task that waits for very many: all have finished but the last one, which failed. Its parents have long ids."""

    def __init__(self, engine: Engine, parents: int = 3000) -> None:
        self.engine = engine
        engine.link.call("SET", keys.SEQ, 32**6)
        *self.parents, self.child = engine.submit(
            *(task(name=f"t{n}") for n in range(parents)), task(after=[f"t{n}" for n in range(parents)], priority=9)
        )
        for number in range(0, parents, 500):
            handed = engine.claim(min(500, parents - number))
            self.last = handed.pop()
            engine.complete(handed)
            engine.complete([self.last], *(("failed", "exit") if number + 500 >= parents else ()))
        engine.release_dependents()

    def retry(self, *ids: str) -> list[str]:
        return list(requeue(self.engine.store, ids).values())


@pytest.fixture
def fan(engine: Engine) -> Fan:
    return Fan(engine)


def test_a_task_with_very_many_parents_is_omitted_again(engine: Engine, fan: Fan) -> None:
    assert fan.retry(fan.child) == ["deferred"]
    engine.release_dependents()
    assert engine.hash(fan.child)["pq_reason"] == "dependency" and engine.registry("deferred") == []
    assert engine.counts() == {"total": 3001, "finished": 2999, "failed": 1, "canceled": 1}


def test_a_task_with_very_many_parents_runs_again(engine: Engine, counted: Counting, fan: Fan) -> None:
    counted.most = 0
    assert fan.retry(fan.last.id, fan.child) == ["queued", "deferred"]
    assert engine.release_dependents() >= 3
    assert counted.most < 1000 * 8
    assert engine.status(fan.child) == "deferred" and engine.hash(fan.child)["pq_open_parents"] == "1"
    engine.complete(engine.claim(1))
    engine.release_dependents()
    assert engine.status(fan.child) == "queued" and engine.registry("deferred") == []
    engine.complete(engine.claim(1, "default.p9.1c"))
    assert engine.nothing_left()


def test_all_its_parents_end_while_they_are_looked_at(engine: Engine, fan: Fan) -> None:
    assert fan.retry(fan.last.id, fan.child) == ["queued", "deferred"]
    engine.store.release_dependents(1)
    engine.complete(engine.claim(1))
    engine.release_dependents()
    assert engine.status(fan.child) == "queued"


def test_it_is_canceled_and_requeued_while_its_parents_are_looked_at(engine: Engine, fan: Fan) -> None:
    fan.retry(fan.last.id, fan.child)
    engine.store.release_dependents(1)
    assert engine.cancel(fan.child) == ["canceled"]
    assert fan.retry(fan.child) == ["deferred"]
    engine.release_dependents()
    assert engine.hash(fan.child)["pq_open_parents"] == "1"
    engine.complete(engine.claim(1))
    engine.release_dependents()
    assert engine.list("default.p9.1c") == [fan.child]


def test_an_array_with_very_many_parents(engine: Engine) -> None:
    engine.link.call("SET", keys.SEQ, 32**6)
    names = [f"t{n}" for n in range(1500)]
    *parents, a = engine.submit(*(task(name=n) for n in names), array(2, after=names, priority=9))
    engine.cancel(parents[-1])
    engine.release_dependents()
    # None of its elements has begun, so none can run before what the array waits for is known.
    assert list(requeue(engine.store, [f"{a}_0", parents[-1], a]).values()) == ["dependency", "queued", "deferred"]
    engine.release_dependents()
    assert engine.hash(a)["pq_open_parents"] == "1500"
    engine.run_all()
    assert engine.status(a) == "queued"
    handed = engine.claim(2, "default.p9.1c")
    engine.complete(handed, "failed", "exit")
    assert list(requeue(engine.store, [f"{a}_1"]).values()) == ["queued"]


def test_very_many_tasks_with_many_parents_in_one_call(engine: Engine, counted: Counting) -> None:
    names = [f"t{n}" for n in range(60)]
    found = engine.submit(*(task(name=n) for n in names), *(task(after=names) for _ in range(300)))
    engine.cancel(found[59])
    engine.release_dependents()
    counted.most = counted.calls = 0
    assert set(requeue(engine.store, found[59:]).values()) == {"queued", "deferred"}
    assert counted.calls > 3 and counted.most < 2100 * 8
    engine.run_all(ONE)
    assert engine.nothing_left()
