"""Workers on the nodes of an allocation, with stubs of srun, ssh and scontrol, which do at will what the real ones do
rarely. Each starts on this machine what it is to start on a node."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pilotq.broker import Broker
from tests.support.command_line import command, environment, prompt
from tests.support.waiting import wait_until

# Runs the worker once for each node, in the background, and reports their ends as srun does. A file fail.NODE makes
# the launch on that node fail, once; a file busy.NODE makes it wait, and report that as srun does; for a file down.NODE
# it reports that the node has failed, and removes the file.
SRUN = """\
#!/bin/bash
nodes=$(printf '%s\\n' "$@" | sed -n 's/^--nodelist=//p' | tr , ' ')
while [[ $1 == --* ]]; do shift; done
trap 'ending=1; kill -TERM $(jobs -p) 2>/dev/null' TERM
for node in $nodes; do
    while [ -e "$FAKES/busy.$node" ]; do
        echo "srun: Job $SLURM_JOB_ID step creation temporarily disabled, retrying (Requested nodes are busy)" >&2
        touch "$FAKES/said"
        sleep 0.2
        [ -z "$ending" ] || break 2
    done
    if [ -e "$FAKES/fail.$node" ]; then
        rm "$FAKES/fail.$node"
        echo "srun: error: Task launch for StepId=$SLURM_JOB_ID.0 failed on node $node: Communication failure" >&2
        continue
    fi
    (
        SLURMD_NODENAME=$node "$@" &
        worker=$!
        while sleep 0.1; do
            rm "$FAKES/down.$node" 2>/dev/null && echo "srun: error: Node failure on $node" >&2
        done &
        watch=$!
        trap "kill -TERM $worker" TERM
        wait $worker; code=$?
        while kill -0 $worker 2>/dev/null; do wait $worker; code=$?; done
        kill $watch
        [ $code = 0 ] || echo "srun: error: $node: task 0: Exited with exit code $code" >&2
    ) &
done
while [ -n "$(jobs -p)" ]; do wait -n; jobs >/dev/null; [ -n "$(jobs -rp)" ] || break; done
"""
# Takes its options and the host, and runs the command with nothing but a home, out of reach of the signals that ssh
# gets; its stdin is that of ssh.
SSH = """\
#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
touch "$FAKES/ssh.$1"; shift
setsid env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "$*" <&0 &
wait $!
"""


@contextmanager
def allocation(folder: Path, nodes: str, **programs: str) -> Iterator[dict[str, str]]:
    """The environment of a batch script in an allocation of these nodes, with these programs on PATH."""
    fakes = folder / "fakes"
    fakes.mkdir()
    for name, text in programs.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(stat.S_IRWXU)
    yield {
        "PATH": f"{fakes}:{os.environ['PATH']}", "FAKES": str(fakes), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": nodes,
        "PILOTQ_SETTINGS": json.dumps({"kill_grace_s": 0.5, "worker_restart_s": 0.2, "nodes_wait_s": 6.0}),
    }  # fmt: skip


def hosts(folder: Path) -> set[str]:
    return {path.name.removeprefix("on.") for path in folder.glob("on.*")}


def test_a_node_on_which_srun_fails_is_tried_again_and_joins_late(tmp_path: Path) -> None:
    with allocation(tmp_path, "n[1-2]", srun=SRUN) as env:
        (tmp_path / "fakes" / "fail.n2").touch()
        script = "touch on.$PILOTQ_NODELIST; until [ -e on.n1 ] && [ -e on.n2 ]; do sleep 0.05; done"
        ran = prompt(tmp_path)("run", "--bind", "127.0.0.1", "--dir", "p", "--nodes", "2", "--array", "0-7", "--",
                               "sh", "-c", script, **env)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    assert hosts(tmp_path) == {"n1", "n2"}
    log = (tmp_path / "p" / "logs" / "supervisor.log").read_text()
    assert "the worker of node n2 has ended: srun: Communication failure" in log


@pytest.mark.parametrize(
    ("options", "lost", "why"),
    [
        (("--cores", "9999"), "", "needs 9999 cores on one node; the largest, n1, has"),
        ((), "n2", "needs 1 core on each of 2 nodes; only 1 node has that much"),
    ],
    ids=["cores", "a node that never comes"],
)
def test_what_can_never_run_is_refused_when_the_nodes_are_known(
    tmp_path: Path, options: tuple[str, ...], lost: str, why: str
) -> None:
    """Not at once, as the nodes are not; and not at the end of the allocation, whose nodes would be idle until then."""
    with allocation(tmp_path, "n[1-2]", srun=SRUN.replace('rm "$FAKES/fail.$node"', "true")) as env:
        env["PILOTQ_SETTINGS"] = '{"worker_restart_s": 0.2, "restart_limit": 1}' if lost else "{}"
        if lost:
            (tmp_path / "fakes" / f"fail.{lost}").touch()
            (tmp_path / "t.json").write_text('{"tasks": [{"command": ["true"], "nodes": 2, "cores": 1}]}')
            words: tuple[str, ...] = ("t.json",)
        else:
            words = (*options, "--", "true")
        ran = prompt(tmp_path)("run", "--bind", "127.0.0.1", "--dir", "p", *words, **env)
    assert ran.returncode == 2, ran.stderr
    assert f"task 1 can never run here: {why}" in ran.stderr


def test_options_of_the_users_own_steps_do_not_reach_the_workers_step(tmp_path: Path) -> None:
    """And what Slurm has granted, but a worker may not use, is named."""
    spy = SRUN.replace("#!/bin/bash\n", '#!/bin/bash\nenv >"$FAKES/env"\n', 1)
    with allocation(tmp_path, "n1", srun=spy, scontrol="#!/bin/sh\nexit 1\n") as env:
        unwanted = {
            "SRUN_CPUS_PER_TASK": "1",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_HINT": "x",
            "SLURM_EXPORT_ENV": "NONE",
        }
        env |= {**unwanted, "SLURM_JOB_CPUS_PER_NODE": "9999", "SLURM_MEM_PER_NODE": "1000"}
        ran = prompt(tmp_path)("run", "--bind", "127.0.0.1", "--dir", "p", "--", "true", **env)
    assert ran.returncode == 0, ran.stderr
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "fakes" / "env").read_text().splitlines())
    assert unwanted.keys() & seen.keys() == set() and seen["SLURM_MEM_PER_NODE"] == "1000"
    assert "CPUs that Slurm has granted cannot be used: " in ran.stderr


def test_a_node_that_slurm_has_given_up_goes_on_if_it_can(tmp_path: Path) -> None:
    """A slurmd that does not answer proves nothing about the tasks, and they may not run twice at one time."""
    with allocation(tmp_path, "n[1-2]", srun=SRUN) as env:
        script = "touch on.$PILOTQ_NODELIST.$PILOTQ_EXECUTION; until [ -e go ]; do sleep 0.05; done"
        words = ("--bind", "127.0.0.1", "--dir", "p", "--array", "0-3", "--", "sh", "-c", script)
        with subprocess.Popen(
            command("run", *words), cwd=tmp_path, env=environment(**env), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as run:  # fmt: skip
            wait_until(lambda: hosts(tmp_path) == {"n1.1", "n2.1"}, seconds=60)
            (tmp_path / "fakes" / "down.n2").touch()
            log = tmp_path / "p" / "logs" / "supervisor.log"
            wait_until(lambda: "Slurm has given up node n2" in log.read_text())
            (tmp_path / "go").touch()
            assert run.wait(60) == 0
    assert hosts(tmp_path) == {"n1.1", "n2.1"}
    assert "n2 is lost (srun" not in (tmp_path / "p" / "logs" / "dispatcher.log").read_text()


def test_too_few_nodes_end_the_pilot_and_it_says_what_srun_said(tmp_path: Path) -> None:
    with allocation(tmp_path, "n[1-2]", srun=SRUN) as env:
        (tmp_path / "fakes" / "busy.n2").touch()
        ran = prompt(tmp_path)("run", "--bind", "127.0.0.1", "--min-nodes", "2", "--", "true", **env)
    assert ran.returncode == 3
    assert "only 1 of 2 nodes have joined" in ran.stderr and "at least 2 are needed; missing: n2" in ran.stderr
    assert "step creation temporarily disabled" in ran.stderr


def test_nothing_begins_before_enough_nodes_are_there(tmp_path: Path) -> None:
    with allocation(tmp_path, "n[1-2]", srun=SRUN) as env:
        (tmp_path / "fakes" / "busy.n2").touch()
        with subprocess.Popen(
            command("run", "--bind", "127.0.0.1", "--min-nodes", "2", "--", "touch", "began"), cwd=tmp_path,
            env=environment(**env), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        ) as run:  # fmt: skip
            wait_until((tmp_path / "fakes" / "said").exists)
            assert not (tmp_path / "began").exists()
            (tmp_path / "fakes" / "busy.n2").unlink()
            assert run.wait(60) == 0
    assert (tmp_path / "began").exists()


def test_an_scontrol_that_hangs_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with allocation(tmp_path, "n1", srun=SRUN, scontrol="#!/bin/sh\nexec sleep 600\n") as env:
        ran = prompt(tmp_path)("run", "--bind", "127.0.0.1", "--dir", "p", "--", "true", **env)
    assert ran.returncode == 0, ran.stderr
    log = (tmp_path / "p" / "logs" / "supervisor.log").read_text()
    assert log.count("scontrol show job 77 does not answer within 10 s: its end is not known") == 1


def test_nothing_begins_before_slurm_has_said_when_the_allocation_ends(tmp_path: Path) -> None:
    """The answer takes longer than everything else; the task that does not fit stands first in the file."""
    slow = """#!/bin/sh\nsleep 2; echo " StartTime=Unknown EndTime=$(date -d '+5 minutes' +%Y-%m-%dT%H:%M:%S) "\n"""
    tasks = [{"name": name, "time_request": length, "command": ["touch", name]} for name, length in
             (("long", 600), ("short", 10))]  # fmt: skip
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    with allocation(tmp_path, "n1", srun=SRUN, scontrol=slow) as env:
        words = command("run", "--bind", "127.0.0.1", "--dir", "p", "tasks.json")
        with subprocess.Popen(
            words, cwd=tmp_path, env=environment(**env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as run:  # fmt: skip
            wait_until((tmp_path / "short").exists, seconds=60)
            run.terminate()
            assert run.wait(60) == 0
    assert not (tmp_path / "long").exists()


def test_an_scontrol_that_fails_is_logged_once(tmp_path: Path) -> None:
    with allocation(tmp_path, "n1", srun=SRUN, scontrol="#!/bin/sh\nexit 1\n") as env:
        ran = prompt(tmp_path)("run", "--bind", "127.0.0.1", "--dir", "p", "--", "true", **env)
    assert ran.returncode == 0, ran.stderr
    log = (tmp_path / "p" / "logs" / "supervisor.log").read_text()
    assert log.count("scontrol show job 77 ended with exit code 1: its end is not known") == 1


def test_workers_are_started_by_ssh_and_end_with_the_pilot(tmp_path: Path) -> None:
    """Also when the supervisor is killed: ssh ends with it, and the worker sees that. They know of the allocation and
    its end, as workers do that srun has started."""
    with allocation(tmp_path, "n[1-2]", ssh=SSH, scontrol="#!/bin/sh\nexit 1\n") as env:
        cli = prompt(tmp_path)
        env["SLURM_JOB_END_TIME"] = str(int(time.time()) + 300)
        words = ("--bind", "127.0.0.1", "--start-method", "ssh", "--counter", "lic=1")
        started = cli("start", "--dir", "p", *words, **env)
        assert started.returncode == 0, started.stderr
        assert {path.name for path in (tmp_path / "fakes").glob("ssh.*")} == {"ssh.n1", "ssh.n2"}
        both = ("--nodes", "2", "--cores", "1", "--use", "lic=1")
        assert cli("enqueue", "--dir", "p", *both, "--", "sh", "-c", "touch on.$PILOTQ_NODELIST").returncode == 0
        long = cli("enqueue", "--dir", "p", "--time-request", "10m", "--", "true").stdout.strip()
        short = cli("enqueue", "--dir", "p", "--time-request", "10s", "--", "true").stdout.strip()
        assert cli("wait", "--dir", "p", short).returncode == 0
        assert hosts(tmp_path) == {"n1,n2"}
        assert json.loads(cli("show", long, "--dir", "p", "--json").stdout)[0]["status"] == "queued"
        pid = json.loads((tmp_path / "p" / "connection.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        mark = str(tmp_path / "p").encode()

        def left() -> list[str]:
            found = []
            for proc in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = proc.read_bytes()
                except OSError:
                    continue  # it has ended
                if mark in words:
                    found.append(words.replace(b"\0", b" ").decode())
            return found

        wait_until(lambda: not left(), seconds=60, what="end of all workers")


def test_the_end_by_the_variables_of_the_job_ends_the_pilot_before_it(tmp_path: Path) -> None:
    """The task gets the signal that was asked for, and SIGTERM later; exit code 0 does not make it finished."""
    script = "trap 'echo notice >>notes' USR1; trap 'echo term >>notes; exit 0' TERM; while :; do sleep 0.1; done"
    with allocation(tmp_path, "n1", srun=SRUN, scontrol="#!/bin/sh\nexit 1\n") as env:
        env["SLURM_JOB_END_TIME"] = str(int(time.time()) + 20)
        words = ("--bind", "127.0.0.1", "--dir", "p", "--grace", "8s", "--notice-signal", "USR1")
        ran = prompt(tmp_path)("run", *words, "--", "bash", "-c", script, **env)
    assert ran.returncode == 0, ran.stderr
    assert "the allocation is ending: go on in the next one with `pilotq run --resume" in ran.stderr
    assert (tmp_path / "notes").read_text() == "notice\nterm\n"
    assert '"reason":"walltime"' in (tmp_path / "p" / "journal.jsonl").read_text()


def test_sigusr1_is_slurms_notice_that_the_end_is_near(tmp_path: Path) -> None:
    with allocation(tmp_path, "n1", srun=SRUN, scontrol="#!/bin/sh\nexit 1\n") as env:
        words = ("--bind", "127.0.0.1", "--dir", "p", "--grace", "4s")
        with subprocess.Popen(
            command("run", *words, "--", "sh", "-c", "touch up; sleep 600"),
            cwd=tmp_path, env=environment(**env), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as run:  # fmt: skip
            wait_until((tmp_path / "up").exists, seconds=60)
            run.send_signal(signal.SIGUSR1)
            stderr = run.communicate(timeout=60)[1]
        assert run.returncode == 0, stderr
    assert "the allocation is ending" in stderr


def test_a_node_that_is_resumed_as_soon_as_it_has_left_comes_back(tmp_path: Path) -> None:
    """The supervisor reads the states of nodes twice a second: it need not have seen that this one was retired."""
    with allocation(tmp_path, "n[1-2]", srun=SRUN) as env:
        cli = prompt(tmp_path)
        started = cli("start", "--dir", "p", "--bind", "127.0.0.1", **env)
        assert started.returncode == 0, started.stderr
        with Broker.connect(str(tmp_path / "p")) as broker:

            def names() -> set[str]:
                return {node.name for node in broker.nodes()}

            wait_until(lambda: names() == {"n1", "n2"}, seconds=60)
            for _ in range(3):
                broker.close_nodes(["n1"], "retired")
                wait_until(lambda: names() == {"n2"}, seconds=60)
                broker.open_nodes(["n1"])
                wait_until(lambda: names() == {"n1", "n2"}, seconds=60, what="n1 comes back")
        assert cli("stop", "--dir", "p", "--now").returncode == 0
