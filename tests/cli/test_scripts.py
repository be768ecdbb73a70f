"""Scripts as a user gives them: what runs them, their directives, and the values of arrays in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pilotq.broker import ArrayRange, Task
from pilotq.broker.tasks.script_text import ARGUMENT_BYTES
from tests.support.command_line import prompt
from tests.support.live_pilot import live_pilot

SCRIPTS = {
    "bash -e": ("#!/bin/bash -e\nfalse\necho reached", 1, ""),
    "sh": ("#!/bin/sh\nset -- $(ps -o args= $$)\necho $1", 0, "/bin/sh\n"),
    "python": ('#!/usr/bin/env python3\nimport sys\nprint(f"{sys.argv[1:]}")', 0, "[]\n"),
    "env -S": ("#!/usr/bin/env -S python3 -u -O\nassert False\nprint(1)", 0, "1\n"),
    "perl": ('#! /usr/bin/perl -w\nprint "perl\\n"; exit 4', 4, "perl\n"),
    "awk": ("#!/usr/bin/awk -f\nBEGIN { print 6 * 7 }", 0, "42\n"),
    "none": ("echo one\necho two | tr o 0", 0, "one\ntw0\n"),
    "long": (
        "#!/bin/bash\n" + "".join(f": text {n}\n" for n in range(ARGUMENT_BYTES // 10)) + "echo end", 0, "end\n",
    ),
    "long line": (f"echo {'x' * ARGUMENT_BYTES} | wc -c", 0, f"{ARGUMENT_BYTES + 1}\n"),
}  # fmt: skip


def test_the_first_line_names_what_runs_a_script(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:2") as pilot:
        tasks = pilot.broker.enqueue_many([Task(script=text) for text, _, _ in SCRIPTS.values()])
        for task, (name, (_, code, output)) in zip(tasks, SCRIPTS.items(), strict=True):
            ended = pilot.ended(task)
            assert (ended.exit_code, pilot.output(task).decode()) == (code, output), name
        assert list((tmp_path / "pilot" / "scripts").glob("*/*")) == []
    assert list((tmp_path / "pilot" / "scripts").iterdir()) == []
    (tmp_path / "e.sh").write_text(SCRIPTS["bash -e"][0])
    assert prompt(tmp_path)("run", "--script", "e.sh").returncode == 1


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("\n", "script is empty"),
        ("#!/bin/bash\r\necho\r\n", "the first line of script ends with a carriage return"),
        ("\n#!/bin/bash\necho\n", "script does not begin with its `#!`"),
        ("\ufeff#!/bin/bash\necho\n", "script does not begin with its `#!`"),
    ],
)
def test_a_script_that_cannot_run_is_refused(tmp_path: Path, script: str, said: str) -> None:
    (tmp_path / "s").write_bytes(script.encode())
    ran = prompt(tmp_path)("run", "--script", "s")
    assert ran.returncode == 2 and said in ran.stderr
    assert not (tmp_path / ".pilotq").exists()


def test_file_names_reach_scripts_as_they_are(tmp_path: Path) -> None:
    names = [
        "a (1).txt",
        "$(touch pwned).txt",
        'it\'s "b"; touch pwned #',
        "-n `touch pwned`",
    ]  # as somebody may have named files
    for name in names:
        (tmp_path / name).write_text(f"<{name}>\n")
    tasks = {
        "quoted": Task(script='cat -- "{value}"'),
        "bare": Task(script="#!/bin/sh\ncat -- {value}\n"),
        "single": Task(script="#!/bin/bash -e\ncat -- '{value}'\n"),
        "variable": Task(script='cd . && cat -- "$PILOTQ_VALUE"\n'),
        "python": Task(
            script=f"#!{sys.executable}\nimport os\nvalue = os.environ['PILOTQ_VALUE']\nprint(f'<{{value}}>')"
        ),
        "command": Task(command=["sh", "-c", "cat -- {value}"]),
        "both": Task(
            command=["env", "sh", "-c", 'cat -- "$1" > \'{value}.{index}\'; cat -- "$1.{index}"', "", "{value}"]
        ),
    }
    for task in tasks.values():
        task.values, task.cwd = names, str(tmp_path)
    show = ["sh", "-c", "echo {value} $PILOTQ_INDEX ${PILOTQ_VALUE-none}"]
    others = [Task(command=show, array=ArrayRange(3, 4)), Task(command=show)]
    with live_pilot(tmp_path, "n1:2") as pilot:
        ids = pilot.broker.enqueue_many([*tasks.values(), *others])
        pilot.broker.wait(ids, timeout=60)
        for array, name in zip(ids, tasks, strict=False):
            assert [pilot.output(f"{array}_{n}").decode() for n in range(4)] == [f"<{name}>\n" for name in names], name
        printed = [pilot.output(task) for task in (f"{ids[-2]}_3", f"{ids[-2]}_4", ids[-1])]
        assert printed == [b"3 3 3\n", b"4 4 4\n", b"{value} none\n"]
    assert not (tmp_path / "pwned").exists()


JOB = """#!/bin/bash
#SBATCH --cpus-per-task=2 --array=0-3:3   # two of two cores
#SBATCH --output=out/%x-%A_%a.txt -J job
#SBATCH --partition=long --time=5 --nodes=1
test -z "$FAIL" || exit 3
echo "$PILOTQ_CORES $SLURM_CPUS_PER_TASK $SLURM_ARRAY_TASK_ID $SLURM_ARRAY_TASK_MAX"
echo "to stderr" >&2
"""


def test_a_script_makes_its_requests_itself(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(JOB)
    cli = prompt(tmp_path)
    ran = cli("run", "--nodes", "2", "--script", "job.sh")
    assert "2 tasks: 2 finished" in ran.stdout, ran.stderr
    assert ran.stderr.splitlines() == [
        "pilotq: job.sh: #SBATCH: obeyed: --array=0-3:3 -J job --time=5 --cpus-per-task=2 --nodes=1 "
        "--output=out/%x-%A_%a.txt; not obeyed, it has no meaning here: --partition=long"
    ]
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert files == {f"job-1_{n}.txt": f"2 2 {n} 3\nto stderr\n" for n in (0, 3)}
    ran = cli("run", "--nodes", "2", "--cores", "1", "--array", "7", "--stdout", "mine-{id}", "--script", "job.sh")
    assert "1 task: 1 finished" in ran.stdout, ran.stderr
    assert "; replaced: --array=0-3:3 --cpus-per-task=2 --output=out/%x-%A_%a.txt; " in ran.stderr
    assert (tmp_path / "mine-1_7").read_text() == "1 2 7 7\n"
    ran = cli("run", "--nodes", "2", "--no-directives", "--stdout", "{id}", "--script", "job.sh")
    assert (ran.returncode, (tmp_path / "1").read_text()) == (0, "1   \n"), ran.stderr
    assert "SBATCH" not in ran.stderr
    ran = cli("run", "--nodes", "1", "--script", "job.sh")
    assert ran.returncode == 2 and "needs 2 cores on one node; the largest, n0, has 1 core" in ran.stderr


def test_a_script_asks_for_an_array_with_gaps(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(
        JOB.replace("0-3:3 ", "1,3-4%1 ").replace("echo", "echo $SLURM_ARRAY_TASK_COUNT", 1)
    )
    ran = prompt(tmp_path)("run", "--nodes", "2", "--script", "job.sh")
    assert "3 tasks: 3 finished" in ran.stdout, ran.stderr
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert files == {f"job-1_{n}.txt": f"3 2 2 {n} 4\nto stderr\n" for n in (1, 3, 4)}
