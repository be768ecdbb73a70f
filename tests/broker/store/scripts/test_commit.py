"""A submit is whole or absent, on a real server."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pilotq.broker.client.submit import check, submit
from pilotq.broker.errors import InvalidInput, NeverFits, PilotFailed, ServerRefused, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.registry import user_queues
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.model import Request, Task
from pilotq.broker.tasks.spec import Spec
from pilotq.broker.tasks.submit_context import SubmitContext
from tests.support.engine import ONE, QUEUE_ID, SHARED, Engine, array, fixtures, task, wide

engine, server, node = fixtures


def visible(engine: Engine) -> dict[str, Any]:
    """All but what is staged: records with a TTL and the last number given out."""
    return {k: v for k, (v, mortal) in engine.dump().items() if not mortal and k != keys.SEQ}


class Meddler(Store):
    """Does something between the staging of a submit and its commit."""

    def __init__(self, engine: Engine, *commands: tuple[str, ...]) -> None:
        super().__init__(engine.link, QUEUE_ID, engine.settings)
        self.commands = commands
        self.seen: dict[str, Any] = {}
        self.keys: list[str] = []
        self.engine = engine

    def commit(self, *args: Any) -> list[Any]:
        self.seen, self.keys = visible(self.engine), self.engine.all_keys()
        for command in self.commands:
            self.link.call(*command)
        return super().commit(*args)


# -- all or nothing ---------------------------------------------------------------------------------------------------


def test_what_is_staged_is_invisible_and_mortal(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.submit(task())
    monkeypatch.setattr(f"{submit.__module__}.CARRIED_TASKS", 0)
    before = visible(engine)
    meddler = Meddler(engine)
    tasks = [task(name="a"), task(after=["a"]), task(values=["x"]), array(3, name="b"), array(3, after_each=["b"])]
    ids = submit(engine.link, meddler, tasks, SHARED, "key")
    assert meddler.seen == before
    assert [engine.ttl(keys.job(i)) for i in ids] == [-1] * 5
    assert engine.ttl(keys.values(ids[2])) == -1
    assert engine.counts() == {"total": 1 + 1 + 1 + 1 + 3 + 3}
    assert engine.link.call("LRANGE", keys.WAKEUP, 0, -1) == [b"1"]


def test_a_small_submit_comes_with_its_call(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before it, and what it writes is the same as what is staged."""

    def records(limit: int) -> dict[str, dict[str, str]]:
        engine.reset()
        monkeypatch.setattr(f"{submit.__module__}.CARRIED_TASKS", limit)
        monkeypatch.setattr(f"{submit.__module__}.iso", lambda _: "2026-01-31T12:00:00.000000Z")
        meddler = Meddler(engine)
        tasks = [
            task(name="a", retries=2), task(after=["a"]), task(values=["x"]), array(3, name="b"),
            array(3, after_each=["b"]), task(after=["b:1", "a"]),
        ]  # fmt: skip
        ids = submit(engine.link, meddler, tasks, SHARED, "key")
        assert any(key.startswith("rq:job:") for key in meddler.keys) == (limit == 0)
        assert all(engine.ttl(keys.job(i)) == -1 for i in ids) and engine.ttl(keys.shared(SHARED.key())) == -1
        return {**{i: engine.hash(i) for i in ids}, "keys": dict.fromkeys(engine.all_keys(), "")}

    assert records(500) == records(0)


def test_an_id_that_somebody_has_taken_is_not_written_over(engine: Engine) -> None:
    (first,) = engine.submit(task())
    for number in (2, 3):
        engine.link.call("HSET", keys.job(str(number)), "status", "queued")
    assert first == "1" and engine.submit(task(), task()) == ["4", "5"]
    assert engine.hash("2") == {"status": "queued"}


@pytest.mark.parametrize("lost", ["job", "values"])
def test_a_submit_that_took_too_long_is_absent(engine: Engine, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = visible(engine)
    monkeypatch.setattr(f"{submit.__module__}.CARRIED_TASKS", 0)
    gone = Meddler(engine, ("DEL", keys.job("2") if lost == "job" else keys.values("3")))
    with pytest.raises(PilotFailed, match="staged records have expired"):
        submit(engine.link, gone, [task(), task(), task(values=["x"]), task(name="a")], SHARED, None)
    assert visible(engine) == before
    assert all(engine.ttl(k) > 0 for k in engine.all_keys() if k.startswith("rq:job:"))


def test_an_unknown_parent_refuses_all(engine: Engine) -> None:
    (known,) = engine.submit(task())
    before = visible(engine)
    for parents in (["vvv"], [known, "vvv"], ["vvv_1"], [f"{known}_1"]):
        with pytest.raises(UnknownTask, match=parents[-1]):
            engine.submit(task(), array(2), task(after=parents))
        assert visible(engine) == before


def test_an_oom_server_refuses_a_submit_and_takes_ends(engine: Engine) -> None:
    """The answer to a full memory: nothing new, but all that runs may end, which makes room."""
    engine.register()
    engine.submit(task(), task(), array(3), task(name="p"), task(after=["p"]))
    handed = engine.claim(5)
    before = visible(engine)
    engine.admin.call("CONFIG", "SET", "maxmemory", "1mb")
    try:
        with pytest.raises(ServerRefused, match="OOM"):
            engine.submit(task())
        with pytest.raises(ServerRefused, match="OOM"):
            engine.store.commit("key", 1, 0, 0, {"groups": []})
        assert visible(engine) == before
        assert engine.complete(handed[:4]) == ["ok"] * 4
        assert engine.return_unstarted(handed[4:]) == 1
        assert len(engine.claim(5)) == 2
        assert engine.cancel(handed[4].id) == ["stopping"]
        engine.release_dependents()
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", "0")
    assert engine.counts() == {"total": 7, "finished": 4}


@pytest.mark.parametrize(("outcome", "text", "answer"), [
    ("finished", "x" * 200, "ok"), ("finished", "x" * 5_000, "full"), ("finished", "file:0:5000:" + "x" * 999, "ok"),
    ("failed", "t" * 5_000, "ok"), ("failed", "t" * 5_000 + "\n" + "x" * 5_000, "full"),
    ("failed", "t" * 5_000 + "\nfile:0:5000:n1.7.pack", "ok"),
])  # fmt: skip
def test_results_do_not_pass_the_limit_of_the_memory(engine: Engine, outcome: str, text: str, answer: str) -> None:
    """What is answered with `full` is as it was, and is reported again."""
    engine.register()
    engine.submit(task(), task())
    first, second = engine.claim(2)
    engine.admin.call("CONFIG", "SET", "maxmemory", "1mb")
    try:
        before = visible(engine)
        assert engine.complete([first], outcome, text=text) == [answer]
        if answer == "full":
            assert {**visible(engine), keys.EVENTS: ""} == {**before, keys.EVENTS: ""}
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", "100mb")
    assert engine.complete([first, second], outcome, text=text) == ["ok", "ok"]
    engine.admin.call("CONFIG", "SET", "maxmemory", "0")
    assert engine.counts() == {"total": 2, outcome: 2}


def test_a_canceled_task_needs_no_room_for_its_result(engine: Engine) -> None:
    engine.register()
    engine.submit(task())
    (run,) = engine.claim(1)
    engine.link.call("HSET", keys.job(run.id), "status", "canceled")  # as RQ's own cancel does
    engine.admin.call("CONFIG", "SET", "maxmemory", "1mb")
    try:
        assert engine.complete([run], text="x" * 5_000) == ["ok"]
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", "0")
    assert engine.counts() == {"total": 1, "canceled": 1} and not engine.registry("wip")


def test_an_executor_is_told_of_every_end(engine: Engine) -> None:
    """With the value, which is kept nowhere else; also of what ends without having run, or was deleted."""
    engine.register()
    name = "0123456789ab"
    ids = engine.submit(
        *[task() for _ in range(4)], task(name="p"), task(after=["p"]), key=f"@{name}.1"
    )  # fmt: skip
    good, bad, deleted, waits, parent, child = ids
    handed = {h.id: h for h in engine.claim(3)}
    engine.complete([handed[good]], text="dmFsdWU=")
    engine.complete([handed[bad]], "failed", "exception", text="trace\nexception")
    engine.link.call("DEL", keys.job(deleted))
    assert engine.complete([handed[deleted]]) == ["stale"]
    assert engine.complete([handed[good]], text="dmFsdWU=") == ["ok"]  # its first answer was lost
    engine.cancel(waits, parent)
    engine.release_dependents()
    entries = engine.link.call("XRANGE", keys.completed(name), "-", "+")
    told = [item for _, fields in entries for item in msgspec.msgpack.decode(fields[1])]
    assert told == [
        [good, "finished", "", "dmFsdWU="], [bad, "failed", "exception", "trace\nexception"],
        [deleted, "canceled", "canceled", ""], [waits, "canceled", "canceled", ""],
        [parent, "canceled", "canceled", ""], [child, "canceled", "dependency", ""],
    ]  # fmt: skip
    assert 0 < engine.ttl(keys.completed(name)) <= 86_400
    assert not engine.link.call("EXISTS", keys.results(good)) and engine.link.call("EXISTS", keys.results(bad))


def test_a_large_submit_is_refused_before_anything_is_written(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reset(bundle_above=10_000)
    used = int(
        dict(x.split(":", 1) for x in engine.link.call("INFO", "memory").decode().split() if ":" in x)["used_memory"]
    )
    engine.admin.call("CONFIG", "SET", "maxmemory", used + 100_000)
    try:
        before = engine.dump(without=(keys.SEQ,))
        with pytest.raises(ServerRefused, match=r"these 2,000 tasks need about 1,400,000 bytes, .* are used"):
            engine.submit(*[task()] * 2000)
        assert engine.dump(without=(keys.SEQ,)) == before
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", "0")


# -- the key of a submission ------------------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_ids(engine: Engine) -> None:
    ids = engine.submit(task(), array(3), key="mine")
    before = visible(engine)
    assert engine.submit(task(), array(3), key="mine") == ids
    assert visible(engine) == before
    engine.run_all()
    assert engine.submit(task(), array(3), key="mine") == ids
    assert engine.counts("pilotq:submit:mine") == {"total": 4, "finished": 4} == engine.counts()
    assert engine.ttl(keys.submission("mine")) > 0
    assert engine.submit(task(), key="other") != ids


def test_counts_of_a_submission(engine: Engine) -> None:
    ids = engine.submit(task(), task(), task(name="c"), task(after=["c"]), task(), key="k")
    a, b, c, e = engine.claim(4)
    assert [h.id for h in (a, b, c, e)] == [*ids[:3], ids[4]]
    engine.complete([a])
    engine.complete([b], "stopped", "stopped")
    engine.complete([c], "failed", "exit")
    engine.release_dependents()
    assert engine.counts(keys.submission("k")) == {"total": 5, "finished": 1, "failed": 2, "canceled": 1}
    assert engine.ttl(keys.submission("k")) == -1
    engine.complete([e])
    assert engine.ttl(keys.submission("k")) > 0


# -- order and records ------------------------------------------------------------------------------------------------


def test_ids_ascend_and_lists_keep_the_order(engine: Engine) -> None:
    engine.reset(bundle_above=10_000)
    first = engine.submit(*[task() for _ in range(1200)])
    second = engine.submit(wide(2), task(), wide(2), task(queue="other", priority=-3))
    numbers = [int(i, 32) for i in first + second]
    assert numbers == list(range(1, 1205))
    assert engine.list() == [*first, second[1]]
    assert engine.list("default.p0.2c") == [second[0], second[2]]
    assert engine.list("other.p-3.1c") == [second[3]]
    queues = {m.decode() for m in engine.link.call("SMEMBERS", keys.QUEUES)}
    names = ("default", "other", ONE, "default.p0.2c", "other.p-3.1c")
    assert queues == {keys.queue(n) for n in names}
    assert user_queues(engine.link) == ["default", "other"]


def test_a_hundred_thousand_ids_in_one_commit(engine: Engine) -> None:
    """More than Lua's stack holds, in every list of the call."""
    ids = [f"x{n}" for n in range(100_000)]
    for first in range(0, 100_000, 10_000):
        engine.link.pipeline([("HSET", keys.job(i), "status", "queued") for i in ids[first : first + 10_000]])
    engine.link.call("SET", keys.shared("x"), "x")
    work = {"groups": [(ONE, ids)], "waits": [], "elementwise": [], "extra": [], "shared": "x"}
    assert engine.store.commit("k", 1, 100_000, 100_000, work) == [b"ok"]
    assert engine.link.call("LLEN", keys.queue(ONE)) == 100_000
    assert engine.list()[:2] == ["x0", "x1"] and engine.list()[-1] == "x99999"


def test_what_tasks_share_is_stored_once_and_goes_after_the_last(engine: Engine) -> None:
    name = keys.shared(SHARED.key())
    engine.submit(task(), task())
    engine.submit(task())
    assert [k for k in engine.all_keys() if k.startswith(keys.shared(""))] == [name]
    assert msgspec.msgpack.decode(engine.link.call("GET", name), type=SubmitContext) == SHARED
    first, *rest = engine.claim(5)
    assert first.shared == SHARED.key()
    assert msgspec.msgpack.decode(first.spec, type=Spec).argv == [b"true"]
    engine.complete(rest)
    assert engine.ttl(name) == -1
    engine.complete([first])
    assert 0 < engine.ttl(name) <= engine.settings.failed_ttl_s
    assert keys.SHARED_REFS not in engine.all_keys()
    engine.submit(task())  # it is used again
    assert engine.ttl(name) == -1


# -- dependents -------------------------------------------------------------------------------------------------------


def test_dependents_of_what_has_ended(engine: Engine) -> None:
    good, bad, stopped, canceled, waits = engine.submit(task(), task(), task(), task(), task())
    a, b, c = engine.claim(3)
    engine.complete([a])
    engine.complete([b], "failed", "exit")
    engine.complete([c], "stopped", "stopped")
    engine.cancel(canceled)
    ids = engine.submit(
        task(after=[good]), task(after=[bad]), task(after=[good, stopped]), task(after=[canceled, waits]),
        task(after=[good, waits]), array(2, after=[good]), array(2, after=[bad]),
    )  # fmt: skip
    words = ["queued", "canceled", "canceled", "canceled", "deferred", "queued", "canceled"]
    assert engine.statuses(*ids) == words
    engine.run_all()
    assert engine.statuses(ids[4], ids[5]) == ["finished", "finished"]
    assert engine.counts() == {"total": 14, "finished": 6, "failed": 2, "canceled": 6}


def test_names_may_point_forward(engine: Engine) -> None:
    ids = engine.submit(task(name="x", after=["y"]), task(name="y", after=["z"]), task(name="z"))
    assert engine.statuses(*ids) == ["deferred", "deferred", "queued"]


def test_an_omitted_chain_in_one_submit_in_any_order(engine: Engine) -> None:
    (bad,) = engine.submit(task())
    engine.complete(engine.claim(), "failed", "exit")
    ids = engine.submit(task(name="x", after=["y"]), task(name="y", after=["z"]), task(name="z", after=[bad]))
    engine.release_dependents()
    assert engine.statuses(*ids) == ["canceled"] * 3
    assert engine.registry("deferred") == []
    assert engine.counts() == {"total": 4, "failed": 1, "canceled": 3}


def test_an_omitted_array_in_one_submit_with_what_waits_for_its_elements(engine: Engine) -> None:
    (bad,) = engine.submit(task())
    engine.complete(engine.claim(), "failed", "exit")
    ids = engine.submit(
        task(after=["a:1"]), array(2, name="a", after=[bad]), task(after=["a:1"]), array(2, after_each=["a"]),
    )  # fmt: skip
    engine.release_dependents()
    assert engine.statuses(*ids) == ["canceled"] * 4
    assert engine.counts() == {"total": 7, "failed": 1, "canceled": 6}
    assert engine.nothing_left()


def test_more_dependents_than_one_call_handles(engine: Engine) -> None:
    (parent, *dependents) = engine.submit(task(name="p"), *[task(after=["p"]) for _ in range(450)])
    engine.complete(engine.claim())
    engine.link.call("DEL", keys.WAKEUP)
    handled, left, _ = engine.store.release_dependents(200)
    assert (handled, left) == (201, 1)
    assert engine.list() == dependents[:200]
    assert engine.link.call("LLEN", keys.WAKEUP) == 1  # so that the dispatcher goes on at once
    assert engine.release_dependents() == 2
    assert engine.list() == dependents
    assert keys.dependents(parent) not in engine.all_keys()


def test_a_parent_whose_record_is_gone_when_its_dependents_are_released(engine: Engine) -> None:
    """The short memory may have been trimmed meanwhile."""
    parent, kid = engine.submit(task(name="p"), task(after=["p"]))
    engine.complete(engine.claim())
    engine.link.call("DEL", keys.job(parent))
    engine.release_dependents()
    assert engine.status(kid) == "queued"


def test_many_parents(engine: Engine) -> None:
    names = [f"p{n}" for n in range(300)]
    *_, kid = engine.submit(*[task(name=n) for n in names], task(after=names))
    handed = engine.claim(300)
    engine.complete(handed[:299])
    engine.release_dependents()
    assert engine.status(kid) == "deferred"
    engine.complete(handed[299:])
    engine.release_dependents()
    assert engine.status(kid) == "queued"


# -- what is refused before the server is asked -----------------------------------------------------------------------


def test_cycles_are_named(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="wait for each other: a -> c -> b -> a"):
        engine.submit(task(name="a", after=["c"]), task(name="b", after=["a"]), task(name="c", after=["b"]))
    with pytest.raises(InvalidInput, match="wait for each other: a -> a"):
        engine.submit(task(name="a", after=["a"]))
    with pytest.raises(InvalidInput, match="wait for each other: a -> b -> a"):
        engine.submit(array(2, name="a", after_each=["b"]), array(2, name="b", after=["a:1"]))
    assert engine.counts() == {}


def test_a_long_chain_is_no_cycle() -> None:
    tasks = [task(name=str(n), after=[str(n + 1)] if n < 30_000 else []) for n in range(30_001)]
    assert check(tasks, []).total == 30_001


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        ([task(name="a"), task(name="a")], "'a' is the name of task 2 already"),
        ([task(after=["no such name"])], "'no such name' is neither the name of a task here nor an id"),
        ([task(name="a"), array(2, after_each=["a"])], "is not an array of 2 elements"),
        ([array(3, name="a"), array(2, after_each=["a"])], "is not an array of 2 elements"),
        ([array(2, name="a"), array(2, after=["a"], after_each=["a"])], "not both"),
        ([Task()], "exactly one of command, script and function"),
    ],
)
def test_refused_descriptions(engine: Engine, tasks: list[Task], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        engine.submit(task(), *tasks)
    assert engine.counts() == {} and not [k for k in engine.all_keys() if k.startswith("rq:")]


def test_what_never_fits_is_refused(engine: Engine) -> None:
    engine.submit(wide(100))  # no node has registered: nobody can know
    engine.register(cores=4)
    engine.submit(wide(4))
    with pytest.raises(NeverFits, match="task 2 can never run here"):
        engine.submit(task(), wide(5))
    with pytest.raises(NeverFits, match="task 'g' can never run here"):
        engine.submit(task(name="g", request=Request(gpus=1)))
    assert engine.counts() == {"total": 2}


def test_any_number_of_kinds_of_a_queue(engine: Engine) -> None:
    sizes = [task(request=Request(memory=n)) for n in range(1, 2001)]
    engine.submit(*sizes, *[task(priority=n) for n in range(1, 1001)])
    engine.submit(*sizes)
    assert engine.link.call("HLEN", keys.CLASSES) == 3000
    assert {engine.link.call("LLEN", keys.queue(f"default.p0.1c-m{n}")) for n in (1, 1000, 2000)} == {2}
    # RQ's tools show as many as they can bear.
    assert engine.link.call("SCARD", keys.QUEUES) == 1000


def test_a_class_goes_a_minute_after_its_list_became_empty(engine: Engine) -> None:
    names = [f"default.p{n}.1c" for n in range(10)]
    engine.submit(*[task(priority=n) for n in range(10)], task(priority=1000))
    for name in names:
        engine.complete(engine.claim(1, name))
    (running,) = engine.claim(1, "default.p1000.1c")
    assert engine.drop_classes(*names, "default.p1000.1c", at=1) == 0
    assert keys.queue(names[0]) not in {m.decode() for m in engine.link.call("SMEMBERS", keys.QUEUES)}
    (again,) = engine.submit(task(priority=3))
    assert engine.drop_classes(*names, "default.p1000.1c", at=60.5) == 0
    assert engine.drop_classes(*names, "default.p1000.1c", at=61) == 10  # though one of its tasks runs
    assert engine.link.call("HGETALL", keys.CLASSES) == [b"default.p3.1c", b""]
    engine.return_unstarted([running])
    assert engine.list("default.p1000.1c") == [running.id]
    assert sorted(engine.link.call("HKEYS", keys.CLASSES)) == [b"default.p1000.1c", b"default.p3.1c"]
    assert engine.run_all("default.p3.1c") == [again]
