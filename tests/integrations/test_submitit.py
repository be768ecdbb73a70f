"""The plugin for submitit, with submitit itself (.ci/run has it)."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_pilot import LivePilot, left_of, live_pilot
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(find_spec("submitit_pilotq") is None, reason="submitit is not installed"),
    pytest.mark.timeout(150),
]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    plugin = importlib.import_module("submitit_pilotq")
    with live_pilot(tmp_path_factory.mktemp("submitit"), "n1:2") as live:
        plugin._Connection.to(live.pilot.directory)  # it stays until the program ends, and is not one test's
        yield live


@pytest.fixture
def executor(pilot: LivePilot, tmp_path: Path) -> Any:
    submitit = importlib.import_module("submitit")
    return submitit.AutoExecutor(folder=tmp_path / "log of %j", cluster="pilotq", pilotq_dir=pilot.pilot.directory)


def shout(text: str) -> str:
    print(text)
    print(text.upper(), file=sys.stderr)
    return text


def nap() -> None:
    threading.Event().wait(WAIT_S)


def ranks() -> tuple[int, int, int]:
    environment = importlib.import_module("submitit").JobEnvironment()
    return environment.global_rank, environment.num_tasks, len(os.sched_getaffinity(0))


class Slow:
    """Counts its executions in the checkpoint; the last one returns."""

    def __init__(self, done: int = 0) -> None:
        self.done = done

    def __call__(self) -> int:
        if self.done < 2:
            nap()  # until the signal
        return self.done

    def checkpoint(self) -> Any:
        return importlib.import_module("submitit").helpers.DelayedSubmission(Slow(self.done + 1))


def test_a_job_returns_its_result_and_keeps_its_logs(executor: Any, pilot: LivePilot) -> None:
    executor.update_parameters(name="shout", timeout_min=2, mem_gb=0.1, cpus_per_task=2, pilotq_priority=5)
    job = executor.submit(shout, "hello")
    assert job.result() == "hello" and job.done()
    wait_until(lambda: job.get_info()["State"] == "COMPLETED", seconds=WAIT_S)
    assert "hello" in job.stdout() and "HELLO" in job.stderr()
    view = pilot.broker.task(job.job_id.partition("-")[0])
    assert (view.name, view.cores) == ("shout", "n1[0:1]")
    assert pickle.loads(pickle.dumps(job)).result() == "hello"


def test_a_failure_has_its_traceback_and_a_job_without_result_its_state(executor: Any) -> None:
    failed, gone = executor.submit(math.sqrt, -1), executor.submit(os._exit, 3)
    with pytest.raises(Exception, match="math domain error"):
        failed.result()
    gone._results_timeout_s = 0
    assert "state: FAILED" in str(gone.exception())


def test_many_are_one_submission(executor: Any) -> None:
    helpers = importlib.import_module("submitit.helpers")
    jobs = executor.map_array(math.gcd, range(10), [6] * 10)
    assert set(helpers.as_completed(jobs, poll_frequency=0.1)) == set(jobs)
    assert [job.result() for job in jobs] == [math.gcd(n, 6) for n in range(10)]
    with executor.batch():
        some = [executor.submit(abs, -n) for n in range(3)]
    assert [job.result() for job in some] == [0, 1, 2]


def test_a_job_has_several_processes(executor: Any) -> None:
    executor.update_parameters(tasks_per_node=2, stderr_to_stdout=True, pilotq_setup=["export WORD=set"])
    job = executor.submit(ranks)
    assert job.results() == [(0, 2, 2), (1, 2, 2)]
    executor.update_parameters(tasks_per_node=1)
    assert executor.submit(os.getenv, "WORD").result() == "set"
    with pytest.raises(ValueError, match="one node of a pilot"):
        executor.update_parameters(nodes=2)


def test_a_job_is_canceled(executor: Any, pilot: LivePilot) -> None:
    job = executor.submit(nap)
    wait_until(lambda: job.get_info()["State"] == "RUNNING", seconds=WAIT_S)
    job.cancel()
    wait_until(lambda: job.done(force_check=True), seconds=WAIT_S)
    assert job.state == "CANCELLED"


def test_a_job_that_comes_to_its_time_limit_goes_on_from_its_checkpoint(executor: Any) -> None:
    executor.update_parameters(pilotq_signal_delay_s=30)
    executor._executor.parameters["timeout_min"] = 0.2  # the signal after 9.6 s
    job = executor.submit(Slow())
    assert job.result() == 2


def test_the_first_process_of_a_job_writes_to_the_files_of_the_task(executor: Any) -> None:
    executor.update_parameters(tasks_per_node=2)
    job = executor.submit(shout, "hello")
    assert job.results() == ["hello", "hello"]
    lines = executor._executor._text(60.0).splitlines()
    first, second = (next(line for line in lines if f"RANK={rank} " in line) for rank in (0, 1))
    assert ">" not in first and ">" in second
    wait_until(lambda: job.get_info()["State"] == "COMPLETED", seconds=WAIT_S)
    assert "hello" in job.stdout() and "HELLO" in job.stderr()
    assert "hello" in job.task(1).stdout()


def test_jobs_are_followed_after_their_pilot_was_resumed(tmp_path: Path) -> None:
    plugin = importlib.import_module("submitit_pilotq")
    submitit = importlib.import_module("submitit")
    directory = str(tmp_path / "pilot")

    def pilotq(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pilotq", *words], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.returncode == 0, done.stderr

    pilotq("start", "--dir", directory, "--nodes", "1")
    try:
        executor = submitit.AutoExecutor(folder=tmp_path / "log", cluster="pilotq", pilotq_dir=directory)
        executor.update_parameters(timeout_min=2)
        job = executor.submit(nap)
        wait_until(lambda: job.get_info()["State"] == "RUNNING", seconds=WAIT_S)
        pilotq("stop", "--dir", directory, "--now")
        pilotq("start", "--resume", directory)
        wait_until(lambda: job.get_info(mode="force")["State"] == "RUNNING", seconds=WAIT_S)
        assert executor.submit(abs, -1).job_id.endswith(executor._executor._connection.mark)
        job.cancel()
        wait_until(lambda: job.get_info(mode="force")["State"] == "CANCELLED", seconds=WAIT_S)
    finally:
        pilotq("stop", "--dir", directory, "--now")
        connection = plugin._connections.pop(executor._executor._connection.mark)
        connection.broker.close()
    assert not left_of(directory)


def test_a_private_pilot_ends_with_the_program(tmp_path: Path) -> None:
    program = (
        "import submitit, math; e = submitit.AutoExecutor(folder='log', cluster='pilotq', pilotq_nodes=1); "
        "print(e.submit(math.factorial, 5).result()); print(e._executor._connection.directory)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    value, directory = done.stdout.split()
    assert value == "120" and not Path(directory).exists() and not left_of(directory)
