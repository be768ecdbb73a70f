"""QCG-PilotJob's executor interface on a real pilot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.qcg import BasicTemplate, QCGPJExecutor, QCGPJFuture, QCGPJTemplate, errors, manager
from tests.support.live_pilot import left_of
from tests.support.waiting import wait_until

LONG = 60.0


class Script(QCGPJTemplate):
    @staticmethod
    def template() -> tuple[str, dict[str, Any]]:
        return (
            """
            {
                'name': '${name}',
                'execution': { 'script': '''${script}''', 'stdout': '${name}.out' }
            }
        """,
            {"script": "true"},
        )


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QCGPJExecutor]:
    wd = tmp_path_factory.mktemp("executor")
    with QCGPJExecutor(wd=str(wd), resources=4, log_level="debug") as executor:
        yield executor
    assert executor.finished and not left_of(str(wd))
    executor.shutdown()
    assert (wd / "api.log").exists()


@pytest.fixture
def wd(executor: QCGPJExecutor) -> Path:
    return Path(executor.qcgpj_manager.system_status()["System"]["Wd"])


def gated(executor: QCGPJExecutor, wd: Path, name: str) -> tuple[QCGPJFuture, Path]:
    """A task that ends when the file is there."""
    gate = wd / f"{name}.gate"
    script = f"until [ -e {gate} ]; do sleep 0.02; done"
    return executor.submit(Script.template, name=name, script=script), gate


def test_a_basic_task(executor: QCGPJExecutor, wd: Path) -> None:
    future = executor.submit(BasicTemplate.template, name="env", exec="env", stdout="env.out")
    assert future.result() == {"env": "SUCCEED"} and future.ids == ["env"]
    assert future.done() and not future.running() and not future.cancelled() and future.exception() is None
    assert "QCG_PM_EXEC_API_JOB_ID=env\n" in (wd / "env.out").read_text()


def test_variables_of_a_template(executor: QCGPJExecutor, wd: Path) -> None:
    first = executor.submit(
        BasicTemplate.template, {"name": "no", "exec": "echo", "args": ["a"]}, None, {"args": ["b"]}, name="words"
    )
    assert first.result() == {"words": "SUCCEED"} and (wd / "stdout").read_text() == "b\n"
    text = "{'name': 'plain', 'execution': {'exec': 'echo', 'args': ['${what}'], 'stdout': 'plain.out'}}"
    assert executor.submit(lambda: text, what="x").result() == {"plain": "SUCCEED"}
    assert (wd / "plain.out").read_text() == "x\n"
    with pytest.raises(KeyError):
        executor.submit(lambda: text)
    with pytest.raises(errors.ConnectionError, match="Request failed - "):
        executor.submit(lambda: text, what="x")
    with pytest.raises(errors.InvalidJobDescriptionError):
        executor.submit(lambda: "{'name': 'n', 'execution': {}}")


def test_a_script_gets_its_variable_too(executor: QCGPJExecutor, wd: Path) -> None:
    executor.submit(Script.template, name="script", script="echo $QCG_PM_EXEC_API_JOB_ID").result()
    assert (wd / "script.out").read_text() == "script\n"


def test_a_task_that_fails(executor: QCGPJExecutor) -> None:
    future = executor.submit(Script.template, name="bad", script="exit 3")
    assert future.result(LONG) == {"bad": "FAILED"}
    assert isinstance(future.exception(), errors.QCGPJMAError) and str(future.exception()) == "job bad is FAILED"


def test_waiting_is_bounded_and_running_is_not_done(executor: QCGPJExecutor, wd: Path) -> None:
    future, gate = gated(executor, wd, "slow")
    for wait in (future.result, future.exception):
        with pytest.raises(errors.TimeoutElapsed):
            wait(timeout=0.1)
    assert future.running() and not future.done()
    gate.touch()
    wait_until(future.done)
    assert not future.running() and future.result(0) == {"slow": "SUCCEED"}
    assert not future.cancel() and not future.cancelled(), "it is too late"


def test_cancel(executor: QCGPJExecutor, wd: Path) -> None:
    future, _ = gated(executor, wd, "stop")
    assert future.cancel() and future.cancelled() and future.cancel()
    assert future.result(LONG) == {"stop": "CANCELED"} and future.done()
    assert isinstance(future.exception(), errors.QCGPJMAError)


def test_callbacks(executor: QCGPJExecutor, wd: Path) -> None:
    called: list[QCGPJFuture] = []
    all_called = threading.Semaphore(0)

    def note(future: QCGPJFuture) -> None:
        called.append(future)
        all_called.release()

    def wrong(_: QCGPJFuture) -> None:
        raise ValueError("a callback that fails keeps no other from being called")

    pairs = [gated(executor, wd, f"cb{number}") for number in range(3)]
    for future, _ in pairs:
        future.add_done_callback(wrong)
        future.add_done_callback(note)
    # The first is known no more by the time it has ended: its callback is called all the same.
    pairs[0][1].touch()
    executor.qcgpj_manager.wait4("cb0", LONG)
    executor.qcgpj_manager.remove("cb0")
    pairs[1][1].touch()
    assert all_called.acquire(timeout=LONG) and all_called.acquire(timeout=LONG)
    assert set(called) == {pairs[0][0], pairs[1][0]}
    pairs[2][1].touch()
    assert all_called.acquire(timeout=LONG)
    pairs[1][0].add_done_callback(note)
    assert called[-1] is pairs[1][0] and len(called) == 4, "what has ended is called at once"


def test_map(executor: QCGPJExecutor) -> None:
    names = [{"name": f"map{number}"} for number in range(3)]
    assert list(executor.map(Script.template, names)) == [{f"map{number}": "SUCCEED"} for number in range(3)]


def test_the_end_waits_for_tasks_and_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "FINISH_S", 0.0)
    called = threading.Event()
    with QCGPJExecutor(str(tmp_path), "n1:2") as executor:  # arguments by place
        assert executor.qcgpj_manager.resources()["total_cores"] == 2
        future = executor.submit(Script.template, name="a", script="sleep 0.5")
        future.add_done_callback(lambda _: (threading.Event().wait(1), called.set()))
        executor.submit(Script.template, name="b", script="sleep 3; touch done")
    assert (tmp_path / "done").exists() and called.is_set()


def test_the_end_does_not_wait_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "FINISH_S", 0.1)
    executor = QCGPJExecutor("--nodes", 1, wd=tmp_path)
    future = executor.submit(Script.template, name="a", script="touch started; sleep 600")
    wait_until((tmp_path / "started").exists)
    with pytest.raises(KeyError), executor:
        raise KeyError
    with pytest.raises(errors.ConnectionError, match="Not connected"):
        future.done()
    assert not left_of(str(tmp_path))


def test_the_end_can_cancel(tmp_path: Path) -> None:
    executor = QCGPJExecutor("--nodes", 1, wd=tmp_path)
    executor.submit(Script.template, name="a", script="sleep 600")
    executor.submit(Script.template, name="b", script="sleep 600")
    executor.shutdown(cancel_futures=True)
    executor.shutdown()
    assert executor.finished and not left_of(str(tmp_path))
