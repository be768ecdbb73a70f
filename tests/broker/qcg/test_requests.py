"""`Requests.handle` on a running pilot: every request, before, while and after its jobs run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.qcg.service.requests import Requests
from pilotq.broker.store import keys
from pilotq.cli.qcg.play import _text
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.qcg_service import job, script
from tests.support.waiting import wait_until

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"
Ask = Callable[..., dict[str, Any]]


class Served:
    """Requests to one pilot, in a folder of its own."""

    def __init__(self, pilot: LivePilot, folder: Path) -> None:
        self.pilot = pilot
        self.folder = folder
        self.requests = Requests(pilot.broker, wd=str(folder))

    def ask(self, request: str, **parts: Any) -> dict[str, Any]:
        return self.requests.handle({"request": request, **parts})

    def data(self, request: str, **parts: Any) -> dict[str, Any]:
        reply = self.ask(request, **parts)
        assert reply["code"] == 0, reply
        data: dict[str, Any] = reply["data"]
        return data

    def submit(self, *jobs: dict[str, Any]) -> list[str]:
        names: list[str] = self.data("submit", jobs=list(jobs))["jobs"]
        return names

    def state(self, name: str) -> str:
        found = self.data("jobStatus", jobNames=[name])["jobs"][name]
        assert found["data"]["jobName"] == name
        return str(found["data"]["status"])

    def info(self, name: str, **params: Any) -> dict[str, Any]:
        data: dict[str, Any] = self.data("jobInfo", jobNames=[name], params=params)["jobs"][name]["data"]
        return data

    def history(self, name: str) -> list[str]:
        return re.findall(rf"\n{STAMP}: ([A-Z]+)", self.info(name)["history"])

    def finished(self) -> bool:
        return bool(self.data("status", options={"allJobsFinished": True})["AllJobsFinished"])

    def wait(self) -> None:
        wait_until(self.finished, what="the end of all jobs")


@contextmanager
def served(folder: Path, nodes: str = "n1:2", **settings: Any) -> Iterator[Served]:
    with live_pilot(folder, nodes, **settings) as pilot:
        found = Served(pilot, folder)
        try:
            yield found
        finally:
            found.requests.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def qcg(shared: Served) -> Iterator[Served]:
    """The module's pilot without jobs."""
    yield shared
    shared.wait()
    names = list(shared.data("listJobs")["jobs"])
    assert not names or shared.data("removeJob", jobNames=names)["removed"] == len(names)
    for path in shared.folder.iterdir():
        if path.is_file():
            path.unlink()


def gate(folder: Path, name: str = "go") -> str:
    """A script that waits for a file."""
    return f"while [ ! -e {folder}/{name} ]; do sleep 0.02; done; "


# looking


def test_a_job_from_queue_to_end(qcg: Served) -> None:
    qcg.submit(job("a", script(gate(qcg.folder) + "exit 3", wd="sub/${ncores}"), resources={"numCores": 2}), job("b"))
    wait_until(lambda: qcg.state("a") == "EXECUTING")
    assert qcg.state("b") == "QUEUED" and qcg.history("b") == ["QUEUED"] and "runtime" not in qcg.info("b")
    assert qcg.history("a") == ["QUEUED", "SCHEDULED", "EXECUTING"]
    directory = str(qcg.folder / "sub" / "2")
    assert qcg.info("a")["runtime"] == {"allocation": "n1[0:1]", "wd": directory}
    wait_until(lambda: qcg.data("resourcesInfo")["used_cores"] == 2)
    assert qcg.data("resourcesInfo") == {"total_nodes": 1, "total_cores": 2, "used_cores": 2, "free_cores": 0}
    assert not qcg.finished()
    (qcg.folder / "go").touch()
    qcg.wait()
    runtime = qcg.info("a")["runtime"]
    assert (runtime["exit_code"], runtime["allocation"], runtime["wd"]) == ("3", "n1[0:1]", directory)
    assert re.fullmatch(r"\d+:\d\d:\d\d\.\d{6}", runtime["rtime"]) and int(runtime["pid"]) > 1
    assert qcg.history("a") == ["QUEUED", "SCHEDULED", "EXECUTING", "FAILED"]
    assert qcg.data("listJobs") == {
        "length": 2, "jobs": {"a": {"status": "FAILED", "inQueue": 0}, "b": {"status": "SUCCEED", "inQueue": 1}},
    }  # fmt: skip


def test_an_iteration_and_its_children(qcg: Served) -> None:
    text = "case ${it} in 3) kill -9 $$;; 4) exit 1;; esac"
    qcg.submit(job("it", script(text), iteration={"start": 2, "stop": 6}))
    qcg.wait()
    info = qcg.info("it", withChilds=True)
    assert info["iterations"] == {"start": 2, "stop": 6, "total": 4, "finished": 4, "failed": 2}
    assert [(c["iteration"], c["state"], c["runtime"]["exit_code"]) for c in info["childs"]] == [
        (2, "SUCCEED", "0"), (3, "FAILED", "-9"), (4, "FAILED", "1"), (5, "SUCCEED", "0"),
    ]  # fmt: skip
    assert info["status"] == "FAILED" and qcg.history("it") == ["QUEUED", "FAILED"]
    assert qcg.history("it:3") == ["SCHEDULED", "EXECUTING", "FAILED"]
    assert "childs" not in qcg.info("it") and qcg.info("it:4")["runtime"]["exit_code"] == "1"


def test_elements_that_are_tasks_of_their_own(qcg: Served) -> None:
    cores = {"numCores": {"scheduler": {"name": "maximum-iters"}}}
    qcg.submit(job("m", script("[ ${it} -ne 1 ]"), iteration={"stop": 3}, resources=cores))
    qcg.wait()
    assert [qcg.state(name) for name in ("m", "m:0", "m:1", "m:2")] == ["FAILED", "SUCCEED", "FAILED", "SUCCEED"]
    info = qcg.info("m", withChilds=True)
    assert info["iterations"]["failed"] == 1
    assert [child["state"] for child in info["childs"]] == ["SUCCEED", "FAILED", "SUCCEED"]
    assert all(child["runtime"]["allocation"] for child in info["childs"])
    assert qcg.history("m") == ["QUEUED", "FAILED"]


def test_unknown_names(qcg: Served) -> None:
    qcg.submit(job("a"), job("it", iteration={"stop": 2}))
    for request in ("jobStatus", "jobInfo"):
        assert qcg.ask(request, jobNames=["x"]) == {"code": 1, "message": "Job 'x' doesn't exist"}
        assert qcg.ask(request, jobNames=["it:2"]) == {"code": 1, "message": "Unknown iteration 2 for job it"}
        some = qcg.data(request, jobNames=["a", "x", "it:1", "a:0"])["jobs"]
        assert [some[name]["status"] for name in ("a", "x", "it:1", "a:0")] == [0, 1, 0, 1]
        assert some["x"]["message"] == "Job 'x' doesn't exist"
        assert qcg.ask(request)["message"].endswith("missing job names")


def test_the_long_status(qcg: Served) -> None:
    text = script("[ ${it} -eq 0 ]")
    qcg.submit(job("a"), job("it", text, iteration={"stop": 3}), job("x", dependencies={"after": ["it"]}))
    qcg.wait()
    status = qcg.data("status")
    assert set(status["System"]) == {
        "InstanceId", "Started", "Generated", "Uptime", "Zmqaddress", "Ifaces", "StatusPublisher", "Host", "Account",
        "Wd", "PythonVersion", "Python", "Platform",
    }  # fmt: skip
    assert re.fullmatch(STAMP, status["System"]["Started"]) and status["System"]["Wd"] == str(qcg.folder)
    assert set(status["Resources"]) == {"TotalNodes", "TotalCores", "UsedCores", "FreeCores"}
    assert status["JobStats"] == {
        "TotalJobs": 3, "InScheduleJobs": 0, "FailedJobs": 2, "FinishedJobs": 1, "ExecutingJobs": 0,
    }  # fmt: skip
    assert status["IterationStats"] == {
        "TotalIterations": 5, "InScheduleIterations": 0, "FailedIterations": 3, "FinishedIterations": 2,
        "ExecutingIterations": 0,
    }  # fmt: skip


# canceling and removing


def test_cancel_what_waits_and_what_runs(qcg: Served) -> None:
    qcg.submit(
        job("runs", {"exec": "sleep", "args": ["60"]}, resources={"numCores": 2}), job("waits"),
        job("after", dependencies={"after": ["runs"]}), job("it", iteration={"stop": 3}),
    )  # fmt: skip
    wait_until(lambda: qcg.state("runs") == "EXECUTING")
    assert qcg.data("cancelJob", jobNames=["waits", "it:1", "it:7", "x", "runs"]) == {
        "canceled": 3, "errors": {"it:7": "Unknown iteration 7 for job it", "x": "Job/iteration x doesn't exist"},
    }  # fmt: skip
    qcg.wait()
    assert [qcg.state(name) for name in ("runs", "waits", "after")] == ["CANCELED", "CANCELED", "OMITTED"]
    assert [qcg.state(f"it:{i}") for i in range(3)] == ["SUCCEED", "CANCELED", "SUCCEED"]
    assert qcg.state("it") == "FAILED" and qcg.history("waits") == ["QUEUED", "CANCELED"]
    errors = qcg.data("cancelJob", jobNames=["runs"])["errors"]
    assert errors == {"runs": "Job/iteration runs already finished - can not be canceled"}


def test_cancel_an_iteration_of_which_some_have_ended(qcg: Served) -> None:
    text = f"[ ${{it}} -lt 2 ] || {{ {gate(qcg.folder, 'never')} }}"
    qcg.submit(job("it", script(text), iteration={"stop": 8}))
    wait_until(lambda: qcg.info("it")["iterations"]["finished"] == 2)
    assert qcg.data("cancelJob", jobNames=["it:6"]) == {"canceled": 1}
    assert qcg.data("cancelJob", jobNames=["it"]) == {"canceled": 1}
    qcg.wait()
    assert qcg.state("it") == "CANCELED" and [qcg.state(f"it:{i}") for i in (0, 1, 2, 6, 7)] == [
        "SUCCEED", "SUCCEED", "CANCELED", "CANCELED", "CANCELED",
    ]  # fmt: skip
    assert qcg.pilot.broker.counts().left == 0


def test_a_name_is_free_again_when_its_job_was_removed(qcg: Served) -> None:
    qcg.submit(job("a", script(gate(qcg.folder))), job("b"))
    assert qcg.data("removeJob", jobNames=["a", "x"]) == {
        "removed": 0,
        "errors": {"a": "Job 'a' not finished - can not be removed", "x": "Job 'x' doesn't exist"},
    }
    assert qcg.ask("submit", jobs=[job("a")]) == {"code": 1, "message": "Job a already exist"}
    (qcg.folder / "go").touch()
    qcg.wait()
    assert qcg.data("removeJob", jobNames=["a"]) == {"removed": 1}
    assert list(qcg.data("listJobs")["jobs"]) == ["b"]
    qcg.submit(job("a", {"exec": "false"}))
    qcg.wait()
    assert qcg.state("a") == "FAILED"


# submitting


def test_a_submit_is_whole_or_absent(qcg: Served) -> None:
    for bad in (
        job("b", {"exec": "x", "colour": "red"}), job("b", resources={"numCores": 3}), job("a"), {"name": "b"}, 7,
        job("b", {"exec": "x", "model": "unknown"}), job("b", resources={"numCores": {"max": 2}}),
        job("b", {"exec": "x\0"}),
    ):  # fmt: skip
        reply = qcg.ask("submit", jobs=[job("a"), bad])
        assert reply["code"] == 1 and reply["message"], bad
    assert qcg.data("listJobs") == {"length": 0, "jobs": {}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "Invalid request: Wrong submit request - missing jobs data"),
        ([], "Invalid request: Wrong submit request - missing jobs data"),
        ([7], "Invalid request: Wrong submit request - wrong job data"),
        ([{"execution": {}}], "Invalid request: Missing name in job description"),
        ([{"name": "a"}], "Invalid request: Missing execution element in job description"),
        ([job("a", iteration=3)], "Invalid request: Wrong format of iteration directive: not a dictionary"),
        ([job("a", iteration={"start": 1})], "Invalid request: Wrong format of iteration directive: not a dictionary"),
        ([job("a", iteration={"start": 3, "stop": 1})],
         "Invalid request: Wrong format of iteration directive: start index larger then stop one"),
        ([job("a", {"exec": "x", "args": "y"})], "Execution arguments must be an array"),
        ([job("a", {"script": "x", "args": ["y"]})], "Job script and exec or args or env defined"),
        ([job("a", {"stdout": "x"})], "Job execution (exec or script) not defined"),
        ([job("a", {"exec": "x", "model_opts": 1})], "Execution model options must be an dictionary"),
        ([job("a", resources={})], "No resources defined"),
        ([job("a", resources={"numCores": -1})], "Neative number of resources"),
        ([job("a", resources={"numCores": "2"})], "Wrong definition of number of cores"),
        ([job("a", resources={"numCores": {"exact": 1, "min": 1}})],
         "Exact number of resources defined with min/max/scheduler"),
        ([job("a", resources={"numCores": 1, "wt": "x"})], "Wall time must be greater than 0"),
        ([job("a", resources={"numCores": 1, "wt": "0s"})], "Wall time must be greater than 0"),
        ([job("a", resources={"numCores": 1, "wt": 60})], "Wrong wall time format"),
        ([job("a", {"exec": ""})], "Job execution (exec or script) not defined"),
        ([job("a", iteration={"stop": 2, "values": [1]})], "Stop and values iteration are excluding"),
        ([job("a", iteration={"stop": 0})], "Job iteration stop greater or equal than start"),
        ([job("a", dependencies={"after": "b"})],
         "Dependency task's list must be an array of job names"),
        ([job("a", attributes="x")], "Job attributes must be dictionary"),
        ([job("a:1")], "Invalid job name"),
    ],
)  # fmt: skip
def test_refusals_with_the_original_texts(shared: Served, body: Any, said: str) -> None:
    reply = shared.ask("submit", jobs=body)
    said = said if said.startswith("Invalid request") else f"Wrong submit request: {said}"
    assert reply["code"] == 1 and reply["message"].startswith(said), reply


def test_what_can_never_run_fails_alone(qcg: Served) -> None:
    qcg.submit(job("zero", resources={"numCores": 0}), job("ok"), job("min", resources={"numCores": {"min": 1}}))
    qcg.wait()
    assert [qcg.state(name) for name in ("zero", "ok", "min")] == ["FAILED", "SUCCEED", "FAILED"]
    assert qcg.info("min")["messages"] == "Both core's range boundaries (min, max) must be defined"


def test_dependencies_on_jobs_of_earlier_requests(qcg: Served) -> None:
    four = {"iteration": {"start": 2, "stop": 6}}
    qcg.submit(job("ok"), job("bad", {"exec": "false"}), job("it", script("[ ${it} -ne 4 ]"), **four))
    qcg.wait()
    text = script("echo ${jname} ${it} >> out")
    qcg.submit(
        job("a", text, dependencies={"after": ["ok", "it:2"]}), job("b", text, dependencies={"after": ["bad"]}),
        job("c", text, dependencies={"after": ["it:4"]}), job("d", text, dependencies={"after": ["it"]}),
        job("e", text, dependencies={"after": ["it:${it}"]}, **four),
        job("f", text, dependencies={"after": ["it:${it}", "ok"]}, iteration={"start": 3, "stop": 7}),
    )  # fmt: skip
    qcg.wait()
    assert [qcg.state(name) for name in "abcd"] == ["SUCCEED", "OMITTED", "OMITTED", "OMITTED"]
    assert [qcg.state(f"e:{i}") for i in range(2, 6)] == ["SUCCEED", "SUCCEED", "OMITTED", "SUCCEED"]
    assert [qcg.state(f"f:{i}") for i in range(3, 7)] == ["SUCCEED", "OMITTED", "SUCCEED", "OMITTED"]
    done = sorted((qcg.folder / "out").read_text().splitlines())
    assert done == ["a", "e 2", "e 3", "e 5", "f 3", "f 5"]


def test_names_that_look_like_ids(qcg: Served) -> None:
    """A job may have the name that is the id of the task its neighbour waits for."""
    qcg.submit(job("first", script(gate(qcg.folder) + "echo first >> order")))
    task_id = qcg.requests.registry.jobs["first"].ids[0]
    waits = job("z", script("echo z >> order"), dependencies={"after": ["first"]})
    qcg.submit(job(task_id, script("echo same >> order")), waits)
    wait_until(lambda: qcg.state(task_id) == "SUCCEED")
    assert qcg.state("z") == "QUEUED"
    (qcg.folder / "go").touch()
    qcg.wait()
    assert (qcg.folder / "order").read_text() == "same\nfirst\nz\n"


def test_what_waits_for_unknown_jobs_is_held_until_it_is_omitted(qcg: Served) -> None:
    qcg.submit(job("c", dependencies={"after": ["b"]}), job("d", dependencies={"after": ["c"]}))
    assert [qcg.state(name) for name in "cd"] == ["QUEUED", "QUEUED"] and not qcg.finished()
    qcg.submit(job("b"), job("e", iteration={"stop": 2}, dependencies={"after": ["x"]}))
    wait_until(lambda: qcg.state("d") == "SUCCEED")
    assert (
        qcg.ask("cancelJob", jobNames=[])["message"] == "Invalid request: Wrong cancel job request - missing job names"
    )
    qcg.submit(job("f", dependencies={"after": ["y"]}))
    assert qcg.data("cancelJob", jobNames=["f"]) == {"canceled": 1}
    assert dict(qcg.requests.omit_unmet()) == {"e": "it waits for 'x', which no request brings"}
    assert [qcg.state(name) for name in ("e", "e:1", "f")] == ["OMITTED", "OMITTED", "CANCELED"]
    assert qcg.info("e")["messages"] == "it waits for 'x', which no request brings"


def test_what_is_nested_too_deeply_is_refused(shared: Served) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    reply = shared.ask("submit", jobs=[job("deep", {"exec": "true", "args": deep})])
    assert reply == {"code": 1, "message": "Invalid request: lists and tables are nested too deeply"}
    assert _text({"request": deep}) == "(nested too deeply)"


def test_control_and_finish(tmp_path: Path) -> None:
    with served(tmp_path) as qcg:
        assert qcg.ask("control")["message"] == "Invalid request: Wrong control request - missing command"
        assert "unknown command" in qcg.ask("control", command="x")["message"]
        assert qcg.ask("control", command="finishAfterAllTasksDone") == {
            "code": 0, "message": "finishAfterAllTasksDone command accepted",
        }  # fmt: skip
        assert qcg.ask("finish") == {"code": 1, "message": "Finish request already requested"}
        of_managers = {
            "register": ("manager", {"id": 1, "address": 1, "resources": 1}),
            "notify": ("job", {"name": 1, "state": 1, "attributes": 1}),
        }
        for name, (entity, params) in of_managers.items():
            wrong = f"Invalid request: Wrong {name} request - missing"
            assert qcg.ask(name)["message"] == qcg.ask(name, entity="x")["message"] == f"{wrong}/unknown entity"
            assert qcg.ask(name, entity=entity)["message"] == f"{wrong} register parameters"
            assert qcg.ask(name, entity=entity, params={"id": 1})["message"] == f"{wrong} key {name} parameters"
            assert "not supported" in qcg.ask(name, entity=entity, params=params)["message"]
    other = tmp_path / "other"
    other.mkdir()
    with served(other) as qcg:
        assert qcg.ask("finish") == {"code": 0, "data": {"when": "2s"}}


# the registry


def test_another_process_and_a_later_one_know_the_same(tmp_path: Path) -> None:
    with served(tmp_path) as qcg:
        other = Served(qcg.pilot, tmp_path)
        qcg.submit(job("a"), job("it", iteration={"values": ["x", "y"]}))
        other.submit(job("b", dependencies={"after": ["a"]}), job("h", dependencies={"after": ["k"]}))
        assert qcg.ask("submit", jobs=[job("b")])["message"] == "Job b already exist"
        qcg.submit(job("k"))
        qcg.wait()
        # What a kill has cut off is no line, and does not spoil the next one.
        with open(qcg.pilot.pilot.path("qcg-jobs.jsonl"), "a") as file:
            file.write('{"is":"removed","na')
        assert other.data("removeJob", jobNames=["a"]) == {"removed": 1}
        later = Served(qcg.pilot, tmp_path)
        expected = dict.fromkeys(["it", "b", "h", "k"], "SUCCEED")
        for served_by in (qcg, other, later):
            assert {name: found["status"] for name, found in served_by.data("listJobs")["jobs"].items()} == expected
        for served_by in (other, later):
            served_by.requests.close()


def test_a_submit_that_was_cut_off_is_found_again(tmp_path: Path) -> None:
    """Killed between the commit and the line that tells of it, and before the commit."""
    with served(tmp_path) as qcg:
        path = Path(qcg.pilot.pilot.path("qcg-jobs.jsonl"))
        qcg.submit(job("a", script("echo a >> out")), job("b", script("echo b >> out"), iteration={"stop": 2}))
        lines = path.read_text().splitlines(keepends=True)
        assert json.loads(lines[-1])["is"] == "done"
        later_submit = "".join(lines[:2]).replace('"a"', '"c"').replace('"b"', '"d"')
        key = json.loads(lines[0])["key"]
        path.write_text("".join(lines[:-1]) + later_submit.replace(key, "other").replace("echo a", "echo c"))
        later = Served(qcg.pilot, tmp_path)
        assert later.requests.registry.jobs["a"].ids == qcg.requests.registry.jobs["a"].ids
        assert later.state("c") == "QUEUED" and later.requests.omit_unmet() == {}
        later.wait()
        assert sorted((tmp_path / "out").read_text().split()) == ["a", "b", "b", "b", "b", "c"]
        later.requests.close()


def test_jobs_that_redis_has_forgotten(tmp_path: Path) -> None:
    with served(tmp_path, finished_ttl_s=1, failed_ttl_s=1) as qcg:
        four = {"iteration": {"stop": 4}}
        qcg.submit(job("ok"), job("bad", {"exec": "false"}), job("it", script("[ ${it} -ne 1 ]"), **four))
        qcg.wait()
        ids = [qcg.requests.registry.jobs[name].ids[0] for name in ("ok", "bad", "it")]
        exists = ("EXISTS", *map(keys.job, ids))
        wait_until(lambda: qcg.pilot.broker.link.call(*exists) == 0, what="records gone")
        late = Served(qcg.pilot, tmp_path)
        assert [late.state(name) for name in ("ok", "bad", "it", "it:0", "it:1")] == [
            "SUCCEED", "FAILED", "FAILED", "SUCCEED", "FAILED",
        ]  # fmt: skip
        assert late.info("it", withChilds=True)["childs"][1]["runtime"]["exit_code"] == "1"
        late.submit(
            job("a", dependencies={"after": ["ok"]}), job("b", dependencies={"after": ["bad"]}),
            job("c", dependencies={"after": ["it:${it}"]}, **four), job("d", dependencies={"after": ["it:0"]}),
        )  # fmt: skip
        late.wait()
        assert [late.state(name) for name in ("a", "b", "d")] == ["SUCCEED", "OMITTED", "SUCCEED"]
        assert [late.state(f"c:{i}") for i in range(4)] == ["SUCCEED", "OMITTED", "SUCCEED", "SUCCEED"]
        late.requests.close()
