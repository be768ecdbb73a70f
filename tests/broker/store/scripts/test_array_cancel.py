"""The end of arrays before their time, on a real server: canceled by us, by RQ's button, or their records deleted."""

from __future__ import annotations

import pytest

from pilotq.broker.store import keys
from pilotq.broker.store.messages import EndReport, Stop
from tests.support.engine import ONE, Engine, array, end_entry, fixtures, ids, task

engine, server, node = fixtures
HIGH = "default.p9.1c"


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_cancel_of_an_array_that_waits(engine: Engine) -> None:
    a, b = engine.submit(array(6, name="six"), task())
    assert engine.cancel(a) == ["canceled"]
    assert (engine.status(a), engine.registry("canceled"), engine.outcomes(a, 6)) == ("canceled", [a], "333333")
    assert engine.final_entry(a)["elements"] == {"canceled": "0-5"}
    assert ids(engine.claim(3)) == [b]
    assert engine.counts() == {"total": 7, "canceled": 6}


def test_cancel_of_an_array_of_which_some_run(engine: Engine) -> None:
    (a,) = engine.submit(array(7))
    ended, runs, given_back, other = engine.claim(4)
    engine.complete([ended])
    engine.return_unstarted([given_back])
    assert engine.cancel(a) == ["stopping"]
    assert engine.inbox() == [Stop(a, 0, "canceled")]
    engine.release_dependents()
    assert engine.outcomes(a, 7) == "1030333"
    assert engine.status(a) == "started"
    assert engine.claim(5) == []
    assert engine.complete([runs], "canceled", "canceled") == ["ok"]
    assert engine.complete([other]) == ["ok"]  # it was faster than the word to stop it
    assert engine.outcomes(a, 7) == "1331333"
    assert (engine.status(a), engine.hash(a)["pq_reason"]) == ("canceled", "canceled")
    assert engine.counts() == {"total": 7, "finished": 2, "canceled": 5}
    assert engine.cancel(a) == ["canceled"]
    assert engine.nothing_left()


def test_cancel_of_an_array_passes_elements_on_their_way_back(engine: Engine) -> None:
    """The workers had the message, but what they held had not started and is returned after that."""
    (a,) = engine.submit(array(4, retries=3))
    handed = engine.claim(4)
    engine.cancel(a)
    engine.release_dependents()
    assert engine.return_unstarted(handed[:2]) == 0
    assert engine.complete(handed[2:3], "failed", "exit") == ["ok"]
    assert engine.report_lost(handed[3:]) == ["ok"]
    assert (engine.outcomes(a, 4), engine.status(a)) == ("3333", "canceled")
    assert engine.nothing_left()


def test_given_back_elements_of_a_canceled_array_are_not_handed_out(engine: Engine) -> None:
    (a,) = engine.submit(array(2))
    engine.return_unstarted(engine.claim(2))
    engine.cancel(a)
    assert engine.claim(2) == []  # even before release_dependents.lua has ended them
    engine.release_dependents()
    assert (engine.status(a), engine.counts()) == ("canceled", {"total": 2, "canceled": 2})
    assert engine.nothing_left()


def test_cancel_of_one_element(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    waits, runs, _ = handed = engine.claim(3)
    engine.return_unstarted([waits])
    assert engine.cancel(waits.id, runs.id, f"{a}_9") == ["canceled", "stopping", "unknown"]
    engine.complete([runs], "failed", "signal")
    engine.complete([handed[2]])
    assert (engine.outcomes(a, 3), engine.status(a)) == ("331", "failed")
    engine.claim(5)
    assert engine.counts() == {"total": 3, "finished": 1, "canceled": 2}
    assert engine.nothing_left()


def test_elements_canceled_one_by_one_are_passed_over(engine: Engine) -> None:
    a, b = engine.submit(array(9), task())
    assert engine.cancel(f"{a}_1", f"{a}_2", f"{a}_8", f"{a}_1") == ["canceled"] * 4
    assert engine.counts() == {"total": 10, "canceled": 3}
    handed = engine.claim(3)
    assert [h.index for h in handed] == [0, 3, 4]
    engine.complete(handed)
    assert engine.cancel(f"{a}_0", f"{a}_5") == ["finished", "canceled"]
    runs = engine.claim(1)
    assert ids(runs) == [f"{a}_6"]
    assert engine.cancel(a) == ["stopping"]  # what is left: 7, and 6 runs
    engine.release_dependents()
    assert engine.outcomes(a, 9) == "133113033"
    engine.complete(runs, "canceled", "canceled")
    assert (engine.outcomes(a, 9), engine.status(a)) == ("133113333", "canceled")
    assert engine.counts() == {"total": 10, "finished": 3, "canceled": 6}
    assert ids(engine.claim(5)) == [b]


def test_cancel_by_rq_of_an_array(engine: Engine) -> None:
    """RQ has set the status and taken the record out of its list; the elements follow when our script hears of it."""
    (a,) = engine.submit(array(5))
    runs, back = engine.claim(2)
    engine.return_unstarted([back])
    engine.link.call("HSET", keys.job(a), "status", "canceled")
    engine.link.call("LREM", keys.queue(ONE), 0, a)
    assert engine.cancel(a) == ["stopping"]
    engine.release_dependents()
    assert engine.outcomes(a, 5) == "03333"
    assert engine.complete([runs], "canceled", "canceled") == ["ok"]
    assert (engine.status(a), engine.hash(a)["pq_reason"]) == ("canceled", "canceled")
    assert engine.counts() == {"total": 5, "canceled": 5}
    assert engine.claim(2) == []
    assert engine.nothing_left()


def test_one_call_cancels_a_bounded_number(engine: Engine) -> None:
    ids = engine.submit(*[task()] * 300, array(600_000), array(600_000), array(10))
    now = (1.0, "2026-01-31T12:00:00.000000Z", 60, "")
    assert len(engine.store.run("cancel", *now, *ids)) == 250
    assert len(engine.store.run("cancel", *now, *ids[299:])) == 3
    assert engine.cancel(*ids) == ["canceled"] * 303
    assert engine.counts() == {"total": 1_200_310, "canceled": 1_200_310}
    assert engine.claim() == [] and engine.nothing_left()


@pytest.mark.parametrize("count", [1, 3, 4, 9, 64, 67, 1030])
def test_cancel_of_a_retried_array_that_finished_in_parts(engine: Engine, count: int) -> None:
    """Whatever the pattern, one script writes the outcomes once, and once those that wait for its elements are told."""
    for pattern in (lambda n: n % 2, lambda n: n % 7 < 3, lambda n: n == count - 1, lambda n: n > 0):
        engine.reset()
        a, _ = engine.submit(array(count, name="a"), array(count, after_each=["a"], priority=9))
        outcomes = bytearray((count + 3) // 4)
        for n in range(count):
            outcomes[n // 4] |= (1 if pattern(n) else 0) << 6 - 2 * (n % 4)
        left = sum(not pattern(n) for n in range(count))
        engine.link.call("SET", keys.outcomes(a), bytes(outcomes))
        engine.link.call("HSET", keys.job(a), "pq_has_gaps", 1, "pq_left", left)
        engine.link.call("HINCRBY", keys.COUNTS, "finished", count - left)
        engine.link.call("HINCRBY", keys.submission(engine.hash(a)["pq_sub"]), "left", left - count)
        if left:
            assert engine.cancel(a) == ["canceled"]
            assert engine.outcomes(a, count) == "".join("1" if pattern(n) else "3" for n in range(count))
            entries = [f"e:{a}:0:{count - 1}".encode(), f"x:{a}:{engine.settings.failed_ttl_s}".encode()]
            assert engine.link.call("LRANGE", keys.RELEASE, 0, -1) == entries
            assert engine.status(a) == "canceled" and engine.counts()["canceled"] == left


# -- deleted records --------------------------------------------------------------------------------------------------


def test_elements_of_a_deleted_array_make_no_ghost(engine: Engine) -> None:
    (a,) = engine.submit(array(4))
    good, bad, back = engine.claim(3)
    engine.return_unstarted([back])
    engine.link.call("DEL", keys.job(a))
    assert engine.complete([good]) == ["ok"]
    assert engine.complete([bad], "failed", "exit") == ["ok"]
    assert engine.claim(2) == []
    assert not [k for k in engine.all_keys() if k.startswith(("rq:job:", "pilotq:outcomes"))]
    assert engine.counts() == {"total": 4, "finished": 1, "failed": 1, "canceled": 1}
    assert engine.store.count_vanished(["default"]) == 1
    assert engine.nothing_left() and not engine.link.call("EXISTS", keys.SUBMISSIONS)


@pytest.mark.parametrize("status", ["runs", "waits"])
def test_a_deleted_record_closes_its_submission(engine: Engine, status: str) -> None:
    engine.submit(task(), key="before")
    (a, b) = engine.submit(task(), array(2), key="mine")
    engine.submit(task(), key="behind")
    handed = engine.claim(5)
    assert engine.link.call("ZRANGE", keys.SUBMISSIONS, 0, -1) == [b"before", b"mine", b"behind"]
    mine = [h for h in handed if h.submission == "mine"]
    engine.complete([h for h in handed if h.submission != "mine"])
    assert engine.link.call("ZRANGE", keys.SUBMISSIONS, 0, -1) == [b"mine"]
    if status == "waits":
        engine.return_unstarted(mine)
        engine.link.call("DEL", keys.job(a), *(keys.job(f"{b}_{n}") for n in range(2)), keys.job(b), keys.queue(ONE))
        engine.link.call("DEL", keys.registry("wip", "default"))
        assert engine.store.count_vanished(["default"]) == 3
    else:
        engine.link.call("DEL", *(keys.job(h.id) for h in mine))
        now = "2026-01-31T12:00:00.000000Z"
        for h in mine:  # as the reconciler does: nobody knows any more whose it was
            report = EndReport(h.id, 1, "canceled", "canceled", now, "", "", "", end_entry(h), class_name="default")
            report.array, report.position = h.array, h.position
            assert engine.store.report_lost([report]) == ["ok" if h.array else "stale"]  # elements have no record
    assert engine.link.call("HMGET", keys.submission("mine"), "left", "canceled") == [b"0", b"3"]
    assert engine.ttl(keys.submission("mine")) > 0
    assert engine.counts() == {"total": 5, "finished": 2, "canceled": 3}
    assert not engine.link.call("EXISTS", keys.SUBMISSIONS)


def test_a_deleted_element_does_not_hold_up_its_array(engine: Engine) -> None:
    (a,) = engine.submit(array(2))
    handed = engine.claim(2)
    engine.report_started(handed[0])
    engine.link.call("DEL", keys.job(handed[0].id))
    assert engine.complete(handed) == ["stale", "ok"]
    assert engine.complete(handed) == ["ok", "ok"]
    assert (engine.outcomes(a, 2), engine.status(a)) == ("31", "failed")
    assert engine.counts() == {"total": 2, "finished": 1, "canceled": 1}
    assert engine.nothing_left()


@pytest.mark.parametrize("ended", [0, 2])
def test_cancel_of_an_array_that_waits_element_by_element(engine: Engine, ended: int) -> None:
    _, b, c = engine.submit(
        array(5, name="a"), array(5, name="b", after_each=["a"], priority=9), array(5, after_each=["b"], priority=9)
    )
    parents = engine.claim(5)
    engine.complete(parents[:ended])
    engine.release_dependents()
    running = engine.claim(1, HIGH)
    assert engine.cancel(b) == ["stopping" if running else "canceled"]
    assert f"{b}:0" in engine.registry("wip") and b not in engine.registry("deferred")
    while engine.store.release_dependents(2)[1]:  # in slices
        pass
    assert engine.outcomes(b, 5) == ("03333" if running else "33333")
    engine.complete(running, "canceled", "canceled")
    engine.complete(parents[ended:])  # too late for b
    engine.release_dependents()
    assert engine.statuses(b, c) == ["canceled", "canceled"]
    assert engine.claim(5, HIGH) == []
    assert engine.counts() == {"total": 15, "finished": 5, "canceled": 10}
    assert engine.nothing_left()
