"""One turn of the dispatcher: what it takes from its lists, and gives back when another one has taken over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pilotq.broker.errors import Superseded
from pilotq.broker.scheduling.dispatcher import Dispatcher
from pilotq.broker.store import keys
from pilotq.broker.store.messages import ControlChanged
from pilotq.broker.store.store import pack
from tests.support.engine import QUEUE_ID, Engine, fixtures

engine, server, node = fixtures


@pytest.fixture
def dispatcher(engine: Engine) -> Iterator[Dispatcher]:
    found = Dispatcher(engine.running.address, QUEUE_ID, engine.settings)
    found._take_over()
    while any(lengths(engine)):
        found._turn()
    engine.link.call("RPUSH", keys.EVENTS, pack(ControlChanged()))
    engine.link.call("RPUSH", keys.WAKEUP, "1")
    yield found
    found.close()


def lengths(engine: Engine) -> list[int]:
    return list(engine.link.pipeline([("LLEN", keys.EVENTS), ("LLEN", keys.WAKEUP)]))


def test_a_wake_up_that_comes_with_an_event_takes_no_turn_of_its_own(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher._turn()
    assert lengths(engine) == [0, 0] and dispatcher.heads_current


def test_what_was_taken_is_given_back_to_the_one_that_has_taken_over(engine: Engine, dispatcher: Dispatcher) -> None:
    engine.link.call("INCR", keys.TERM)
    with pytest.raises(Superseded):
        dispatcher._turn()
    assert lengths(engine) == [1, 1]


def test_a_wake_up_alone_releases_what_waits_for_that(engine: Engine, dispatcher: Dispatcher) -> None:
    engine.link.call("DEL", keys.EVENTS)
    engine.link.call("RPUSH", keys.RELEASE, "k:nobody")
    dispatcher._turn()
    assert not engine.link.call("EXISTS", keys.RELEASE)


def test_commands_that_are_sent_with_a_script_are_answered_where_that_had_to_be_loaded(engine: Engine) -> None:
    engine.admin.call("FUNCTION", "FLUSH")
    engine.store.take_term()
    assert engine.store.release_dependents(5, ("ECHO", "here")) == (0, 0, [b"here"])
