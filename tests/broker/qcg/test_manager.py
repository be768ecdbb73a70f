"""QCG-PilotJob's Python interface on a real pilot: every call, also those that QCG-PilotJob answers wrongly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.pilot.lock import holder
from pilotq.broker.process_identity import start_time
from pilotq.broker.qcg import Jobs, LocalManager, Manager, errors
from tests.support.live_pilot import left_of
from tests.support.waiting import wait_until

LONG = 60.0


class Home:
    """A manager that the tests of this file share, and the directory of its service."""

    def __init__(self, manager: LocalManager, wd: Path) -> None:
        self.manager = manager
        self.wd = wd
        self.count = 0

    def gate(self) -> tuple[str, Callable[[], None]]:
        """A script that ends when the gate is opened, and the function that opens it."""
        self.count += 1
        gate = self.wd / f"gate-{self.count}"
        return f"until [ -e {gate} ]; do sleep 0.02; done", gate.touch

    def status(self, name: str) -> str:
        state: str = self.manager.status(name)["jobs"][name]["data"]["status"]
        return state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    wd = tmp_path_factory.mktemp("service")
    manager = LocalManager(["--wd", wd, "--nodes", 4, "--log", "debug"], {"wdir": wd, "no_such_key": 1})
    yield Home(manager, wd)
    manager.finish()
    manager.kill_manager_process()  # as programs do, one after the other
    manager.cleanup()
    assert not left_of(str(wd))


@pytest.fixture
def m(home: Home) -> Iterator[LocalManager]:
    """The shared manager, without jobs."""
    yield home.manager
    home.manager.cancel(home.manager.list())
    home.manager.wait4all(LONG)
    home.manager.remove(home.manager.list())
    assert home.manager.list() == {}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LocalManager]]:
    """Starts managers in tmp_path, or in ``wd``; what a failed test has left of them ends with it."""
    started: list[LocalManager] = []

    def start_one(*args: Any, wd: Path = tmp_path) -> LocalManager:
        started.append(LocalManager(["--wd", wd, *args], {"wdir": wd}))
        return started[-1]

    yield start_one
    for manager in started:
        manager.cleanup()
    assert not left_of(str(tmp_path))


def aux_of(wd: Path) -> Path:
    (found,) = wd.glob(".qcgpjm-service-*")
    return found


# -- calls ------------------------------------------------------------------------------------------------------------


def test_every_call(home: Home, m: LocalManager) -> None:
    ids = m.submit(
        Jobs()
        .add(name="one", exec="date", stdout="date.out")
        .add(name="its", exec="echo", args=["${it}", "${itval}"], iteration=["a", 'b"c'], stdout="${it}", numCores=2)
        .add(name="wrong", exec="false")
        .add(name="never", exec="true", after="wrong")
    )
    assert ids == ["one", "its", "wrong", "never"]
    assert list(m.list()) == ids and all("status" in job for job in m.list().values())
    states = {"one": "SUCCEED", "its": "SUCCEED", "wrong": "FAILED", "never": "OMITTED"}
    assert m.wait4(m.list(), LONG) == states
    assert m.wait4(iter(["its:1", "one"]), LONG) == {"its:1": "SUCCEED", "one": "SUCCEED"}
    assert m.status("one") == {"jobs": {"one": {"status": 0, "data": {"jobName": "one", "status": "SUCCEED"}}}}
    assert (home.wd / "date.out").stat().st_size and (home.wd / "1").read_text() == '1 b"c\n'
    assert set(m.info(ids)["jobs"]) == set(ids)
    assert "childs" in m.info("its", withChilds=True)["jobs"]["its"]["data"]
    infos = m.info_parsed(ids, withChilds=True)
    assert {name: info.status for name, info in infos.items()} == states
    assert infos["one"].total_cores == 1 and infos["one"].wdir == str(home.wd) and infos["one"].time is not None
    assert [line.rpartition(" ")[2] for line in infos["one"].history or []][-1] == "SUCCEED"
    assert [(c.name, c.status, c.total_cores) for c in infos["its"].childs or []] == [
        ("its:0", "SUCCEED", 2), ("its:1", "SUCCEED", 2)
    ]  # fmt: skip
    wait_until(lambda: m.resources()["free_cores"] == 4, what="free cores")
    assert m.resources() == {"total_nodes": 1, "total_cores": 4, "used_cores": 0, "free_cores": 4}
    assert m.system_status()["JobStats"]["TotalJobs"] == 4
    reply = m.send_request({"request": "status", "options": {"allJobsFinished": True}})
    assert reply["code"] == 0 and reply["data"] == {"AllJobsFinished": True}
    assert [m.is_status_finished(s) for s in ("SUCCEED", "FAILED", "CANCELED", "OMITTED", "QUEUED", "EXECUTING")] == [
        True, True, True, True, False, False
    ]  # fmt: skip
    m.remove("one")
    m.remove(["its", "wrong"])
    assert list(m.list()) == ["never"]
    assert m.submit(Jobs().add(name="one", exec="true")) == ["one"], "a name is free again"
    assert "submit" in (home.wd / ".qcgpjm-client" / "api.log").read_text()
    assert (aux_of(home.wd) / "service.log").exists()


def test_what_is_refused(m: LocalManager) -> None:
    good = Jobs().add(name="good", exec="true")
    for wrong in ({"exec": "true", "numCores": 5}, {"exec": "true", "model": "magic"}, {"exec": "true", "wt": "soon"}):
        with pytest.raises(errors.ConnectionError, match="^Request failed - "):
            m.submit(Jobs().add_std(good.jobs()[0]).add({"name": "wrong", **wrong}))
    assert m.list() == {}, "all or none"
    for ask in (m.status, m.info, m.info_parsed, lambda name: m.wait4(name, LONG)):
        with pytest.raises(errors.ConnectionError, match="^Request failed - Job 'nope' doesn't exist"):
            ask("nope")
    with pytest.raises(errors.ConnectionError, match="^Request failed - Invalid request: "):
        m.send_request({"request": "bogus"})
    m.remove("nope")
    m.cancel(["nope", "nope:1"])


def test_an_unknown_name_is_told_before_others_have_ended(home: Home, m: LocalManager) -> None:
    script, _ = home.gate()
    ids = m.submit(Jobs().add(name="slow", script=script))
    with pytest.raises(errors.ConnectionError, match="doesn't exist"):
        m.wait4([*ids, "nope"], LONG)


def test_what_a_wait_costs_is_the_front_of_its_list(m: LocalManager, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = m.submit(Jobs().add(name="first", exec="sleep", args=[1]).add_std(
        name="many", execution={"exec": "true"}, iteration={"stop": 700}))  # fmt: skip
    names = ["first", *(f"many:{i}" for i in range(700))]
    asked: list[int] = []
    once = m._ask
    monkeypatch.setattr(
        m, "_ask", lambda request, deadline=None: asked.append(len(request["jobNames"])) or once(request, deadline)
    )
    assert set(m.wait4(names, LONG).values()) == {"SUCCEED"}
    assert asked[:2] == [500, 201], "all of them once"
    assert sum(asked) < 4 * len(names) + 8 * len(asked)
    assert ids == ["first", "many"]


# -- waits ------------------------------------------------------------------------------------------------------------


def test_wait4all_waits_for_what_was_submitted_after_another_wait(home: Home, m: LocalManager) -> None:
    m.wait4(m.submit(Jobs().add(name="q1", exec="true")), LONG)
    script, release = home.gate()
    m.submit(Jobs().add(name="q2", script=script, after=["q1"]))
    with pytest.raises(errors.TimeoutElapsed, match="after 0.5 s"):
        m.wait4all(0.5)
    release()
    m.wait4all(LONG)
    assert home.status("q2") == "SUCCEED"


def test_wait4_tells_the_state_of_the_job_and_not_of_its_last_iteration(m: LocalManager) -> None:
    ids = m.submit(Jobs().add(name="pf", script="[ ${it} -ne 0 ] && sleep .5", iteration=3))
    assert m.wait4(ids, LONG) == {"pf": "FAILED"}
    assert m.wait4(["pf:0", "pf:2"], LONG) == {"pf:0": "FAILED", "pf:2": "SUCCEED"}
    iterations = m.info_parsed("pf")["pf"].iterations
    assert iterations == {"start": 0, "stop": 3, "total": 3, "finished": 3, "failed": 1}


def test_waits_are_bounded(home: Home, m: LocalManager) -> None:
    script, release = home.gate()
    ids = m.submit(Jobs().add(name="slow", script=script))
    for wait in (lambda t: m.wait4(ids, timeout=t), m.wait4all, m.wait4_any_job_finish):
        for timeout in (0, 0.1):
            with pytest.raises(errors.TimeoutElapsed):
                wait(timeout)
    release()
    m.wait4(ids, LONG)
    assert m.wait4(ids, 0) == {"slow": "SUCCEED"}, "what has ended needs no time"
    m.wait4all(0)


def test_each_end_is_told_once(home: Home, m: LocalManager) -> None:
    script, release = home.gate()
    script = f"[ ${{it}} = 3 ] || {script}"
    m.submit(Jobs().add(name="its", script=script, iteration={"start": 3, "stop": 5}).add(name="one", exec="false"))
    assert sorted(m.wait4_any_job_finish(LONG) for _ in range(2)) == [("its:3", "SUCCEED"), ("one", "FAILED")]
    release()
    assert [m.wait4_any_job_finish(LONG) for _ in range(2)] == [("its:4", "SUCCEED"), ("its", "SUCCEED")]
    with pytest.raises(errors.TimeoutElapsed):
        m.wait4_any_job_finish(0.1)
    # Another wait has told it; and a name that is used again is news again.
    m.wait4(m.submit(Jobs().add(name="known", exec="true")), LONG)
    m.wait4(["its:3", "one"], LONG)
    m.remove(["its", "one"])
    m.submit(Jobs().add(name="its", exec="true", iteration={"start": 3, "stop": 4}))
    assert [m.wait4_any_job_finish(LONG) for _ in range(2)] == [("its:3", "SUCCEED"), ("its", "SUCCEED")]
    m.submit(Jobs().add(name="all", exec="true"))
    m.wait4all(LONG)
    script, release = home.gate()
    m.submit(Jobs().add(name="last", script=script))
    release()
    assert m.wait4_any_job_finish(LONG) == ("last", "SUCCEED")


def test_two_threads_wait_with_one_manager(home: Home, m: LocalManager) -> None:
    script, release = home.gate()
    m.submit(Jobs().add(name="a", script=script).add(name="b", exec="true", after="a"))
    found: list[dict[str, str]] = []
    threads = [threading.Thread(target=lambda n=n: found.append(m.wait4(n, LONG))) for n in ("a", "b")]
    for thread in threads:
        thread.start()
    release()
    for thread in threads:
        thread.join()
    assert {name: state for part in found for name, state in part.items()} == {"a": "SUCCEED", "b": "SUCCEED"}


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_cancel_right_after_submit(m: LocalManager) -> None:
    for number in range(20):
        (name,) = m.submit(Jobs().add(name=f"c{number}", exec="sleep", args=["600"]))
        m.cancel(name)
        assert m.wait4(name, LONG) == {name: "CANCELED"}


def test_cancel_ends_all_processes_of_a_script(home: Home, m: LocalManager) -> None:
    pid_file = home.wd / "child.pid"
    script = f"sleep 600 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    ids = m.submit(Jobs().add(name="tree", script=script))
    wait_until(pid_file.exists)
    pid = int(pid_file.read_text())
    assert start_time(pid) is not None
    m.cancel(ids)
    assert m.wait4(ids, LONG) == {"tree": "CANCELED"}
    assert start_time(pid) is None


def test_cancel_of_iterations_and_of_what_others_wait_for(home: Home, m: LocalManager) -> None:
    script, release = home.gate()
    m.submit(
        Jobs()
        .add(name="its", script=script, iteration=6)
        .add(name="whole", script=script, iteration=3)
        .add(name="after", exec="true", after="whole")
    )
    m.cancel(["its:1", "its:5", "whole"])
    release()
    assert m.wait4(m.list(), LONG) == {"its": "FAILED", "whole": "CANCELED", "after": "OMITTED"}
    infos = m.info_parsed(["its", "whole"], withChilds=True)
    states = [child.status for child in infos["its"].childs or []]
    assert states == ["SUCCEED", "CANCELED", "SUCCEED", "SUCCEED", "SUCCEED", "CANCELED"]
    assert {child.status for child in infos["whole"].childs or []} == {"CANCELED"}


# -- tasks and other programs -----------------------------------------------------------------------------------------

CONTROLLER = """
import os
del os.environ["PILOTQ_DIR"]  # the address is enough
from pilotq.broker.qcg import Jobs, Manager
with open(os.devnull, "w") as null:
    m = Manager(cfg={"log_file": os.devnull})
    ids = m.submit(Jobs().add(name="inner", exec="pwd", stdout="inner.out"))
    print(m.wait4(ids, 60))
    m.cleanup()
"""


def test_a_task_submits_to_the_pilot_that_runs_it(home: Home, m: LocalManager) -> None:
    program = {"exec": sys.executable, "args": ["-c", CONTROLLER]}
    ids = m.submit(Jobs().add(program, name="outer", wd="deep", stdout="o", stderr="e"))
    assert m.wait4(ids, LONG) == {"outer": "SUCCEED"}, (home.wd / "deep/e").read_text()
    assert (home.wd / "deep" / "o").read_text() == "{'inner': 'SUCCEED'}\n"
    # Paths of its jobs begin where those of the service do, not where the task happens to be.
    assert (home.wd / "inner.out").read_text() == f"{home.wd}\n"
    assert home.status("inner") == "SUCCEED"


def test_addresses(home: Home, m: LocalManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m.wait4(m.submit(Jobs().add(name="seen", exec="true")), LONG)
    monkeypatch.chdir(tmp_path)
    aux = aux_of(home.wd)
    for address in (aux, str(aux), f"pilotq:{aux}", None):
        if address is None:
            monkeypatch.setenv("QCG_PM_ZMQ_ADDRESS", f"pilotq:{aux}")
        other = Manager(address)
        assert list(other.list()) == ["seen"] and other.wait4("seen", LONG) == {"seen": "SUCCEED"}
        other.cleanup()
        with pytest.raises(errors.ConnectionError, match="^Not connected$"):
            other.list()
    for address in ("tcp://127.0.0.1:5555", tmp_path / "nothing", f"pilotq:{tmp_path}"):
        with pytest.raises(errors.ConnectionError, match="^Failed to connect to [^ ]+ - (a|no|.* is no) pilot"):
            Manager(address)


def test_a_request_to_finish_ends_the_service_when_its_jobs_have_ended(
    start: Callable[..., LocalManager], tmp_path: Path
) -> None:
    manager = start("--nodes", "1", "--id", "mine")
    assert (aux_of(tmp_path) / "address").read_text() == f"pilotq:{aux_of(tmp_path)}"
    manager.submit(Jobs().add(name="a", script="until [ -e go ]; do sleep 0.02; done"))
    other = Manager(aux_of(tmp_path), {"wdir": tmp_path})
    assert other.send_request({"request": "finish"})["data"] == {"when": "2s"}
    with pytest.raises(errors.ConnectionError, match="^Request failed - Finish request already requested"):
        other.finish()
    other.cleanup()
    assert manager.system_status()["System"]["InstanceId"] == "mine"
    (tmp_path / "go").touch()
    wait_until(lambda: not left_of(str(tmp_path)), seconds=LONG, what="the end of the service")
    manager.finish()
    assert '"name": "a","state": "SUCCEED"' in (aux_of(tmp_path) / "jobs.report").read_text()
    stats = json.loads((aux_of(tmp_path) / "final_status.json").read_text())["JobStats"]
    assert (stats["TotalJobs"], stats["FinishedJobs"]) == (1, 1)
    assert not (aux_of(tmp_path) / "address").exists()


def python(code: str, cwd: Path, *, shell: str = "exec", **variables: str) -> subprocess.Popen[str]:
    command = ["bash", "-c", f'{shell} "$0" -c "$1"', sys.executable, code]
    return subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )


def test_environment_and_functions_reach_the_tasks(tmp_path: Path) -> None:
    code = """
from pilotq.broker.qcg import Jobs, LocalManager
m = LocalManager(["--nodes", "1"])
jobs = Jobs().add(script="module call $MINE $ITS", env={"ITS": 3}, stdout="out")
m.wait4(m.submit(jobs.add(exec="echo", args=["$MINE"], modules=["a", "b"], stdout="loaded")), 60)
m.finish()
"""
    with python(code, tmp_path, shell='module() { echo "it is $*"; }; export -f module; exec', MINE="x y") as process:
        pass
    assert process.returncode == 0
    assert (tmp_path / "out").read_text() == "it is call x y 3\n"
    assert (tmp_path / "loaded").read_text() == "it is load a b\nx y\n"


def test_programs_as_its_users_write_them(home: Home, m: LocalManager) -> None:
    (home.wd / "log_task").mkdir()
    (home.wd / "task.sh").write_text("echo task $QCG_PM_NPROCS")
    jobs = Jobs()
    for number in (1, 2):
        jobs.add(
            name=f"TaskID{number}", exec="bash", args=["-l", str(home.wd / "task.sh")], model="default",
            stdout=f"log_task/TaskID{number}_${{jname}}__${{uniq}}.stdout", numCores={"exact": number},
        )  # fmt: skip
    ids = m.submit(jobs)
    m.wait4(ids)
    assert {job["data"]["status"] for job in m.info(ids)["jobs"].values()} == {"SUCCEED"}
    outputs = sorted((home.wd / "log_task").iterdir())
    assert [path.read_text() for path in outputs] == ["task 1\n", "task 2\n"]
    assert [path.name[:16] for path in outputs] == ["TaskID1_TaskID1_", "TaskID2_TaskID2_"]

    generate = m.submit(Jobs().add(exec="seq", args=[3], stdout="in", iteration=1, numCores={"exact": 1}))
    m.wait4(generate)
    average = m.submit(Jobs().add(exec="sort", args=["-r"], stdin="in", stdout="sorted", after=generate))
    m.wait4all()
    assert m.status(average)["jobs"][average[0]]["data"]["status"] == "SUCCEED"
    assert (home.wd / "sorted").read_text() == "3\n2\n1\n"


# -- the service ------------------------------------------------------------------------------------------------------

RUNS = """
import os
from pilotq.broker.qcg import Jobs, LocalManager
m = LocalManager(["--nodes", "2"])
m.submit(Jobs().add(script="touch started; sleep 600"))
while not os.path.exists("started"): pass
"""


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)"])
def test_the_pilot_ends_with_its_program_however_that_goes(tmp_path: Path, end: str) -> None:
    with python(RUNS + end, tmp_path) as process:
        pass
    assert process.returncode == (0 if not end else 3 if "Exit" in end else -signal.SIGKILL)
    if "SIGKILL" in end:
        wait_until(lambda: not left_of(str(tmp_path)), seconds=LONG, what="the end of the pilot")
    assert not left_of(str(tmp_path))


def test_a_child_of_the_program_does_not_end_the_pilot(home: Home, m: LocalManager) -> None:
    child = os.fork()
    if child == 0:
        home.manager._service.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert m.wait4(m.submit(Jobs().add(name="a", exec="true")), LONG) == {"a": "SUCCEED"}


def test_finish_gives_running_jobs_time_and_leaves_nothing(start: Callable[..., LocalManager], tmp_path: Path) -> None:
    manager = start("--nodes", "1")
    manager.submit(Jobs().add(script="sleep 1; touch done"))
    manager.finish()
    assert (tmp_path / "done").exists() and not left_of(str(tmp_path))
    manager.finish()
    with pytest.raises(errors.ConnectionError, match="Not connected"):
        manager.list()
    again = start("--resume", tmp_path)
    again.finish()
    assert not left_of(str(tmp_path))


def test_resume_in_one_directory(start: Callable[..., LocalManager], tmp_path: Path) -> None:
    first = start("--nodes", "2")
    script = "echo ${it} >> runs; [ ${it} -lt 2 ] || [ -e gate ] || sleep 600"
    first.submit(Jobs().add(name="its", script=script, iteration=["a", "b", "c", "d", "e"]))
    first.wait4(["its:0", "its:1"], LONG)
    wait_until(lambda: sorted((tmp_path / "runs").read_text().split()) == ["0", "1", "2", "3"])
    first.kill_manager_process()
    first.cleanup()
    (tmp_path / "gate").touch()
    second = start("--nodes", "2", "--resume", tmp_path)
    second.wait4all(LONG)
    info = second.info_parsed("its", withChilds=True)["its"]
    assert info.status == "SUCCEED" and [c.status for c in info.childs or []] == ["SUCCEED"] * 5
    runs = (tmp_path / "runs").read_text().split()
    assert sorted(runs) == ["0", "1", "2", "2", "3", "3", "4"], "what had ended is not run again"
    aux_of(tmp_path)


def test_services_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Any], str]] = [
        (["--nodes", "no:such:thing"], "Service not started: "),
        (["--bogus"], "Service not started: unrecognized arguments: --bogus"),
        (["--resume", "no"], "Resume directory .*/no not exists or is not valid QCG-PilotJob auxiliary directory"),
        (["--resume", tmp_path / "empty"], "Resume directory .* not exists or is not valid"),
    ]  # fmt: skip
    for args, message in cases:
        with pytest.raises(errors.ServiceError, match=message):
            LocalManager(["--wd", tmp_path, *args], {"wdir": tmp_path})
    with pytest.raises(errors.ServiceError, match="Service not started in 0.0"):
        LocalManager(["--wd", tmp_path], {"wdir": tmp_path, "init_timeout": 0.01})
    (tmp_path / "file").touch()
    with pytest.raises(errors.FileError, match="log_file"):
        LocalManager([], {"log_file": tmp_path / "file" / "log"})
    assert not left_of(str(tmp_path))


def test_a_directory_deeper_than_a_socket_path_may_be_long(start: Callable[..., LocalManager], tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    manager = start("--nodes", 1, wd=deep)
    assert manager.wait4(manager.submit(Jobs().add(name="a", exec="pwd", stdout="out")), LONG) == {"a": "SUCCEED"}
    assert (deep / "out").read_text() == f"{deep}\n"


def test_waits_outlive_the_server_and_end_with_the_pilot(start: Callable[..., LocalManager], tmp_path: Path) -> None:
    manager = start("--nodes", 1)
    ids = manager.submit(Jobs().add(name="a", script="sleep 1").add(name="b", script="sleep 600", after="a"))
    os.kill(int((aux_of(tmp_path) / "server" / "server.pid").read_text()), signal.SIGKILL)
    assert manager.wait4("a", LONG) == {"a": "SUCCEED"}
    supervisor = holder(str(aux_of(tmp_path) / "lock"))
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGTERM)
    with pytest.raises(errors.ConnectionError):
        manager.wait4(ids, LONG)
