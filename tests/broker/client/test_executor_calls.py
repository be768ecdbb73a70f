"""`Executor`: what it has beyond `submit` and `map` for programs of other pools."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator
from concurrent import futures

import pytest

from pilotq.broker import Executor
from pilotq.broker.errors import InvalidInput
from tests.support import functions
from tests.support.live_pilot import LivePilot, live_pilot

WAIT_S = 60.0


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("executor"), "n1:2") as live:
        yield live


@pytest.fixture
def executor(pilot: LivePilot) -> Iterator[Executor]:
    with Executor(pilot.pilot.directory) as made:
        yield made


def test_map_with_a_buffer_reads_and_submits_as_results_are_taken(executor: Executor) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            read.append(number)
            yield number

    results = executor.map(functions.product, numbers(), numbers(), buffersize=3)
    assert len(read) == 6
    assert next(results) == 0 and len(read) == 8
    assert list(results) == [n * n for n in range(1, 20)]
    assert list(executor.map(functions.product, range(5), buffersize=2, chunksize=2)) == list(range(5))
    assert list(executor.map(functions.product, [], buffersize=2)) == []
    with pytest.raises(TypeError):
        executor.map(functions.product, [1], buffersize="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffersize"):
        executor.map(functions.product, [1], buffersize=0)


def test_starmap_takes_the_arguments_of_each_call_together(executor: Executor) -> None:
    pairs = [(n, n + 1) for n in range(7)]
    expected = [a * b for a, b in pairs]
    assert list(executor.starmap(functions.product, pairs)) == expected
    assert list(executor.options(cores=2).starmap(functions.product, pairs, chunksize=3, buffersize=1)) == expected
    with pytest.raises(TypeError):
        executor.starmap(functions.product, [1])  # type: ignore[list-item]


def test_it_says_how_many_calls_run_at_once(executor: Executor) -> None:
    """As those of the standard library do; Dask and joblib read it."""
    assert executor._max_workers == 2
    wide = executor.options(cores=2)
    assert isinstance(wide, futures.Executor) and wide._max_workers == 1
    assert wide.directory == executor.directory and os.path.isfile(os.path.join(executor.directory, "connection.json"))


def test_executors_with_a_resource_dict_take_that_of_a_call(pilot: LivePilot) -> None:
    with Executor(pilot.pilot.directory, resource_dict={"threads_per_core": 2}) as executor:
        assert len(executor.submit(os.sched_getaffinity, 0).result(WAIT_S)) == 2
        one = executor.submit(os.sched_getaffinity, 0, resource_dict={"threads_per_core": 1, "run_time_max": 60})
        assert len(one.result(WAIT_S)) == 1
        defaults = {"cores": 1, "gpus_per_core": 0, "openmpi_oversubscribe": False, "slurm_cmd_args": []}
        where = executor.submit(os.getcwd, resource_dict={"cwd": "/", **defaults})
        assert where.result(WAIT_S) == "/"
        for wrong, words in ({"cores": 2}, "MPI ranks"), ({"slurm_cmd_args": ["-x"]}, "slurm_cmd_args has no meaning"):
            with pytest.raises(InvalidInput, match=words):
                executor.submit(os.getcwd, resource_dict=wrong)
    with Executor(pilot.pilot.directory) as plain:  # there it is an argument like any other
        assert plain.submit(dict, resource_dict=1).result(WAIT_S) == {"resource_dict": 1}


def test_futures_among_the_arguments_stand_for_their_results(executor: Executor, pilot: LivePilot) -> None:
    one = executor.submit(functions.product, 2, 3)
    two = executor.options(cores=2).submit(functions.product, one, one)
    many = [executor.submit(functions.product, n, two) for n in range(3)]
    assert executor.submit(sum, many).result(WAIT_S) == 3 * 36
    named = executor.submit(dict, first=one, more={"b": two}, rest=(1, two))
    assert named.result(WAIT_S) == {"first": 6, "more": {"b": 36}, "rest": (1, 36)}
    assert list(executor.map(functions.product, many, [one] * 3)) == [0, 216, 432]
    assert executor.submit(functions.product, executor.submit(bytes, 5000), 2).result(WAIT_S) == bytes(10_000)
    with futures.ThreadPoolExecutor(1) as threads:
        assert executor.submit(abs, threads.submit(int, "-7")).result(WAIT_S) == 7


def test_a_call_that_waits_for_another_one_ends_as_that_does(pilot: LivePilot) -> None:
    held: futures.Future[int] = futures.Future()
    with Executor(pilot.pilot.directory) as executor:
        failed = executor.submit(operator.truediv, 1, 0)
        for _ in range(500):  # longer than Python's stack
            failed = executor.submit(abs, failed)
        with pytest.raises(ZeroDivisionError):
            failed.result(WAIT_S)
        odd = executor.submit(abs, executor.submit(threading.Lock))
        assert "pickle" in str(odd.exception(WAIT_S))
        waits, given_up = executor.submit(abs, held), executor.submit(abs, held)
        last = executor.submit(abs, given_up)
        assert given_up.cancel()
        with pytest.raises(futures.CancelledError):
            last.result(WAIT_S)
        executor.shutdown(wait=False)
        assert not waits.done()
        held.set_result(-4)
        assert waits.result(WAIT_S) == 4 and given_up.cancelled()
    held = futures.Future()
    with Executor(pilot.pilot.directory) as executor:
        waits = executor.submit(abs, held)
        executor.shutdown(cancel_futures=True)
        assert waits.cancelled()
    held.set_result(1)
