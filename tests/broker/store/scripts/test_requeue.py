"""Running again what ended and did not finish, on a real server: tasks, elements, arrays, and what depends on them."""

from __future__ import annotations

import pytest

from pilotq.broker.store import keys
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.requeue import requeue
from tests.support.engine import ONE, Engine, array, fixtures, ids, task, wide

engine, server, node = fixtures


def again(engine: Engine, *wanted: str) -> dict[str, str]:
    return requeue(engine.store, wanted)


def fail(engine: Engine, count: int = 1, class_name: str = ONE) -> list[str]:
    handed = engine.claim(count, class_name)
    engine.complete(handed, "failed", "exit", text="what RQ shows")
    engine.release_dependents()
    return ids(handed)


def test_a_failed_task_is_as_before_but_for_its_number(engine: Engine) -> None:
    (a,) = engine.submit(task(name="a"), key="s")
    before = engine.hash(a)
    fail(engine)
    assert engine.counts("pilotq:submit:s") == {"total": 1, "failed": 1}
    assert engine.link.call("EXISTS", keys.SHARED_REFS) == 0
    assert again(engine, a) == {a: "queued"}
    record = engine.hash(a)
    assert {k: record[k] for k in before if k != "enqueued_at"} == {
        k: v for k, v in before.items() if k != "enqueued_at"
    }
    assert set(record) == {*before, "pq_exec"} and record["enqueued_at"] > before["enqueued_at"]
    assert (engine.ttl(keys.job(a)), engine.registry("failed"), engine.list()) == (-1, [], [a])
    assert engine.counts() == {"total": 1} == engine.counts("pilotq:submit:s")
    assert [engine.ttl(k) for k in engine.all_keys() if k.startswith(("pilotq:shared:", "pilotq:submit:"))] == [-1, -1]
    assert [(entry["status"], entry["final"]) for entry in engine.journal()] == [("failed", True), ("queued", False)]
    (handed,) = engine.claim()
    assert (handed.id, handed.execution, handed.name) == (a, 2, "a")
    assert engine.complete([handed]) == ["ok"]
    assert engine.nothing_left() and engine.counts() == {"total": 1, "finished": 1}


def test_a_late_report_of_an_earlier_execution_counts_for_nothing(engine: Engine) -> None:
    (a,) = engine.submit(task())
    (first,) = engine.claim()
    engine.complete([first], "failed", "exit")
    again(engine, a)
    assert engine.complete([first], "finished") == ["retry"]
    (second,) = engine.claim()
    assert engine.complete([first], "finished") == ["stale"]
    assert engine.status(a) == "started" and second.execution == 2


def test_what_has_nothing_to_run_again(engine: Engine) -> None:
    done, runs, waits = engine.submit(*[task()] * 3)
    first, second = engine.claim(2)
    engine.complete([first])
    assert again(engine, done, runs, waits, "nobody", f"{done}_3") == {
        done: "finished", runs: "started", waits: "queued", "nobody": "unknown", f"{done}_3": "unknown",
    }  # fmt: skip
    engine.link.call("HSET", keys.job(runs), "status", "canceled")  # by RQ's button
    assert again(engine, runs) == {runs: "ending"}
    engine.cancel(runs)
    engine.complete([second])
    assert again(engine, runs) == {runs: "queued"}


def test_a_chain_runs_again_from_where_it_broke(engine: Engine) -> None:
    a, b, c = engine.submit(task(name="a"), task(name="b", after=["a"]), task(after=["b", "a"]))
    fail(engine)
    assert engine.statuses(a, b, c) == ["failed", "canceled", "canceled"]
    assert again(engine, c, b) == {c: "dependency", b: "dependency"}
    assert again(engine, a, b, c) == {a: "queued", b: "deferred", c: "deferred"}
    assert engine.counts() == {"total": 3}
    assert engine.run_all() == [a, b, c]
    assert engine.nothing_left() and engine.counts() == {"total": 3, "finished": 3}


def test_canceled_while_it_waited_it_waits_for_each_parent_once(engine: Engine) -> None:
    c = engine.submit(task(name="a"), task(name="b"), task(after=["a", "b"]))[2]
    engine.cancel(c)
    assert again(engine, c) == {c: "deferred"}
    first, second = engine.claim(2)
    engine.complete([first])
    engine.release_dependents()
    assert engine.status(c) == "deferred"
    engine.complete([second])
    engine.release_dependents()
    assert engine.status(c) == "queued"
    engine.run_all()
    assert engine.nothing_left()


@pytest.mark.parametrize("retried", [False, True])
def test_a_release_that_is_pending_does_not_count_for_a_later_wait(engine: Engine, retried: bool) -> None:
    """Canceled and requeued before the end of its first parent was handled, it waits only for the second one."""
    first, _, child = engine.submit(task(name="a"), task(name="b"), task(after=["a", "b"]))
    runs = engine.claim(2)
    engine.complete(runs[:1], "failed" if retried else "finished", "exit" if retried else "")
    engine.cancel(child)
    if retried:
        assert again(engine, first, child) == {first: "queued", child: "deferred"}
    else:
        assert again(engine, child) == {child: "deferred"}
    engine.release_dependents()
    assert engine.status(child) == "deferred" and engine.hash(child)["pq_open_parents"] == ("2" if retried else "1")
    engine.complete(runs[1:])
    engine.release_dependents()
    assert engine.status(child) == ("deferred" if retried else "queued")
    engine.run_all()
    assert engine.status(child) == "finished" and engine.nothing_left()


def test_canceled_while_a_release_is_pending_it_waits_for_the_other(engine: Engine) -> None:
    """A's release, queued before the cancel, says nothing about the second wait, nor does B's own earlier entry."""
    _, _, c = engine.submit(task(name="a"), task(name="b"), task(after=["a", "b"], time_limit=60))
    a, b = engine.claim(2)
    engine.complete([a])
    for _ in range(2):
        engine.cancel(c)
        assert again(engine, c) == {c: "deferred"}
    engine.release_dependents()
    assert engine.status(c) == "deferred" and engine.registry("deferred") == [c]
    engine.complete([b])
    engine.release_dependents()
    assert engine.status(c) == "queued" and engine.list("default.p0.1c-t60") == [c]


def test_a_forgotten_class_is_known_again(engine: Engine) -> None:
    (a,) = engine.submit(wide(3))
    three = "default.p0.3c"
    fail(engine, class_name=three)
    assert [engine.drop_classes(three, at=at) for at in (0, 60)] == [0, 1]
    assert engine.link.call("HGET", keys.CLASSES, three) is None
    assert again(engine, a) == {a: "queued"}
    assert engine.link.call("HGET", keys.CLASSES, three) == b""
    engine.run_all(three)
    assert engine.nothing_left()


@pytest.mark.parametrize("lost", ["shared", "submission"])
def test_what_cannot_run_again_says_so_and_changes_nothing(engine: Engine, lost: str) -> None:
    (a,) = engine.submit(task(), key="s")
    fail(engine)
    (shared,) = (k for k in engine.all_keys() if k.startswith("pilotq:shared:"))
    engine.link.call("DEL", {"shared": shared, "submission": keys.submission("s")}[lost])
    before = engine.dump(without=(keys.WAKEUP,))
    assert again(engine, a) == {a: "gone"}
    assert engine.dump(without=(keys.WAKEUP,)) == before


def test_what_rq_has_requeued_is_taken_over(engine: Engine) -> None:
    """RQ sets the status, and pushes into the user's queue; its registry entry is gone."""
    (a, b) = engine.submit(task(), array(2))
    fail(engine, 3)
    for task_id in (a, f"{b}_1"):
        engine.link.call("HSET", keys.job(task_id), "status", "queued")
        engine.link.call("ZREM", keys.registry("failed", "default"), task_id)
    assert again(engine, a, f"{b}_1") == {a: "queued", f"{b}_1": "queued"}
    assert engine.counts() == {"total": 3, "failed": 1}
    assert sorted(engine.run_all()) == sorted([a, f"{b}_1"])
    assert again(engine, b) == {b: "queued"}
    assert engine.run_all() == [f"{b}_0"]
    assert engine.nothing_left() and engine.counts() == {"total": 3, "finished": 3}


# -- arrays -----------------------------------------------------------------------------------------------------------


def test_of_an_array_that_has_ended_only_what_did_not_finish(engine: Engine) -> None:
    (a,) = engine.submit(array(11, retries=1, name="many"), key="s")
    for count, outcome in ((5, "finished"), (1, "stopped"), (3, "finished")):
        engine.complete(engine.claim(count), outcome)
    engine.cancel(a)
    assert (engine.outcomes(a, 11), engine.status(a)) == ("11111211133", "canceled")
    assert again(engine, a) == {a: "queued"}
    # What was canceled in its list stands there still: the second entry is dropped when its turn comes.
    assert (engine.outcomes(a, 11), engine.list(), engine.registry("failed")) == ("11111011100", [a, a], [])
    assert engine.counts() == {"total": 11, "finished": 8} == engine.counts(keys.submission("s"))
    handed = engine.claim(2)
    assert [(h.id, h.execution, h.retries) for h in handed] == [(f"{a}_5", 2, 1), (f"{a}_9", 2, 1)]
    engine.complete(handed)
    assert engine.run_all() == [f"{a}_10"]
    assert (engine.status(a), engine.hash(a)["pq_reason"]) == ("finished", "")
    assert engine.nothing_left() and engine.counts() == {"total": 11, "finished": 11}
    assert engine.final_entry(f"{a}_9")["execution"] == 2


@pytest.mark.parametrize("size", [4, 400_000])
def test_the_last_element_of_a_long_array_is_found(engine: Engine, size: int) -> None:
    (a,) = engine.submit(array(size))
    engine.cancel(a)
    bits = bytearray(b"\x55" * (size // 4))
    bits[-1] = 0x57  # all finished but the last but one, which failed... and one in the middle that was canceled
    bits[len(bits) // 2] = (bits[len(bits) // 2] & 0x3F) | 0xC0
    engine.link.call("SET", keys.outcomes(a), bytes(bits), "KEEPTTL")
    assert again(engine, a) == {a: "queued"}
    middle = len(bits) // 2 * 4
    assert [h.index for h in engine.claim(5)] == [middle, size - 1]
    assert engine.status(a) == "started"


def test_the_journal_has_the_index_of_an_element_that_is_tried_again(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    fail(engine, 3)
    assert again(engine, f"{a}_1") == {f"{a}_1": "queued"}
    (entry,) = (entry for entry in engine.journal() if entry["id"] == f"{a}_1" and not entry["final"])
    assert (entry["id"], entry["status"], entry["array"], entry["index"]) == (f"{a}_1", "queued", a, 1)
    assert JournalEntry(f"{a}_1", array=a, index=entry["index"]).submitted_as == a


def test_one_element_opens_its_array_again(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    fail(engine, 3)
    assert again(engine, f"{a}_1") == {f"{a}_1": "queued"}
    assert (engine.status(a), engine.outcomes(a, 3), engine.registry("wip")) == ("started", "202", [f"{a}:0"])
    assert again(engine, f"{a}_1") == {f"{a}_1": "queued"}
    (handed,) = engine.claim(5)
    assert (handed.id, handed.execution, handed.index, handed.array) == (f"{a}_1", 2, 1, a)
    engine.complete([handed])
    assert (engine.status(a), engine.outcomes(a, 3)) == ("failed", "212")
    assert engine.counts() == {"total": 3, "finished": 1, "failed": 2}
    assert again(engine, a) == {a: "queued"}
    assert engine.run_all() == [f"{a}_0", f"{a}_2"]
    assert engine.nothing_left() and engine.status(a) == "finished"


def test_of_an_array_under_way_what_has_failed_so_far(engine: Engine) -> None:
    (a,) = engine.submit(array(6))
    fail(engine, 2)
    engine.cancel(f"{a}_4")
    assert again(engine, a) == {a: "queued"}
    assert engine.outcomes(a, 6) == "000000"
    assert sorted(engine.run_all()) == [f"{a}_{n}" for n in range(6)]
    assert engine.nothing_left() and engine.status(a) == "finished"


def test_an_array_that_is_being_canceled_must_end_first(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    (first, second) = engine.claim(2)
    engine.complete([first], "failed", "exit")
    engine.cancel(a)
    assert again(engine, a) == {a: "ending"} and again(engine, f"{a}_0") == {f"{a}_0": "ending"}
    engine.complete([second])
    # The canceled positions are still to be swept by the dispatcher: they must not end what runs again.
    assert engine.link.call("LLEN", keys.RELEASE) == 1
    assert again(engine, a) == {a: "queued"}
    engine.release_dependents()
    assert engine.run_all() == [f"{a}_0", f"{a}_2"]
    assert engine.nothing_left()


def test_bits_that_changed_meanwhile_are_not_overwritten(engine: Engine) -> None:
    (a,) = engine.submit(array(2))
    fail(engine, 2)
    before = engine.dump(without=(keys.WAKEUP,))
    assert engine.store.requeue([[a, "0" * 40, 5, 2, 0, 0, []]], b"\0") == ["changed"]
    assert engine.dump(without=(keys.WAKEUP,)) == before


def test_an_array_waits_for_a_task_again(engine: Engine) -> None:
    a, b = engine.submit(task(name="a"), array(4, after=["a"]))
    fail(engine)
    assert engine.outcomes(b, 4) == "3333"
    assert again(engine, b) == {b: "dependency"}
    assert again(engine, f"{b}_2") == {f"{b}_2": "dependency"}
    assert again(engine, a, b) == {a: "queued", b: "deferred"}
    assert engine.run_all() == [a, *(f"{b}_{n}" for n in range(4))]
    assert engine.nothing_left()


def test_element_by_element(engine: Engine) -> None:
    a, b = engine.submit(array(4, name="a"), array(4, name="b", after_each=["a"]))
    engine.complete(engine.claim(2))
    fail(engine, 2)
    assert engine.run_all() == [f"{b}_0", f"{b}_1"]
    assert (engine.outcomes(b, 4), engine.status(b)) == ("1133", "failed")
    assert again(engine, f"{b}_2") == {f"{b}_2": "dependency"}
    assert (engine.outcomes(b, 4), engine.status(b)) == ("1133", "failed")
    assert again(engine, a, b) == {a: "queued", b: "deferred"}
    engine.release_dependents()
    assert engine.run_all() == [*(f"{a}_{n}" for n in (2, 3)), *(f"{b}_{n}" for n in (2, 3))]
    assert engine.nothing_left() and engine.statuses(a, b) == ["finished", "finished"]


def test_one_element_after_anothers(engine: Engine) -> None:
    a, b = engine.submit(array(2, name="a"), array(2, name="b", after_each=["a"]))
    engine.complete(engine.claim(2))
    engine.release_dependents()
    fail(engine, 2)
    assert again(engine, f"{b}_1") == {f"{b}_1": "queued"}
    engine.release_dependents()
    assert engine.run_all() == [f"{b}_1"]
    assert engine.outcomes(b, 2) == "21"
    engine.link.call("DEL", keys.job(a))
    assert again(engine, b) == {b: "gone"}


def test_a_parent_that_is_only_called_as_an_element_is_waited_for_again(engine: Engine) -> None:
    """RQ's producers name their jobs as they like."""
    engine.link.call("HSET", keys.job("report_7"), "status", "started")
    (child,) = engine.submit(task(after=["report_7"]))
    engine.cancel(child)
    assert again(engine, child) == {child: "deferred"}
    assert engine.hash("report_7")["pq_has_dependents"] == "1"
    assert engine.link.call("EXISTS", keys.job("report")) == 0, "no record is made that nobody removes"
