"""`Executor`: concurrent.futures over a pilot, on real pilots."""

from __future__ import annotations

import gc
import operator
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import closing
from pathlib import Path

import pytest
from rq.job import Job

from pilotq.broker import Executor, Task
from pilotq.broker.client import executor as executor_module
from pilotq.broker.client.results import Ended, StoredValue
from pilotq.broker.errors import FunctionFailed, InvalidInput, NoPilot, PilotFailed, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.workers.protocol import INLINE_BYTES
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


def test_it_is_an_executor(executor: Executor) -> None:
    assert isinstance(executor, futures.Executor)
    future = executor.submit(functions.product, 6, b=7)
    assert future.result(WAIT_S) == 42 and future.done() and not future.cancel()
    many = [executor.submit(functions.product, n, 2) for n in range(300)]
    done, left = futures.wait(many, timeout=WAIT_S)
    assert not left and sorted(f.result() for f in done) == [2 * n for n in range(300)]
    assert {f.result() for f in futures.as_completed(many, timeout=WAIT_S)} == {2 * n for n in range(300)}
    called: list[int] = []
    future = executor.submit(functions.product, 5)
    future.add_done_callback(lambda f: called.append(f.result()))
    wait_until(lambda: called == [5], what="the callback")


def used_memory(executor: Executor) -> int:
    return int(executor._broker.redis.info("memory")["used_memory"])


def test_results_leave_the_memory_of_the_server(executor: Executor, pilot: LivePilot) -> None:
    """Large ones go to files, and are read when they are asked for; small ones go when they were read."""
    before = used_memory(executor)
    sizes = [*[1_000_000] * 20, *[20_000] * 20, 3_000_000]
    made = [executor.submit(os.urandom, size) for size in sizes]
    assert futures.wait(made, timeout=WAIT_S).not_done == set()
    assert used_memory(executor) - before < 1_000_000
    assert all(isinstance(future._result, StoredValue) for future in made)
    values = [future.result() for future in made]
    assert [len(value) for value in values] == sizes and values == [future.result() for future in made]
    assert all(future.exception() is None for future in made)
    files = list(Path(pilot.pilot.directory, "output").glob("*.result"))
    assert [path.stat().st_size > 3_000_000 for path in files] == [True]
    made[-1], task_of_first = made[0], made[0].task_id
    gc.collect()
    assert not files[0].exists()  # nobody else could have read it
    with pytest.raises(UnknownTask, match="went to its executor"):
        pilot.broker.result(str(task_of_first))
    assert list(executor.map(os.urandom, [3_000] * 500)) and len(list(executor.map(str, range(2000)))) == 2000
    key = keys.completed(executor._name)
    wait_until(lambda: not executor._broker.redis.xlen(key), what="removal of what was read")
    large = pilot.broker.enqueue(Task(function=os.urandom, args=(2_000_000,)))
    assert len(pilot.broker.result(large, timeout=WAIT_S)) == 2_000_000
    assert Job.fetch(large, connection=executor._broker.redis).return_value() is None  # RQ knows no files


def test_what_has_no_room_in_the_server_is_kept_in_files(executor: Executor, pilot: LivePilot) -> None:
    """Of calls that were accepted the results would pass the limit."""
    address = pilot.pilot.connection().admin
    assert address is not None
    with closing(Connection(address)) as admin:
        pilot.pause()
        calls = [Task(function=operator.mul, args=(bytes([n % 256]), 3_000)) for n in range(300)]
        tasks = pilot.broker.enqueue_many(calls)
        made = [executor.submit(operator.mul, [n], 1_500) for n in range(300)]
        long = executor.submit(functions.throw_long, 3_000)
        wait_until(lambda: long.task_id, what="submission")
        limit = used_memory(executor) + 200_000
        admin.call("CONFIG", "SET", "maxmemory", limit)
        try:
            pilot.broker.pause(False)
            assert futures.wait([*made, long], timeout=WAIT_S).not_done == set()
            pilot.broker.wait(tasks, timeout=WAIT_S)
            assert used_memory(executor) < limit + 600_000  # beside ends; the results are 3,000,000 bytes
        finally:
            admin.call("CONFIG", "SET", "maxmemory", 0)
    assert [future.result() for future in made] == [[n] * 1_500 for n in range(300)]
    assert [pilot.broker.result(task) for task in tasks] == [bytes([n % 256] * 3_000) for n in range(300)]
    assert isinstance(long.exception(), ValueError) and len(str(long.exception())) == 3_000


def test_an_exception_has_a_bound(executor: Executor) -> None:
    for size, kind in ((100, ValueError), (100_000, ValueError), (3_000_000, FunctionFailed)):
        before = used_memory(executor)
        error = executor.submit(functions.throw_long, size).exception(WAIT_S)
        assert type(error) is kind and "in throw_long" in str(error.__cause__)
        assert used_memory(executor) - before < 100_000
        assert (len(str(error)) == size) == (kind is ValueError)
        assert len(str(error.__cause__)) < 10_000


def test_a_result_whose_file_is_damaged_or_gone_is_said(executor: Executor, pilot: LivePilot) -> None:
    future = executor.submit(os.urandom, 3_000_000)
    assert futures.wait([future], timeout=WAIT_S).done
    path = Path(pilot.pilot.directory, "output", f"{future.task_id}.1.result")
    os.truncate(path, 1000)
    with pytest.raises(FunctionFailed, match="has 1,000 of its 3,"):
        future.result()
    path.unlink()
    with pytest.raises(FunctionFailed, match="No such file"):
        future.result()
    assert "No such file" in str(future.exception())


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt(), GeneratorExit(), ValueError("no")])
@pytest.mark.parametrize("size", [10, 10_000])
def test_a_result_that_raises_where_it_is_read_fails_its_call_alone(
    executor: Executor, error: BaseException, size: int
) -> None:
    odd, plain = executor.submit(functions.trap, error, size), executor.submit(functions.product, 2)
    if size > INLINE_BYTES:
        odd.add_done_callback(lambda future: future.result())  # in the thread that reads results, which goes on
    with pytest.raises(FunctionFailed if not isinstance(error, KeyboardInterrupt) or size == 10 else KeyboardInterrupt):
        odd.result(WAIT_S)
    assert plain.result(WAIT_S) == 2
    raised = executor.submit(functions.throw_trap, error)
    assert isinstance(raised.exception(WAIT_S), FunctionFailed)
    assert executor.submit(functions.product, 3).result(WAIT_S) == 3


def test_what_others_cancel_or_delete_is_noticed_however_many_wait(
    executor: Executor, pilot: LivePilot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(executor_module, "POLL_S", 0.1)
    mark = tmp_path / "mark"
    wide = executor.options(cores=2)
    many = [wide.submit(functions.wait_for_ever, str(mark)), *(wide.submit(functions.product, n) for n in range(700))]
    wait_until(lambda: many[-1].task_id is not None and mark.exists(), what="submission and start")
    last, alone = many[-1], wide.submit(functions.product, 1)
    wait_until(lambda: alone.task_id is not None, what="a submission of one")
    together = [wide.submit(functions.product, n) for n in range(50)]
    wait_until(lambda: together[-1].task_id is not None, what="submission of a bundle")
    bundle = str(together[-1].task_id).partition("_")[0]
    gone = [alone, *(future for future in together if str(future.task_id).startswith(f"{bundle}_"))]
    try:
        pilot.broker.cancel([str(last.task_id)])
        pilot.broker.redis.delete(keys.job(str(alone.task_id)), keys.job(bundle))
        assert isinstance(last.exception(WAIT_S), futures.CancelledError)
        assert all(isinstance(future.exception(WAIT_S), (UnknownTask, futures.CancelledError)) for future in gone)
    finally:
        for future in [*many, *together]:
            future.cancel()


def test_a_client_that_lags_gets_every_result(tmp_path: Path) -> None:
    """More records end than are kept, and their time is over, while it does not read."""
    with (
        live_pilot(tmp_path, "n1:2", keep_records=20, finished_ttl_s=1, reconcile_s=0.1) as pilot,
        Executor(pilot.pilot.directory) as executor,
    ):
        hold = threading.Event()
        executor.submit(functions.product, 0).add_done_callback(lambda _: hold.wait(WAIT_S))
        many = [executor.submit(functions.product, n) for n in range(1, 400)]
        wait_until(lambda: pilot.broker.counts().finished == 400, what="end of all calls")
        last = str(many[-1].task_id)
        wait_until(lambda: not pilot.broker.redis.exists(keys.job(last)), what="end of its record")
        hold.set()
        assert [future.result(WAIT_S) for future in many] == list(range(1, 400))


def test_map_keeps_the_order_and_takes_chunks(executor: Executor) -> None:
    factor = 3
    assert list(executor.map(lambda a, b: a * b + factor, range(500), range(500), timeout=WAIT_S)) == [
        n * n + 3 for n in range(500)
    ]
    before = executor._broker.counts().total
    assert list(executor.map(functions.product, range(1000), [2] * 1000, chunksize=100)) == [2 * n for n in range(1000)]
    assert executor._broker.counts().total - before == 10
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(functions.product, [1], chunksize=0)


def test_what_a_function_raises_is_raised(executor: Executor) -> None:
    future = executor.submit(functions.throw, KeyError("k"))
    with pytest.raises(KeyError) as caught:
        future.result(WAIT_S)
    assert "in throw" in str(caught.value.__cause__)
    assert isinstance(executor.submit(os._exit, 3).exception(WAIT_S), FunctionFailed)
    with pytest.raises(ZeroDivisionError):
        list(executor.map(functions.divide, [4, 0, 2]))
    with pytest.raises(InvalidInput, match="pickled"):
        executor.submit(functions.product, (n for n in range(3)))


def test_what_cannot_be_submitted_is_said_and_stops_nothing_else(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="options: time_limit must be a number of seconds, not str"):
        executor.options(time_limit="1s")
    with pytest.raises(TypeError, match="takes a function"):
        executor.submit(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a function"):
        executor.map(3, [1])  # type: ignore[arg-type]
    gone = tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        assert "does not exist any more" in str(executor.submit(functions.product, 1).exception(WAIT_S))
    assert executor.submit(functions.product, 6, b=7).result(WAIT_S) == 42


def test_options_ask_for_resources(executor: Executor, pilot: LivePilot) -> None:
    wide = executor.options(cores=2, env={"MINE": "yes"}, name="wide")
    future = wide.submit(functions.observe)
    found = future.result(WAIT_S)
    assert found["mine"] == "yes"
    assert future.task_id is not None
    view = pilot.ended(future.task_id)
    assert (view.cores, view.name) == ("n1[0:1]", "wide")
    # One that never fits fails alone.
    impossible, possible = (
        executor.options(cores=64).submit(functions.product, 1),
        executor.submit(functions.product, 2),
    )
    assert possible.result(WAIT_S) == 2
    with pytest.raises(InvalidInput, match="can never run here"):
        impossible.result(WAIT_S)
    limited = executor.options(time_limit=1).submit(signal.pause)
    assert isinstance(limited.exception(WAIT_S), TimeoutError)


def test_cancel_ends_what_waits_and_what_runs(executor: Executor, pilot: LivePilot, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    wide = executor.options(cores=2)
    running, waiting = wide.submit(functions.wait_for_ever, str(mark)), wide.submit(functions.product, 1)
    wait_until(lambda: mark.exists() and mark.read_text().isdigit(), what="start of the function")
    wait_until(lambda: waiting.task_id, what="submission")
    assert waiting.cancel() and running.cancel() and running.cancel()
    assert futures.wait([running, waiting], timeout=WAIT_S).not_done == set()
    with pytest.raises(futures.CancelledError):
        running.result()
    for future in (running, waiting):
        assert future.task_id is not None
        assert pilot.ended(future.task_id).status == "canceled"
    assert mark.read_text() == "KeyboardInterrupt"
    # Somebody else cancels.
    other = wide.submit(signal.pause)
    wait_until(lambda: other.task_id, what="submission")
    pilot.broker.cancel([str(other.task_id)])
    assert isinstance(other.exception(WAIT_S), futures.CancelledError)


def test_shutdown_waits_or_cancels(pilot: LivePilot, tmp_path: Path) -> None:
    executor = Executor(pilot.pilot.directory)
    many = [executor.submit(functions.product, n) for n in range(50)]
    executor.shutdown()
    assert [f.result(0) for f in many] == list(range(50))
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(functions.product, 1)
    executor = Executor(pilot.pilot.directory)
    mark = tmp_path / "mark"
    runs = executor.submit(functions.wait_for_ever, str(mark))
    wait_until(mark.exists, what="start of the function")
    executor.shutdown(cancel_futures=True)
    assert runs.cancelled()
    pilot.assert_calm()


def test_cancelling_at_shutdown_means_what_was_not_yet_submitted_too(pilot: LivePilot) -> None:
    executor = Executor(pilot.pilot.directory)
    many = [executor.submit(functions.wait_for_ever, "") for _ in range(200)]
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in many)
    pilot.assert_calm()


@pytest.mark.parametrize("block", ["with Executor(nodes='1') as e:", "e = Executor(nodes='1')\nif e:"])
def test_ctrl_c_ends_the_program_and_what_it_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "program.py").write_text(
        "import signal, time\nfrom pilotq.broker import Executor\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{block}\n    futures = [e.submit(time.sleep, 1000) for _ in range(5)]\n"
        "    print('waiting', flush=True)\n    futures[0].result()\n"
    )
    with subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stdout is not None and program.stdout.readline() == "waiting\n"
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=WAIT_S)
        finally:
            program.kill()
    assert program.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt") and errors.count("Traceback") == 1, errors
    assert not list(tmp_path.glob("pilotq-*"))


def run_program(folder: Path, text: str, pilot: LivePilot) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(
        "import os, signal, sys, time\nfrom pilotq.broker import Executor\n"
        f"signal.signal(signal.SIGINT, signal.default_int_handler)\nDIR = {pilot.pilot.directory!r}\n{text}"
    )
    command = [sys.executable, "program.py"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_end_of_a_program_waits_for_what_it_has_submitted(pilot: LivePilot, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(f"def f(n): open({str(tmp_path)!r} + '/ran', 'a').write('x')\n")
    text = (
        "import beside\ne = Executor(DIR)\nf = [e.submit(beside.f, n) for n in range(1000)]\ne.shutdown(wait=False)\n"
    )
    with run_program(tmp_path, text, pilot) as program:
        assert program.communicate(timeout=WAIT_S) == ("", "") and program.returncode == 0
    assert len((tmp_path / "ran").read_text()) == 1000


def test_an_exit_within_the_block_waits_for_what_was_submitted(pilot: LivePilot, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(f"def f(n): open({str(tmp_path)!r} + '/ran', 'a').write('x')\n")
    text = "import beside\nwith Executor(DIR) as e:\n    for n in range(100): e.submit(beside.f, n)\n    sys.exit(5)\n"
    with run_program(tmp_path, text, pilot) as program:
        assert program.communicate(timeout=WAIT_S) == ("", "") and program.returncode == 5
    assert len((tmp_path / "ran").read_text()) == 100


@pytest.mark.parametrize("text", [
    "with Executor(DIR) as e:\n    for n in range(700): e.submit(signal.pause)\n    print('waiting', flush=True)\n",
    "e = Executor(DIR)\nfor n in range(700): e.submit(signal.pause)\ne.shutdown(wait=False)\n"
    "print('waiting', flush=True)\n",
])  # fmt: skip
def test_ctrl_c_while_it_waits_cancels_all(text: str, pilot: LivePilot, tmp_path: Path) -> None:
    before = pilot.broker.counts()
    with run_program(tmp_path, text, pilot) as program:
        try:
            assert program.stdout is not None and program.stdout.readline() == "waiting\n"
            wait_until(lambda: pilot.broker.counts().total == before.total + 700, what="the submission")
            wait_until(pilot.broker.running, what="start of the first ones")
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=WAIT_S)
        finally:
            program.kill()
    assert "KeyboardInterrupt" in errors
    wait_until(lambda: pilot.broker.counts().canceled == before.canceled + 700, what="end of all 700")
    pilot.assert_calm()


def test_a_forked_process_is_told_that_it_needs_its_own(executor: Executor, pilot: LivePilot) -> None:
    open_one = executor.submit(signal.pause)
    wait_until(lambda: open_one.task_id, what="submission")
    here, there = os.pipe()
    pid = os.fork()
    if not pid:
        told = []
        for action in (lambda: executor.submit(id, 1), open_one.result, lambda: executor.shutdown(cancel_futures=True)):
            try:
                action()
                told.append("nothing")
            except RuntimeError as error:
                told.append(f"{type(error).__name__}: {error}")
        os.write(there, "; ".join(told).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(here, 1000).decode() == 2 * (
        f"RuntimeError: this executor belongs to process {os.getpid()}, and this one was forked from it: "
        "make an Executor here; "
    ) + "nothing"  # fmt: skip
    os.close(here)
    os.close(there)
    assert not open_one.done() and open_one.cancel()


def test_a_large_result_that_nobody_wants_any_more_leaves_no_file(
    executor: Executor, pilot: LivePilot, tmp_path: Path
) -> None:
    """A call that is asked to end, and has a result all the same; and one that ended as it was canceled."""
    output, mark = Path(pilot.pilot.directory, "output"), tmp_path / "mark"
    future = executor.submit(functions.large_when_ended, str(mark), 10 * INLINE_BYTES)
    wait_until(mark.exists, what="start of the call")
    (task_id,) = executor._waiting
    pilot.broker.cancel([task_id])
    with pytest.raises(futures.CancelledError):
        future.result(WAIT_S)
    assert not list(output.glob(f"{task_id}.*.result"))
    late = output / "late.1.result"
    late.write_bytes(b"x")
    executor._take([Ended("late", "finished", "", f"file:0:1:{late.name}")])
    assert not late.exists()


def test_a_large_result_of_a_private_pilot_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")  # what the pilot's commands print may be bytes that are not UTF-8
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    with Executor(nodes="1") as executor:
        made = [executor.submit(os.urandom, 10_000_000) for _ in range(2)]
    del executor
    assert [len(future.result()) for future in made] == [10_000_000] * 2
    assert list(folder.glob("pilotq-*"))
    made.clear()
    gc.collect()
    assert not list(folder.glob("pilotq-*"))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_without_a_pilot_it_has_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PILOTQ_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "beside.py").write_text("import os\ndef f(n): return n, len(os.sched_getaffinity(0))\n")
    program = (
        "from pilotq.broker import Executor\nimport beside\n"
        "class Own: pass\n"
        "def main(n): return Own()\n"
        "with Executor(nodes='2') as e:\n"
        "    print(list(e.map(beside.f, range(3))), type(e.submit(main, 1).result()) is Own)\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == "[(0, 1), (1, 1), (2, 1)] True\n", done.stderr
    assert not list(tmp_path.glob("pilotq-*"))
    # Not closed, and not waited for: the program's end does both.
    (tmp_path / "program.py").write_text(program.split("with", maxsplit=1)[0] + (
        "e = Executor(nodes='2')\nf = e.submit(main, 1)\nf.add_done_callback(lambda f: print('done', flush=True))\n"
    ))  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == "done\n", done.stderr
    assert not list(tmp_path.glob("pilotq-*"))
    with pytest.raises(NoPilot):
        Executor(str(tmp_path))
    for nodes in ("no", "", 0):
        with pytest.raises(PilotFailed, match="--nodes"):
            Executor(nodes=nodes)
    with Executor(nodes=1) as executor:
        assert executor.submit(abs, -1).result() == 1


def test_a_pilot_that_was_named_and_has_died_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live_pilot(tmp_path, "n1:1") as pilot:
        copy = tmp_path / "died"
        copy.mkdir(mode=0o700)
        (copy / "server").mkdir()
        shutil.copy(pilot.pilot.path("connection.json"), copy)  # as a supervisor leaves it that was killed
    with pytest.raises(NoPilot, match=f"in {copy} has died: go on with it by `pilotq start --resume {copy}`"):
        Executor(str(copy))
    monkeypatch.setenv("PILOTQ_DIR", str(copy))
    with pytest.raises(NoPilot, match="has died"):
        Executor()


def test_when_the_pilot_is_gone_its_futures_say_so(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as pilot:
        executor = Executor(pilot.pilot.directory)
        runs = executor.submit(signal.pause)
        wait_until(lambda: runs.task_id, what="submission")
    with pytest.raises(PilotFailed, match="is gone"):
        runs.result(WAIT_S)
    executor.shutdown()


def test_importing_the_broker_loads_neither_cloudpickle_nor_rq() -> None:
    code = (
        "import sys\nfrom pilotq.broker import Broker, Executor, Task\n"
        "import pilotq.cli.main, pilotq.cli.commands.enqueue\n"
        "print(sorted({'cloudpickle', 'rq', 'redis', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert done.stdout == "[]\n"
