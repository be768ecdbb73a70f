"""The executor plugin for Snakemake, with Snakemake itself, in an environment of its own (.ci/run has it)."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from pilotq.broker import Broker
from tests.support.command_line import in_background
from tests.support.live_pilot import left_of
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(find_spec("snakemake") is None, reason="Snakemake is not installed"),
    pytest.mark.timeout(300),
]
WAIT_S = 120.0  # Snakemake itself takes seconds for each job on a busy machine
MANY = ("--max-jobs-per-timespan", "10000/1s")  # Snakemake submits at most 100 jobs a second otherwise

# Each kind of job: plain commands with a temporary file, a log, threads, memory; a script; a `run` block; a group.
KINDS = """
rule all:
    input: "all.txt"
rule part:
    output: temp("parts/{i}.txt")
    log: "logs/part {i}.log"
    params: word=lambda wc: f"it's {wc.i}"
    shell: "echo {params.word:q} > {output}; echo 'part {wildcards.i} $' >&2 2> '{log}'"
rule wide:
    input: expand("parts/{i}.txt", i=range(4))
    output: "wide.txt"
    threads: 2
    resources: mem_mb=50, runtime=5, disk_mb=10
    shell: "cat {input} > {output}; echo {threads} $OMP_NUM_THREADS >> {output}"
rule script:
    output: "script.txt"
    script: "part.py"
rule block:
    output: "block.txt"
    run:
        with open(output[0], "w") as file: file.write(f"{wildcards} {threads}")
rule first:
    output: "first.txt"
    group: "pair"
    shell: "echo first > {output}"
rule second:
    input: "first.txt"
    output: directory("second")
    group: "pair"
    benchmark: "second.tsv"
    shell: "mkdir {output}; cp {input} {output}/copy"
rule gather:
    input: "wide.txt", "script.txt", "block.txt", "second"
    output: protected("all.txt")
    shell: "cat wide.txt script.txt block.txt second/copy > {output}"
"""
SCRIPT = "open(snakemake.output[0], 'w').write(f'script {snakemake.threads}\\n')\n"


def snakemake(folder: Path, *args: str, code: int | None = 0, **env: str) -> str:
    """Run Snakemake in a folder; returns what it says."""
    done = subprocess.run(
        command(*args), cwd=folder, env=variables(**env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stdout
    return done.stdout


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--nocolor", *args]


def variables(**env: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("PILOTQ_", "SNAKEMAKE_"))} | env


@contextmanager
def running(folder: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Snakemake in the background; it has ended afterwards, in one way or another."""
    with subprocess.Popen(
        command(*args), cwd=folder, env=variables(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def files(folder: Path) -> dict[str, str]:
    """What a workflow has made: path -> content."""
    found = (path for path in folder.rglob("*") if path.is_file())
    paths = {path.relative_to(folder).as_posix(): path for path in found}
    return {
        name: path.read_text() for name, path in paths.items()
        if not name.startswith((".snakemake", ".pilotq")) and not name.endswith(".tsv")
    }  # fmt: skip


@contextmanager
def workflow(folder: Path, text: str, *options: str, **env: str) -> Iterator[Broker]:
    """A folder with a Snakefile, and a pilot that runs in it."""
    (folder / "Snakefile").write_text(text)
    started = in_background(folder, *(options or ("--nodes", "2")), **env)
    with started, Broker.connect(str(folder / ".pilotq" / "current")) as broker:
        yield broker


def test_every_kind_of_job_makes_the_files_that_the_local_executor_makes(tmp_path: Path) -> None:
    made = {}
    for name, options in {"local": ["--cores", "2"], "pilotq": ["--executor", "pilotq", "--jobs", "10"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "Snakefile").write_text(KINDS)
        (tmp_path / name / "part.py").write_text(SCRIPT)
        said = snakemake(tmp_path / name, *options)
        assert "11 of 11 steps" in said, said
        made[name] = files(tmp_path / name)
    assert made["pilotq"] == made["local"]
    assert made["pilotq"]["all.txt"].startswith("it's 0\nit's 1\nit's 2\nit's 3\n2 2\nscript")
    assert "disk_mb is ignored" in said
    assert not os.access(tmp_path / "pilotq" / "all.txt", os.W_OK) or os.getuid() == 0
    # Its private pilot has ended with it.
    [directory] = re.findall(r"tasks of the pilot in (\S+),", said)
    assert not Path(directory).exists() and not left_of(directory)


def test_requests_go_with_the_tasks(tmp_path: Path) -> None:
    text = """
rule all:
    input: "gpu.txt", "first.txt"
rule gpu:
    output: "gpu.txt"
    threads: 2
    priority: 7
    resources: mem_mb=100, runtime=3, gpu=1
    shell: "echo $CUDA_VISIBLE_DEVICES $PILOTQ_CPUS $TMPDIR {resources.tmpdir} > {output}"
rule first:
    output: "first.txt"
    shell: "echo $PILOTQ_CORES > {output}"
"""
    with workflow(tmp_path, text, CUDA_VISIBLE_DEVICES="5") as broker:
        snakemake(tmp_path, "--executor", "pilotq", "--jobs", "2", "--default-resources", f"tmpdir='{tmp_path}'")
        assert (tmp_path / "gpu.txt").read_text() == f"5 0,1 {tmp_path} {tmp_path}\n"
        assert (tmp_path / "first.txt").read_text() == "1\n"
        views = {view.name: view for view in broker.tasks()}
        assert set(views) == {"gpu", "first"} and all(v.queue.startswith("snakemake-") for v in views.values())
        found = broker.redis.hget(f"rq:job:{views['gpu'].id}", "pq_class")
        assert found == b"%s.p7.2c-1g-m100000000-t300" % views["gpu"].queue.encode()


def test_a_job_that_failed_is_tried_again_with_its_attempt(tmp_path: Path) -> None:
    text = """
rule one:
    output: "one.txt"
    retries: 2
    resources: mem_mb=lambda wildcards, attempt: 10 * attempt
    shell: "echo {resources.mem_mb} >> tries; echo done > {output}; test {resources.mem_mb} = 30"
"""
    (tmp_path / "Snakefile").write_text(text)
    snakemake(tmp_path, "--executor", "pilotq", "--jobs", "2", "--pilotq-nodes", "1")
    assert (tmp_path / "tries").read_text() == "10\n20\n30\n"


def test_a_failure_says_why_and_where_the_output_is_and_touches_no_other_job(tmp_path: Path) -> None:
    text = """
rule all:
    input: "bad.txt", "wide.txt", "lazy.txt", "good.txt"
rule bad:
    output: "bad.txt"
    shell: "touch {output}; echo no such grid >&2; exit 3"
rule wide:
    output: "wide.txt"
    threads: 99
    shell: "touch {output}"
rule lazy:
    output: "lazy.txt"
    shell: "true"
rule good:
    output: "good.txt"
    shell: "touch {output}"
"""
    (tmp_path / "Snakefile").write_text(text)
    options = ("--executor", "pilotq", "--jobs", "4", "--pilotq-nodes", "2", "--keep-going", "--latency-wait", "1")
    said = snakemake(tmp_path, *options, code=1)
    assert "it ended with a non-zero exit code (3)" in said
    assert "needs 99 cores on one node; the largest, n0, has 2 cores" in said
    [log] = (tmp_path / ".snakemake" / "pilotq_logs").glob("bad.*.log")
    assert log.read_text() == "no such grid\n" and log.name in said
    assert set(files(tmp_path)) == {"Snakefile", "good.txt"}


SLOW = """
rule all:
    input: expand("done/{i}.txt", i=range(6))
rule one:
    output: "done/{i}.txt"
    shell: "echo {wildcards.i} >> started; until [ -e go ]; do sleep 0.02; done; touch {output}"
"""


def started(folder: Path) -> list[str]:
    path = folder / "started"
    return path.read_text().split() if path.exists() else []


def test_after_a_kill_the_next_run_goes_on_with_what_runs(tmp_path: Path) -> None:
    options = ("--executor", "pilotq", "--jobs", "6")
    with workflow(tmp_path, SLOW) as broker:
        with running(tmp_path, *options) as first:
            wait_until(lambda: len(started(tmp_path)) == 2, seconds=WAIT_S, what="two jobs that run")
            wait_until(lambda: broker.counts().total == 6, seconds=WAIT_S, what="six tasks")
            marks = tmp_path / ".snakemake" / "incomplete"
            wait_until(lambda: len(list(marks.iterdir())) == 6, seconds=WAIT_S, what="their marks")
            first.kill()
        snakemake(tmp_path, "--unlock")
        with running(tmp_path, *options) as second:
            assert second.stdout is not None
            taken_over = (line for line in second.stdout if "goes on as task" in line)
            assert len(list(islice(taken_over, 6))) == 6
            (tmp_path / "go").touch()
            said, _ = second.communicate(timeout=WAIT_S)
            assert second.returncode == 0, said
        assert len(list((tmp_path / "done").iterdir())) == 6
        # Each has run once.
        assert sorted(started(tmp_path)) == [str(n) for n in range(6)] and broker.counts().total == 6


def test_after_a_kill_tasks_that_no_job_takes_over_are_canceled_first(tmp_path: Path) -> None:
    options = ("--executor", "pilotq", "--jobs", "6")
    with workflow(tmp_path, SLOW) as broker:
        with running(tmp_path, *options) as first:
            wait_until(lambda: len(started(tmp_path)) == 2, seconds=WAIT_S, what="two jobs that run")
            wait_until(lambda: broker.counts().total == 6, seconds=WAIT_S, what="six tasks")
            first.kill()
        (tmp_path / "started").unlink()
        snakemake(tmp_path, "--unlock")
        with running(tmp_path, *options, "--rerun-incomplete") as second:
            wait_until(lambda: len(started(tmp_path)) == 2, seconds=WAIT_S, what="two jobs of the second run")
            wait_until(lambda: broker.counts().total == 12, seconds=WAIT_S, what="six more tasks")
            assert broker.counts().ended == 6
            (tmp_path / "go").touch()
            assert second.wait(WAIT_S) == 0
        assert sorted(started(tmp_path)) == [str(n) for n in range(6)]


def test_ctrl_c_ends_what_runs_and_the_private_pilot(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SLOW)
    with running(tmp_path, "--executor", "pilotq", "--jobs", "6", "--pilotq-nodes", "2") as process:
        wait_until(lambda: len(started(tmp_path)) == 2, seconds=WAIT_S, what="two jobs that run")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1, said
    [directory] = re.findall(r"tasks of the pilot in (\S+),", said)
    assert not Path(directory).exists() and not left_of(directory) and not list(tmp_path.glob("done/*"))


def test_a_private_pilot_ends_when_snakemake_is_killed(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SLOW)
    with running(tmp_path, "--executor", "pilotq", "--jobs", "6", "--pilotq-nodes", "2") as process:
        wait_until(lambda: len(started(tmp_path)) == 2, seconds=WAIT_S, what="two jobs that run")
        process.kill()
        assert process.stdout is not None
        [directory] = re.findall(r"tasks of the pilot in (\S+),", process.stdout.read())
    wait_until(lambda: not left_of(directory), seconds=WAIT_S, what="the end of the pilot and its tasks")
    assert not list(tmp_path.glob("done/*"))
    shutil.rmtree(Path(directory).parent)  # nobody is left who would


def test_after_ctrl_c_the_next_run_begins_anew_and_others_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    options = ("--executor", "pilotq", "--jobs", "6")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "stays").touch()  # Snakemake removes empty folders when it is interrupted
    with workflow(tmp_path, SLOW) as broker:
        with running(tmp_path, *options, "done/0.txt") as first:
            wait_until(lambda: started(tmp_path) == ["0"], seconds=WAIT_S, what="the first one's job")
            with running(tmp_path, *options, "done/1.txt", "--nolock") as second:
                wait_until(lambda: started(tmp_path) == ["0", "1"], seconds=WAIT_S, what="the second one's job")
                second.send_signal(signal.SIGINT)
                assert second.wait(WAIT_S) == 1
            assert (broker.counts().ended, broker.counts().total) == (1, 2)
            (tmp_path / "go").touch()
            said, _ = first.communicate(timeout=WAIT_S)
            assert first.returncode == 0, said
        snakemake(tmp_path, *options)
        assert len(list((tmp_path / "done").iterdir())) == 7
    assert not list((tmp_path / ".snakemake" / "pilotq_runs").iterdir())


WIDE = """
rule all:
    input: expand("out/{i}.txt", i=range(200))
rule one:
    output: "out/{i}.txt"
    shell: "echo {wildcards.i} > {output}"
"""


def test_many_jobs_make_what_they_make_under_cluster_generic(tmp_path: Path) -> None:
    """And fast enough that no job can have had a Snakemake of its own."""
    (tmp_path / "Snakefile").write_text(WIDE)
    snakemake(tmp_path, "--executor", "pilotq", "--jobs", "200", "--pilotq-nodes", "2", *MANY)
    assert {name: text for name, text in files(tmp_path).items() if "/" in name} == {
        f"out/{n}.txt": f"{n}\n" for n in range(200)
    }


def test_without_a_pilot_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(WIDE)
    said = snakemake(tmp_path, "--executor", "pilotq", "--jobs", "2", "--pilotq-dir", "nowhere", code=1)
    assert "The executor pilotq has no pilot: nowhere (--dir) is no pilot's directory" in said
    assert "cannot schedule" not in said


def test_on_another_host_a_command_waits_for_its_inputs_and_a_second_execution_begins_anew(tmp_path: Path) -> None:
    tasks = importlib.import_module("snakemake_executor_plugin_pilotq.tasks")
    late, made = tmp_path / "it's late.txt", tmp_path / "out put"
    text = tasks.await_inputs([str(late)], 60) + tasks.clean_outputs([str(made)]) + f"cat '{tmp_path}'/*late*"
    (made / "half").mkdir(parents=True)
    with subprocess.Popen(
        ["bash", "-euc", text], env={**os.environ, "PILOTQ_EXECUTION": "2"}, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(), what="its pause")
        late.write_text("here")
        assert process.communicate(timeout=WAIT_S)[0] == "here" and process.returncode == 0
    assert not made.exists()
    gone = tasks.await_inputs([str(tmp_path / "gone")], 1) + "echo on"
    assert subprocess.run(["bash", "-euc", gone], capture_output=True, text=True).stdout == "on\n"
