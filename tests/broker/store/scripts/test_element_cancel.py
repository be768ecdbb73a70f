"""Elements of an array that are canceled one by one, before they were handed out."""

from __future__ import annotations

from tests.support.engine import Engine, array, fixtures, ids, task

engine, server, node = fixtures


def test_a_canceled_element_is_passed_over(engine: Engine) -> None:
    a, kid, other = engine.submit(
        array(5, name="a"), task(name="kid", after=["a:2"]), task(name="other", after=["a:3"])
    )  # fmt: skip
    handed = engine.claim(1)
    assert engine.cancel(f"{a}_2", f"{a}_2", f"{a}_5", f"{a}_x", f"{a}_00", "v_0") == [
        "canceled", "canceled", "unknown", "unknown", "unknown", "unknown",
    ]  # fmt: skip
    engine.release_dependents()
    assert engine.status(kid) == "canceled" and engine.hash(kid)["pq_reason"] == "dependency"
    handed += engine.claim(10)
    assert ids(handed) == [f"{a}_{i}" for i in (0, 1, 3, 4)]
    assert engine.complete(handed) == ["ok"] * 4
    assert engine.cancel(f"{a}_0") == ["finished"]
    engine.release_dependents()
    assert engine.outcomes(a, 5) == "11311" and engine.statuses(a, other) == ["failed", "queued"]
    assert engine.counts() == {"total": 7, "finished": 4, "canceled": 2}


def test_an_array_with_holes_is_canceled_or_omitted_once(engine: Engine) -> None:
    first, second = engine.submit(array(9, name="first"), array(9, name="second", after=["first"]))
    assert engine.cancel(f"{first}_3", f"{first}_8", f"{second}_0") == ["canceled"] * 3
    assert engine.cancel(first) == ["canceled"]
    engine.release_dependents()
    assert engine.statuses(first, second) == ["canceled", "canceled"]
    assert engine.counts() == {"total": 18, "canceled": 18}
    assert engine.claim() == [] and engine.nothing_left()


def test_an_array_whose_last_elements_are_canceled_ends(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    handed = engine.claim(1)
    assert engine.complete(handed) == ["ok"]
    assert engine.cancel(f"{a}_2", f"{a}_1") == ["canceled", "canceled"]
    assert engine.status(a) == "failed" and engine.counts() == {"total": 3, "finished": 1, "canceled": 2}
    assert engine.claim(3) == [] and engine.nothing_left()


def test_an_element_that_waits_for_another_arrays_is_canceled(engine: Engine) -> None:
    a, b = engine.submit(array(3, name="a"), array(3, name="b", after_each=["a"]))
    assert engine.cancel(f"{b}_1") == ["canceled"]
    assert engine.complete(engine.claim(3)) == ["ok"] * 3
    engine.release_dependents()
    handed = engine.claim(3)
    assert ids(handed) == [f"{b}_0", f"{b}_2"] and engine.complete(handed) == ["ok"] * 2
    assert (engine.outcomes(b, 3), engine.status(b), engine.status(a)) == ("131", "failed", "finished")
