"""Lists of tasks while these move: nothing is left out, and nothing is there twice."""

from __future__ import annotations

from pilotq.broker.client.queries import TaskQueries
from tests.support.engine import Engine, fixtures, task

engine, server, node = fixtures


def test_a_task_that_starts_while_they_are_listed_is_listed_once(engine: Engine) -> None:
    first, second, third = engine.submit(task(), task(), task())
    engine.claim(1)
    listing = TaskQueries(engine.link, None).tasks(None, 10)
    assert next(listing).id == first
    engine.claim(1)
    assert sorted(view.id for view in listing) == [second, third]


def test_a_task_that_ends_while_they_are_listed_is_listed_once(engine: Engine) -> None:
    first, second, third = engine.submit(task(), task(), task())
    handed = engine.claim(1)
    listing = TaskQueries(engine.link, None).tasks(None, 10)
    assert next(listing).id == first
    engine.complete([*handed, *engine.claim(1)])
    assert sorted(view.id for view in listing) == [second, third]
