"""`pilotq-qcg-service`: the given request files, each against what QCG-PilotJob makes of it, and its options."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.client.broker import Broker
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.qcg.service.requests import Requests
from tests.support.qcg_service import case, command, environment, job, jobs, requests, script, serve
from tests.support.waiting import wait_until

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"
WHOLE = ["QUEUED", "SCHEDULED", "EXECUTING", "SUCCEED"]


# the given cases


def test_01_single_echo(tmp_path: Path) -> None:
    ran = case(tmp_path, "01", "--nodes", "2")
    assert ran.code == 0 and ran.stderr == ""
    assert ran.replies[0] == {
        "code": 0, "message": "1 jobs submitted", "data": {"submitted": 1, "jobs": ["hello"]},
    }  # fmt: skip
    assert ran.states == {"hello": "SUCCEED"} and ran.history("hello") == WHOLE
    runtime = ran.report["hello"]["runtime"]
    assert {key: runtime[key] for key in ("exit_code", "allocation", "wd", "pname")} == {
        "exit_code": "0", "allocation": "n0[0]", "wd": str(tmp_path), "pname": "echo",
    }  # fmt: skip
    assert re.fullmatch(r"0:00:0\d\.\d{6}", runtime["rtime"]) and int(runtime["pid"]) > 1
    assert ran.report["hello"]["execution"]["args"] == ["hello", "world"]
    assert ran.text("hello.out") == "hello world\n"
    log = (ran.home / "service.log").read_text()
    assert '"request": "submit"' in log and '"message": "1 jobs submitted"' in log
    assert ran.home.stat().st_mode & 0o077 == 0


def test_02_docs_submit_wd_vars(tmp_path: Path) -> None:
    ran = case(tmp_path, "02", "--nodes", "2")
    assert ran.code == 0
    assert sorted(p.name for p in (tmp_path / "sleep.sandbox").iterdir()) == [
        "sleep2.2.1.stderr", "sleep2.2.1.stdout",
    ]  # fmt: skip
    assert ran.text("sleep.sandbox/sleep2.2.1.stdout") == "" == ran.text("sleep.sandbox/sleep2.2.1.stderr")
    runtime = ran.report["msleep2"]["runtime"]
    assert (runtime["allocation"], runtime["wd"]) == ("n0[0:1]", str(tmp_path / "sleep.sandbox"))


def test_03_iteration_start_stop(tmp_path: Path) -> None:
    ran = case(tmp_path, "03", "--nodes", "2")
    assert ran.states == dict.fromkeys(["it", *(f"it:{i}" for i in range(2, 6))], "SUCCEED")
    assert ran.entries[-1]["name"] == "it"
    assert ran.history("it") == ["QUEUED", "SUCCEED"] and ran.history("it:2") == WHOLE[1:]
    assert [ran.text(f"it.{i}.out") for i in range(2, 6)] == [f"i={i} v={i}\n" for i in range(2, 6)]


def test_06_env_and_qcg_vars(tmp_path: Path) -> None:
    ran = case(tmp_path, "06", "--nodes", "n1:2", INHERITED="yes")
    env = dict(line.split("=", 1) for line in ran.text("env.out").splitlines() if "=" in line)
    assert (env["MY_VAR"], env["NC"], env["INHERITED"]) == ("my value", "2", "yes")
    assert {name: value for name, value in env.items() if name.startswith("QCG_PM_")} == {
        "QCG_PM_NNODES": "1", "QCG_PM_NODELIST": "n1", "QCG_PM_NPROCS": "2", "QCG_PM_NTASKS": "2",
        "QCG_PM_TASKS_PER_NODE": "2", "QCG_PM_STEP_ID": env["QCG_PM_STEP_ID"],
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{32}", env["QCG_PM_STEP_ID"])
    assert not [name for name in env if name.startswith("SLURM_")]


def test_10_dependency_chain(tmp_path: Path) -> None:
    ran = case(tmp_path, "10", "--nodes", "2")
    assert ran.text("order") == "1\n2\n3\n"
    assert ran.states == dict.fromkeys(["first", "second", "third"], "SUCCEED")


def test_11_dependency_failed_omitted(tmp_path: Path) -> None:
    ran = case(tmp_path, "11", "--nodes", "2")
    assert ran.states == {"bad": "FAILED", "child": "OMITTED", "grandchild": "OMITTED", "unknown": "OMITTED"}
    assert ran.report["bad"]["runtime"]["exit_code"] == "1"
    assert ran.replies[0]["code"] == 0
    assert ran.code == 1
    assert "job bad FAILED: exit code 1" in ran.stderr and "job unknown OMITTED" in ran.stderr


def test_with_its_exit_codes_the_service_ends_with_0_however_jobs_end(tmp_path: Path) -> None:
    assert case(tmp_path, "11", "--nodes", "2", "--qcg-exit-codes").code == 0


def test_14_missing_executable_failed(tmp_path: Path) -> None:
    ran = case(tmp_path, "14", "--nodes", "2")
    entry = ran.report["noexec"]
    assert entry["state"] == "FAILED" and entry["runtime"]["exit_code"] == "-1"
    assert "No such file or directory: '/no/such/program'" in entry["messages"]
    assert ran.history("noexec") == ["QUEUED", "SCHEDULED", "EXECUTING", "FAILED"]


def test_18_nodes_times_cores(tmp_path: Path) -> None:
    ran = case(tmp_path, "18", "--nodes", "n1:2,n2:2,n3:2")
    assert ran.text("mp.out") == "2 4 n1,n2\n"
    assert ran.report["mp"]["runtime"]["allocation"] == "n1[0:1],n2[0:1]"


def test_20_min_max_cores(tmp_path: Path) -> None:
    assert case(tmp_path, "20", "--nodes", "4").text("rng.out") == "4\n"


def test_22_scheduler_maximum_iters(tmp_path: Path) -> None:
    ran = case(tmp_path, "22", "--nodes", "10")
    assert [ran.text(f"mi.{i}.out") for i in range(4)] == ["2\n", "2\n", "3\n", "3\n"]
    assert ran.states["mi"] == "SUCCEED" and ran.entries[-1]["name"] == "mi"
    begins = [ran.report[f"mi:{i}"]["history"][1]["date"] for i in range(4)]
    ends = [ran.report[f"mi:{i}"]["history"][2]["date"] for i in range(4)]
    assert max(begins) < min(ends)


def test_24_requests_and_replies(tmp_path: Path) -> None:
    ran = case(tmp_path, "24", "--nodes", "n1:2")
    submit, listed, status, unknown, info, resources, removed, finished, bogus, control = ran.replies
    states = ("QUEUED", "SCHEDULED", "EXECUTING")
    assert submit["code"] == 0
    assert (listed["data"]["length"], set(listed["data"]["jobs"]["s"])) == (1, {"status", "inQueue"})
    assert status["data"]["jobs"]["s"]["status"] == 0
    assert status["data"]["jobs"]["s"]["data"]["jobName"] == "s"
    assert status["data"]["jobs"]["s"]["data"]["status"] in states
    assert unknown == {"code": 1, "message": "Job 'nope' doesn't exist"}
    assert re.match(rf"\n{STAMP}: QUEUED", info["data"]["jobs"]["s"]["data"]["history"])
    data = resources["data"]
    assert (data["total_nodes"], data["total_cores"], data["used_cores"] + data["free_cores"]) == (1, 2, 2)
    assert removed == {
        "code": 0, "data": {"removed": 0, "errors": {"s": "Job 's' not finished - can not be removed"}},
    }  # fmt: skip
    assert finished == {"code": 0, "data": {"AllJobsFinished": False}}
    assert bogus == {"code": 1, "message": "Invalid request: Unknown request name: bogus"}
    assert control == {"code": 0, "message": "finishAfterAllTasksDone command accepted"}
    assert ran.code == 0 and ran.states == {"s": "SUCCEED"}
    final = json.loads((ran.home / "final_status.json").read_text())
    assert final["JobStats"] == {
        "TotalJobs": 1, "InScheduleJobs": 0, "FailedJobs": 0, "FinishedJobs": 1, "ExecutingJobs": 0,
    }  # fmt: skip
    assert final["Resources"]["FreeCores"] == 2


def test_29_text_report(tmp_path: Path) -> None:
    ran = case(tmp_path, "29", "--nodes", "2", "--report-format", "text")
    lines = (ran.home / "jobs.report").read_text().splitlines()
    assert lines[0].rstrip() == "t (SUCCEED)"
    assert [re.sub(STAMP, "T", line) for line in lines[1:5]] == [f"\tT: {state}" for state in WHOLE]
    assert [line.split(":")[0] for line in lines[5:]] == [
        "\tallocation", "\twd", "\trtime", "\texit_code", "\tpid", "\tpname",
    ]  # fmt: skip


# execution


def test_the_slurm_schema_adds_the_variables_of_a_job_step(tmp_path: Path) -> None:
    both = {"numNodes": {"exact": 2}, "numCores": {"exact": 2}}
    show = job("e", script("env > env.out; cat $SLURM_HOSTFILE > hosts"), resources=both)
    one = job("one", script("cat $SLURM_HOSTFILE; echo $SLURM_NTASKS", stdout="one"), resources={"numCores": 2})
    ran = jobs(tmp_path, show, one, nodes="n1:2,n2:2", args=("--envschema", "slurm"))
    found = dict(line.split("=", 1) for line in ran.text("env.out").splitlines() if line.startswith("SLURM_"))
    assert found.pop("SLURM_HOSTFILE") and ran.text("hosts") == "n1\nn1\nn2\nn2\n"
    node = ran.report["one"]["runtime"]["allocation"].partition("[")[0]
    assert ran.text("one") == f"{node}\n{node}\n2\n"
    assert found == {
        "SLURM_NNODES": "2", "SLURM_NODELIST": "n1,n2", "SLURM_NPROCS": "4", "SLURM_NTASKS": "4",
        "SLURM_JOB_NODELIST": "n1,n2", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n1,n2",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_OVERLAP": "1", "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_NTASKS_PER_NODE": "2",
    }  # fmt: skip


def test_one_file_for_both_outputs_numbers_as_values_and_a_directory_that_is_made(tmp_path: Path) -> None:
    line = {"exec": "bash", "args": ["-c", "echo $N; echo e >&2; echo $N ${ncores}"], "env": {"N": 3}}
    ran = jobs(tmp_path, job("j", line | {"wd": "a/b", "stdout": "both", "stderr": "both"}))
    assert ran.code == 0 and ran.text("a/b/both") == "3\ne\n3 1\n"


def test_a_module_or_environment_that_cannot_be_had_fails_the_task(tmp_path: Path) -> None:
    touch = {"exec": "touch", "args": ["ran"]}
    ran = jobs(
        tmp_path, job("m", touch | {"modules": ["none", "such"]}), job("v", touch | {"venv": "nowhere"}),
        job("s", script("touch ran", modules="none")),
    )  # fmt: skip
    assert set(ran.states.values()) == {"FAILED"} and not (tmp_path / "ran").exists()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("export ACTIVE=yes\n")
    again = tmp_path / "again"
    again.mkdir()
    show = {"exec": "echo", "args": ["$ACTIVE", "a b"], "venv": str(tmp_path / "venv"), "stdout": "out"}
    assert jobs(again, job("ok", show)).text("out") == "yes a b\n"


# options


def test_everything_is_below_wd_and_the_id_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"request": "submit", "jobs": [
        job("j", {"exec": "pwd", "stdout": "${root_wd}/out"}),
    ]}]))  # fmt: skip
    ran = serve(tmp_path, "--file-path", "q.json", "--wd", "deep/er", "--id", "mine", "--report-file", "r.json",
                "--nodes", "1")  # fmt: skip
    assert ran.code == 0, ran.stderr
    here = tmp_path / "deep" / "er"
    assert (here / "out").read_text() == f"{here}\n"
    assert (here / ".qcgpjm-service-mine" / "r.json").exists()


def test_options_without_a_meaning_are_accepted_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text("[]")
    ran = serve(
        tmp_path, "--file", "--file-path", "q.json", "--nodes", "1", "--net-port", "5555", "--log", "debug",
        "--disable-nl", "--nl-ready-treshold", "0.5", "--nl-ready-threshold=1.0", "--nl-start-method", "ssh",
        "--nl-init-timeout", "7", "--enable-rt-stats", "--slurm-partition-nodes", "2", "--disable-pub",
    )  # fmt: skip
    assert ran.code == 0
    lines = ran.stderr.splitlines()
    assert len(lines) == 10 and all(line.startswith("pilotq-qcg-service: --") for line in lines)
    assert not [line for line in lines if "Error" in line]


@pytest.mark.parametrize(("args", "hint"), [
    ((), "--file-path"),
    (("--file-path", "none.json"), "none.json: cannot be read"),
    (("--file-path", "bad.json"), "line 1, column 2"),
    (("--file-path", "table.json"), "it must begin with ["),
    (("--file-path", "ok.json", "--nodes", "0"), "--nodes 0"),
    (("--file-path", "ok.json", "--nodes", "1", "--system-core"), "--system-core: there is only one core"),
    (("--file-path", "ok.json", "--envschema", "pbs"), 'environment "pbs" not available'),
    (("--file-path", "ok.json", "--resources", "file"), "--nodes"),
    (("--resume", "."), ".qcgpjm-service-*"),
    (("--colour", "red"), "--colour"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, args: tuple[str, ...], hint: str) -> None:
    texts = {"ok.json": "[]", "bad.json": "[}", "table.json": "{}"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    ran = serve(tmp_path, *args)
    assert ran.code == 2 and hint in ran.stderr
    assert {p.name for p in tmp_path.iterdir()} == set(texts)


def start(folder: Path, *args: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args), cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def home(folder: Path) -> Path:
    return next(iter(folder.glob(".qcgpjm-service-*")), folder / "none")


def test_without_a_file_it_stays_until_somebody_asks_it_to_finish(tmp_path: Path) -> None:
    process = start(tmp_path, "--net", "--nodes", "2")
    wait_until(lambda: list(tmp_path.glob(".qcgpjm-service-*/service.log")), what="the service")
    with Broker.connect(str(home(tmp_path))) as broker:
        wait_until(broker.nodes, what="the node")
        service = Requests(broker, wd=str(tmp_path))
        reply: Any = service.handle({"request": "submit", "jobs": [job("a", script("echo a > out"))]})
        assert reply["code"] == 0
        assert service.handle({"request": "control", "command": "finishAfterAllTasksDone"})["code"] == 0
        service.close()
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert (tmp_path / "out").read_text() == "a\n"
    assert '"name": "a","state": "SUCCEED"' in (home(tmp_path) / "jobs.report").read_text()


def test_sigterm_ends_tasks_and_leaves_a_report(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"request": "submit", "jobs": [
        job("done", script("touch done")), job("long", script("touch started; sleep 600")), job("waits"),
    ]}]))  # fmt: skip
    process = start(tmp_path, "--file-path", "q.json", "--nodes", "1")
    wait_until((tmp_path / "started").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 130
    names = [json.loads(line)["name"] for line in (home(tmp_path) / "jobs.report").read_text().splitlines()]
    assert names == ["done"]
    stats = json.loads((home(tmp_path) / "final_status.json").read_text())["JobStats"]
    assert (stats["FinishedJobs"], stats["InScheduleJobs"]) == (1, 2)
    assert not Pilot(str(home(tmp_path))).alive()


def test_requests_that_are_no_requests_are_answered(tmp_path: Path) -> None:
    ran = requests(tmp_path, 7, {"no": 1}, {"request": "submit"}, {"request": "submit", "jobs": [{"name": "x"}]})
    assert [reply["code"] for reply in ran.replies] == [1] * 4
    assert ran.replies[2]["message"] == "Invalid request: Wrong submit request - missing jobs data"
    assert ran.replies[3]["message"] == "Invalid request: Missing execution element in job description (jobs[0])"
    assert ran.code == 1 and "request 4: Invalid request: Missing execution" in ran.stderr
