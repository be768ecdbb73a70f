"""Files on which QCG-PilotJob hangs, loses tasks or reports what is wrong: here each ends as it should."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_pilot import left_of
from tests.support.qcg_service import Ran, command, environment, job, jobs, requests, script, serve
from tests.support.waiting import wait_until


def after(*names: str) -> dict[str, list[str]]:
    return {"after": list(names)}


def submit(*described: dict[str, Any]) -> dict[str, Any]:
    return {"request": "submit", "jobs": list(described)}


# what hangs there


def test_h1_a_resource_that_no_node_has_fails_its_job_alone(tmp_path: Path) -> None:
    gpu = {"numNodes": 1, "numCores": 1, "nodeCrs": {"gpu": 1}}
    memory = {"numNodes": 1, "nodeCrs": {"mem": 4}}
    ran = jobs(
        tmp_path, job("a"), job("g", resources=gpu), job("m", resources=memory), job("b"),
        job("d", dependencies=after("g")), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert ran.states == {"a": "SUCCEED", "b": "SUCCEED", "g": "FAILED", "m": "FAILED", "d": "OMITTED"}
    assert "GPU" in ran.report["g"]["messages"] and ran.history("g") == ["QUEUED", "FAILED"]
    assert ran.code == 1


def test_h2_dependents_before_their_parents(tmp_path: Path) -> None:
    ran = jobs(
        tmp_path, job("B", dependencies=after("A")), job("A", dependencies=after("X")), job("X", {"exec": "/bin/false"})
    )
    assert ran.states == {"X": "FAILED", "A": "OMITTED", "B": "OMITTED"}


def test_h2_over_several_submits(tmp_path: Path) -> None:
    write = {name: job(name, script(f"echo {name} >> order")) for name in "ABC"}
    ran = requests(
        tmp_path, submit(write["C"] | {"dependencies": after("B")}), submit(write["B"] | {"dependencies": after("A")}),
        submit(job("never", dependencies=after("nobody")), job("nor", dependencies=after("never"))), submit(write["A"]),
    )  # fmt: skip
    assert [reply["code"] for reply in ran.replies] == [0] * 4
    assert ran.text("order") == "A\nB\nC\n"
    assert ran.states == dict.fromkeys("ABC", "SUCCEED") | {"never": "OMITTED", "nor": "OMITTED"}
    assert "'nobody', which no request brings" in ran.report["never"]["messages"]


def test_h3_a_cycle_is_refused(tmp_path: Path) -> None:
    ran = requests(
        tmp_path, submit(job("A", dependencies=after("B")), job("B", dependencies=after("A"))),
        submit(job("C", dependencies=after("C"))), submit(job("D", dependencies=after("E"))),
        submit(job("E", dependencies=after("D"))), submit(job("ok")),
    )  # fmt: skip
    assert [reply["code"] for reply in ran.replies] == [1, 1, 0, 1, 0]
    assert "tasks wait for each other: A -> B -> A" in ran.replies[0]["message"]
    assert ran.states == {"ok": "SUCCEED", "D": "OMITTED"} and ran.code == 1


def test_h4_split_into_more_parts_than_cores_is_refused_whole(tmp_path: Path) -> None:
    split = {"numCores": {"min": 1, "scheduler": {"name": "split-into", "params": {"parts": 8}}}}
    ran = jobs(tmp_path, job("ok", script("touch ran")), job("s", iteration={"stop": 8}, resources=split))
    assert ran.replies[0]["code"] == 1 and "8 parts" in ran.replies[0]["message"]
    assert ran.code == 1 and not (tmp_path / "ran").exists() and not (ran.home / "jobs.report").exists()


def test_h5_a_job_for_all_cores_beside_a_system_core_is_refused(tmp_path: Path) -> None:
    one, two = (job(f"j{n}", {"exec": "/bin/true"}, resources={"numCores": n}) for n in (1, 2))
    ran = requests(tmp_path, submit(two), submit(one), args=("--system-core",))
    assert ran.replies[0]["code"] == 1 and "Not enough resources for job j2" in ran.replies[0]["message"]
    assert ran.states == {"j1": "SUCCEED"} and ran.report["j1"]["runtime"]["allocation"] == "n0[1]"


def test_a_system_core_counts_as_used(tmp_path: Path) -> None:
    """As there: of three cores one is the service's own. Programs that connect are told the same, and what they use
    within a quarter of a second."""
    ask = (
        "import os, time; from pilotq.broker.qcg import Manager\n"
        "manager, until = Manager(os.environ['QCG_PM_ZMQ_ADDRESS']), time.monotonic() + 10\n"
        "while (found := manager.resources())['used_cores'] < 2 and time.monotonic() < until: pass\n"
        "print(found)"
    )
    show = {"exec": sys.executable, "args": ["-c", ask], "stdout": "out"}
    ran = requests(
        tmp_path, {"request": "resourcesInfo"}, submit(job("m", show)), args=("--system-core", "--net"), nodes="2,1"
    )
    cores = {"total_nodes": 2, "total_cores": 3, "used_cores": 1, "free_cores": 2}
    assert ran.replies[0]["data"] == cores
    assert ast.literal_eval(ran.text("out")) == cores | {"used_cores": 2, "free_cores": 1}
    assert json.loads((ran.home / "final_status.json").read_text())["Resources"] == {
        "TotalNodes": 2,
        "TotalCores": 3,
        "UsedCores": 1,
        "FreeCores": 2,
    }


def test_nodes_are_used_in_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    both = {"numNodes": 2, "numCores": 1}
    ran = jobs(
        tmp_path, job("one", script("echo ${nlist}", stdout="one")),
        job("two", script("echo ${nlist}", stdout="two"), resources=both), nodes="z:1,m:1,a:1",
    )  # fmt: skip
    assert (ran.text("one"), ran.text("two")) == ("z\n", "m,a\n")


# what is answered wrongly there


def test_w2_an_iteration_that_fails_fails_its_job(tmp_path: Path) -> None:
    ran = jobs(tmp_path, job("p", script("[ ${it} -ne 0 ] && sleep .3"), iteration={"stop": 3}))
    assert ran.states == {"p": "FAILED", "p:0": "FAILED", "p:1": "SUCCEED", "p:2": "SUCCEED"}


def kill_everything(folder: Path, process: subprocess.Popen[str]) -> None:
    (home,) = folder.glob(".qcgpjm-service-*")
    process.kill()
    while left := left_of(str(home)):
        for text in left:
            try:
                os.kill(int(text.split()[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended with another one
    process.wait()


ITERATIONS = {"indices": {"start": 0, "stop": 8}, "values": {"values": [f"v{i}" for i in range(8)]}}


@pytest.mark.parametrize("again", ["the file", "nothing"])
@pytest.mark.parametrize("kind", ITERATIONS)
def test_w3_and_w4_a_killed_service_is_resumed_exactly(tmp_path: Path, kind: str, again: str) -> None:
    """Index 0 and one in the middle run when everything is killed: what has ended is no prefix."""
    slow = "if [ ${it} -eq 0 -o ${it} -eq 5 ]; then while [ ! -e go ]; do sleep 0.05; done; fi; "
    text = "echo ${it} ${itval} >> begun; " + slow + "echo ${it} ${itval} >> done"
    (tmp_path / "q.json").write_text(json.dumps([
        submit(job("r", script(text), iteration=ITERATIONS[kind]), job("last", dependencies=after("r"))),
        submit(job("never", dependencies=after("nobody"))),
    ]))  # fmt: skip
    process = subprocess.Popen(
        command("--file-path", "q.json", "--nodes", "2"), cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    report = tmp_path / "none"

    def ended() -> set[str]:
        found = next(iter(tmp_path.glob(".qcgpjm-service-*/jobs.report")), report)
        lines = found.read_text().splitlines() if found.exists() else []
        return {json.loads(line)["name"] for line in lines if line.endswith("}")}

    wait_until(lambda: {f"r:{i}" for i in (1, 2, 3, 4)} <= ended() and "5 " in (tmp_path / "begun").read_text(),
               what="four ends, and the slow ones running")  # fmt: skip
    kill_everything(tmp_path, process)
    (tmp_path / "go").touch()
    file = ("--file-path", "q.json") if again == "the file" else ()
    ran = serve(tmp_path, "--resume", ".", *file, "--nodes", "2")
    values = {str(i): f"v{i}" if kind == "values" else str(i) for i in range(8)}
    assert sorted(ran.text("done").splitlines()) == sorted(f"{i} {value}" for i, value in values.items())
    begun = Counter(line.split()[0] for line in ran.text("begun").splitlines())
    assert begun == dict.fromkeys("123467", 1) | {"0": 2, "5": 2}
    assert ran.states == dict.fromkeys(["r", "last", *(f"r:{i}" for i in range(8))], "SUCCEED") | {"never": "OMITTED"}
    assert [reply["code"] for reply in ran.replies] == ([0, 0] if again == "the file" else [])
    assert json.loads((ran.home / "final_status.json").read_text())["IterationStats"]["FinishedIterations"] == 9


def test_w5_a_dependency_on_one_element(tmp_path: Path) -> None:
    ran = requests(
        tmp_path,
        submit(job("a", script("[ ${it} -ne 1 ]"), iteration={"stop": 3}), job("b", dependencies=after("a:0"))),
        submit(job("c", dependencies=after("a:2")), job("d", dependencies=after("a:1")),
               job("e", iteration={"stop": 3}, dependencies=after("a:${it}"))),
    )  # fmt: skip
    states = ran.states
    assert [states[name] for name in ("b", "c", "d")] == ["SUCCEED", "SUCCEED", "OMITTED"]
    assert [states[f"e:{i}"] for i in range(3)] == ["SUCCEED", "OMITTED", "SUCCEED"]
    assert states["a"] == states["e"] == "FAILED"


def test_w6_and_w7_cancel_is_at_once_and_ends_everything_of_a_job(tmp_path: Path) -> None:
    ran = requests(
        tmp_path, submit(job("q", {"exec": "sleep", "args": ["60"]}), job("s", script("sleep 60; echo x > x"))),
        {"request": "cancelJob", "jobNames": ["q", "s"]},
    )  # fmt: skip
    assert ran.replies[1] == {"code": 0, "data": {"canceled": 2}}
    assert ran.states == {"q": "CANCELED", "s": "CANCELED"} and not (tmp_path / "x").exists()
    for name in ("q", "s"):
        hours, minutes, seconds = ran.report[name]["runtime"].get("rtime", "0:00:00").split(":")
        assert (hours, minutes) == ("0", "00") and float(seconds) < 30
    assert not left_of(str(ran.home))


# what is written wrongly there


def test_v1_a_script_keeps_its_own_variables(tmp_path: Path) -> None:
    text = "echo $$; for it in 1 2; do echo $it; done; date=x; echo $date"
    ran = jobs(tmp_path, job("v", script(text, stdout="out"), iteration={"start": 7, "stop": 8}))
    pid, *rest = ran.text("out").splitlines()
    assert pid == ran.report["v:7"]["runtime"]["pid"] and rest == ["1", "2", "x"]


def test_v2_a_value_may_have_quotes(tmp_path: Path) -> None:
    show = {"exec": "echo", "args": ["${itval}"], "stdout": "o${it}"}
    ran: Ran = jobs(tmp_path, job("v", show, iteration={"values": ['a"b', "c\\d", "$$$$"]}))
    assert [ran.text(f"o{i}") for i in range(3)] == ['a"b\n', "c\\d\n", "$$\n"]


def test_an_unknown_model_and_a_dependency_twice_submitted_are_refused(tmp_path: Path) -> None:
    ran = requests(tmp_path, submit(job("m", {"exec": "true", "model": "smoke"})), submit(job("a")), submit(job("a")))
    assert [reply["code"] for reply in ran.replies] == [1, 0, 1]
    assert "model 'smoke' is unknown" in ran.replies[0]["message"]
    assert ran.replies[2]["message"] == "Job a already exist"
