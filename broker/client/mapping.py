"""`mapped`: the results of many calls, in order or as they come, for `map` and `starmap` of an executor."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from itertools import chain, islice
from typing import Any

from pilotq.broker.tasks.functions import target_of

BLOCK = 500  # calls that are submitted together, where all are at once
# Submits calls of a function, so many at a time as is said, and gives their futures.
Put = Callable[[Any, Iterator[tuple[Any, ...]], int], "Iterator[futures.Future[Any]]"]


def mapped(
    put: Put,
    fn: Callable[..., Any],
    calls: Iterator[tuple[Any, ...]],
    *,
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
    unordered: bool,
) -> Iterator[Any]:
    """Submit ``fn(*args)`` for each of ``calls`` by ``put``, ``chunksize`` calls as one; yield results, in order or,
    ``unordered``, as they come.

    With ``buffersize`` only so many are submitted ahead of what was yielded. Raises ValueError and TypeError for wrong
    arguments.
    """
    if chunksize < 1:
        raise ValueError("chunksize must be at least 1")
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or at least 1")
    if not callable(fn):
        raise TypeError(f"map takes a function and iterables, not {type(fn).__name__}")
    end_at = None if timeout is None else time.monotonic() + timeout
    if chunksize > 1:
        several = iter(lambda: list(islice(calls, chunksize)), [])
        submitted = put(run_each, ((fn, part) for part in several), 1 if buffersize else BLOCK)
    else:
        submitted = put(target_of(fn), calls, 1 if buffersize else BLOCK)
    found = (_results_as_done if unordered else _results)(deque(islice(submitted, buffersize)), submitted, end_at)
    return chain.from_iterable(found) if chunksize > 1 else found


def run_each(fn: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Several calls as one."""
    return [fn(*args) for args in calls]


def _results(
    made: deque[futures.Future[Any]], more: Iterator[futures.Future[Any]], end_at: float | None
) -> Iterator[Any]:
    try:
        while made:
            made.extend(islice(more, 1))
            yield _take(made.popleft(), _left(end_at))  # without a name: a result that was yielded is not kept
    finally:
        for future in made:
            future.cancel()


def _results_as_done(
    made: deque[futures.Future[Any]], more: Iterator[futures.Future[Any]], end_at: float | None
) -> Iterator[Any]:
    done: queue.SimpleQueue[futures.Future[Any]] = queue.SimpleQueue()
    left: set[futures.Future[Any]] = set()
    try:
        while made or left:
            made.extend(islice(more, 1))
            while made:
                left.add(made[0])
                made.popleft().add_done_callback(done.put)  # without a name: a result that was yielded is not kept
            yield _next(done, left, _left(end_at))
    finally:
        for future in (*made, *left):
            future.cancel()


def _next(done: queue.SimpleQueue[futures.Future[Any]], left: set[futures.Future[Any]], timeout: float | None) -> Any:
    try:
        future = done.get(timeout=timeout)
    except queue.Empty:
        raise futures.TimeoutError from None
    left.discard(future)
    return future.result()


def _left(end_at: float | None) -> float | None:
    return None if end_at is None else max(end_at - time.monotonic(), 0.0)


def _take(future: futures.Future[Any], timeout: float | None) -> Any:
    """The result; a future that has none in time is canceled."""
    try:
        return future.result(timeout)
    except BaseException:
        future.cancel()
        raise
