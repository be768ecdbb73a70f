"""The command `hq` on a pilot: by the calls that Nextflow makes, and by aiida-hyperqueue itself (.ci/run has it).

Nextflow's calls are those of its `HyperQueueExecutor.groovy`, and what it reads is read here as it does. HyperQueue's
JSON is that of `client/output/json.rs`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

HQ = ROOT / "integrations" / "hyperqueue" / "hq_pilotq.py"
pytestmark = pytest.mark.timeout(300)  # each call starts Python
WAIT_S = 60.0


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("hq"), "n1:2") as live:
        live.broker.redis.ping()  # its connection is not one test's
        yield live


class Shell:
    """A folder with `hq` on its path and a pilot."""

    def __init__(self, folder: Path, directory: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        program = folder / "bin" / "hq"
        program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{HQ}' \"$@\"\n")
        program.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PILOTQ_DIR": directory}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=WAIT_S,
        )  # fmt: skip

    def __call__(self, *words: str, code: int = 0) -> str:
        done = self.run("hq", *words)
        assert done.returncode == code, done.stderr
        return done.stdout


@pytest.fixture
def hq(tmp_path: Path, pilot: LivePilot) -> Shell:
    return Shell(tmp_path, pilot.pilot.directory)


def statuses(text: str) -> dict[str, str]:
    """As Nextflow reads a list: the words of each line are the number and the state."""
    return dict(line.split(" ") for line in text.split("\n") if line)


NEXTFLOW = """#!/bin/bash
#HQ --name nf-hello_(1)
#HQ --log {folder}/.command.log
#HQ --cwd {folder}
#HQ --resource mem=1073741824
#HQ --cpus 2
#HQ --time-limit 60sec
echo "on $PILOTQ_CPUS"; echo problem >&2; {rest}
"""


def test_the_calls_of_nextflow(hq: Shell, pilot: LivePilot) -> None:
    work = hq.folder / "work dir"
    work.mkdir()
    hq.folder = work

    def submitted(rest: str) -> str:
        (work / ".command.run").write_text(NEXTFLOW.format(folder=str(work).replace(" ", "\\ "), rest=rest))
        return str(int(hq("--output-mode=quiet", "submit", "--directives=file", ".command.run")))

    number = submitted("exit 0")
    wait_until(lambda: statuses(hq("--output-mode=quiet", "job", "list", "--all"))[number] == "FINISHED")
    assert (work / ".command.log").read_text() == "on 0,1\nproblem\n"
    view = pilot.ended(pilot.broker.find("nf-hello_(1)")[0])
    spec = pilot.broker.redis.hget(f"rq:job:{view.id}", "pq_class")
    assert spec == b"default.p0.2c-m1073741824-t60"
    first, second, bad = submitted("sleep 100"), submitted("sleep 100"), submitted("exit 3")
    wait_until(lambda: statuses(hq("--output-mode=quiet", "job", "list", "--all"))[first] == "RUNNING")
    found = statuses(hq("--output-mode=quiet", "job", "list", "--all"))
    assert found[second] == "WAITING" and found[bad] == "WAITING"
    hq("job", "cancel", f"{first},{second}")
    hq("job", "wait", bad, code=1)
    found = statuses(hq("--output-mode=quiet", "job", "list", "--all"))
    assert (found[number], found[bad], found[second]) == ("FINISHED", "FAILED", "CANCELED")
    wait_until(lambda: statuses(hq("--output-mode=quiet", "job", "list", "--all"))[first] == "CANCELED")


def test_options_of_the_command_line(hq: Shell) -> None:
    (hq.folder / "names.txt").write_text("red\ngreen\n")
    lines = ["submit", "--each-line", "names.txt", "--stdout", "%{TASK_ID}.out", "--wait", "sh", "-c", "echo $HQ_ENTRY"]
    hq(*lines)
    assert (hq.folder / "1.out").read_text() == "green\n"
    some = ["--cpus=1", "--array", "1-3", "--stderr=none", "--stdout=%{TASK_ID}.txt", "--priority", "3", "--name=some"]
    out = hq("submit", *some, "--output-mode", "json", "--", "sh", "-c", "echo $HQ_TASK_ID; test $HQ_TASK_ID -ne 2")
    number = json.loads(out)["id"]
    hq("job", "wait", str(number), code=1)
    [job] = [job for job in json.loads(hq("job", "list", "--all", "--output-mode=json")) if job["id"] == number]
    stats = {"running": 0, "finished": 2, "failed": 1, "canceled": 0, "waiting": 0}
    assert job == {"id": number, "name": "some", "task_count": 3, "task_stats": stats}
    assert (hq.folder / "3.txt").read_text() == "3\n"
    (hq.folder / "job.sh").write_text("#HQ --name=script --stdout=script.txt\necho $0 $1\n")
    hq("submit", "--wait", "job.sh", "word")
    assert (hq.folder / "script.txt").read_text() == f"{hq.folder / 'job.sh'} word\n"
    assert hq("--output-mode=quiet", "server", "info").strip() == hq.env["PILOTQ_DIR"]
    hq("server", "start")
    done = hq.run("hq", "submit", "--wait", "--pin", "taskset", "--name=pinned", "true")
    assert done.returncode == 0 and done.stderr == "hq: not obeyed, it has no meaning here: --pin taskset\n"
    assert hq.run("hq", "submit", "--pin=no", "--output-mode=quiet", "--name=script", "true").stderr == ""
    numbers = [job["info"]["id"] for job in json.loads(hq("--output-mode=json", "job", "info", "1,1-2,2"))]
    assert numbers == [1, 2]
    assert json.loads(hq("--output-mode=json", "job", "info", "last"))[0]["info"]["name"] == "script"


def test_wrong_calls_say_what_is_wrong(hq: Shell) -> None:
    for words, why in {
        ("submit", "--cpu-s=2", "true"): "there is no option --cpu-s=2",
        ("submit", "--cpus", "99", "true"): "can never run here",
        ("submit", "--stdin", "cat"): "--stdin: a pilot does not have this",
        ("submit", "--cpus", "2 scatter", "true"): "--cpus 2 scatter: a pilot does not have this",
        ("submit", "--resource=odd=x", "true"): "--resource=odd=x: a pilot does not have this",
        ("submit", "--directives=file", "gone.sh"): "gone.sh: No such file",
        ("submit",): "give a command",
        ("job", "cancel", "x"): "'x' is no number of a job",
        ("job", "list", "--filter", "odd"): "there is no state odd",
        ("submit", "--time-limit", "x", "true"): "hq: submit --time-limit: 'x' is no duration",
        ("job", "cancel", "99999"): "there is no job 99999",
        ("job", "wait", "99998,99999"): "there is no job 99998, 99999: `hq job list --all`",
        ("job", "info", "99999"): "there is no job 99999",
    }.items():
        done = hq.run("hq", *words)
        assert done.returncode == 1 and why in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = hq.run("hq", "alloc", "list")
    assert done.returncode == 2 and done.stderr.startswith("hq: `alloc list` is not known here\n")
    assert "hq submit [OPTIONS]" in hq("--help") and hq("--version").startswith("hq on pilotq ")


def test_people_are_told_how_jobs_have_ended(hq: Shell) -> None:
    number = hq("submit", "--name=bad", "--stdout=none", "sh", "-c", "exit 3").split()[-1]
    done = hq.run("hq", "job", "wait", number)
    assert (done.returncode, done.stderr) == (1, "hq: not all tasks have finished: 1 failed\n")
    assert hq.run("hq", "--output-mode=quiet", "job", "wait", number).stderr == ""
    lines = dict(line.split(maxsplit=1) for line in hq("job", "info", number).splitlines())
    assert lines["info"] == f"job {number} (bad) failed; tasks: 1 failed" and lines["exit_code"] == "3"
    assert time.strptime(lines["finished_at"], "%Y-%m-%d %H:%M:%S")
    assert lines["cores"].startswith("n1[") and lines["command"].startswith("sh -c")


@pytest.mark.skipif(find_spec("aiida_hyperqueue") is None, reason="aiida-hyperqueue is not installed")
@pytest.mark.filterwarnings("ignore")  # AiiDA's own, at its import
def test_aiida_runs_its_jobs(hq: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIIDA_PATH", str(hq.folder))
    plugin = importlib.import_module("aiida_hyperqueue.scheduler")
    templates = importlib.import_module("aiida.schedulers.datastructures")
    scheduler = plugin.HyperQueueScheduler()
    job: Any = templates.JobTemplate()
    job.job_name, job.sched_output_path, job.sched_error_path = "aiida-1", "_scheduler-stdout.txt", "_err.txt"
    job.max_wallclock_seconds, job.priority = 600, "5"
    job.job_resource = plugin.HyperQueueJobResource(num_cpus=2, memory_mb=100)

    def submitted(command: str) -> str:
        header = scheduler._get_submit_script_header(job)
        (hq.folder / "_aiidasubmit.sh").write_text(f"#!/bin/bash\n{header}\n\n{command}\n")
        done = hq.run("bash", "-c", scheduler._get_submit_command("_aiidasubmit.sh"))
        number: str = scheduler._parse_submit_output(done.returncode, done.stdout, done.stderr)
        assert not done.stderr
        return number

    def listed() -> dict[str, Any]:
        done = hq.run("bash", "-c", scheduler._get_joblist_command())
        found = scheduler._parse_joblist_output(done.returncode, done.stdout, done.stderr)
        return {info.job_id: (info.title, info.job_state) for info in found}

    state = templates.JobState
    first, second = submitted("echo $PILOTQ_CPUS; sleep 100"), submitted("true")
    wait_until(lambda: listed().get(first) == ("aiida-1", state.RUNNING), seconds=WAIT_S)
    assert listed()[second] == ("aiida-1", state.QUEUED)
    assert (hq.folder / "_scheduler-stdout.txt").read_text() == "0,1\n"
    done = hq.run("bash", "-c", scheduler._get_kill_command(first))
    assert scheduler._parse_kill_output(done.returncode, done.stdout, done.stderr)
    wait_until(lambda: not listed(), seconds=WAIT_S)
    info = hq.run("hq", *scheduler._get_detailed_job_info_command(second).partition(" | ")[0].split()[1:])
    assert json.loads(info.stdout)[0]["info"]["task_stats"]["finished"] == 1
