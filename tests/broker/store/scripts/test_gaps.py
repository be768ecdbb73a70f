"""Arrays of several ranges of indices, on a real server: elements have the user's own indices, in all scripts."""

from __future__ import annotations

import time

import pytest

from pilotq.broker.client.past import PastTasks
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.errors import InvalidInput, UnknownTask
from pilotq.broker.scheduling.reconciler import Reconciler
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.requeue import requeue
from pilotq.broker.tasks.array_indices import RANGES_MAX
from pilotq.broker.tasks.model import ArrayRange
from pilotq.workers.shared_data import SharedData
from tests.support.engine import ONE, Engine, array, fixtures, ids, task

engine, server, _ = fixtures
GAPS = ArrayRange.parse("1,3-5,10-20:5")
LAST = 2**53 - 1


def test_elements_have_the_indices_of_the_user(engine: Engine) -> None:
    (a,) = engine.submit(task(array=GAPS, name="gaps", retries=1))
    first = engine.claim(3)
    (head,) = engine.store.heads([ONE])
    assert (head.elements, head.waiting) == (4, 4)
    second = engine.claim(9)
    handed = first + second
    assert [(h.id, h.index, h.position) for h in handed] == [
        (f"{a}_{index}", index, position) for position, index in enumerate(GAPS)
    ]
    assert engine.complete(handed[1:2], "failed", "exit") == ["retry"]
    assert engine.return_unstarted(handed[4:5]) == 1
    assert engine.list() == [f"{a}_10", f"{a}_3"]
    again = engine.claim(2)
    assert [(h.id, h.index, h.position, h.execution) for h in again] == [(f"{a}_10", 10, 4, 2), (f"{a}_3", 3, 1, 2)]
    engine.complete([handed[0], *handed[2:4], again[0]])
    engine.complete(handed[6:])
    engine.complete(again[1:], "failed", "exit")
    assert engine.report_lost(handed[5:6]) == ["retry"]
    assert engine.run_all() == [f"{a}_15"]
    assert engine.final_entry(a)["elements"] == {"finished": "1,4-5,10-20:5", "failed": "3"}
    assert requeue(engine.store, [a]) == {a: "queued"}
    assert engine.run_all() == [f"{a}_3"]
    assert engine.outcomes(a, 7) == "1111111"
    assert engine.nothing_left()


def test_waiting_elements_are_canceled_and_run_again(engine: Engine) -> None:
    (a,) = engine.submit(task(array=GAPS))
    for index in ("0", "2", "6", "9", "11", "25", "03", f"{LAST}", f"{LAST + 1}", "1e1"):
        assert engine.cancel(f"{a}_{index}") == ["unknown"]
        assert requeue(engine.store, [f"{a}_{index}"]) == {f"{a}_{index}": "unknown"}
    assert engine.cancel(f"{a}_3", f"{a}_20") == ["canceled"] * 2
    assert requeue(engine.store, [f"{a}_20"]) == {f"{a}_20": "queued"}
    handed = engine.claim(9)
    assert [h.index for h in handed] == [1, 4, 5, 10, 15, 20]
    assert engine.cancel(a) == ["stopping"]
    engine.complete(handed, "canceled")
    engine.release_dependents()
    assert engine.final_entry(a)["elements"] == {"canceled": "1,3-5,10-20:5"}
    assert requeue(engine.store, [f"{a}_15", a]) == {f"{a}_15": "queued", a: "queued"}
    assert sorted(engine.run_all()) == sorted(f"{a}_{index}" for index in GAPS)
    assert engine.nothing_left()


def test_what_waits_for_elements(engine: Engine) -> None:
    a, one, each, whole = engine.submit(
        task(array=GAPS, name="a"), task(after=["a:10"]), task(array=ArrayRange.parse("0-5,7"), after_each=["a"]),
        task(after=["a"]),
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="'a:11' is neither"):
        engine.submit(task(array=GAPS, name="a"), task(after=["a:11"]))
    with pytest.raises(UnknownTask, match=f"{a}_2"):
        engine.submit(task(after=[f"{a}_2"]))
    with pytest.raises(InvalidInput, match="not an array of 6 elements"):
        engine.submit(task(array=GAPS, name="a"), array(6, after_each=["a"]))
    handed = engine.claim(9)
    engine.complete(handed[3:5])
    engine.release_dependents()
    assert sorted(engine.list()) == sorted([one, f"{each}_3", f"{each}_4"])
    engine.complete(handed[:1], "failed", "exit")
    engine.complete([*handed[1:3], *handed[5:]])
    engine.release_dependents()
    assert engine.status(whole) == "canceled"
    assert set(engine.run_all()) == {one, *(f"{each}_{index}" for index in (1, 2, 3, 4, 5, 7))}
    assert engine.final_entry(each)["elements"] == {"canceled": "0", "finished": "1-5,7"}
    (late,) = engine.submit(task(after=[f"{a}_20"]))
    assert engine.run_all() == [late]
    assert engine.nothing_left()


def test_readers_know_the_indices(engine: Engine) -> None:
    (a,) = engine.submit(task(array=GAPS))
    handed = engine.claim(3)
    engine.complete(handed[:1])
    engine.complete(handed[1:2], "failed", "exit")
    link = Connection(engine.running.address)
    listing = TaskQueries(link, None)
    view = listing.task(a)
    assert view is not None and view.array_size == 7
    assert view.elements == {"finished": "1", "failed": "3", "started": "4", "waiting": "5,10-20:5"}
    expected = {1: "finished", 3: "failed", 4: "started", 5: "queued", 10: "queued", 15: "queued", 20: "queued"}
    found = {n: view.status for n in range(26) for view in [listing.task(f"{a}_{n}")] if view is not None}
    assert found == expected
    names = [f"{a}_{n}" for n in range(26)]
    past = PastTasks(link, None, names).statuses(names)
    assert past == {f"{a}_{n}": status for n, status in expected.items()}
    link.close()


def test_a_running_element_whose_record_is_deleted_ends_at_its_position(engine: Engine) -> None:
    (a,) = engine.submit(task(array=GAPS))
    engine.register()
    handed = engine.claim(9)
    engine.report_started(next(h for h in handed if h.index == 15))
    engine.link.call("DEL", keys.job(f"{a}_15"))
    reconciler = Reconciler(engine.store)
    reconciler.turn(time.monotonic(), {}, [], walked=True, idle=False)
    assert engine.outcomes(a, 7) == "0000030"
    engine.complete([h for h in handed if h.index != 15])
    assert engine.final_entry(a)["elements"] == {"finished": "1,3-5,10,20", "canceled": "15"}
    assert engine.nothing_left()


def test_the_largest_indices_and_the_most_ranges(engine: Engine) -> None:
    indices = [n * n for n in range(1, RANGES_MAX - 1)] + [LAST - 3, LAST]
    (a,) = engine.submit(task(array=ArrayRange.of(indices)))
    assert engine.cancel(f"{a}_{LAST - 1}", f"{a}_{LAST + 1}", f"{a}_{LAST}") == ["unknown", "unknown", "canceled"]
    ran = []
    while handed := engine.claim(4_000):
        ran += [h.index for h in handed]
        engine.complete(handed)
    assert ran == indices[:-1]
    assert engine.nothing_left()


@pytest.mark.parametrize(
    "text",
    ["", "x", "1:0:7", "1:0:7 ", "1:0:7 00", "1:0:7 00 01 01 01", "1:0:7 00 01 01 99 x3 01", "1:1:7 00 01 01",
     "1:0:7 00 01 00 01 03 00 04 10 00", "1:0:7 00 01 01 01 03 01 04 10 05 1", "1:0:7 05 01 01 04 03 01 03 10 05"],
)  # fmt: skip
def test_a_damaged_list_of_ranges_costs_that_array_alone(engine: Engine, text: str) -> None:
    a, b = engine.submit(task(array=GAPS), task())
    engine.claim(1)
    engine.link.call("HSET", keys.job(a), "pq_array", text)
    ran = []
    for _ in range(12):
        handed = engine.claim(3)
        engine.complete(handed)
        engine.release_dependents()
        ran += ids(handed)
    assert b in ran and engine.status(b) == "finished"
    assert requeue(engine.store, [a])[a] in ("damaged", "failed", "queued", "started", "unknown")
    listing = TaskQueries(engine.link, None)
    assert (view := listing.task(a)) is not None and view.status in ("failed", "queued", "started", "finished")


def test_values_with_these_indices(engine: Engine) -> None:
    values = [f"value {n}" for n in range(2_500)]
    a, b = engine.submit(
        task(values=values, array=ArrayRange.parse("7,1200-2499:3%2"), name="a"), task(after=["a:1203"], priority=9)
    )
    (name,) = {engine.hash(a)["pq_class"]}
    handed = engine.claim(999, name)
    assert [h.index for h in handed] == [7, *range(1200, 2500, 3)]
    data = SharedData(engine.link, lambda: None)
    assert [data.fetch_value(a, h.position) for h in handed] == [f"value {h.index}".encode() for h in handed]
    engine.complete(handed)
    engine.release_dependents()
    assert engine.run_all("default.p9.1c") == [b]
    with pytest.raises(InvalidInput, match="names the index 2,500, but the last of the values has the index 2,499"):
        engine.submit(task(values=values, array=ArrayRange(0, 2_500)))
