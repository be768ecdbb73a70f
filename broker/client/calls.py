"""`Calls`: the calls that an executor and its `Options` take, and the tasks that these come to.

A call may have futures among its arguments. It is packed when they are done, with their results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from pilotq.broker.client.mapping import mapped
from pilotq.broker.client.resource_dict import task_of
from pilotq.broker.tasks.functions import pack_call
from pilotq.broker.tasks.model import Task

if TYPE_CHECKING:
    from pilotq.broker.client.executor import TaskFuture


class PackedCall(NamedTuple):
    """A call whose task is like ``base``."""

    base: Task
    payload: bytes  # made by functions.pack_call


class Waiting(NamedTuple):
    """A call that waited for the futures among its arguments; ``make`` packs it, or raises what one of these has."""

    future: TaskFuture
    make: Callable[[], PackedCall]


class Calls(futures.Executor):
    """What an executor and its `Options` have in common: calls whose tasks are as ``_base``."""

    _base: Task
    _max_workers: int  # how many of its calls can run at once; Dask and joblib read it
    # Not None: the argument ``resource_dict`` of a call is not the function's, but executorlib's; on top of these.
    _resources: Mapping[str, Any] | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TaskFuture:
        """Run ``fn(*args, **kwargs)`` as one task. Raises InvalidInput when the call cannot be pickled.

        A future that is an argument, or in a list, tuple or dict that is one, stands for its result: the call is
        submitted when it is done, and fails as it fails.
        """
        if not callable(fn):
            raise TypeError(f"submit takes a function and its arguments, not {type(fn).__name__}")
        base = self._base
        if self._resources is not None and "resource_dict" in kwargs:
            base = task_of(base, {**self._resources, **kwargs.pop("resource_dict")})
        return self._call(base, fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        unordered: bool = False,
    ) -> Iterator[Any]:
        """Results in order, or with ``unordered`` as they come; one task for ``chunksize`` calls.

        The rest is canceled when one raises, or after ``timeout`` seconds (TimeoutError). With ``buffersize`` at most
        so many tasks are ahead of the results that were taken, and the iterables are read as they are needed; else they
        are read, and submitted, at once.
        """
        calls = zip(*iterables, strict=False)
        return mapped(
            self._put_calls, fn, calls, timeout=timeout, chunksize=chunksize, buffersize=buffersize, unordered=unordered
        )  # fmt: skip

    def starmap(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        unordered: bool = False,
    ) -> Iterator[Any]:
        """As `map`, of ``fn(*args)`` for each ``args`` of the iterable."""
        calls = map(tuple, iterable)
        return mapped(
            self._put_calls, fn, calls, timeout=timeout, chunksize=chunksize, buffersize=buffersize, unordered=unordered
        )  # fmt: skip

    def _put_calls(self, fn: Any, calls: Iterator[tuple[Any, ...]], most: int) -> Iterator[TaskFuture]:
        while part := list(islice(calls, most)):
            if any(map(_futures_in, part)):
                yield from (self._call(self._base, fn, args, {}) for args in part)
            else:
                yield from self._put([PackedCall(self._base, pack_call(fn, args, {})) for args in part])

    def _call(self, base: Task, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskFuture:
        if waited := _futures_in((*args, *kwargs.values())):

            def made() -> PackedCall:
                given = [_with_results(value) for value in args]
                named = {name: _with_results(value) for name, value in kwargs.items()}
                return PackedCall(base, pack_call(fn, given, named))

            return self._put_after(waited, made)
        return self._put([PackedCall(base, pack_call(fn, args, kwargs))])[0]

    def _put(self, calls: list[PackedCall]) -> list[TaskFuture]:
        raise NotImplementedError

    def _put_after(self, waited: Sequence[futures.Future[Any]], make: Callable[[], PackedCall]) -> TaskFuture:
        raise NotImplementedError


def _futures_in(values: Iterable[Any]) -> list[futures.Future[Any]]:
    found: list[futures.Future[Any]] = []
    for value in values:
        kind = type(value)
        if isinstance(value, futures.Future):
            found.append(value)
        elif kind is list or kind is tuple or kind is dict:
            parts = value.values() if kind is dict else value
            found += [part for part in parts if isinstance(part, futures.Future)]
    return found


def _with_results(value: Any) -> Any:
    """The value with the results of the futures that `_futures_in` finds in it."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(map(_result, value))
    if kind is dict:
        return {name: _result(part) for name, part in value.items()}
    return _result(value)


def _result(value: Any) -> Any:
    return value.result() if isinstance(value, futures.Future) else value


def when_done(waited: Iterable[futures.Future[Any]], action: Callable[[], None]) -> None:
    """Call ``action`` once, when the last of the futures is done: at once, or in the thread that does that."""
    left, lock = set(waited), threading.Lock()

    def ended(future: futures.Future[Any]) -> None:
        with lock:
            left.discard(future)
            last = not left
        if last:
            action()

    for future in list(left):
        future.add_done_callback(ended)
