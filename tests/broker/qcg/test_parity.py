"""Request files against what QCG-PilotJob 0.14.2 made of them: states, files, reports; each was run with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.qcg_service import job, jobs, requests, script, serve


def show(name: str, *args: Any, out: str = "o.${it}", **parts: Any) -> dict[str, Any]:
    return job(name, {"exec": "echo", "args": list(args), "stdout": out}, **parts)


def after(*names: str) -> dict[str, list[str]]:
    return {"after": list(names)}


def test_the_report_shows_a_job_with_the_variables_of_its_request(tmp_path: Path) -> None:
    execution = {
        "exec": "./${jname}.sh", "args": [1, 2.5, True, None, ["x"], "${rcnt}-${it}-${other}"], "model": "Threads",
        "env": {"J": "${jname}"}, "stdout": "${jname}.${it}.out", "wd": "w${rcnt}",
    }  # fmt: skip
    (tmp_path / "w1").mkdir()
    (tmp_path / "w1" / "a.sh").write_text('#!/bin/sh\necho "$J|$*"\n')
    (tmp_path / "w1" / "a.sh").chmod(0o755)
    (tmp_path / "v" / "bin").mkdir(parents=True)
    (tmp_path / "v" / "bin" / "activate").write_text("")
    ran = jobs(
        tmp_path, job("a", execution, iteration={"stop": 1}, dependencies=after("b_${rcnt}")), job("b_1"),
        job("v", {"exec": "/bin/echo", "args": ["x"], "venv": "v", "modules": []}),
        job("p", {"exec": "p_${it}"}, iteration={"stop": 1}),
    )  # fmt: skip
    assert ran.text("w1/a.0.out") == "a|1 2.5 True None ['x'] 1-0-${other}\n"
    entry = ran.report["a"]
    assert entry["execution"] == {
        "exec": "./a.sh", "args": ["1", "2.5", "True", "None", "['x']", "1-${it}-${other}"], "model": "threads",
        "env": {"J": "a"}, "stdout": "a.${it}.out", "wd": "w1", "script": None, "model_opts": {},
    }  # fmt: skip
    assert entry["dependencies"] == {"after": ["b_1"]} and entry["resources"] == {"numCores": {"exact": 1}}
    assert [ran.report[name]["runtime"]["pname"] for name in ("a:0", "v", "p:0")] == ["a.sh", "echo", "p_0"]


def test_what_a_file_cancels_never_runs(tmp_path: Path) -> None:
    names = [f"j{i}" for i in range(12)]
    touch = [job(name, {"exec": "touch", "args": ["ran.${jname}"]}) for name in names]
    many = job("many", {"exec": "touch", "args": ["ran.many"]}, iteration={"stop": 20})
    ran = requests(
        tmp_path, {"request": "submit", "jobs": [*touch, many, job("late", dependencies=after("j0"))]},
        *({"request": "cancelJob", "jobNames": [name]} for name in [*names, "many"]),
        {"request": "removeJob", "jobNames": ["j1"]}, {"request": "submit", "jobs": [touch[1], job("z")]},
    )  # fmt: skip
    assert [path.name for path in tmp_path.glob("ran.*")] == ["ran.j1"]
    states = {(entry["name"], entry["state"]) for entry in ran.entries}
    others = {("late", "OMITTED"), ("z", "SUCCEED"), ("j1", "SUCCEED")}
    gone = {(name, "CANCELED") for name in [*names, "many", *(f"many:{n}" for n in range(20))]}
    assert states == gone | others, states ^ (gone | others)


def test_elements_that_wait_one_by_one_for_what_was_canceled(tmp_path: Path) -> None:
    three = {"iteration": {"start": 2, "stop": 5}}
    ran = requests(
        tmp_path,
        {"request": "submit", "jobs": [
            job("i", script("sleep 600"), **three), job("j", dependencies=after("i:${it}"), **three),
            job("k", dependencies=after("j:${it}"), **three), job("z", dependencies=after("i")),
            job("w", iteration={"stop": 2}, dependencies=after("i")),
        ]},
        {"request": "cancelJob", "jobNames": ["i"]},
        {"request": "jobInfo", "jobNames": ["j", "w"], "params": {"withChilds": True}},
    )  # fmt: skip
    states = ran.states
    assert {name: states[name] for name in "ijkzw"} == {
        "i": "CANCELED", "j": "FAILED", "k": "FAILED", "z": "OMITTED", "w": "OMITTED",
    }  # fmt: skip
    assert [states[f"{name}:{i}"] for name in "ijk" for i in (2, 3, 4)] == ["CANCELED"] * 3 + ["OMITTED"] * 6
    assert "w:0" not in states, "an iteration that is omitted as a whole has no elements to tell of"
    assert ran.history("j:2") == ["OMITTED"] and ran.report["j:2"]["runtime"] == {}
    assert ran.code == 1 and "job j:2 OMITTED" in ran.stderr


@pytest.mark.parametrize(
    ("resources", "shown", "allocation"),
    [
        ({"numCores": 2}, "1 n1 2 2", "n1[0:1]"),
        ({"numCores": {"exact": 5}}, "2 n1,n2 5 2,3", "n1[0:1],n2[0:1:2]"),
        ({"numCores": {"min": 2, "max": 40}}, "3 n1,n2,n3 6 2,3,1", "n1[0:1],n2[0:1:2],n3[0]"),
        ({"numNodes": 2}, "2 n1,n2 5 2,3", "n1[0:1],n2[0:1:2]"),
        ({"numNodes": {"min": 1, "max": 5}}, "3 n1,n2,n3 6 2,3,1", "n1[0:1],n2[0:1:2],n3[0]"),
        ({"numNodes": 2, "numCores": 2}, "2 n1,n2 4 2,2", "n1[0:1],n2[0:1]"),
        ({"numNodes": 2, "numCores": {"min": 1, "max": 3}}, "2 n1,n2 5 2,3", "n1[0:1],n2[0:1:2]"),
        ({"numNodes": {"min": 1, "max": 3}, "numCores": 2}, "2 n1,n2 4 2,2", "n1[0:1],n2[0:1]"),
        ({"numNodes": 1, "numCores": 3}, "1 n2 3 3", "n2[0:1:2]"),
        ({"numNodes": 2, "numCores": 0}, "2 n1,n2 5 2,3", "n1[0:1],n2[0:1:2]"),
        ({"numNodes": 2, "numCores": {"min": 0, "max": 1}}, "2 n1,n2 5 2,3", "n1[0:1],n2[0:1:2]"),
        ({"numNodes": 0, "numCores": 3}, "2 n1,n2 3 2,1", "n1[0:1],n2[0]"),
        ({"numNodes": {"min": 0, "max": 2}, "numCores": 3}, "2 n1,n2 3 2,1", "n1[0:1],n2[0]"),
        ({"numCores": {"min": 1, "max": 2, "scheduler": {"name": "split-into"}}}, "1 n1 2 2", "n1[0:1]"),
    ],
)
def test_cores_and_nodes(tmp_path: Path, resources: dict[str, Any], shown: str, allocation: str) -> None:
    text = "echo $QCG_PM_NNODES $QCG_PM_NODELIST $QCG_PM_NPROCS $QCG_PM_TASKS_PER_NODE ${ncores} ${nnodes} ${nlist}"
    ran = jobs(tmp_path, job("a", script(text, stdout="o"), resources=resources), nodes="n1:2,n2:3,n3:1")
    nnodes, nlist, ncores, _ = shown.split()
    assert ran.text("o") == f"{shown} {ncores} {nnodes} {nlist}\n"
    assert ran.report["a"]["runtime"]["allocation"] == allocation


@pytest.mark.parametrize(
    ("name", "params", "least", "count", "cores"),
    [
        ("maximum-iters", {}, 2, 7, [2, 2, 2, 2, 2, 3, 3]),
        ("maximum-iters", {}, 3, 2, [4, 4]),
        ("split-into", {"parts": 3}, 1, 5, [2] * 5),
        ("Split-Into", {"parts": "3"}, 0, 2, [2] * 2),
        ("split-into", {"parts": 2}, 7, 3, [4] * 3),  # there `min` has no say
    ],
)
def test_schedulers(
    tmp_path: Path, name: str, params: dict[str, int], least: int, count: int, cores: list[int]
) -> None:
    amount = {"min": least, "scheduler": {"name": name, "params": params}}
    it = show("it", "${ncores}", iteration={"stop": count}, resources={"numCores": amount})
    ran = jobs(tmp_path, it, nodes="8")
    assert sorted(int(ran.text(f"o.{i}")) for i in range(count)) == cores


@pytest.mark.parametrize(
    ("resources", "count", "shown"),
    [
        ({"numNodes": {"min": 1, "scheduler": {"name": "maximum-iters"}}, "numCores": 1}, 2, ["1 1", "2 2"]),
        ({"numNodes": {"min": 1, "scheduler": {"name": "split-into", "params": {"parts": 1}}}}, 2, ["8 3", "8 3"]),
        (
            {"numNodes": 1, "numCores": {"min": 1, "scheduler": {"name": "split-into", "params": {"parts": 4}}}},
            1,
            ["2 1"],
        ),
    ],
)
def test_schedulers_of_nodes(tmp_path: Path, resources: dict[str, Any], count: int, shown: list[str]) -> None:
    it = show("it", "${ncores}", "${nnodes}", iteration={"stop": count}, resources=resources)
    ran = jobs(tmp_path, it, nodes="2,2,4")
    assert [ran.text(f"o.{i}").strip() for i in range(count)] == shown


def test_values_of_all_kinds(tmp_path: Path) -> None:
    values = ["a", "b c", 3, 4.5, True, None, "it's", "$HOME", "${it}", [1, 2], {"k": "v"}]
    ran = jobs(tmp_path, show("it", "${it}=${itval}", iteration={"start": 0, "values": values}))
    assert [ran.text(f"o.{i}") for i in range(len(values))] == [f"{i}={value}\n" for i, value in enumerate(values)]


def test_variables_of_a_request_in_values_and_in_names_of_variables(tmp_path: Path) -> None:
    line = "echo '${itval}'; env | grep ^K_ | sort"
    env = {"K_${jname}": "${rcnt}", "K_$it": "it", "QCG_PM_NPROCS": "99", "QCG_PM_MINE": "mine"}
    execution = {"exec": "bash", "args": ["-c", f"{line}; echo $QCG_PM_NPROCS $QCG_PM_MINE"], "env": env}
    values = ["${jname}-${rcnt}", "$sname", "${ncores}"]
    a = job("a", execution | {"stdout": "o.${it}"}, iteration={"start": 7, "values": values})
    ran = jobs(tmp_path, a)
    assert [ran.text(f"o.{i}").splitlines() for i in range(3)] == [
        [value, f"K_{i}=it", "K_a=1", "1 mine"] for i, value in enumerate(["a-1", "local", "${ncores}"])
    ]
    assert ran.report["a"]["execution"]["env"] == {"K_a": "1", **dict(list(env.items())[1:])}


def test_a_refused_submit_has_its_number(tmp_path: Path) -> None:
    bad = [{"name": "x"}], [job("x", {"args": []})], [job("x", resources={"numCores": 400})], [job("x y")]
    ran = requests(
        tmp_path, *({"request": "submit", "jobs": described} for described in ([], *bad)),
        {"request": "submit", "jobs": [job("a_${rcnt}")]},
    )  # fmt: skip
    assert [reply["code"] for reply in ran.replies] == [1] * 5 + [0] and ran.states == {"a_5": "SUCCEED"}
    named = "Job identifier '(x y)' contains invalid characters or unknown variables"
    assert ran.replies[4]["message"].startswith(named)


def test_bash_reads_the_line_of_a_job_with_an_environment(tmp_path: Path) -> None:
    words = ["a b", "'c  d'", '"e f"', "$((1+1))"]
    ran = jobs(tmp_path, job("a", {"exec": "printf '%s|'", "args": words, "venv": "", "stdout": "o"}))
    assert ran.text("o") == "a|b|c  d|e f|2|"


def test_what_is_empty_is_not_given(tmp_path: Path) -> None:
    ran = jobs(
        tmp_path, job("a", script("echo a", exec="", args=[], env={}, wd="", stdout="a")),
        job("b", {"exec": "echo", "args": ["b"], "script": "", "wd": "w/.", "stdout": "b"}, dependencies={}),
    )  # fmt: skip
    assert (ran.text("a"), ran.text("w/b")) == ("a\n", "b\n")
    assert ran.report["b"]["runtime"]["wd"] == f"{tmp_path}/w/." and ran.report["b"]["dependencies"] == {"after": []}


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("top\n")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "in.1").write_text("deep\n")
    cat = {"exec": "cat", "stdout": "out"}
    ran = jobs(
        tmp_path, job("a", cat | {"stdin": "in"}), job("b", cat | {"stdin": "in.${ncores}", "wd": "w"}),
        job("c", cat | {"stdin": "missing", "stdout": "c"}), job("d", {"exec": "cat"}),
        job("e", {"exec": "pwd", "wd": "${jname}/${ncores}", "stdout": "${root_wd}/e.out"}),
    )  # fmt: skip
    assert (ran.text("out"), ran.text("w/out"), ran.text("e.out")) == ("top\n", "deep\n", f"{tmp_path}/e/1\n")
    assert ran.states == {"a": "SUCCEED", "b": "SUCCEED", "c": "FAILED", "d": "SUCCEED", "e": "SUCCEED"}
    assert f"No such file or directory: '{tmp_path}/missing'" in ran.report["c"]["messages"]


@pytest.mark.parametrize("model", ["default", "threads", "OpenMPI", "intelmpi", "srunmpi"])
def test_on_one_machine_a_model_starts_one_process(tmp_path: Path, model: str) -> None:
    (tmp_path / "p").write_text("#!/bin/sh\necho $QCG_PM_NPROCS >> o\n")
    (tmp_path / "p").chmod(0o755)
    execution = {"exec": "./p", "model": model, "model_opts": {"mpirun": "none"}}
    plain = job("a", execution, resources={"numCores": 2})
    loaded = job("b", execution | {"venv": ""}, resources={"numCores": 2}, dependencies=after("a"))
    ran = jobs(tmp_path, plain, loaded)
    assert ran.states == {"a": "SUCCEED", "b": "SUCCEED"} and ran.text("o") == "2\n2\n"


def test_signals_and_exit_codes(tmp_path: Path) -> None:
    ran = jobs(
        tmp_path, job("a", script("exit 255")), job("b", {"exec": "bash", "args": ["-c", "kill -9 $BASHPID"]}),
        job("c", {"exec": "/"}),
    )  # fmt: skip
    assert [ran.report[name]["runtime"]["exit_code"] for name in "abc"] == ["255", "-9", "-1"]
    assert "Permission denied: '/'" in ran.report["c"]["messages"]


def test_a_job_that_can_never_run_fails_and_others_run(tmp_path: Path) -> None:
    ran = jobs(
        tmp_path, job("zero", resources={"numCores": 0}), job("least", resources={"numCores": {"min": 1}}),
        job("ok", script("touch ok")), job("late", dependencies=after("zero")),
    )  # fmt: skip
    assert ran.states == {"zero": "FAILED", "least": "FAILED", "ok": "SUCCEED", "late": "OMITTED"}
    assert ran.report["least"]["messages"] == "Both core's range boundaries (min, max) must be defined"
    assert ran.history("zero") == ["QUEUED", "FAILED"] and ran.report["zero"]["runtime"] == {}


def test_the_form_of_a_submit_and_extra_keys(tmp_path: Path) -> None:
    ran = requests(
        tmp_path, {"request": "submit", "jobs": []}, {"request": "submit", "jobs": [job("a")], "more": 1},
        {"request": "listJobs", "more": 1}, {"request": "jobStatus", "jobNames": []},
    )  # fmt: skip
    assert [reply["code"] for reply in ran.replies] == [1, 0, 0, 1]
    assert json.loads((ran.home / "final_status.json").read_text())["JobStats"]["FinishedJobs"] == 1


def test_file_alone_means_the_usual_name(tmp_path: Path) -> None:
    (tmp_path / "qcg_pm_reqs.json").write_text(json.dumps([{"request": "submit", "jobs": [show("a", "x", out="o")]}]))
    assert serve(tmp_path, "--file", "--nodes", "1").text("o") == "x\n"
