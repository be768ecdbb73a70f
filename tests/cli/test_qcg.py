"""`pilotq run` on request files of QCG-PilotJob, each with what QCG-PilotJob makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pilotq.broker.store.resources import parse_allocation
from tests.support.command_line import command, environment, in_background, prompt
from tests.support.live_pilot import left_of
from tests.support.paths import QCG_CASES
from tests.support.qcg_service import job, script
from tests.support.waiting import wait_until


class Ran(NamedTuple):
    code: int
    report: dict[str, Any]  # of `run --json`
    rows: dict[str, dict[str, Any]]  # of `list --json` afterwards, by name, or by id
    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def statuses(self) -> dict[str, str]:
        return {name: row["status"] for name, row in self.rows.items()}


def ran(folder: Path, case: str, nodes: str, **env: str) -> Ran:
    (file,) = QCG_CASES.glob(f"{case}_*.json")
    shutil.copy(file, folder / "requests.json")
    cli = prompt(folder)
    result = cli("run", "requests.json", "--nodes", nodes, "--json", **env)
    assert result.returncode in (0, 1), result.stderr
    rows = json.loads(cli("list", "--json").stdout)
    return Ran(result.returncode, json.loads(result.stdout), {row["name"] or row["id"]: row for row in rows}, folder)


def test_one_echo(tmp_path: Path) -> None:
    found = ran(tmp_path, "01", "2")
    assert found.code == 0
    assert found.text("hello.out") == "hello world\n"
    row = found.rows["hello"]
    assert (row["status"], row["exit_code"], row["cores"]) == ("finished", 0, "n0[0]")


def test_a_working_directory_is_made_and_words_in_file_names_are_filled_in(tmp_path: Path) -> None:
    found = ran(tmp_path, "02", "2")
    assert found.code == 0
    assert found.rows["msleep2"]["cores"] == "n0[0:1]"
    names = sorted(p.name for p in (tmp_path / "sleep.sandbox").iterdir())
    assert names == ["sleep2.2.1.stderr", "sleep2.2.1.stdout"]
    assert [found.text(f"sleep.sandbox/{name}") for name in names] == ["", ""]


def test_an_iteration_counts_from_start_to_before_stop(tmp_path: Path) -> None:
    found = ran(tmp_path, "03", "2")
    assert found.code == 0
    assert {p.name: p.read_text() for p in tmp_path.glob("it.*.out")} == {
        f"it.{i}.out": f"i={i} v={i}\n" for i in range(2, 6)
    }
    assert found.report["tasks"]["finished"] == 4


def test_environment_and_variables_of_a_job(tmp_path: Path) -> None:
    found = ran(tmp_path, "06", "n1:2", OF_THE_SERVICE="yes")
    assert found.code == 0
    env = dict(line.split("=", 1) for line in found.text("env.out").splitlines() if "=" in line)
    assert (env["MY_VAR"], env["NC"], env["OF_THE_SERVICE"]) == ("my value", "2", "yes")
    wanted = {"NNODES": "1", "NODELIST": "n1", "NPROCS": "2", "NTASKS": "2", "TASKS_PER_NODE": "2"}
    assert {name: env[f"QCG_PM_{name}"] for name in wanted} == wanted
    assert re.fullmatch(r"[0-9a-f]{32}", env["QCG_PM_STEP_ID"])
    assert not [name for name in env if name.startswith("SLURM_")]


def test_dependencies_submitted_in_reverse_order(tmp_path: Path) -> None:
    found = ran(tmp_path, "10", "2")
    assert found.code == 0
    assert found.text("order") == "1\n2\n3\n"


def test_what_waits_for_a_failure_or_for_nothing_is_omitted(tmp_path: Path) -> None:
    found = ran(tmp_path, "11", "2")
    assert found.code == 1
    assert found.statuses() == {"bad": "failed", "child": "canceled", "grandchild": "canceled"}
    assert found.rows["bad"]["exit_code"] == 1
    assert {found.rows[name]["reason"] for name in ("child", "grandchild")} == {"dependency"}
    tasks = found.report["tasks"]
    assert (tasks["total"], tasks["failed"], tasks["canceled"], tasks["omitted"]) == (3, 1, 2, 1)
    assert list(found.report["omitted"]) == ["unknown"]
    assert "no_such_job" in found.report["omitted"]["unknown"]


def test_omitted_jobs_are_named_to_people_and_alone_make_exit_code_1(tmp_path: Path) -> None:
    jobs = [
        {"name": "good", "execution": {"exec": "true"}},
        {"name": "lost", "execution": {"exec": "true"}, "dependencies": {"after": ["nobody"]}},
    ]
    (tmp_path / "requests.json").write_text(json.dumps([{"request": "submit", "jobs": jobs}]))
    result = prompt(tmp_path)("run", "requests.json", "--nodes", "1")
    assert result.returncode == 1
    assert "1 task: 1 finished; 1 omitted" in result.stdout
    assert "lost omitted: it waits for 'nobody'" in result.stdout


def test_a_program_that_is_not_there_fails_its_job(tmp_path: Path) -> None:
    found = ran(tmp_path, "14", "2")
    assert found.code == 1
    row = found.rows["noexec"]
    assert (row["status"], row["reason"], row["exit_code"]) == ("failed", "not found", None)


def test_nodes_with_cores_on_each(tmp_path: Path) -> None:
    found = ran(tmp_path, "18", "n1:2,n2:2,n3:2")
    assert found.code == 0
    assert found.text("mp.out") == "2 4 n1,n2\n"
    assert found.rows["mp"]["cores"] == "n1[0:1],n2[0:1]"


def test_a_range_of_cores_takes_all_that_is_free(tmp_path: Path) -> None:
    found = ran(tmp_path, "20", "4")
    assert found.code == 0
    assert found.text("rng.out") == "4\n"


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_scheduler_shares_out_the_cores_of_the_pilot(tmp_path: Path, way: str) -> None:
    if way == "run":
        found = ran(tmp_path, "22", "10")
        assert found.code == 0
    else:
        cli = prompt(tmp_path)
        shutil.copy(next(QCG_CASES.glob("22_*.json")), tmp_path / "requests.json")
        assert cli("start", "--nodes", "10").returncode == 0
        try:
            assert len(cli("submit", "requests.json").stdout.split()) == 4
            assert cli("wait").returncode == 0
        finally:
            cli("stop")
    assert [(tmp_path / f"mi.{i}.out").read_text() for i in range(4)] == ["2\n", "2\n", "3\n", "3\n"]
    rows = json.loads(prompt(tmp_path)("list", "--json").stdout)
    held = [core for row in rows for part in parse_allocation(row["cores"]) for core in part.cores]
    assert sorted(held) == list(range(10)), "all four at once, on cores of their own"


def play(folder: Path, *requests: Any, args: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "requests.json").write_text(json.dumps(requests))
    return prompt(folder)("run", "--format", "qcg", "requests.json", "--nodes", "2", *args, **env)


def home(folder: Path) -> Path:
    return folder / ".pilotq" / "current"


def test_run_handles_every_request(tmp_path: Path) -> None:
    sleeper = job("s", script("sleep 600; touch late"))
    show = script("echo $QCG_PM_NPROCS ${QCG_PM_ZMQ_ADDRESS-none} > a")
    one = {"request": "submit", "jobs": [job("a", show), sleeper]}
    again = {"request": "submit", "jobs": [job("b"), job("a")]}
    result = play(
        tmp_path, one, again, {"request": "cancelJob", "jobNames": ["s"]}, {"request": "removeJob", "jobNames": ["s"]},
        {"request": "listJobs"}, {"request": "bogus"}, args=("--replies", "replies", "--json"),
    )  # fmt: skip
    replies = [json.loads(line) for line in (tmp_path / "replies").read_text().splitlines()]
    assert [reply["code"] for reply in replies] == [0, 1, 0, 0, 0, 1]
    assert replies[1]["message"] == "Job a already exist" and replies[2]["data"] == {"canceled": 1}
    assert set(replies[4]["data"]["jobs"]) <= {"a", "s"}
    assert result.returncode == 1 and not (tmp_path / "late").exists()
    assert (tmp_path / "a").read_text() == "1 none\n"
    found = json.loads(result.stdout)
    assert found["refused"] == ["request 2: Job a already exist"]
    assert (found["tasks"]["finished"], found["tasks"]["canceled"]) == (1, 1)
    report = [json.loads(line) for line in (home(tmp_path) / "jobs.report").read_text().splitlines()]
    assert {entry["name"]: entry["state"] for entry in report} == {"a": "SUCCEED", "s": "CANCELED"}
    stats = json.loads((home(tmp_path) / "final_status.json").read_text())["JobStats"]
    assert stats["FinishedJobs"] + stats["InScheduleJobs"] >= 1
    log = (home(tmp_path) / "service.log").read_text()
    assert log.count(": request ") == log.count(": reply ") == 6


def test_what_is_refused_is_said_and_replies_go_where_they_are_wanted(tmp_path: Path) -> None:
    bad = {"request": "submit", "jobs": [job("g", {"exec": "true", "model": "smoke"})]}
    assert play(tmp_path, bad).returncode == 2 and not (tmp_path / ".pilotq").exists()
    result = play(tmp_path, bad, args=("--replies", "-"))
    assert result.returncode == 2 and "request 1: Wrong submit request: jobs[0]: model 'smoke'" in result.stderr
    assert json.loads(result.stdout.splitlines()[0])["code"] == 1
    result = play(tmp_path, bad, {"request": "submit", "jobs": [job("ok")]})
    assert result.returncode == 1 and "1 task: 1 finished" in result.stdout and "request 1: " in result.stderr
    result = play(tmp_path)
    assert (result.returncode, result.stderr) == (0, "") and "0 tasks" in result.stdout


@pytest.mark.parametrize("args", [("--shell",), ("--replies", "no/such/folder/r")])
def test_options_that_cannot_be_are_refused(tmp_path: Path, args: tuple[str, ...]) -> None:
    assert play(tmp_path, args=args).returncode == 2
    assert not (tmp_path / ".pilotq").exists()


def test_replies_are_of_requests_only(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("true\n")
    for words in (("lines",), ("--", "true")):
        result = prompt(tmp_path)("run", "--replies", "-", *words)
        assert result.returncode == 2 and "--replies is for" in result.stderr


def test_submit_handles_requests_on_a_pilot_that_runs(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "2") as cli:
        two = {"request": "submit", "jobs": [job("a", iteration={"stop": 3}), job("b", dependencies={"after": ["x"]})]}
        (tmp_path / "q.json").write_text(json.dumps([two, {"request": "jobStatus", "jobNames": ["b"]}]))
        result = cli("submit", "q.json", "--json", "--replies", "replies")
        assert result.returncode == 0 and "b is omitted" in result.stderr
        (row,) = json.loads(result.stdout)
        assert (row["name"], row["tasks"]) == ("a", 3)
        assert cli("wait", row["id"]).returncode == 0
        assert len((tmp_path / "replies").read_text().splitlines()) == 2
        result = cli("submit", "q.json")
        assert result.returncode == 2 and "Job a already exist" in result.stderr and result.stdout == ""
        assert "--key" in cli("submit", "q.json", "--key", "k").stderr


def test_a_run_of_requests_is_resumed(tmp_path: Path) -> None:
    text = "echo ${it} >> begun; [ ${it} -ne 0 ] || [ -e go ] || sleep 600"
    (tmp_path / "q.json").write_text(json.dumps([
        {"request": "submit", "jobs": [job("r", script(text), iteration={"stop": 4})]}
    ]))  # fmt: skip
    process = subprocess.Popen(
        command("run", "q.json", "--nodes", "2"), cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    begun = tmp_path / "begun"
    wait_until(lambda: begun.exists() and len(begun.read_text().split()) == 4, what="all elements begun")
    report = home(tmp_path) / "jobs.report"
    wait_until(lambda: report.exists() and "r:3" in report.read_text(), what="three ends in the report")
    process.kill()
    process.wait()
    wait_until(lambda: not left_of(os.path.realpath(home(tmp_path))), what="the end of the pilot")
    (tmp_path / "go").touch()
    result = prompt(tmp_path)("run", "--resume", ".pilotq/current", "--nodes", "2")
    assert result.returncode == 0, result.stderr
    assert sorted(begun.read_text().split()) == ["0", "0", "1", "2", "3"]
    names = [json.loads(line)["name"] for line in (home(tmp_path) / "jobs.report").read_text().splitlines()]
    assert sorted(names) == ["r", "r:0", "r:1", "r:2", "r:3"]


@pytest.mark.parametrize("way", ["run", "start"])
def test_a_core_is_left_to_the_pilot_and_the_slurm_schema_is_set(tmp_path: Path, way: str) -> None:
    options = ("--nodes", "n1:2,n2:1", "--system-core", "--envschema", "slurm")
    task = ("--", "sh", "-c", "echo $PILOTQ_CPUS $SLURM_NNODES $SLURM_NTASKS $SLURM_JOB_NODELIST")
    if way == "run":
        result = prompt(tmp_path)("run", *options, *task)
        assert result.stdout == "1 1 1 n1\n", result.stderr
        local = ("--resources", "local")
        alone = prompt(tmp_path)("run", "--nodes", "1", "--system-core", *task)
        assert alone.returncode == 2 and "--system-core: there is only one core" in alone.stderr
        plain = prompt(tmp_path)("run", *local, "--nodes", "1", "--envschema", "common", *task, SLURM_JOB_ID="7")
        assert plain.stdout == "0\n"
        auto = prompt(tmp_path)("run", *local, "--nodes", "n3:1", *task, SLURM_JOB_ID="7")
        assert auto.stdout == "0 1 1 n3\n"
    else:
        with in_background(tmp_path, *options) as cli:
            task_id = cli("enqueue", *task).stdout.strip()
            cli("wait", task_id)
            assert cli("logs", task_id).stdout == "1 1 1 n1\n"
            assert [row["cores"] for row in json.loads(cli("nodes", "--json").stdout)] == [1, 1]
