"""What launches read from the server: the records of several jobs at once."""

from __future__ import annotations

import pytest

from pilotq.broker.errors import PilotFailed
from pilotq.broker.store import keys
from pilotq.broker.store.connection import ReplyError
from pilotq.workers.shared_data import SharedData
from tests.support.engine import Engine, fixtures

engine, server, _ = fixtures


@pytest.fixture
def data(engine: Engine) -> SharedData:
    for number in range(3):
        engine.link.call("HSET", keys.job(f"j{number}"), "data", number)
    return SharedData(engine.link, lambda: None)


def test_what_was_read_ahead_is_given_without_the_server(engine: Engine, data: SharedData) -> None:
    data.read_jobs(["j0", "j1"])
    engine.link.call("DEL", keys.job("j0"), keys.job("j1"))
    assert data.fetch_job("j0") == {b"data": b"0"}
    data.forget_jobs()
    assert data.fetch_job("j2") == {b"data": b"2"}
    with pytest.raises(PilotFailed, match="record of job j1 is gone"):
        data.fetch_job("j1")


def test_one_that_cannot_be_read_costs_the_others_nothing(engine: Engine, data: SharedData) -> None:
    engine.link.call("DEL", keys.job("j1"))
    engine.link.call("SET", keys.job("j1"), "no record")
    data.read_jobs(["j0", "j1", "gone"])
    assert data.fetch_job("j0") == {b"data": b"0"}
    with pytest.raises(ReplyError):
        data.fetch_job("j1")
    with pytest.raises(PilotFailed, match="is gone"):
        data.fetch_job("gone")
