"""Jobs of QCG-PilotJob's request files: what each becomes, what is omitted, and what is refused."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.qcg import draft_of, job_of, request_variables
from pilotq.broker.taskfiles.qcg_schedulers import plan
from pilotq.broker.taskfiles.qcg_tasks import tasks_of
from pilotq.broker.taskfiles.reader import read_tasks
from pilotq.broker.tasks.model import ArrayRange, Request, Task
from tests.support.paths import QCG_CASES

NOW = datetime(2026, 1, 31, 12, 30, 0, 5, tzinfo=timezone.utc)


class Read(NamedTuple):
    """What the jobs of all submits of a file become, as if they came at once."""

    tasks: list[Task]
    omitted: dict[str, str]


def of_file(path: Path, total_cores: int | None = None) -> Read:
    submits = [body for body in read_tasks(path, format="qcg").requests or () if body["request"] == "submit"]
    drafts = []
    for count, submit in enumerate(submits, 1):
        words = request_variables(count, NOW)
        for number, body in enumerate(submit["jobs"]):
            place = f"[{number}]"
            drafts.append(draft_of(job_of(body, "jobs", place), "jobs", place, words, total_cores))
    return Read(*tasks_of(drafts, "jobs"))


def case(name: str, **options: Any) -> Read:
    return of_file(QCG_CASES / f"{name}.json", **options)


def read(folder: Path, *jobs: dict[str, Any], **options: Any) -> Read:
    return requests(folder, {"request": "submit", "jobs": list(jobs)}, **options)


def requests(folder: Path, *bodies: Any, **options: Any) -> Read:
    path = folder / "jobs.json"
    path.write_text(json.dumps(bodies))
    return of_file(path, **options)


def refusal(folder: Path, *jobs: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(folder, *jobs, **options)
    return str(caught.value).removeprefix("jobs: ")


def job(name: str, *after: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "execution": {"exec": "true"}, "dependencies": {"after": list(after)}, **more}


def test_01_single_echo() -> None:
    batch = case("01_single_echo")
    assert batch.tasks == [Task(command=["/bin/echo", "hello", "world"], name="hello", stdout="hello.out", qcg=True)]
    assert batch.omitted == {}


def test_02_working_directory_and_variables_in_paths() -> None:
    (task,) = case("02_docs_submit_wd_vars").tasks
    assert task == Task(
        command=["/bin/sleep", "1s"], name="msleep2", request=Request(cores=(2, 2), spread=True), cwd="sleep.sandbox",
        stdout="sleep2.${ncores}.${nnodes}.stdout", stderr="sleep2.${ncores}.${nnodes}.stderr", qcg=True,
    )  # fmt: skip


def test_03_iteration() -> None:
    (task,) = case("03_iteration_start_stop").tasks
    assert task == Task(
        command=["/bin/echo", "i=${it} v=${itval}"], name="it", array=ArrayRange(2, 5), stdout="it.${it}.out", qcg=True
    )


def test_06_environment() -> None:
    (task,) = case("06_env_and_qcg_vars").tasks
    assert task.env == {"MY_VAR": "my value", "NC": "${ncores}"}
    assert (task.command, task.request) == (["/usr/bin/env"], Request(cores=(2, 2), spread=True))


def test_10_dependencies_in_any_order() -> None:
    tasks = case("10_dependency_chain").tasks
    assert [(task.name, task.after) for task in tasks] == [("third", ["second"]), ("second", ["first"]), ("first", [])]
    assert tasks[2] == Task(script="sleep 0.3; echo 1 >> order", name="first", qcg=True, login_shell=True)


def test_11_only_the_job_that_waits_for_nothing_is_omitted_at_once() -> None:
    batch = case("11_dependency_failed_omitted")
    assert [task.name for task in batch.tasks] == ["bad", "child", "grandchild"]
    assert batch.omitted == {"unknown": "it waits for 'no_such_job', which no request brings"}


def test_14_and_29_simple_jobs() -> None:
    assert case("14_missing_executable_failed").tasks == [Task(command=["/no/such/program"], name="noexec", qcg=True)]
    assert case("29_text_report").tasks == [Task(command=["/bin/true"], name="t", qcg=True)]


def test_18_and_20_resources() -> None:
    assert case("18_nodes_times_cores").tasks[0].request == Request(cores=(2, 2), nodes=(2, 2))
    assert case("20_min_max_cores").tasks[0].request == Request(cores=(2, 8), spread=True)


def test_22_scheduler() -> None:
    tasks = case("22_scheduler_maximum_iters", total_cores=10).tasks
    assert [task.name for task in tasks] == ["mi:0", "mi:1", "mi:2", "mi:3"]
    assert [task.request for task in tasks] == [Request(cores=(n, n), spread=True) for n in (2, 2, 3, 3)]
    assert [task.stdout for task in tasks] == [f"mi.{i}.out" for i in range(4)]
    assert not any(task.is_array for task in tasks)
    with pytest.raises(InvalidInput, match="needs to know how many there are"):
        case("22_scheduler_maximum_iters")


def test_24_requests_are_kept_as_they_stand() -> None:
    path = QCG_CASES / "24_requests_and_replies.json"
    batch = read_tasks(path)
    assert batch.tasks == [] and batch.requests == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("resources", "request_"),
    [
        ({"numCores": 1}, Request()),
        ({"numCores": 3}, Request(cores=(3, 3), spread=True)),
        ({"numNodes": 2}, Request(nodes=(2, 2), whole=True)),
        ({"numNodes": {"min": 1, "max": 3}}, Request(nodes=(1, 3), whole=True)),
        ({"numNodes": {"exact": 2}, "numCores": {"min": 1, "max": 4}}, Request(nodes=(2, 2), cores=(1, 4))),
        ({"numNodes": 2, "numCores": 1, "nodeCrs": {"gpu": 4}}, Request(nodes=(2, 2), gpus=4)),
    ],
)
def test_resources(tmp_path: Path, resources: dict[str, Any], request_: Request) -> None:
    assert read(tmp_path, job("a", resources=resources)).tasks[0].request == request_


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ({"numCores": 0}, "Missing node and cores specification"),
        ({"numNodes": {"exact": 0}}, "Missing node and cores specification"),
        ({"numCores": {"min": 0, "max": 4}}, "Missing node and cores specification"),
        ({"numCores": {"min": 1}}, "Both core's range boundaries (min, max) must be defined"),
        ({"numCores": {"min": 1, "scheduler": {"name": "maximum-iters"}}}, "Both core's range boundaries"),
        ({"numCores": 1, "nodeCrs": {"gpu": 1}}, "Number of nodes is required when CR are used"),
        ({"numCores": {"min": 1, "max": 1}, "numNodes": 1}, ""),
    ],
)
def test_what_is_accepted_and_can_never_run_is_known(resources: dict[str, Any], why: str) -> None:
    body = job("a", resources=resources)
    draft = draft_of(job_of(body, "jobs", "[0]"), "jobs", "[0]", request_variables(1, NOW), 4)
    assert draft.unrunnable.startswith(why) and bool(draft.unrunnable) == bool(why)


def test_walltime_is_what_the_job_asks_for(tmp_path: Path) -> None:
    for text, seconds in (("1h2m3s", 3723.0), ("30s1h", 30.0), ("${rcnt}m", 60.0)):
        (task,) = read(tmp_path, job("a", resources={"numCores": 1, "wt": text})).tasks
        assert (task.time_request, task.time_limit) == (seconds, None)


def test_variables_of_a_request(tmp_path: Path) -> None:
    words = "${rcnt} ${sname} ${date} $time ${dateTime} ${jname} ${it} $$ ${other}"
    execution = {
        "exec": "x",
        "args": [words, 1, 0.5, True],
        "env": {"N": 3, "J": "$jname"},
        "stdout": "${jname}.${it}.out",
    }
    script = {"script": "date=1; echo ${date} ${jname} $jname $$"}
    one = {"request": "submit", "jobs": [{"name": "a_${rcnt}", "execution": execution}]}
    two = {
        "request": "submit",
        "jobs": [{"name": "a_${rcnt}", "execution": script, "dependencies": {"after": ["a_1"]}}],
    }
    first, second = requests(tmp_path, one, two).tasks
    times = "1 local 2026-01-31 12:30:00.000005 2026-01-31 12:30:00.000005 a_1 ${it} $ ${other}"
    assert first.command == ["x", times, "1", "0.5", "True"]
    assert (first.name, first.env, first.stdout) == ("a_1", {"N": "3", "J": "a_1"}, "a_1.${it}.out")
    assert (second.name, second.after) == ("a_2", ["a_1"])
    assert second.script == "date=1; echo ${date} a_2 $jname $$"


def test_uniq_is_one_per_request(tmp_path: Path) -> None:
    jobs = [{"name": name, "execution": {"exec": "${uniq}"}} for name in "ab"]
    other = {"request": "submit", "jobs": [{"name": "c", "execution": {"exec": "${uniq}"}}]}
    a, b, c = requests(tmp_path, {"request": "submit", "jobs": jobs}, other).tasks
    assert a.command == b.command != c.command


def test_what_is_null_is_not_given(tmp_path: Path) -> None:
    nothing = {"args": None, "env": None, "wd": None, "stdout": None, "modules": None, "venv": None, "model": None}
    body = {"name": "a", "execution": {"exec": "x", "script": None, **nothing}, "resources": None, "iteration": None}
    (task,) = read(tmp_path, {**body, "dependencies": {"after": None}, "attributes": None}).tasks
    assert task == Task(command=["x"], name="a", qcg=True)


def test_values(tmp_path: Path) -> None:
    (task,) = read(tmp_path, job("a", iteration={"values": ['a"b', 2, None]})).tasks
    assert (task.values, task.array) == (['a"b', "2", "None"], None)
    (letters,) = read(tmp_path, job("a", iteration={"values": "abc"})).tasks
    assert letters.values == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"modules": "gcc"}, "source /etc/profile; module load gcc || exit; exec x a b $HOME ${it}"),
        ({"modules": ["a", "b"], "venv": "v"},
         "source /etc/profile; module load a b || exit; source v/bin/activate || exit; exec x a b $HOME ${it}"),
        ({"venv": ""}, "exec x a b $HOME ${it}"),
    ],
)  # fmt: skip
def test_modules_and_venv(tmp_path: Path, more: dict[str, Any], line: str) -> None:
    execution = {"exec": "x", "args": ["a b", "$HOME", "${it}"], **more}
    (task,) = read(tmp_path, {"name": "a", "execution": execution}).tasks
    assert (task.command, task.script) == (["bash", "-l", "-c", line], None)


def test_model_and_script_with_venv_and_env(tmp_path: Path) -> None:
    execution = {
        "script": "./run", "venv": "v", "env": {"A": "1"}, "model": "OpenMPI",
        "model_opts": {"mpirun": "mpiexec", "mpirun_args": ["-x", "a b", 2], "n": 3},
    }  # fmt: skip
    (task,) = read(tmp_path, {"name": "a", "execution": execution}).tasks
    # Each rank runs the script; what is set up is for mpirun, whose words stand for "$@".
    line = 'source v/bin/activate || exit; exec "$@" '
    assert task.command == ["bash", "-l", "-c", line, "pilotq", "bash", "-l", "-c", "./run"]
    assert (task.launch_at, task.env, task.script) == (5, {"A": "1"}, None)
    (task,) = read(
        tmp_path, {"name": "a", "execution": {"exec": "x", "args": ["1"], "venv": "v", "model": "mpich"}}
    ).tasks
    assert task.command == ["bash", "-l", "-c", 'source v/bin/activate || exit; exec "$@" x 1', "pilotq"]
    assert task.launch_at == 5
    (task,) = read(tmp_path, {"name": "a", "execution": execution | {"venv": None}}).tasks
    assert (task.script, task.login_shell, task.launch_at) == ("./run", True, 0)
    assert (task.model, task.model_opts) == ("openmpi", {"mpirun": "mpiexec", "mpirun_args": "-x 'a b' 2", "n": "3"})


def test_dependencies_on_elements(tmp_path: Path) -> None:
    three = {"iteration": {"stop": 3}}
    batch = read(tmp_path, job("b", "a:${it}", **three), job("a", **three), job("d", "a:2", "b:0"))
    assert {task.name: (task.after, task.after_each) for task in batch.tasks} == {
        "b": ([], ["a"]), "a": ([], []), "d": (["a:2", "b:0"], []),
    }  # fmt: skip


def test_an_iteration_that_waits_for_elements_and_for_whole_jobs(tmp_path: Path) -> None:
    two = {"iteration": {"stop": 2}}
    batch = read(tmp_path, job("b", "a:${it}", "c", **two), job("a", **two), job("c"))
    assert {task.name: (task.after, task.after_each) for task in batch.tasks} == {
        "b:0": (["a:0", "c"], []), "b:1": (["a:1", "c"], []), "a": ([], []), "c": ([], []),
    }  # fmt: skip


def test_elements_of_other_indices_are_matched_by_index(tmp_path: Path) -> None:
    a, b = {"iteration": {"stop": 3}}, {"iteration": {"start": 1, "stop": 4}}
    batch = read(
        tmp_path, job("a", **a), job("b", "a:${it}", **b), job("c", "b:$it", **b), job("d", "c"), job("e", "b:1")
    )
    assert {task.name: task.after for task in batch.tasks} == {
        "a": [], "b:1": ["a:1"], "b:2": ["a:2"], "c:1": ["b:1"], "c:2": ["b:2"], "e": ["b:1"],
    }  # fmt: skip
    assert batch.omitted == {
        "b:3": "it waits for 'a:3', which no request brings",
        "c:3": "it waits for 'b:3', which is omitted",
        "d": "it waits for 'c:3', which is omitted",
    }


def test_omission_spreads_and_is_no_cycle(tmp_path: Path) -> None:
    batch = read(
        tmp_path,
        job("a", "b"),
        job("b", "a", "bad"),
        job("c", "x:0"),
        job("x"),
        job("d", "x:${it}"),
        job("e", "c", "x"),
    )
    assert [task.name for task in batch.tasks] == ["x"]
    assert set(batch.omitted) == {"a", "b", "c", "d", "e"}
    assert batch.omitted["e"] == "it waits for 'c', which is omitted"


def test_dependents_of_a_job_under_a_scheduler(tmp_path: Path) -> None:
    resources = {"numCores": {"scheduler": {"name": "split-into", "params": {"parts": 2}}}}
    two = {"iteration": {"values": ["x y", "z"]}}
    execution = {"exec": "p", "args": ["${itval}-${it}"], "env": {"V": "$itval"}}
    batch = read(
        tmp_path, {**job("a", resources=resources, **two), "execution": execution}, job("b", "a"),
        job("c", "a:1"), job("d", "a:${it}", iteration={"stop": 2}), total_cores=9,
    )  # fmt: skip
    assert [(task.name, task.command, task.env) for task in batch.tasks[:2]] == [
        ("a:0", ["p", "x y-0"], {"V": "x y"}), ("a:1", ["p", "z-1"], {"V": "z"}),
    ]  # fmt: skip
    assert {task.request.cores for task in batch.tasks[:2]} == {(4, 4)}
    assert {task.name: task.after for task in batch.tasks[2:]} == {
        "b": ["a:0", "a:1"], "c": ["a:1"], "d:0": ["a:0"], "d:1": ["a:1"],
    }  # fmt: skip
    values = {"resources": resources, "iteration": {"values": ["${ncores}"]}}
    batch = read(tmp_path, {**job("a", **values), "execution": execution}, total_cores=9)
    assert (batch.tasks[0].command, batch.tasks[0].env) == (["p", "$${ncores}-0"], {"V": "$${ncores}"})
    said = refusal(tmp_path, {**job("a", **values), "execution": {"script": "echo ${itval}"}}, total_cores=9)
    assert said == "[0].iteration.values[0]: '${ncores}' has a variable in it"


@pytest.mark.parametrize(
    ("arguments", "cores"),
    [
        (("maximum-iters", {}, 4, 2, 10), [2, 2, 3, 3]),
        (("maximum-iters", {}, 3, None, 10), [3, 3, 4]),
        (("maximum-iters", {}, 7, 2, 6), [2, 2, 2, 3, 3, 3, 3]),
        (("maximum-iters", {}, 3, None, 1), [1, 1, 1]),
        (("split-into", {"parts": 3}, 4, None, 10), [3, 3, 3, 3]),
        (("split-into", {}, 4, None, 10), [2, 2, 2, 2]),
    ],
)
def test_schedulers(arguments: tuple[Any, ...], cores: list[int]) -> None:
    assert plan(*arguments, "here") == cores


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        ({"scheduler": {"name": "best"}}, "scheduler.name: 'best' is unknown"),
        ({"min": 5, "scheduler": {"name": "maximum-iters"}}, "scheduler: min is 5, but the pilot has 4"),
        (
            {"scheduler": {"name": "split-into", "params": {"parts": 8}}},
            "scheduler: 4 in 8 parts leave less than 1",
        ),
        ({"scheduler": {"name": "split-into", "params": {"parts": 0}}}, "scheduler.params.parts: must be"),
        ({"max": 5, "scheduler": {"name": "maximum-iters"}}, "a scheduler goes with min only"),
        ({"min": 1, "scheduler": "split-into"}, "scheduler: expected a table, got text"),
    ],
)
def test_schedulers_that_cannot_be(tmp_path: Path, amount: dict[str, Any], said: str) -> None:
    bad = job("a", iteration={"stop": 3}, resources={"numCores": amount})
    assert said in refusal(tmp_path, job("ok"), bad, total_cores=4)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"execution": {"exec": "x"}}, "[1]: the key name is missing"),
        ({"name": "a"}, "[1]: the key execution is missing"),
        (job("a", executon={}), "[1].executon: unknown key; did you mean execution?"),
        (job("ok"), "[1].name: 'ok' is the name of [0] already"),
        (job("a b"), "[1].name: Job identifier '(a b)' contains invalid characters or unknown variables"),
        (job("a_${it}"), "[1].name: Job identifier '(a_${it})' contains invalid characters"),
        (job("a:1"), "[1].name: 'a:1' has a :"),
        (job("a", execution={"exec": "x", "args": "y"}), "[1].execution.args: expected a list, got text"),
        (job("a", execution={"exec": "x", "arg": []}), "[1].execution.arg: unknown key; did you mean args?"),
        (job("a", execution={"exec": "x", "script": "y"}), "[1].execution: give exec or script, not both"),
        (job("a", execution={"stdout": "x"}), "[1].execution: exec or script is missing"),
        (job("a", resources={"wt": "1h"}), "[1].resources: it asks for nothing: give numCores or numNodes"),
        (job("a", execution={"script": "y", "args": ["z"]}), "[1].execution: args go with exec"),
        (job("a", execution={"exec": "x", "model": "mpi"}), "[1]: model 'mpi' is unknown"),
        (job("a", execution={"exec": "x", "args": ["\0"]}), "execution.args[0]: the text contains a NUL character"),
        (job("a", resources={"numCores": -1}), "[1].resources.numCores: expected a whole number >= 0"),
        (job("a", resources={"numCores": {"max": 1}}), "[1].resources.numCores: it says no number: give exact, or"),
        (job("a", resources={"numCores": {"min": 3, "max": 1}}), "[1].resources.numCores: min is above max"),
        (job("a", resources={"numCores": {"exact": 3, "max": 4}}), "[1].resources.numCores: give exact"),
        (job("a", resources={"numNodes": 1, "nodeCrs": {"disk": 1}}), "[1].resources.nodeCrs: disk: only gpu"),
        (job("a", resources={"numCores": 1, "wt": "soon"}), "[1].resources.wt: 'soon' is no duration"),
        (job("a", iteration={"start": 3}), "[1].iteration: stop must be given"),
        (job("a", iteration={"start": 3, "stop": 3}), "[1].iteration: stop must be given, and be above start (3)"),
        (job("a", iteration={"stop": 10**12}), "[1].iteration: an iteration may have at most 10,000,000 elements"),
        (job("a", iteration={"stop": 3, "values": [1]}), "[1].iteration: give start and stop, or values"),
        (job("a", iteration={"values": []}), "[1]: values is empty"),
        (job("a", "a"), "[1].after: tasks wait for each other: a -> a"),
    ],
)
def test_bad_jobs(tmp_path: Path, bad: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, job("ok"), bad)


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    assert "[0].after: tasks wait for each other: a -> b -> a" in refusal(tmp_path, job("a", "b"), job("b", "a"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"request": "submit",\n "jobs": [}]', "jobs: line 2, column 11: this is not JSON"),
        ('{"request": "submit", "jobs": []}', "jobs: this is no list of requests: it must begin with ["),
        ('[{"request": "x", "y": ' + "[" * 100_000, "jobs: lists and tables are nested too deeply"),
    ],
)
def test_bad_documents(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "jobs"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_tasks(path, format="qcg")
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(said)
