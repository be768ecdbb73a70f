"""Arrays: one record that stands for many tasks, on a real server."""

from __future__ import annotations

import pytest

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.errors import InvalidInput, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.journal import Journal
from pilotq.broker.store.messages import Run
from pilotq.broker.store.requeue import requeue
from pilotq.broker.tasks.model import ArrayRange
from tests.support.engine import ONE, Engine, array, fixtures, ids, task

engine, server, node = fixtures
HIGH = "default.p9.1c"


# -- handing out ------------------------------------------------------------------------------------------------------


def test_slices_of_a_stepped_range(engine: Engine) -> None:
    (a,) = engine.submit(task(array=ArrayRange(10, 30, 5), name="steps", retries=2))
    first = engine.claim(2)
    assert [(h.id, h.array, h.index, h.position, h.execution, h.retries, h.name) for h in first] == [
        (f"{a}_10", a, 10, 0, 1, 2, "steps"), (f"{a}_15", a, 15, 1, 1, 2, "steps"),
    ]  # fmt: skip
    assert (engine.status(a), engine.list()) == ("queued", [a])
    (head,) = engine.store.heads([ONE])
    assert (head.length, head.elements, head.waiting) == (1, 3, 3)
    second = engine.claim(10)
    assert [h.index for h in second] == [20, 25, 30]
    assert (engine.status(a), engine.list()) == ("started", [])
    assert (engine.registry("wip"), engine.leased()) == ([f"{a}:0"], [f"{h.id}:1" for h in first + second])
    assert engine.complete(second) == ["ok"] * 3
    assert (engine.outcomes(a, 5), engine.status(a)) == ("00111", "started")
    assert engine.complete(first) == ["ok"] * 2
    assert (engine.status(a), engine.registry("finished")) == ("finished", [a])
    assert engine.counts() == {"total": 5, "finished": 5}
    assert engine.final_entry(a)["elements"] == {"finished": "10-30:5"}
    assert engine.nothing_left()


def test_the_largest_indices_are_exact(engine: Engine) -> None:
    last = 2**53 - 1
    a, kid = engine.submit(
        task(array=ArrayRange(last - 4, last, 2), name="a"), task(name="kid", after=[f"a:{last - 2}"])
    )  # fmt: skip
    for index in (last - 5, last - 3, last - 1, last + 1, last + 2, f"0{last}", f"{last}.0", "1e15"):
        assert engine.cancel(f"{a}_{index}") == ["unknown"]
    handed = engine.claim(5)
    assert [(h.id, h.index) for h in handed] == [(f"{a}_{n}", n) for n in (last - 4, last - 2, last)]
    engine.complete(handed)
    engine.release_dependents()
    assert ids(engine.claim()) == [kid]
    assert engine.final_entry(a)["elements"] == {"finished": f"{last - 4}-{last}:2"}


def test_a_claim_goes_over_the_ends_of_arrays_and_plain_tasks(engine: Engine) -> None:
    a, b, c, d, e = engine.submit(array(3), task(), array(2), task(), task())
    order = [f"{a}_0", f"{a}_1", f"{a}_2", b, f"{c}_0", f"{c}_1", d, e]
    got = []
    for size in (2, 3, 2, 5):
        got += ids(engine.claim(size))
    assert got == order


def test_what_was_popped_behind_an_array_keeps_its_place(engine: Engine) -> None:
    a, b, c = engine.submit(array(5), task(), task())
    assert ids(engine.claim(3)) == [f"{a}_{n}" for n in range(3)]
    assert engine.list() == [a, b, c]


def test_elements_given_back_come_first_and_run_as_a_second_execution(engine: Engine) -> None:
    a, b = engine.submit(array(4), task())
    handed = engine.claim(3)
    assert engine.return_unstarted(handed[1:]) == 2
    assert engine.list() == [f"{a}_1", f"{a}_2", a, b]
    (head,) = engine.store.heads([ONE])
    assert (head.places[0], head.elements) == (f"{a}_1", 0)
    again = engine.claim(4)
    assert [(h.id, h.execution, h.array, h.index, h.position) for h in again[:2]] == [
        (f"{a}_1", 2, a, 1, 1), (f"{a}_2", 2, a, 2, 2),
    ]  # fmt: skip
    assert again[0].spec == handed[0].spec
    assert ids(again[2:]) == [f"{a}_3", b]
    assert engine.complete(handed[1:2]) == ["stale"]
    engine.complete([handed[0], *again])
    assert engine.counts() == {"total": 5, "finished": 5}
    assert engine.nothing_left()


@pytest.mark.parametrize("outcome", ["requeue", "lost"])
def test_elements_that_are_requeued_count_once(engine: Engine, outcome: str) -> None:
    (a,) = engine.submit(array(3))
    handed = engine.claim(3)
    assert (engine.report_lost(handed) if outcome == "lost" else engine.complete(handed, outcome)) == ["retry"] * 3
    assert engine.list() == ids(handed)
    engine.run_all()
    assert (engine.outcomes(a, 3), engine.counts()) == ("111", {"total": 3, "finished": 3})
    assert engine.nothing_left()


def test_retries_count_for_each_element(engine: Engine) -> None:
    (a,) = engine.submit(array(2, retries=1))
    handed = engine.claim(2)
    assert engine.complete(handed, "failed", "exit") == ["retry", "retry"]
    again = engine.claim(2)
    assert [(h.id, h.execution, h.retries) for h in again] == [(f"{a}_0", 2, 0), (f"{a}_1", 2, 0)]
    assert engine.complete(again[:1], "failed", "exit") == ["ok"]
    assert engine.complete(again[1:]) == ["ok"]
    assert engine.outcomes(a, 2) == "21"
    assert (engine.status(a), engine.hash(a)["pq_reason"]) == ("failed", "elements")


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_finished_element_leaves_no_record_a_failed_one_does(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    good, bad, stopped = engine.claim(3)
    engine.complete([good])
    engine.complete([bad], "failed", "exit", text="dHJhY2U=")
    engine.complete([stopped], "stopped", "stopped")
    assert engine.statuses(good.id, bad.id, stopped.id) == [None, "failed", "stopped"]
    assert engine.ttl(keys.job(bad.id)) > 0 and engine.ttl(keys.results(bad.id)) > 0
    assert sorted(engine.registry("failed")) == [a, bad.id, stopped.id]
    assert (engine.outcomes(a, 3), engine.status(a)) == ("122", "failed")
    assert engine.counts() == {"total": 3, "finished": 1, "failed": 2}
    assert engine.final_entry(a)["elements"] == {"finished": "0", "failed": "1-2"}


def test_records_of_failed_elements_are_kept_up_to_a_bound(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    engine.link.call("HSET", keys.job(a), "pq_kept", 9999)
    engine.complete(engine.claim(3), "failed", "exit")
    assert engine.statuses(f"{a}_0", f"{a}_1", f"{a}_2") == ["failed", None, None]
    assert engine.counts() == {"total": 3, "failed": 3}


def test_a_repeated_end_of_an_element_is_known_by_its_bits(engine: Engine) -> None:
    (a,) = engine.submit(array(2))
    handed = engine.claim(2)
    engine.complete(handed)
    before = engine.dump(without=("rq:worker:", keys.EVENTS))
    assert engine.complete(handed) == ["ok", "ok"]
    assert engine.dump(without=("rq:worker:", keys.EVENTS)) == before
    assert engine.counts() == {"total": 2, "finished": 2}
    assert engine.hash(a)["pq_left"] == "0"


def test_every_key_of_an_ended_array_has_a_ttl(engine: Engine) -> None:
    (a,) = engine.submit(task(values=["x", "y", "z"], name="first"))
    engine.submit(task(values=["x", "y", "z"], after_each=[a]))
    engine.run_all()
    engine.run_all()
    left = [
        k
        for k in engine.all_keys()
        if k.startswith(("rq:job:", "pilotq:outcomes", "pilotq:values", "pilotq:elementwise"))
    ]
    assert left and [k for k in left if engine.ttl(k) < 0] == []
    assert not [k for k in left if k.endswith(":seen")]
    assert engine.nothing_left()


def test_a_hundred_thousand_elements_in_a_few_calls(engine: Engine) -> None:
    (a,) = engine.submit(array(100_000))
    for _ in range(2):
        handed = engine.claim(9_000)
        engine.complete(handed)
    assert len(handed) == 9_000
    assert engine.hash(a)["pq_left"] == "82000"
    assert engine.cancel(a) == ["canceled"]
    engine.release_dependents()
    assert engine.counts() == {"total": 100_000, "finished": 18_000, "canceled": 82_000}
    assert engine.final_entry(a)["elements"] == {"finished": "0-17999", "canceled": "18000-99999"}
    assert engine.claim() == []
    assert engine.nothing_left()


def test_listing_tells_what_became_of_elements(engine: Engine) -> None:
    (a,) = engine.submit(array(5))
    engine.complete(engine.claim(1))
    engine.complete(engine.claim(1), "failed", "exit")
    engine.claim(1)
    listing = TaskQueries(Connection(engine.running.address), None)
    view = listing.task(a)
    assert view is not None
    assert view.elements == {"finished": "0", "failed": "1", "started": "2", "waiting": "3-4"}
    words = [v.status if v is not None else None for n in range(6) for v in [listing.task(f"{a}_{n}")]]
    assert words == ["finished", "failed", "started", "queued", "queued", None]
    listing.link.close()


# -- dependencies -----------------------------------------------------------------------------------------------------


def test_after_a_whole_array(engine: Engine) -> None:
    a, b, c = engine.submit(array(3, name="a"), task(after=["a"]), array(2, after=["a"]))
    engine.complete(engine.claim(2))
    engine.release_dependents()
    assert engine.statuses(b, c) == ["deferred", "deferred"]
    assert engine.claim(5)[0].index == 2 and engine.list() == []
    engine.report_lost([Run(f"{a}_2", 1, 1, "", ONE, "", 0, 0, "", a, 2, 2, 0, "", b"")])  # type: ignore[arg-type]
    engine.complete(engine.claim())
    engine.release_dependents()
    assert engine.list() == [b, c]


def test_an_array_that_failed_omits_what_waits_transitively(engine: Engine) -> None:
    a, b, c, d, e = engine.submit(
        array(2, name="a"), array(3, name="b", after=["a"]), task(name="c", after=["b"]),
        array(3, name="d", after_each=["b"]), task(after=["b:1"]),
    )  # fmt: skip
    engine.complete(engine.claim(2), "failed", "exit")
    engine.release_dependents()
    assert engine.statuses(b, c, d, e) == ["canceled"] * 4
    assert {engine.hash(i)["pq_reason"] for i in (b, c, d, e)} == {"dependency"}
    assert (engine.outcomes(b, 3), engine.outcomes(d, 3)) == ("333", "333")
    assert engine.counts() == {"total": 10, "failed": 2, "canceled": 8}
    assert engine.final_entry(d)["elements"] == {"canceled": "0-2"}
    assert a in engine.registry("failed")
    assert sorted(engine.registry("canceled")) == sorted([b, c, d, e])
    assert engine.nothing_left()


def test_after_one_element(engine: Engine) -> None:
    a, b, c, d = engine.submit(
        task(array=ArrayRange(10, 20, 5), name="a"), task(after=["a:15"]), task(after=["a:10", "a:20"]), task(name="d")
    )
    first, second, third, _ = engine.claim(4)
    engine.complete([second])
    engine.release_dependents()
    assert engine.list() == [b]
    engine.complete([first])
    engine.release_dependents()
    assert engine.status(c) == "deferred"
    engine.complete([third], "failed", "exit")
    engine.release_dependents()
    assert engine.status(c) == "canceled"
    # By id, of elements that have ended: finished, failed; and of what does not exist.
    e, f = engine.submit(task(after=[f"{a}_15"]), task(after=[f"{a}_20", d]))
    assert engine.statuses(e, f) == ["queued", "canceled"]
    for missing in (f"{a}_16", f"{a}_25", f"{a}_5", f"{d}_0"):
        with pytest.raises(UnknownTask, match=missing):
            engine.submit(task(after=[missing]))


def test_canceled_elements_omit_what_waits_for_them(engine: Engine) -> None:
    a, b, c = engine.submit(array(4, name="a"), task(after=["a:3"]), array(4, after_each=["a"]))
    engine.complete(engine.claim(1))
    engine.cancel(a)
    engine.release_dependents()
    assert engine.status(b) == "canceled"
    assert engine.outcomes(c, 4) == "0333"
    assert engine.list() == [a, f"{c}_0"]
    assert engine.run_all() == [f"{c}_0"]
    assert (engine.status(c), engine.counts()) == ("failed", {"total": 9, "finished": 2, "canceled": 7})
    assert engine.nothing_left()


def test_after_each(engine: Engine) -> None:
    _, b = engine.submit(array(3, name="a"), array(3, name="b", after_each=["a"], retries=1, priority=9))
    one, two, three = engine.claim(3)
    assert (engine.status(b), engine.registry("deferred")) == ("deferred", [b])
    engine.complete([two])
    engine.release_dependents()
    assert (engine.status(b), engine.list(HIGH), engine.registry("deferred")) == ("started", [f"{b}_1"], [])
    assert f"{b}:0" in engine.registry("wip")
    (handed,) = engine.claim(5, HIGH)
    assert (handed.index, handed.position, handed.retries, handed.array, handed.execution) == (1, 1, 1, b, 1)
    assert engine.complete([handed], "failed", "exit") == ["retry"]
    engine.complete([one], "failed", "exit")
    engine.complete([three])
    engine.release_dependents()
    assert engine.run_all(HIGH) == [f"{b}_1", f"{b}_2"]
    assert (engine.outcomes(b, 3), engine.status(b)) == ("311", "failed")
    assert engine.counts() == {"total": 6, "finished": 4, "failed": 1, "canceled": 1}
    assert engine.nothing_left()


def test_after_each_of_several_arrays_counts_every_one_once(engine: Engine) -> None:
    a, b, c = engine.submit(
        array(2, name="a"), array(2, name="b"), array(2, name="c", after_each=["a", "b"], priority=9)
    )
    first = engine.claim(2)
    engine.complete(first)
    engine.release_dependents()
    engine.link.call("RPUSH", keys.RELEASE, f"e:{a}:0:1", f"e:{a}:1:1")  # seen again: it is one parent still
    engine.release_dependents()
    assert engine.list(HIGH) == []
    second = engine.claim(2)
    assert {h.array for h in second} == {b}
    engine.complete(second[:1])
    engine.release_dependents()
    assert engine.list(HIGH) == [f"{c}_0"]
    engine.link.call("RPUSH", keys.RELEASE, f"e:{a}:0:1", f"e:{b}:0:1")
    engine.release_dependents()
    assert engine.list(HIGH) == [f"{c}_0"]
    engine.complete(second[1:], "failed", "exit")
    engine.release_dependents()
    assert keys.elementwise(c) + ":seen" in engine.all_keys()
    assert engine.link.call("HKEYS", keys.elementwise(c) + ":seen") == [b"w1"]
    assert engine.run_all(HIGH) == [f"{c}_0"]
    assert engine.outcomes(c, 2) == "13"
    assert engine.nothing_left()


def test_after_each_of_what_ended_before_the_submit(engine: Engine) -> None:
    (a,) = engine.submit(array(4))
    handed = engine.claim(3)
    engine.complete(handed[:1])
    engine.complete(handed[1:2], "failed", "exit")
    (b,) = engine.submit(array(4, after_each=[a], priority=9))
    engine.release_dependents()
    assert engine.list(HIGH) == [f"{b}_0"]
    assert engine.outcomes(b, 4) == "0300"
    engine.complete([*handed[2:], *engine.claim(1)])
    assert engine.status(a) == "failed"
    (c,) = engine.submit(array(4, after_each=[a, b], priority=8))
    engine.release_dependents()
    assert engine.run_all(HIGH) == [f"{b}_0", f"{b}_2", f"{b}_3"]
    assert engine.run_all("default.p8.1c") == [f"{c}_0", f"{c}_2", f"{c}_3"]
    assert (engine.outcomes(c, 4), engine.status(c)) == ("1311", "failed")
    assert engine.nothing_left()


def test_after_each_of_all_failed_was_never_run(engine: Engine) -> None:
    _, b = engine.submit(array(2, name="a"), array(2, after_each=["a"]))
    engine.complete(engine.claim(2), "failed", "exit")
    engine.release_dependents()
    assert (engine.status(b), engine.hash(b)["pq_reason"]) == ("canceled", "dependency")
    assert engine.nothing_left()


def test_what_cannot_be_waited_for_each(engine: Engine) -> None:
    a, b = engine.submit(array(3), task())
    before = engine.dump(without=(keys.SEQ, "rq:job:", "pilotq:shared"))
    with pytest.raises(InvalidInput, match=f"'{a}' is no array of as many elements"):
        engine.submit(array(4, after_each=[a]))
    with pytest.raises(InvalidInput, match=f"'{b}' is no array of as many elements"):
        engine.submit(array(4, after_each=[b]))
    with pytest.raises(InvalidInput, match="one element"):
        engine.submit(array(4, after_each=[f"{a}_1"]))
    with pytest.raises(InvalidInput, match="at most 30 arrays, not 31"):
        engine.submit(*(array(2, name=f"a{n}") for n in range(31)), array(2, after_each=[f"a{n}" for n in range(31)]))
    assert engine.dump(without=(keys.SEQ, "rq:job:", "pilotq:shared")) == before


def test_thirty_arrays_each(engine: Engine) -> None:
    names = [f"a{n}" for n in range(30)]
    *_, last = engine.submit(*(array(2, name=n) for n in names), array(2, after_each=names, priority=9))
    engine.run_all()
    assert engine.run_all(HIGH) == [f"{last}_0", f"{last}_1"]
    assert engine.nothing_left()


def test_the_journal_file_tells_of_elements(engine: Engine, tmp_path: object) -> None:
    from pilotq.broker.store.journal_writer import JournalWriter

    (a,) = engine.submit(task(array=ArrayRange(5, 9, 2), name="odd"))
    engine.complete(engine.claim(2))
    engine.complete(engine.claim(1), "failed", "exit")
    path = f"{tmp_path}/journal.jsonl"
    writer = JournalWriter(path, fsync_s=0.0)
    assert writer.drain(engine.link, 0.0)
    writer.close()
    (line,) = Journal(path).find(a)
    assert (line.name, line.status, line.reason, line.final) == ("odd", "failed", "elements", True)
    assert line.elements == {"finished": "5-7:2", "failed": "9"}
    assert [e.status for e in Journal(path).find(f"{a}_9")] == ["failed"]


@pytest.mark.parametrize("when", ["at the end", "at the commit", "at a retry"])
def test_what_waits_for_elements_is_released_however_late(engine: Engine, when: str) -> None:
    """The dispatcher was away for longer than the record of the array is kept."""
    engine.reset(finished_ttl_s=100, failed_ttl_s=100)
    (a,) = engine.submit(array(2))
    if when == "at the end":
        (b,) = engine.submit(array(2, after_each=[a]))
        (c,) = engine.submit(task(after=[f"{a}_1"]))
        engine.complete(engine.claim(2))
    else:
        engine.complete(engine.claim(2))
        b, c = engine.submit(array(2, after_each=[a]), task())
    if when == "at a retry":
        engine.release_dependents()
        engine.complete(engine.claim(5), "failed", "exit")
        (c,) = engine.submit(task())
        assert requeue(engine.store, [b]) == {b: "deferred"}
    engine.store.run("trim", engine.store.term, "finished", "default", a)
    assert engine.ttl(keys.job(a)) == -1
    engine.release_dependents()
    assert 0 < engine.ttl(keys.job(a)) <= 100 and 0 < engine.ttl(keys.outcomes(a)) <= 100
    assert set(ids(engine.claim(5))) == {f"{b}_0", f"{b}_1", c}
