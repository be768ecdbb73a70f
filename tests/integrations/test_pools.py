"""Programs that take an executor, or find one by a name: Dask, joblib, scikit-learn (.ci/run has them)."""

from __future__ import annotations

import importlib
import operator
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import Executor
from tests.support import functions
from tests.support.live_pilot import LivePilot, live_pilot

pytestmark = pytest.mark.timeout(150)
needs_dask = pytest.mark.skipif(find_spec("dask") is None, reason="Dask is not installed")
needs_joblib = pytest.mark.skipif(find_spec("joblib_pilotq") is None, reason="joblib is not installed")


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("pools"), "n1:2") as live:
        yield live


@pytest.fixture
def executor(pilot: LivePilot) -> Iterator[Executor]:
    with Executor(pilot.pilot.directory) as made:
        yield made


@needs_dask
def test_dask_computes_graphs_on_an_executor(executor: Executor, pilot: LivePilot) -> None:
    dask = importlib.import_module("dask")
    numbers = [dask.delayed(operator.mul)(n, n) for n in range(20)]
    before = pilot.broker.counts().total
    assert dask.delayed(sum)(numbers).compute(scheduler=executor) == sum(n * n for n in range(20))
    assert pilot.broker.counts().total > before
    with dask.config.set(scheduler=executor.options(cores=2)):
        [cores] = dask.compute(dask.delayed(os.sched_getaffinity)(0))
    assert len(cores) == 2
    with pytest.raises(ZeroDivisionError):
        dask.delayed(operator.truediv)(1, 0).compute(scheduler=executor)


def parallel(backend: Any, calls: Any, **more: Any) -> list[Any]:
    joblib = importlib.import_module("joblib")
    with joblib.parallel_config(**backend):
        found: list[Any] = joblib.Parallel(**more)(joblib.delayed(fn)(*args) for fn, *args in calls)
    return found


@pytest.fixture
def backend(pilot: LivePilot, executor: Executor) -> dict[str, Any]:
    importlib.import_module("joblib_pilotq")
    return {"backend": "pilotq", "executor": executor}


@needs_joblib
def test_joblib_runs_its_calls_on_a_pilot(pilot: LivePilot, backend: dict[str, Any]) -> None:
    before = pilot.broker.counts().total
    factor = 3
    assert parallel(backend, ((lambda n: n * factor, n) for n in range(500))) == [3 * n for n in range(500)]
    assert 0 < pilot.broker.counts().total - before < 500, "in batches"
    assert parallel(backend, [(functions.product, 6, 7)] * 3, n_jobs=2) == [42] * 3
    assert parallel(backend, [(os.getpid,)] * 3, n_jobs=1) == [os.getpid()] * 3
    with pytest.raises(ZeroDivisionError):
        parallel(backend, ((operator.truediv, 1, n) for n in (1, 0, 2)))
    stream = parallel(backend, ((functions.product, n) for n in range(9)), return_as="generator")
    assert list(stream) == list(range(9))


@needs_joblib
def test_large_arguments_of_joblib_go_by_files_that_do_not_stay(executor: Executor, backend: dict[str, Any]) -> None:
    numpy = importlib.import_module("numpy")
    array, text = numpy.arange(300_000, dtype="float64"), "x" * 2_000_000
    # The same file for all calls; what is read-only there cannot be changed for the others.
    calls = [(lambda a: (float(a.sum()), a.flags.writeable), array)] * 4
    assert parallel(backend, calls) == [(float(array.sum()), False)] * 4
    assert parallel(backend, [(len, text)] * 2) == [len(text)] * 2
    assert not list(Path(executor.directory).glob("joblib-*"))


@needs_joblib
def test_a_grid_search_of_scikit_learn_finds_what_it_finds_in_one_process(backend: dict[str, Any]) -> None:
    joblib = importlib.import_module("joblib")
    datasets, search, svm = (importlib.import_module(f"sklearn.{n}") for n in ("datasets", "model_selection", "svm"))
    x, y = datasets.load_digits(return_X_y=True)
    grid = {"C": [0.1, 1, 10], "gamma": [0.001, 0.01]}

    def best() -> tuple[Any, list[float]]:
        found = search.GridSearchCV(svm.SVC(), grid, cv=3).fit(x[:600], y[:600])
        return found.best_params_, list(found.cv_results_["mean_test_score"])

    alone = best()
    with joblib.parallel_config(**backend):
        assert best() == alone
