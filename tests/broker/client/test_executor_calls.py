"""`Executor`: what it has beyond `submit` and `map` for programs of other pools."""

from __future__ import annotations

import os
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
        where = executor.submit(os.getcwd, resource_dict={"cwd": "/", "cores": 1})
        assert where.result(WAIT_S) == "/"
        for wrong, words in ({"cores": 2}, "MPI ranks"), ({"slurm_cmd_args": []}, "slurm_cmd_args has no meaning"):
            with pytest.raises(InvalidInput, match=words):
                executor.submit(os.getcwd, resource_dict=wrong)
    with Executor(pilot.pilot.directory) as plain:  # there it is an argument like any other
        assert plain.submit(dict, resource_dict=1).result(WAIT_S) == {"resource_dict": 1}
