"""`Executor`: concurrent.futures over a pilot, on real pilots."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path

import pytest

from pilotq.broker import Executor
from pilotq.broker.client import executor as executor_module
from pilotq.broker.client import results
from pilotq.broker.errors import FunctionFailed, InvalidInput, NoPilot, PilotFailed
from pilotq.broker.store.connection import Connection
from tests.support import functions
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

WAIT_S = 60.0


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("executor"), "n1:2") as live:
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


def test_large_results_are_read_in_portions(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them holds more than its bound, but for one that is larger by itself."""
    monkeypatch.setattr(results, "PORTION_BYTES", 400_000)
    read: list[list[int]] = []

    def fetch(link: Connection, ids: Sequence[str]) -> list[results.Outcome | None]:
        found = results.fetch(link, ids)
        read.append([len(o.value) for o in found if o is not None])
        return found

    monkeypatch.setattr(executor_module, "fetch", fetch)
    sizes = [*[150_000] * 6, 900_000, *[10] * 20]
    made = [executor.submit(os.urandom, size) for size in sizes]
    assert [len(future.result(WAIT_S)) for future in made] == sizes
    cut = results.portions(executor._broker.link, [future.task_id for future in made])  # type: ignore[attr-defined]
    assert [len(part) for part in cut] == [1] * 7 + [20]  # in RQ's encoding 150,000 bytes are 200,000
    assert sorted(size for portion in read for size in portion) == sorted(sizes)
    assert all(sum(portion) <= 400_000 or len(portion) == 1 for portion in read)


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
    with pytest.raises(PilotFailed, match="--nodes"):
        Executor(nodes="no")


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
