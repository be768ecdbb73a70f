"""QCG-PilotJob's Python interface, as far as it needs no pilot: lists of jobs, parsed replies, the original's names."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.errors import InvalidInput, PilotqError, UnknownTask, WaitTimedOut
from pilotq.broker.qcg import JobInfo, Jobs, errors
from pilotq.broker.qcg.jobs import MAX_ITERATIONS

# -- Jobs -------------------------------------------------------------------------------------------------------------

SIMPLE: dict[str, Any] = {
    "name": "j1", "exec": "cat", "args": ["-v"], "stdin": "in", "stdout": "out", "stderr": "err", "wd": "w",
    "modules": ["a"], "venv": "v", "model": "default", "model_opts": {"srun_args": []}, "env": {"A": 1}, "numCores": 2,
    "numNodes": {"min": 1, "max": 2}, "wt": "10m", "iteration": 10, "after": "j0",
}  # fmt: skip
STANDARD = {
    "name": "j1",
    "execution": {
        "exec": "cat", "args": ["-v"], "env": {"A": 1}, "stdin": "in", "stdout": "out", "stderr": "err", "wd": "w",
        "modules": ["a"], "venv": "v", "model": "default", "model_opts": {"srun_args": []},
    },
    "resources": {"numCores": {"exact": 2}, "numNodes": {"min": 1, "max": 2}, "wt": "10m"},
    "iteration": {"start": 0, "stop": 10},
    "dependencies": {"after": ["j0"]},
}  # fmt: skip


def test_the_simple_form_becomes_the_standard_form() -> None:
    assert Jobs().add(SIMPLE).jobs() == [STANDARD]
    assert Jobs().add(**SIMPLE).jobs() == [STANDARD]
    assert Jobs().add({"name": "other", "exec": "cat"}, name="j1").job_names() == ["j1"]
    assert Jobs().add_std(STANDARD).jobs() == [STANDARD]
    assert Jobs().add_std({"name": "other"}, **STANDARD).jobs() == [STANDARD]


@pytest.mark.parametrize(
    ("attrs", "where", "value"),
    [
        ({"args": "-v"}, ("execution", "args"), ["-v"]),
        ({"iteration": ["a", 2]}, ("iteration",), {"values": ["a", 2]}),
        ({"iteration": {"start": 2, "stop": 4}}, ("iteration",), {"start": 2, "stop": 4}),
        (
            {"numCores": {"min": 1, "scheduler": "split-into"}},
            ("resources", "numCores"),
            {"min": 1, "scheduler": {"name": "split-into"}},
        ),
        (
            {"numCores": {"scheduler": {"name": "split-into", "params": {"parts": 2}}}},
            ("resources", "numCores", "scheduler"),
            {"name": "split-into", "params": {"parts": 2}},
        ),
        ({"after": ["a", "b:${it}"]}, ("dependencies", "after"), ["a", "b:${it}"]),
    ],
)
def test_short_forms(attrs: dict[str, Any], where: tuple[str, ...], value: Any) -> None:
    found: Any = Jobs().add(attrs, exec="true").jobs()[0]
    for key in where:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"unknownAttribute": True}, "Unknown attribute unknownAttribute"),
        ({"exec": 2}, "Invalid attribute exec type"),
        ({"name": ["j"]}, "Invalid attribute name type"),
        ({"args": {"1": "one"}}, "Invalid attribute args type"),
        ({"exec": "date", "script": "date"}, "Both 'exec' and 'script' defined"),
        ({}, "No 'exec' nor 'script' defined"),
        ({"exec": "date", "numCores": {"unknownAttr": 1}}, "Unknown numCores attribute unknownAttr"),
        ({"exec": "date", "numCores": {"exact": "1"}}, "Invalid numCores attribute exact type"),
        ({"exec": "date", "numNodes": {"unknownAttr": 1}}, "Unknown numNodes attribute unknownAttr"),
        ({"exec": "date", "iteration": "some"}, "Invalid attribute iteration type"),
        ({"exec": "date", "iteration": {"other": 3}}, "Unknown iteration attribute other"),
        ({"exec": "date", "iteration": {"start": 2}}, "Required attribute stop of element iteration not defined"),
        ({"exec": "date", "iteration": {"stop": 2, "values": [1]}}, "Stop and values iteration attribute are excl"),
        ({"exec": "date", "iteration": -1}, "Wrong number of iterations"),
        ({"exec": "date", "iteration": {"start": 2, "stop": 1}}, "Wrong number of iterations"),
        ({"exec": "date", "iteration": MAX_ITERATIONS + 1}, "Wrong number of iterations"),
    ],
)
def test_the_simple_form_refuses_with_the_original_texts(attrs: dict[str, Any], message: str) -> None:
    jobs = Jobs()
    with pytest.raises(errors.InvalidJobDescriptionError, match=f".*{message}.*"):
        jobs.add({"name": "j1", **attrs})
    assert jobs.jobs() == []


@pytest.mark.parametrize("job", [{}, {"name": "j"}, {"execution": {}}, {"execution": {"stdout": "out"}}])
def test_the_standard_form_needs_something_to_run(job: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidJobDescriptionError, match=r'.*Missing "execution/exec" key.*'):
        Jobs().add_std(job)


def test_a_list_of_jobs() -> None:
    jobs = Jobs().add(exec="a").add(exec="b").add(name="c", script="c")
    names = jobs.job_names()
    assert len(set(names)) == 3 and all(names) and jobs.ordered_job_names() == names
    assert [job["execution"] for job in jobs.ordered_jobs()] == [{"exec": "a"}, {"exec": "b"}, {"script": "c"}]
    for add in (jobs.add, lambda **job: jobs.add_std(STANDARD, **job)):
        with pytest.raises(errors.InvalidJobDescriptionError, match=r".*Job c already in list.*"):
            add(name="c", exec="d")
    jobs.remove("c")
    with pytest.raises(errors.JobNotDefinedError):
        jobs.remove("c")
    assert jobs.clear() == 2 and jobs.jobs() == [] and jobs.clear() == 0


def test_files_of_jobs(tmp_path: Path) -> None:
    jobs = Jobs().add(SIMPLE).add(name="j2", script="date")
    file = tmp_path / "jobs.json"
    for action in (jobs.load_from_file, jobs.save_to_file):
        with pytest.raises(errors.FileError, match=r'File to open/write file ".*/no/jobs.json": No such file'):
            action(tmp_path / "no" / "jobs.json")
    assert len(jobs.jobs()) == 2
    jobs.save_to_file(file)
    again = Jobs()
    again.load_from_file(str(file))
    assert again.ordered_jobs() == jobs.ordered_jobs()
    with pytest.raises(errors.InvalidJobDescriptionError, match="already in list"):
        again.load_from_file(file)
    for text in ("[", '{"name": "a"}', "[1]"):
        file.write_text(text)
        with pytest.raises(errors.FileError):
            Jobs().load_from_file(file)
    with pytest.raises(errors.FileError):
        Jobs().add_std(execution={"exec": "true", "args": [object()]}).save_to_file(file)


# -- JobInfo ----------------------------------------------------------------------------------------------------------


def test_info_is_parsed() -> None:
    info = JobInfo.from_job(
        {
            "jobName": "j", "status": "FAILED", "messages": "why", "history": "\na: QUEUED\nb: FAILED",
            "iterations": {"start": 0, "stop": 2, "total": 2, "finished": 2, "failed": 1},
            "runtime": {"allocation": "n1[0:1],n2[0]", "wd": "/w", "rtime": "0:00:01.500000", "exit_code": "1"},
            "childs": [
                {"iteration": 0, "state": "SUCCEED", "runtime": {"allocation": "n1[1]", "rtime": "0:00:02"}},
                {"iteration": 1, "state": "FAILED", "runtime": {"rtime": "-"}},
            ],
        }
    )  # fmt: skip
    assert (info.name, info.status, info.messages, info.wdir) == ("j", "FAILED", "why", "/w")
    assert info.nodes == {"n1": ["0", "1"], "n2": ["0"]} and info.total_cores == 3
    assert info.history == ["a: QUEUED", "b: FAILED"]
    assert info.time == timedelta(seconds=1.5)
    assert info.iterations is not None and info.iterations["failed"] == 1
    first, second = info.childs or []
    assert (first.name, first.iteration, first.status, first.total_cores) == ("j:0", 0, "SUCCEED", 1)
    assert first.time == timedelta(seconds=2) and second.time is None and second.nodes is None
    assert json.loads(str(info))["status"] == "FAILED"


def test_info_of_a_job_that_waits() -> None:
    info = JobInfo.from_job({"jobName": "j", "status": "QUEUED"})
    assert (info.nodes, info.total_cores, info.time, info.history, info.iterations) == ({}, 0, None, [], {})


@pytest.mark.parametrize("time", [timedelta(days=1, seconds=1), timedelta(days=3, microseconds=5), timedelta(hours=30)])
def test_a_run_time_of_more_than_a_day(time: timedelta) -> None:
    assert JobInfo.from_job({"runtime": {"rtime": str(time)}}).time == time


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_hang_where_old_and_new_programs_catch_them() -> None:
    old = [errors.InternalError, errors.InvalidJobDescriptionError, errors.JobNotDefinedError, errors.ConnectionError,
           errors.WrongArgumentsError, errors.FileError, errors.ServiceError]  # fmt: skip
    assert all(issubclass(error, errors.QCGPJMAError) for error in old)
    assert not issubclass(errors.TimeoutElapsed, errors.QCGPJMAError)
    assert issubclass(errors.QCGPJMAError, PilotqError) and issubclass(errors.TimeoutElapsed, WaitTimedOut)
    assert issubclass(errors.InvalidJobDescriptionError, InvalidInput)
    assert issubclass(errors.JobNotDefinedError, UnknownTask)
    assert [error.exit_code for error in (*old, errors.TimeoutElapsed)] == [3, 2, 2, 3, 2, 2, 3, 4]


# -- install ----------------------------------------------------------------------------------------------------------

NAMES = """
from qcg.pilotjob.api.errors import ConnectionError, QCGPJMAError, TimeoutElapsed
from qcg.pilotjob.api.job import MAX_ITERATIONS, Jobs
from qcg.pilotjob.api.jobinfo import JobInfo
from qcg.pilotjob.api.manager import LocalManager, Manager
from qcg.pilotjob.executor_api.qcgpj_executor import QCGPJExecutor
from qcg.pilotjob.executor_api.qcgpj_future import QCGPJFuture
from qcg.pilotjob.executor_api.templates.basic_template import BasicTemplate
from qcg.pilotjob.executor_api.templates.qcgpj_template import QCGPJTemplate
import qcg.pilotjob.api.job as job, qcg.pilotjob.api.manager, pilotq.broker.qcg as ours
for name in ours._HOMES:
    assert name == "install" or globals()[name] is getattr(ours, name), name
assert job.Jobs is ours.Jobs and qcg.pilotjob.api.manager.Manager is Manager
"""


def program(code: str, path: Path | None = None) -> str:
    """What a Python program prints; ``path`` stands on its PYTHONPATH."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path or '/')!r})\n{code}"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


def original(folder: Path) -> Path:
    """Something that is laid out as an installed QCG-PilotJob."""
    for name in ("api", "executor_api", "executor_api/templates", "utils"):
        (folder / "qcg/pilotjob" / name).mkdir(parents=True)
        (folder / "qcg/pilotjob" / name / "__init__.py").write_text(f"print('original {name}')")
    for name in ("api/manager", "api/errors", "executor_api/qcgpj_executor", "executor_api/version", "utils/auxdir"):
        (folder / f"qcg/pilotjob/{name}.py").write_text(f"Manager = LocalManager = 'original {name}'")
    return folder


INSTALL = "import pilotq.broker.qcg\npilotq.broker.qcg.install()\n"


def test_old_names_without_an_original() -> None:
    program(INSTALL + "pilotq.broker.qcg.install()\n" + NAMES)


def test_old_names_win_over_an_installed_original(tmp_path: Path) -> None:
    rest = "from qcg.pilotjob.executor_api.version import Manager as m\nprint(m)\nimport qcg.pilotjob.utils.auxdir\n"
    printed = program(INSTALL + NAMES + rest, original(tmp_path))
    # What is not replaced is the original's, and of the packages of what is nothing was run.
    assert printed.splitlines() == ["original executor_api/version", "original utils"]


def test_old_names_win_over_an_original_that_was_imported_before(tmp_path: Path) -> None:
    before = "from qcg.pilotjob.api.manager import Manager\nprint(Manager)\nimport qcg.pilotjob.utils.auxdir\n"
    printed = program(before + INSTALL + NAMES, original(tmp_path))
    assert printed.splitlines() == ["original api", "original api/manager", "original utils"]


def test_without_install_an_original_is_left_alone(tmp_path: Path) -> None:
    code = "import pilotq.broker.qcg\nfrom qcg.pilotjob.api.manager import Manager\nprint(Manager)"
    assert program(code, original(tmp_path)).splitlines()[-1] == "original api/manager"


@pytest.mark.parametrize(
    "code",
    [
        INSTALL,
        INSTALL + "from qcg.pilotjob.executor_api.qcgpj_executor import QCGPJExecutor\n"
        "from qcg.pilotjob.executor_api.templates.qcgpj_template import QCGPJTemplate\n",
    ],
)
def test_what_is_not_used_is_not_loaded(code: str) -> None:
    """Every task of EasyVVUQ imports the executor interface."""
    loaded = set(program(code + "print(*sys.modules)").split())
    heavy = {"redis", "hiredis", "msgspec", "rq", "click", "rich", "psutil", "subprocess", "json", "argparse"}
    assert not heavy & loaded
    assert {m for m in loaded if m.startswith("pilotq.broker.")} <= {
        "pilotq.broker.qcg", "pilotq.broker.qcg.aliases", "pilotq.broker.qcg.executor"
    }  # fmt: skip
