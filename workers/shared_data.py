"""Reads what launches need from the server beyond the task itself: submit contexts, values, jobs, nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from pilotq.broker.errors import PilotFailed, ServerUnavailable
from pilotq.broker.os_strings import UNREADABLE
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Connection, ReplyError
from pilotq.broker.store.registry import decode_nodes
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.value_blocks import BLOCK, read_block
from pilotq.broker.tasks.submit_context import SubmitContext

RETRY_S = 0.4  # no attempt for so long after one that failed
_shared = msgspec.msgpack.Decoder(SubmitContext)


class SharedData:
    """Reads over ``connection``, which is the session's; ``limit_timeouts`` is called before each read.

    Each `fetch` may wait for the server up to the timeout of the connection, and raises ServerUnavailable when it does
    not answer::

        session.shared_data.fetch_value(array, 17)
    """

    def __init__(self, connection: Connection, limit_timeouts: Callable[[], None]) -> None:
        self._connection = connection
        self._limit_timeouts = limit_timeouts
        self._retry_at = 0.0  # monotonic
        self._fetch_shared = lru_cache(maxsize=256)(self._read_shared)
        self._fetch_block = lru_cache(maxsize=16)(self._read_block)
        self._jobs: dict[str, list[bytes]] = {}  # records that were read before they are asked for

    def end_pause(self) -> None:
        """The server answers again: the next read needs not wait until the pause after a failure is over."""
        self._retry_at = 0.0

    def fetch_nodes(self, names: tuple[str, ...]) -> dict[str, NodeInfo]:
        """Those of these nodes that are registered."""
        return {info.name: info for info in decode_nodes(self._fetch("HMGET", keys.NODES, *names))}

    def fetch_shared(self, key: str) -> SubmitContext:
        """The context of a submission; cached."""
        return self._fetch_shared(key)

    def fetch_value(self, array: str, position: int) -> bytes:
        """The value of an array's element; read in blocks of 1,000 and cached (a few blocks)."""
        block = self._fetch_block(array, position // BLOCK)
        if not 0 <= position % BLOCK < len(block):
            raise PilotFailed(f"array {array} has no value at position {position}: its record is damaged")
        return block[position % BLOCK]

    def read_jobs(self, ids: Sequence[str]) -> None:
        """Read the records of these jobs in one round trip; `fetch_job` gives them until `forget_jobs`."""
        try:
            records = self._ask(lambda: self._connection.pipeline([("HGETALL", keys.job(i)) for i in ids]))
        except ReplyError:
            return  # one of them cannot be read: `fetch_job` says which
        self._jobs = dict(zip(ids, records, strict=True))

    def forget_jobs(self) -> None:
        self._jobs.clear()

    def fetch_job(self, task_id: str) -> dict[bytes, bytes]:
        """The record of a job as it stands."""
        flat = self._jobs.pop(task_id, None)
        if flat is None:
            flat = self._fetch("HGETALL", keys.job(task_id))
        if not flat:
            raise PilotFailed(f"the record of job {task_id} is gone")
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def _fetch(self, *command: Argument) -> Any:
        return self._ask(lambda: self._connection.call(*command))

    def _ask(self, ask: Callable[[], Any]) -> Any:
        """Each attempt blocks the worker, and many launches may need one: after a failure there is a pause."""
        if time.monotonic() < self._retry_at:
            raise ServerUnavailable(f"the server at {self._connection.address} did not answer a moment ago")
        self._limit_timeouts()
        try:
            return ask()
        except ServerUnavailable:
            self._retry_at = time.monotonic() + RETRY_S
            raise

    def _read_shared(self, key: str) -> SubmitContext:
        data = self._fetch("GET", keys.shared(key))
        if data is None:
            raise PilotFailed(f"the context {key} of a submission is gone")
        try:
            return _shared.decode(data)
        except UNREADABLE as error:
            raise PilotFailed(f"the context {key} of its submission is damaged: {error}") from None

    def _read_block(self, array: str, block: int) -> list[bytes]:
        return read_block(array, self._fetch("HGET", keys.values(array), block))
