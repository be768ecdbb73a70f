"""`pilotq` end to end: a real pilot, used as a person uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pilotq.broker.pilot.server import find_server
from tests.support.command_line import TIMEOUT, Cli, command, environment, in_background, prompt
from tests.support.waiting import wait_until


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return prompt(tmp_path)


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    """A pilot of four virtual cores that runs in the background."""
    with in_background(tmp_path, "--nodes", "4") as cli:
        yield cli


# run


def test_run_lines(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_text("touch a\n# a comment\ntouch 'b c'\n\ntrue\n")
    result = cli("run", "tasks.txt", "--nodes", "2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a").exists() and (tmp_path / "b c").exists()
    assert "3 tasks: 3 finished" in result.stdout
    assert "2 cores" in result.stdout


QCG = (
    '[{"request": "submit", "jobs": [{"name": "one", "execution": {"exec": "touch", "args": ["a"]}},'
    '{"name": "two", "execution": {"exec": "touch", "args": ["b"]}, "dependencies": {"after": ["one"]}}]},'
    '{"request": "control", "command": "finishAfterAllTasksDone"}]'
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.toml", '[[tasks]]\nname="one"\ncommand=["touch", "a"]\n[[tasks]]\nscript="touch b"\nafter=["one"]\n'),
        ("t.json", '{"tasks": [{"command": ["touch", "a"]}, {"script": "echo > b"}]}'),
        ("q.json", QCG),
    ],
)  # fmt: skip
def test_run_every_kind_of_file(cli: Cli, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    result = cli("run", name, "--nodes", "2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_run_one_command_passes_its_output_through(cli: Cli) -> None:
    result = cli("run", "--", "sh", "-c", "echo out; echo err >&2; exit 0")
    assert result.returncode == 0
    assert result.stdout == "out\n"
    assert result.stderr.startswith("err\n")


def test_run_one_command_that_fails(cli: Cli) -> None:
    result = cli("run", "--", "sh", "-c", "echo out; exit 7")
    assert result.returncode == 1
    assert result.stdout == "out\n"
    assert "(7)" in result.stderr


def test_a_run_ends_when_nothing_that_is_left_can_run_on_its_nodes(cli: Cli) -> None:
    """A pilot that is resumed may have smaller nodes. What fits runs, and what waits for the rest stays for later."""
    assert cli("start", "--nodes", "4", "--dir", "p").returncode == 0
    assert cli("enqueue", "--dir", "p", "--cores", "4", "--", "sleep", "600").returncode == 0
    for task in (("--cores", "3", "--", "true"), ("--after", "2", "--", "true"), ("--", "touch", "small")):
        assert cli("enqueue", "--dir", "p", *task).returncode == 0
    assert cli("stop", "--now", "--dir", "p").returncode == 0
    ran = cli("run", "--resume", "p", "--nodes", "2")
    assert ran.returncode == 2, ran.stderr
    assert "can never run here: needs 4 cores on one node; the largest, " in ran.stderr
    assert "has 2 cores; 3 tasks left: go on with other nodes with `pilotq run --resume" in ran.stderr
    assert "1 of 4 tasks ended: 1 finished" in ran.stdout


def test_limits_of_another_host_are_left_there(pilot: Cli, tmp_path: Path) -> None:
    """A login node limits CPU time, locked memory and address space for its own sake; all else is taken over."""
    show = ("--", "bash", "-c", "ulimit -St; ulimit -Sl; ulimit -Sv; ulimit -Sc")
    words = ["bash", "-c", 'ulimit -St 70; ulimit -Sl 16; ulimit -Sv 20000000; ulimit -Sc 0; "$@"', "-"]

    def seen() -> list[str]:
        submit = subprocess.run(
            [*words, *command("enqueue", *show)], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert submit.returncode == 0, submit.stderr
        assert pilot("wait", submit.stdout.strip()).returncode == 0
        return pilot("logs", submit.stdout.strip()).stdout.split()

    assert seen() == ["70", "16", "20000000", "0"]
    connection = tmp_path / ".pilotq" / "current" / "connection.json"
    record = json.loads(connection.read_text())
    connection.write_text(json.dumps({**record, "host": "elsewhere"}))
    cpu, locked, space, core = seen()
    assert cpu != "70" and locked != "16" and space != "20000000" and core == "0"


def test_run_an_array_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "values").write_text("x\n\ny z\n")
    result = cli("run", "--nodes", "2", "--array", "1-5:2", "--", "touch", "i{index}")
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.glob("i*")) == ["i1", "i3", "i5"]
    result = cli("run", "--nodes", "2", "--each-line", "values", "--", "touch", "v{value}")
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.glob("v*") if p.name != "values") == ["vx", "vy z"]


def test_run_names_what_failed_and_why(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"tasks": [
        {"name": "good", "command": ["true"]},
        {"name": "bad", "script": "echo the cause >&2; exit 3"},
        {"name": "gone", "command": ["./no-such-program"]},
        {"name": "child", "command": ["true"], "after": ["bad"]},
    ]}))  # fmt: skip
    result = cli("run", "t.json", "--nodes", "2")
    assert result.returncode == 1
    assert "4 tasks: 1 finished, 2 failed, 1 canceled" in result.stdout
    assert "(bad) failed: ended with a non-zero exit code (3)" in result.stdout
    assert "    the cause" in result.stdout
    assert "(gone) failed: No such file or directory: './no-such-program'" in result.stdout


def test_run_json(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("sh -c 'exit 1'\ntrue\n")
    result = cli("run", "t.txt", "--nodes", "2", "--json")
    assert result.returncode == 1
    record = json.loads(result.stdout)
    assert record["tasks"] == {"total": 2, "finished": 1, "failed": 1, "canceled": 0, "left": 0, "omitted": 0}
    assert record["exit_code"] == 1 and record["cores"] == 2
    assert [(task["exit_code"], task["command"]) for task in record["failed"]] == [(1, "sh -c exit 1")]
    assert Path(record["directory"]).is_dir()


BAD = [
    ("lines.txt", "true\nls | wc\n", "--shell"),
    ("t.toml", '[[tasks]]\ncommand = ["a"]\ncolour = "red"\n', "colour"),
    ("t.json", '{"tasks": [{"command": ["a"]', "t.json: line 1, column"),
    ("t.toml", "tasks = [\n", "this is not TOML"),
    ("t.txt", "true\necho 'open\n", "t.txt: line 2, column 6"),
    ("t.txt", "true\nLANG=C sort x\n", "t.txt: line 2: 'LANG=C' sets a variable, which needs a shell: write `env`"),
    ("t.json", '{"tasks": [{"command": ["a"], "priority": "high"}]}', "tasks[0].priority: expected a whole number"),
    ("t.json", '{"tasks": [{"name": "a", "command": ["a"]}, {"name": "a", "command": ["a"]}]}', "tasks[1].name: 'a'"),
    ("t.json", '{"tasks": [{"name": "a", "command": ["a"], "after": ["a"]}]}', "a -> a"),
    (
        "q.json",
        '[{"request": "submit", "jobs": [{"name": "a", "execution": {"exec": 1}}]}]',
        "[0].jobs[0].execution.exec",
    ),
    ("t.json", '{"tasks": [{"command": ["a"], "after": ["nobody"]}]}', "nobody"),
    ("t.json", '{"tasks": [{"command": ["a"], "cores": 4096}]}', "4096"),
]


@pytest.mark.parametrize(("name", "text", "hint"), BAD)
def test_bad_input_leaves_nothing(cli: Cli, tmp_path: Path, name: str, text: str, hint: str) -> None:
    (tmp_path / name).write_text(text)
    result = cli("run", name, "--nodes", "2")
    assert result.returncode == 2, result.stdout + result.stderr
    assert hint in result.stderr and "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_directory_where_a_pilot_lives_is_refused_and_the_pilot_lives_on(pilot: Cli, tmp_path: Path) -> None:
    home = str((tmp_path / ".pilotq" / "current").resolve())
    for verb in (["start", "--dir", home], ["run", "--dir", home, "--", "true"], ["start", "--resume", home]):
        result = pilot(*verb)
        assert result.returncode == 2
        assert f"{home}: a pilot lives here already" in result.stderr and len(result.stderr.splitlines()) == 1
    assert pilot("status").returncode == 0


def test_a_server_may_be_named_by_a_relative_path(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "server").symlink_to(find_server())
    assert cli("run", "--server", "./server", "--", "echo", "hi").stdout == "hi\n"


def test_tasks_that_tasks_submit_are_waited_for(cli: Cli, tmp_path: Path) -> None:
    inner = " ".join(command("enqueue", "--", "touch", "inner"))
    (tmp_path / "t.txt").write_text(inner + "\n")
    result = cli("run", "t.txt", "--nodes", "2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "inner").exists()
    assert "2 tasks: 2 finished" in result.stdout


def test_run_is_told_in_plain_lines_where_there_is_no_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("true\nsleep 3\n")
    result = cli("run", "t.txt", "--nodes", "2")
    assert result.returncode == 0
    assert "1 of 2 tasks ended: 1 finished; 1 running, after " in result.stderr
    assert "\x1b" not in result.stderr + result.stdout


# Ctrl-C


def start_run(tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", *args), cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """The line of standard error that holds the text; progress may have been printed before."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not said")


def test_ctrl_c_once_lets_running_tasks_end_and_starts_no_other(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"tasks": [
        {"script": "touch started; while [ ! -e go ]; do sleep 0.05; done; touch ended"},
        {"command": ["touch", "second"]},
    ]}))  # fmt: skip
    process = start_run(tmp_path, "t.json", "--nodes", "1")
    wait_until((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    assert "waiting for 1 running task" in line_with(process, "Ctrl-C again")
    (tmp_path / "go").touch()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert (tmp_path / "ended").exists() and not (tmp_path / "second").exists()


def test_ctrl_c_twice_ends_everything(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("sh -c 'touch started; sleep 600'\n")
    process = start_run(tmp_path, "t.txt", "--nodes", "1")
    wait_until((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    line_with(process, "Ctrl-C again")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130


def test_an_interrupted_run_is_resumed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"tasks": [
        {"script": "echo x >> first; while [ ! -e go ]; do sleep 0.05; done"},
        {"script": "echo x >> second"},
    ]}))  # fmt: skip
    process = start_run(tmp_path, "t.json", "--nodes", "1", "--dir", "p")
    wait_until((tmp_path / "first").exists)
    process.send_signal(signal.SIGINT)
    line_with(process, "Ctrl-C again")
    (tmp_path / "go").touch()
    process.communicate(timeout=TIMEOUT)
    assert not (tmp_path / "second").exists()
    result = cli("run", "t.json", "--nodes", "1", "--resume", "p")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "first").read_text() == "x\n" and (tmp_path / "second").read_text() == "x\n"


def test_what_failed_is_named_with_its_command_and_runs_again(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("# a comment\ntrue\n\ntest -e there\n")
    result = cli("run", "t.txt", "--nodes", "2")
    assert result.returncode == 1
    assert "\ntask 2 failed: ended with a non-zero exit code (1)\n  command: test -e there\n" in result.stdout
    directory = str((tmp_path / ".pilotq" / "current").resolve())
    assert f"to run what failed again: `pilotq start --resume {directory}`, then `pilotq retry --all`" in result.stdout
    (tmp_path / "there").touch()
    result = cli("run", "t.txt", "--nodes", "2", "--resume", ".pilotq/current")
    assert result.returncode == 1 and "1 had failed before and did not run again" in result.stdout
    assert "more failed" not in result.stdout
    cli("run", "--", "true")  # another one is the current pilot now
    assert cli("start", "--resume", directory).returncode == 0
    try:
        assert cli("retry", "--all").stdout == "2: runs again\n"
        assert cli("wait", "--timeout", "60").returncode == 0
    finally:
        assert cli("stop").returncode == 0


# start, and what other shells do


def test_start_names_the_pilot_that_commands_meant_so_far(cli: Cli, tmp_path: Path) -> None:
    current = tmp_path / ".pilotq" / "current"
    with ExitStack() as stack:
        for earlier in (False, True):
            first = str(current.resolve())
            started = cli("start", "--nodes", "1")
            stack.callback(cli, "stop", "--now", "--dir", str(current.resolve()))
            note = f"pilotq: the pilot in {first} runs, too: `pilotq stop --dir {first}` ends it\n"
            assert (note in started.stderr) == earlier and (" runs, too" in started.stderr) == earlier


def test_a_run_beside_a_pilot_leaves_commands_to_that(pilot: Cli, tmp_path: Path) -> None:
    current = (tmp_path / ".pilotq" / "current").resolve()
    ran = pilot("run", "--", "true")
    assert ran.returncode == 0 and str(current) not in ran.stderr
    assert (tmp_path / ".pilotq" / "current").resolve() == current


def test_a_pilot_in_the_background(pilot: Cli, tmp_path: Path) -> None:
    one = pilot("enqueue", "--name", "hello", "--", "sh", "-c", "echo hello; echo oops >&2").stdout.strip()
    assert one and "\n" not in one
    done = pilot("wait", "hello")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(pilot("list", "--json").stdout)
    assert set(row) == {"id", "name", "status", "reason", "exit_code", "execution", "node", "cores", "times"}
    assert (row["id"], row["name"], row["status"]) == (one, "hello", "finished")
    assert (row["exit_code"], row["execution"]) == (0, 1)
    assert pilot("logs", one).stdout == "hello\n"
    assert pilot("logs", "hello", "--stderr").stdout == "oops\n"
    shown = pilot("show", one).stdout
    assert "finished" in shown and "hello" in shown
    assert "1 task: 1 finished" in pilot("status").stdout
    assert json.loads(pilot("nodes", "--json").stdout)[0]["cores"] == 4


def test_wait_and_list_tell_failures(pilot: Cli) -> None:
    pilot("enqueue", "--name", "bad", "--", "false")
    pilot("enqueue", "--name", "good", "--", "true")
    assert pilot("wait", "good").returncode == 0
    assert pilot("wait").returncode == 1
    rows = json.loads(pilot("list", "--status", "failed", "--json").stdout)
    assert [(row["name"], row["reason"], row["exit_code"]) for row in rows] == [("bad", "exit", 1)]


def test_wait_times_out(pilot: Cli) -> None:
    (task,) = pilot("enqueue", "--", "sleep", "600").stdout.split()
    result = pilot("wait", task, "--timeout", "0.2")
    assert result.returncode == 4
    assert result.stderr.startswith("pilotq: ")


def test_cancel_a_running_and_a_waiting_task(pilot: Cli, tmp_path: Path) -> None:
    (running,) = pilot("enqueue", "--cores", "4", "--", "sh", "-c", "touch started; sleep 600").stdout.split()
    (waiting,) = pilot("enqueue", "--cores", "4", "--", "touch", "never").stdout.split()
    wait_until((tmp_path / "started").exists)
    text = pilot("cancel", running, waiting).stdout
    assert f"{waiting}: canceled" in text and f"{running}: is running" in text
    assert pilot("wait", "--timeout", "60").returncode == 1
    rows = json.loads(pilot("list", "--json").stdout)
    assert {row["id"]: row["status"] for row in rows} == {running: "canceled", waiting: "canceled"}
    assert not (tmp_path / "never").exists()
    (done,) = pilot("enqueue", "--", "true").stdout.split()
    assert pilot("wait", done).returncode == 0
    assert f"{done}: had already ended: finished" in pilot("cancel", done).stdout


def test_an_unknown_task_is_a_sentence(pilot: Cli) -> None:
    for verb in ("show", "logs", "wait", "cancel"):
        result = pilot(verb, "nobody")
        assert result.returncode == 2 and "'nobody'" in result.stderr


def test_two_tasks_of_one_name_must_be_told_apart(pilot: Cli) -> None:
    ids = [pilot("enqueue", "--name", "twin", "--", "true").stdout.strip() for _ in range(2)]
    result = pilot("show", "twin")
    assert result.returncode == 2
    assert all(task in result.stderr for task in ids)


def test_submit_is_all_or_nothing_and_knows_its_key(pilot: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("true\ntrue\n")
    first = pilot("submit", "t.txt", "--key", "k").stdout.split()
    assert len(first) == 2
    assert pilot("submit", "t.txt", "--key", "k").stdout.split() == first
    (tmp_path / "bad.json").write_text('{"tasks": [{"command": ["true"]}, {"command": ["true"], "cores": 4096}]}')
    result = pilot("submit", "bad.json")
    assert result.returncode == 2 and result.stdout == ""
    assert len(json.loads(pilot("list", "--json").stdout)) == 2


def test_after_takes_a_name_and_a_failed_parent_omits(pilot: Cli, tmp_path: Path) -> None:
    pilot("enqueue", "--name", "parent", "--", "false")
    (child,) = pilot("enqueue", "--after", "parent", "--", "touch", "never").stdout.split()
    assert pilot("wait", child).returncode == 1
    (row,) = json.loads(pilot("show", child, "--json").stdout)
    assert (row["status"], row["reason"]) == ("canceled", "dependency")
    assert not (tmp_path / "never").exists()


def test_logs_follow_a_task_until_it_ends(pilot: Cli, tmp_path: Path) -> None:
    script = "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two"
    (task,) = pilot("enqueue", "--", "sh", "-c", script).stdout.split()
    follower = subprocess.Popen(
        command("logs", "-f", task), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    assert follower.stdout.readline() == "one\n"
    assert pilot("logs", task).stdout == "one\n", "without -f: what there is now"
    (tmp_path / "go").touch()
    assert follower.communicate(timeout=TIMEOUT)[0] == "two\n"
    assert follower.returncode == 0


def test_the_submit_context_reaches_the_task(pilot: Cli, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    script = "umask; pwd; echo $COLOUR $PILOTQ_TASK_ID"
    args = command("enqueue", "--dir", str(tmp_path / ".pilotq" / "current"), "--", "sh", "-c", script)
    made = subprocess.run(
        args, cwd=tmp_path / "sub", env=environment(COLOUR="red"), umask=0o027, capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    task = made.stdout.strip()
    assert pilot("wait", task).returncode == 0
    assert pilot("logs", task).stdout == f"0027\n{tmp_path / 'sub'}\nred {task}\n"


def test_exec_sets_the_url_and_keeps_it_out_of_argv(pilot: Cli) -> None:
    url = pilot("url").stdout.strip()
    code = "import os,sys; print(os.environ['RQ_REDIS_URL'], os.environ['REDIS_URL'], os.environ['PILOTQ_DIR'])"
    result = pilot("exec", "--", sys.executable, "-c", code)
    assert result.stdout.split()[:2] == [url, url], result.stderr
    assert Path(result.stdout.split()[2]).is_dir()
    assert pilot("exec", "--", "no-such-program").returncode == 2


def test_stop_with_drain_lets_running_tasks_end(pilot: Cli, tmp_path: Path) -> None:
    script = "touch started; while [ ! -e go ]; do sleep 0.05; done; touch ended"
    pilot("enqueue", "--", "sh", "-c", script)
    wait_until((tmp_path / "started").exists)
    stopping = subprocess.Popen(command("stop", "--drain"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
    (tmp_path / "go").touch()
    stopping.communicate(timeout=TIMEOUT)
    assert stopping.returncode == 0
    assert (tmp_path / "ended").exists()
    assert pilot("enqueue", "--", "true").returncode == 2, "there is no pilot any more"


# a terminal


def on_a_terminal(tmp_path: Path, *args: str, **env: str) -> tuple[subprocess.Popen[bytes], int]:
    """The command with a terminal of its own, and the terminal's other end."""
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    # The first terminal that the leader of a new session opens becomes the one whose Ctrl-C it gets.
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>"$0"', name, *command(*args)], cwd=tmp_path,
        env=environment(TERM="xterm", COLUMNS="100", **env), stdin=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_all(terminal: int) -> str:
    found = b""
    try:
        while data := os.read(terminal, 65_536):
            found += data
    except OSError:
        pass  # how Linux says that the other end is closed
    finally:
        os.close(terminal)
    return found.decode()


def test_a_terminal_sees_a_live_bar_and_the_summary(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("sleep 1\ntrue\n")
    process, terminal = on_a_terminal(tmp_path, "run", "t.txt", "--nodes", "2", NO_COLOR="1")
    text = read_all(terminal)
    assert process.wait() == 0
    assert "1/2" in text, "the bar has moved"
    assert "2 tasks: 2 finished" in text
    assert "\x1b[3" not in text and "\x1b[9" not in text, "no colours with NO_COLOR"


def test_ctrl_c_on_a_terminal_reaches_the_command_and_not_the_pilot(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"tasks": [
        {"script": "touch started; while [ ! -e go ]; do sleep 0.05; done; touch ended"},
        {"command": ["touch", "second"]},
    ]}))  # fmt: skip
    process, terminal = on_a_terminal(tmp_path, "run", "t.json", "--nodes", "1")
    wait_until((tmp_path / "started").exists)
    os.write(terminal, b"\x03")
    seen = b""
    while b"Ctrl-C again" not in seen:
        seen += os.read(terminal, 65_536)
    (tmp_path / "go").touch()
    read_all(terminal)
    assert process.wait() == 130
    assert (tmp_path / "ended").exists() and not (tmp_path / "second").exists()
