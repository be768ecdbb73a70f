"""#SBATCH, #HQ and #DISBATCH: what they come to, what is stronger, what is named and what is refused."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.directives import read_directives
from pilotq.broker.taskfiles.reader import read_tasks
from pilotq.broker.tasks.model import ArrayRange, Request, Task

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "{index}", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "9", "SLURM_ARRAY_TASK_STEP": "3",
}  # fmt: skip
TWO = Request(cores=(2, 2))


def task_of(lines: str, **given: Any) -> tuple[Task, list[str]]:
    """What a script with these lines in its head comes to, and what is said; ``given`` is said elsewhere."""
    script = f"#!/bin/bash\n\n# a comment\n{lines}\necho\n#SBATCH --cpus-per-task=77\n#HQ --cpus=77\n"
    task = Task(script=script, **given)
    directives = read_directives(script, "job.sh")
    assert directives is not None
    task.request = directives.request(Request())
    notes = directives.complete(task, given.keys())
    task.script = None
    return task, notes


SLURM: list[tuple[str, dict[str, Any]]] = [
    ("--cpus-per-task=2", {"request": TWO, "env": {"SLURM_CPUS_PER_TASK": "2"}}),
    ("-c2", {"request": TWO, "env": {"SLURM_CPUS_PER_TASK": "2"}}),
    ("-c 3 # three\n#SBATCH --cpus-per-task 2", {"request": TWO, "env": {"SLURM_CPUS_PER_TASK": "2"}}),
    ("--cpus-per-t=2", {"request": TWO, "env": {"SLURM_CPUS_PER_TASK": "2"}}),
    ("--ntasks=1", {"request": Request(), "env": {"SLURM_NTASKS": "1", "SLURM_NPROCS": "1"}}),
    ("-n 4 -c 2", {"request": Request(cores=(8, 8), spread=True),
                   "env": {"SLURM_CPUS_PER_TASK": "2", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}}),
    ("-N 1 -n 4", {"request": Request(cores=(4, 4)), "env": {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}}),
    ("--nodes=2 --ntasks=5", {"request": Request(nodes=(2, 2), cores=(3, 3)),
                              "env": {"SLURM_NTASKS": "5", "SLURM_NPROCS": "5"}}),
    ("-N2-4 --ntasks-per-node=3 -c 2", {"request": Request(nodes=(2, 4), cores=(6, 6)),
                                        "env": {"SLURM_CPUS_PER_TASK": "2"}}),
    ("--ntasks=8 --ntasks-per-node=4", {"request": Request(nodes=(2, 2), cores=(4, 4)),
                                        "env": {"SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}}),
    ("--nodes=2", {"request": Request(nodes=(2, 2))}),
    ("--nodes=2 --exclusive", {"request": Request(nodes=(2, 2), whole=True)}),
    ("--exclusive", {"request": Request(nodes=(1, 1), whole=True)}),
    ("--mem=4G", {"request": Request(memory=4 << 30)}),
    ("--mem=500", {"request": Request(memory=500 << 20)}),
    ("--mem-per-cpu=1G -c 2", {"request": Request(cores=(2, 2), memory=2 << 30), "env": {"SLURM_CPUS_PER_TASK": "2"}}),
    ("--gpus=2", {"request": Request(gpus=2)}),
    ("--gres=gpu:a100:2 --mem-per-gpu=1G", {"request": Request(gpus=2, memory=2 << 30)}),
    ("--gres=gpu", {"request": Request(gpus=1)}),
    ("--dependency=afterany:1:2,afternotok:3,afterok:4_7:prep,afterany:5",
     {"after": ["4_7", "prep"], "after_any": ["1", "2", "5"], "after_notok": ["3"]}),
    ("-d aftercorr:9", {"after_each": ["9"]}),
    ("-N 2 -G 3 --ntasks-per-node=1", {"request": Request(nodes=(2, 2), gpus=2)}),
    ("--gpus-per-node=h100:1", {"request": Request(gpus=1)}),
    ("--gpus-per-task=2 --ntasks-per-node=2", {"request": Request(cores=(2, 2), gpus=4)}),
    ("--array=0-9:3", {"array": ArrayRange(0, 9, 3), "env": ARRAY}),
    ("--array=1,4-5,0%2", {"array": ArrayRange(0, 1, limit=2, more=((4, 5, 1),)),
                           "env": {**ARRAY, "SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_STEP": "1"}}),
    ("-a 5", {"array": ArrayRange(5, 5), "env": {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "5",
                                                 "SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_STEP": "1"}}),
    ("--time=90", {"time_limit": 5400.0}),
    ("-t 1:30", {"time_limit": 90.0}),
    ("-t 01:30:05", {"time_limit": 5405.0}),
    ("-t 1-0", {"time_limit": 86_400.0}),
    ("-t 2-00:30:00", {"time_limit": 174_600.0}),
    ("-t UNLIMITED", {}),
    ("-J my-job -o %x-%j.out", {"name": "my-job", "stdout": "my-job-{id}.out", "stderr": "my-job-{id}.out"}),
    ("--output=out --error err/%u%%.txt", {"stdout": "out", "stderr": f"err/{getpass.getuser()}%.txt"}),
    ("-o 'a b.txt' -i in", {"stdout": "a b.txt", "stderr": "a b.txt", "stdin": "in"}),
    ("-a 0-9:3 -o %A_%a.out -e %A-%a.err", {"array": ArrayRange(0, 9, 3), "env": ARRAY, "stdout": "{id}.out",
                                            "stderr": "{id}-{index}.err"}),
    ("--chdir=/tmp --nice=-10", {"cwd": "/tmp", "priority": 10}),
    ("--export=ALL,A=1,B=x=y,HOME", {"env": {"A": "1", "B": "x=y"}}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "fields"), SLURM, ids=lambda value: value if isinstance(value, str) else "")
def test_slurm(options: str, fields: dict[str, Any]) -> None:
    task, notes = task_of(f"#SBATCH {options}")
    assert task == Task(**fields)
    assert len(notes) == 1 and notes[0].startswith("job.sh: #SBATCH: obeyed: ") and "no meaning" not in notes[0]


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ("--cpus=2 --name=x", {"request": TWO, "name": "x"}),
        ("--cpus=all", {"request": Request(nodes=(1, 1), whole=True)}),
        ("--nodes 2", {"request": Request(nodes=(2, 2), whole=True)}),
        ("--resource mem=100 --resource gpus/nvidia=1 --resource fpga=2",
         {"request": Request(memory=100 << 20, gpus=1, use=(("fpga", 2),))}),
        ("--array 1,4-5%2", {"array": ArrayRange(1, 1, limit=2, more=((4, 5, 1),)), "env": {"HQ_TASK_ID": "{index}"}}),
        ("--resource gpus/nvidia=0.25", {"request": Request(gpus=0.25)}),
        ("--array 1-10:2", {"array": ArrayRange(1, 10, 2), "env": {"HQ_TASK_ID": "{index}"}}),
        ("--time-limit=10min --time-request 5m", {"time_limit": 600.0, "time_request": 300.0}),
        ("--log x.log", {"stdout": "x.log", "stderr": "x.log"}),
        ("--stderr=e.txt --stream=x.log", {"stdout": "x.log", "stderr": "e.txt"}),
        ("--resource mem=16777216", {"request": Request(memory=16_777_216 << 20)}),
        ("--resource mem=1073741824", {"request": Request(memory=1 << 30)}),
        ("--time-limit='1h 30m'\n#HQ --priority=-5", {"time_limit": 5400.0, "priority": -5}),
        ("--cwd=/tmp --env A=1 --env B=2", {"cwd": "/tmp", "env": {"A": "1", "B": "2", "HQ_TASK_ID": "0"}}),
        ("--stdout=%{CWD}/j-%{JOB_ID}.%{TASK_ID} --stderr none",
         {"stdout": "j-{id}.{index}", "stderr": "/dev/null"}),
    ],
)  # fmt: skip
def test_hyperqueue(options: str, fields: dict[str, Any]) -> None:
    task, notes = task_of(f"#HQ {options}")
    assert task == Task(**{"env": {"HQ_TASK_ID": "0"}, **fields})
    assert len(notes) == 1 and notes[0].startswith("job.sh: #HQ: obeyed: ") and "no meaning" not in notes[0]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("#SBATCH -p long --mail-type=END -c 1 --hold", "-p long --mail-type=END --hold"),
        ("#SBATCH --no-such-option=3 -y", "--no-such-option=3 -y"),
        ("#SBATCH --mem=0", "--mem=0"),
        ("#SBATCH --exclusive=user", "--exclusive=user"),
        ("#SBATCH --gres=gpu:1,tmp:2", "--gres=gpu:1,tmp:2"),
        ("#SBATCH --output=%N.txt", "--output=%N.txt"),
        ("#SBATCH --output=%5j.txt", "--output=%5j.txt"),
        ("#SBATCH --export=NONE", "--export=NONE"),
        ("#HQ --pin taskset --cpus=0.5 --crash-limit=3", "--pin taskset --cpus=0.5 --crash-limit=3"),
        ("#HQ --stdout=a:rm-if-finished --resource x/y=1", "--stdout=a:rm-if-finished --resource x/y=1"),
    ],
)
def test_what_has_no_meaning_is_named(line: str, named: str) -> None:
    (note,) = task_of(line)[1]
    assert note.endswith(f"not obeyed, it has no meaning here: {named}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("#SBATCH --cpus-per-task=x", "job.sh: line 4: #SBATCH --cpus-per-task=x: 'x' is no whole number from 1 on"),
        ("#SBATCH -a 1,3-5%0", "job.sh: line 4: #SBATCH -a 1,3-5%0: '1,3-5%0': at most 0 at a time would run nothing"),
        ("#SBATCH --array=1-x", "job.sh: line 4: #SBATCH --array=1-x: '1-x' is no array"),
        ("#SBATCH --time=soon", "job.sh: line 4: #SBATCH --time=soon: 'soon' is no time"),
        ("#SBATCH --nodes=0", "job.sh: line 4: #SBATCH --nodes=0: '0' is no number or range"),
        ("#SBATCH --mem=much", "job.sh: line 4: #SBATCH --mem=much: 'much' is no size"),
        ("#SBATCH --time", "job.sh: line 4: #SBATCH --time has no value"),
        ("#SBATCH --comment='x", "job.sh: line 4: no closing quotation"),
        ("#SBATCH -d afterok:5?afterok:6", "job.sh: line 4: #SBATCH -d afterok:5?afterok:6: a task waits for all that"),
        ("#SBATCH --dependency=singleton", "job.sh: line 4: #SBATCH --dependency=singleton: 'singleton' is not known"),
        ("#SBATCH --dependency=afterok:", "job.sh: line 4: #SBATCH --dependency=afterok:: 'afterok:' names no task"),
        ("#HQ --each-line values", "job.sh: #HQ --each-line values: give --each-line FILE on the command line"),
        ("#SBATCH -n 2\n#SBATCH hetjob\n#SBATCH -n 4", "job.sh: line 5: #SBATCH hetjob: a task has the same resources"),
        ("#HQ --nodes=x", "job.sh: line 4: #HQ --nodes=x: 'x' is no whole number"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(line: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        task_of(line)
    assert str(caught.value).startswith(said)


def test_what_is_said_elsewhere_is_stronger() -> None:
    task, (note,) = task_of(
        "#SBATCH -J job -o out -t 5 -a 0-9 --export=A=1 -d afterok:1",
        name="mine", stdout="my", values=["x", "y"], env={"A": "2", "SLURM_ARRAY_TASK_MIN": "7"}, after=["3"],
    )  # fmt: skip
    env = {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_STEP": "1"}
    assert task == Task(
        name="mine", stdout="my", values=["x", "y"], time_limit=300.0, after=["3"],
        env={**env, "A": "2", "SLURM_ARRAY_TASK_MIN": "7"},
    )  # fmt: skip
    assert note == "job.sh: #SBATCH: obeyed: -t 5 --export=A=1; replaced: -J job -a 0-9 -d afterok:1 -o out"


def test_directives_of_other_systems_are_named() -> None:
    task, notes = task_of("#PBS -l ncpus=8\n#HQ --cpus=2\n#BSUB -n 4\n#PBS -N x")
    assert task.request == TWO
    assert notes == [
        "job.sh: #HQ: obeyed: --cpus=2",
        *(f"job.sh: {w} is not obeyed: #SBATCH and #HQ are" for w in ("#BSUB", "#PBS")),
    ]


def test_what_is_no_directive() -> None:
    others = ["##SBATCH -c 2", "# SBATCH -c 2", "#SBATCHx -c 2", "#sbatch -c 2", "#SBATCH", "echo '#HQ -x'", " #HQ -x"]
    for line in others:
        assert read_directives(f"#!/bin/sh\n{line}\n", "job.sh") is None
    assert task_of("#SBATCH -c 2\n\n  # more\n#SBATCH\t-J\tx")[0].name == "x"


def test_scripts_in_files_of_tasks(tmp_path: Path) -> None:
    script = "#!/bin/sh\n#SBATCH -c 2 --mem=1G -J job -t 10\n#HQ --priority=3\n"
    tasks = [{"script": script}, {"script": script, "cores": 1, "time_limit": 7, "name": "own"}, {"command": "true"}]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({"defaults": {"memory": "2G", "gpus": 1, "time_limit": 5}, "tasks": tasks}))
    batch = read_tasks(path)
    first, second, third = batch.tasks
    assert first.request == Request(cores=(2, 2), memory=1 << 30, gpus=1)
    assert (first.time_limit, first.name, first.priority) == (600.0, None, 3)
    assert second.request == Request(cores=(1, 1), memory=1 << 30, gpus=1)
    assert (second.time_limit, second.name) == (7.0, "own")
    assert (third.request, third.time_limit) == (Request(memory=2 << 30, gpus=1), 5.0)
    assert [note.removeprefix(str(path)) for note in batch.notes[:2]] == [
        ": tasks[0].script: #SBATCH: obeyed: -t 10 -c 2 --mem=1G; not obeyed, it has no meaning here: -J job",
        ": tasks[0].script: #HQ: obeyed: --priority=3",
    ]
    path.write_text(json.dumps({"tasks": [{"script": "#SBATCH -c none\n"}]}))
    with pytest.raises(InvalidInput, match=r"tasks\[0\].script: line 1: #SBATCH -c none: 'none' is no whole number"):
        read_tasks(path)


def test_lines_of_disbatch(tmp_path: Path) -> None:
    path = tmp_path / "tasks"
    path.write_text(
        "zero\n#DISBATCH PREFIX ( cd /tmp ; \n#DISBATCH SUFFIX  ) &> log\n-a 0\n# a comment\n\n-a 1\n"
        "#DISBATCH prefix echo on \n#DISBATCH SUFFIX\nb\n"
    )
    batch = read_tasks(path, shell=True)
    scripts = ["zero", "( cd /tmp ; -a 0 ) &> log", "( cd /tmp ; -a 1 ) &> log", "echo on b"]
    assert [task.script for task in batch.tasks] == scripts
    assert batch.notes == [f"{path}: #DISBATCH: obeyed: PREFIX and SUFFIX"]
    with pytest.raises(InvalidInput, match="line 4, column 11: ';' needs a shell"):
        read_tasks(path)
    path.write_text("#DISBATCH PREFIX echo \n'a b'\n")
    assert [task.command for task in read_tasks(path).tasks] == [["echo", "a b"]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "#DISBATCH BARRIER CHECK",
            "line 2: #DISBATCH BARRIER is not known here: write the tasks in TOML",
        ),
        ("#DISBATCH REPEAT 10 x", "line 2: #DISBATCH REPEAT is not known here: an array does that"),
        ("#DISBATCH PERENGINE START x", "line 2: #DISBATCH PERENGINE is not known here"),
    ],
)
def test_directives_of_disbatch_that_would_change_what_runs_are_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "tasks").write_text(f"true\n{line}\ntrue\n")
    with pytest.raises(InvalidInput, match=said):
        read_tasks(tmp_path / "tasks")


def test_a_script_that_is_given_as_lines_is_told(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text("#!/bin/bash\n#SBATCH -c 2\n#SBATCH -n 2\necho one\n#!no\n")
    with pytest.raises(InvalidInput, match=f"it is a script .* run it with --script {path}, or say --format lines"):
        read_tasks(path, shell=True)
    assert read_tasks(path, format="lines").notes == [
        f"{path}: each line is a task here, and #! has no meaning: a script is --script {path}",
        f"{path}: each line is a task here, and #SBATCH has no meaning: a script is --script {path}",
    ]
    path.write_text("#!/usr/bin/env -S pilotq run\n#HQX\necho one\n")
    assert read_tasks(path).notes == []
