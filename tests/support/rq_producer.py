"""Jobs of RQ's own producers, for tests: a client that knows only RQ, and the dispatcher's side without a dispatcher.

A test module takes `client` and `ingest` from `producing`, as it takes `engine` from `tests.support.engine.fixtures`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from rq.job import Job

from pilotq.broker.rq.ingest import RqIngest
from tests.support.engine import SHARED, Engine

CLASS = "default.p0.1c-t300"  # RQ's time limit is 180 s


def work(*args: object) -> object:
    """The function of jobs; nobody calls it here."""
    return args


@pytest.fixture
def client(engine: Engine) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(engine.running.address.url()) as found:
        yield found


@pytest.fixture
def ingest(engine: Engine) -> Iterator[RqIngest]:
    """The dispatcher's ingest, without a dispatcher."""
    found = RqIngest(engine.running.address, engine.store, SHARED)
    found.start(engine.store.term)
    yield found
    found.close()


def route(ingest: RqIngest) -> int:
    """As the dispatcher does after a notification or a poll."""
    ingest.refresh(time.monotonic())
    return ingest.route(lambda _: None)


def text_of(client: redis.Redis, job: Job) -> str:
    result = Job.fetch(job.id, connection=client).latest_result()
    assert result is not None and result.exc_string is not None
    return result.exc_string


producing = (client, ingest)
