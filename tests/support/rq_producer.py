"""Jobs of RQ's own producers, for tests: a client that knows only RQ, and the dispatcher's side without a dispatcher.

A test module takes `client` and `inbound` from `producing`, as it takes `engine` from `tests.support.engine.fixtures`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from rq.job import Job

from pilotq.broker.rq.ingest import Inbound
from tests.support.engine import SHARED, Engine

CLASS = "default.p0.1c-t300"  # RQ's time limit is 180 s


def work(*args: object) -> object:
    """What jobs are to call; nobody does so here."""
    return args


@pytest.fixture
def client(engine: Engine) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(engine.running.address.url()) as found:
        yield found


@pytest.fixture
def inbound(engine: Engine) -> Iterator[Inbound]:
    """The dispatcher's, without a dispatcher."""
    found = Inbound(engine.running.address, engine.store, SHARED)
    found.begin(engine.store.term)
    yield found
    found.close()


def route(inbound: Inbound) -> int:
    """As the dispatcher does after a word or a look."""
    inbound.look(time.monotonic())
    return inbound.route(lambda _: None)


def text_of(client: redis.Redis, job: Job) -> str:
    result = Job.fetch(job.id, connection=client).latest_result()
    assert result is not None and result.exc_string is not None
    return result.exc_string


producing = (client, inbound)
