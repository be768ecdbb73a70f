"""`Executor`: what it has beyond `submit` and `map` for programs of other pools."""

from __future__ import annotations

import operator
import os
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
from rq.job import Job

from pilotq.broker import Executor
from pilotq.broker.errors import InvalidInput
from tests.support import functions
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

WAIT_S = 60.0


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("executor"), "n1:2") as live:
        live.broker.redis.ping()  # its connection is not one test's
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


def test_results_come_as_their_calls_end(executor: Executor, tmp_path: Path) -> None:
    go = tmp_path / "go"
    results = executor.map(functions.wait_for, [str(go), ""], unordered=True)
    assert next(results) == ""
    go.touch()
    assert list(results) == [str(go)]
    numbers = executor.starmap(functions.product, [(n, 1) for n in range(9)], 2, buffersize=2, unordered=True)
    assert sorted(numbers) == list(range(9))
    assert sorted(executor.map(functions.product, range(9), chunksize=4, unordered=True)) == list(range(9))
    with pytest.raises(futures.TimeoutError):
        list(executor.map(functions.wait_for, [str(tmp_path / "never")], timeout=0.1, unordered=True))


@pytest.mark.parametrize("lock", ["held", "lost"])
def test_an_interrupt_at_a_bad_moment_leaves_no_lock_and_is_an_interrupt(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """As Python's own code does where Ctrl-C comes while a lock changes hands."""

    def interrupted(future: futures.Future[Any], _: float | None = None) -> None:
        future._condition.acquire()
        try:
            raise KeyboardInterrupt
        finally:
            if lock == "lost":
                future._condition.release()
                future._condition.release()

    future = executor.submit(functions.product, 1)
    for name in ("result", "exception"):
        with monkeypatch.context() as patch:
            patch.setattr(futures.Future, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                getattr(future, name)()
    assert future.result(WAIT_S) == 1
    other = threading.Thread(target=future.cancelled, daemon=True)
    other.start()
    other.join(WAIT_S)
    assert not other.is_alive()


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


def test_calls_that_are_alike_share_a_record_and_keep_their_order(executor: Executor) -> None:
    made = [executor.submit(functions.product, n, 3) for n in range(1500)]
    assert [future.result(WAIT_S) for future in made] == [3 * n for n in range(1500)]
    bundles = {str(future.task_id).partition("_")[0] for future in made}
    assert len(bundles) < 1000 and any("_" in str(future.task_id) for future in made)
    mixed = [executor.options(name=f"n{n % 2}").submit(functions.product, n) for n in range(20)]
    assert [future.result(WAIT_S) for future in mixed] == list(range(20))


@pytest.mark.parametrize("way", ["killed", "exited"])
def test_an_interpreter_that_dies_amid_calls_fails_only_the_one_that_ran(
    executor: Executor, tmp_path: Path, way: str
) -> None:
    file, victim = tmp_path / "calls", 170
    made = [executor.submit(functions.note_and_die, str(file), n, victim, way) for n in range(300)]
    assert futures.wait(made, timeout=WAIT_S).not_done == set()
    assert "interpreter" in str(made[victim].exception()) or "signal" in str(made[victim].exception()).lower()
    assert [future.result() for n, future in enumerate(made) if n != victim] == [n for n in range(300) if n != victim]
    assert sorted(map(int, file.read_text().split())) == list(range(300)), "each began once"


def test_a_time_limit_amid_calls_ends_the_one_that_ran(executor: Executor) -> None:
    limited = executor.options(time_limit=5.0)
    made = [limited.submit(functions.use_memory, 0, 60.0 if n == 60 else 0.0) for n in range(120)]
    assert isinstance(made[60].exception(WAIT_S), TimeoutError)
    assert [future.result(WAIT_S) for n, future in enumerate(made) if n != 60] == [0] * 119


def test_a_cancel_amid_calls_ends_the_one_that_ran(executor: Executor, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    made: list[futures.Future[Any]] = [executor.submit(functions.product, n) for n in range(60)]
    made.append(executor.submit(functions.wait_for_ever, str(mark)))
    made += [executor.submit(functions.product, n) for n in range(60)]
    wait_until(mark.exists, what="the call that does not end")
    assert made[60].cancel()
    rest = [future for n, future in enumerate(made) if n != 60]
    assert [future.result(WAIT_S) for future in rest] == 2 * list(range(60))
    wait_until(lambda: mark.read_text() == "KeyboardInterrupt", what="the interrupt")


def test_a_result_behind_which_a_long_call_runs_comes_at_once(executor: Executor, tmp_path: Path) -> None:
    """On each core a call that does not end has others behind it and in front of it."""
    marks = [str(tmp_path / name) for name in "ab"]
    many = [executor.submit(functions.product, n) for n in range(400)]
    long = [executor.submit(functions.wait_for_ever, mark) for mark in marks]
    behind = [executor.submit(functions.product, n) for n in range(50)]
    assert [future.result(WAIT_S) for future in many] == list(range(400))
    for future in long:
        future.cancel()
    assert [future.result(WAIT_S) for future in behind] == list(range(50))


def test_calls_of_one_executor_differ_in_what_they_ask_for_and_keep_it(executor: Executor) -> None:
    wide, variables = executor.options(cores=2), executor.options(env={"MINE": "yes"})
    cores = [(wide if n % 2 else executor).submit(os.sched_getaffinity, 0) for n in range(40)]
    mine = [(variables if n % 2 else executor).submit(os.getenv, "MINE") for n in range(40)]
    assert [len(future.result(WAIT_S)) for future in cores] == [1, 2] * 20
    assert [future.result(WAIT_S) for future in mine] == [None, "yes"] * 20


def test_calls_note_something_in_their_jobs(executor: Executor, pilot: LivePilot) -> None:
    made = [executor.submit(functions.note, f"word {n}") for n in range(10)]
    assert [future.result(WAIT_S) for future in made] == [future.task_id for future in made]
    jobs = [Job.fetch(str(future.task_id), connection=pilot.broker.redis) for future in made]
    assert [job.get_meta()["word"] for job in jobs] == [f"word {n}" for n in range(10)]


def test_a_callback_that_exits_does_not_end_the_executor(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    future = executor.submit(functions.product, 1)
    future.add_done_callback(lambda _: sys.exit(3))
    assert executor.submit(functions.product, 2).result(WAIT_S) == 2 and future.result(WAIT_S) == 1
    wait_until(lambda: "exception calling callback" in caplog.text, what="the word of it")
