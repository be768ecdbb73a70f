"""joblib's backend `pilotq`: calls of `Parallel` are tasks of a pilot. Importing this module makes it known to joblib.

    import joblib, joblib_pilotq
    with joblib.parallel_config(backend="pilotq"):
        joblib.Parallel()(joblib.delayed(f)(x) for x in xs)

A call has at most 1 MiB in a pilot: large arrays, and what is too large with all of them taken out, go by files in the
pilot's directory, which all of its nodes see.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent import futures
from typing import Any

import cloudpickle
from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)
from joblib.parallel import register_parallel_backend

from pilotq.broker import Executor
from pilotq.broker.errors import PilotFailed

ARRAY_BYTES = 1 << 17  # an array of so many bytes goes by a file, once for all calls of one Parallel
CALL_BYTES = 900_000  # as does a pickle of so many
_executors: dict[
    tuple[str | None, str | None, int], Executor
] = {}  # until the program ends: a pilot takes a second to start


class PilotqBackend(AutoBatchingMixin, ParallelBackendBase):
    """Runs batches of calls on the pilot of ``dir`` or the one that runs here, else on a private one with ``nodes``.

    ``executor``: one of yours, for example `Executor.options(cores=4)`.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(
        self,
        nesting_level: int | None = None,
        *,
        dir: str | None = None,
        nodes: int | str | None = None,
        executor: futures.Executor | None = None,
        **backend_kwargs: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, **backend_kwargs)
        self._key = (dir, None if nodes is None else str(nodes), os.getpid())
        self._given = executor
        self._arguments: _Arguments | None = None
        self._open: set[futures.Future[Any]] = set()

    def _executor(self) -> Any:
        if self._given is not None:
            return self._given
        if self._key not in _executors:
            directory, nodes, _ = self._key
            _executors[self._key] = Executor(directory, nodes=nodes)
        return _executors[self._key]

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """``n_jobs``; of negative ones -1 means all cores of the pilot, -2 all but one."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(self._executor()._max_workers + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Begin a call of Parallel."""
        number = self.effective_n_jobs(n_jobs)
        if number == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._arguments = _Arguments(self._executor().directory)
        return number

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None = None) -> futures.Future[Any]:
        """Submit a batch of calls as one task."""
        assert self._arguments is not None, "configure comes first"
        future: futures.Future[Any] = self._executor().submit(_run, self._arguments.pack(func))
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: futures.Future[Any]) -> Any:
        """What a batch has returned."""
        try:
            return out.result()
        except PilotFailed:
            _executors.pop(self._key, None)  # the next call of Parallel has a new one
            raise

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002  # it is always ready
        """Cancel what has not ended: one call has failed."""
        for future in list(self._open):
            future.cancel()

    def terminate(self) -> None:
        """End a call of Parallel. The pilot stays for the next one."""
        arguments, self._arguments = self._arguments, None
        if arguments is not None:
            arguments.remove()
        self.reset_batch_stats()


class _Arguments:
    """The pickles of one Parallel's batches, and the files that they refer to."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._folder: str | None = None
        self._files: dict[int, tuple[Any, str]] = {}  # by the identity of an array, which stays with its array

    def pack(self, func: Any) -> bytes | str:
        """The pickle, or the path of the file that holds it."""
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(func)
        if buffer.tell() < CALL_BYTES:
            return buffer.getvalue()
        path = self._new_file(".pickle")
        with open(path, "wb") as file:
            file.write(buffer.getbuffer())
        return path

    def file_of(self, array: Any) -> str:
        """The file of an array, which is written with its first call."""
        if id(array) not in self._files:
            import numpy as np

            path = self._new_file(".npy")
            np.save(path, array, allow_pickle=False)
            self._files[id(array)] = (array, path)
        return self._files[id(array)][1]

    def _new_file(self, suffix: str) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="joblib-", dir=self._directory)
        descriptor, path = tempfile.mkstemp(suffix, dir=self._folder)
        os.close(descriptor)
        return path

    def remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Pickler(cloudpickle.Pickler):
    """Pickles functions by value where they have no name, and large arrays by their files."""

    def __init__(self, file: io.BytesIO, arguments: _Arguments) -> None:
        super().__init__(file)
        self._arguments = arguments

    def reducer_override(self, obj: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and type(obj) is numpy.ndarray and obj.nbytes >= ARRAY_BYTES and not obj.dtype.hasobject:
            return _load_array, (self._arguments.file_of(obj),)
        return super().reducer_override(obj)


def _load_array(path: str) -> Any:
    import numpy as np

    return np.load(path, mmap_mode="r")


def _run(packed: bytes | str) -> Any:
    if isinstance(packed, bytes):
        return pickle.loads(packed)()  # noqa: S301  # what the user's own program has made
    with open(packed, "rb") as file:
        return pickle.load(file)()  # noqa: S301


register_parallel_backend("pilotq", PilotqBackend)
