"""The command line without a pilot: help, wrong usage, and what the light commands import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pilotq.cli.main import COMMANDS, HIDDEN

SHOWN = sorted(set(COMMANDS) - set(HIDDEN))
LIGHT = {
    "enqueue": ["enqueue", "--", "true"],
    "submit": ["submit", "tasks.txt"],
    "wait": ["wait", "1"],
    "list": ["list"],
}
HEAVY = ("rq", "redis", "rich", "psutil", "cloudpickle")


def pilotq(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PILOTQ_")}
    return subprocess.run(
        [sys.executable, "-m", "pilotq", *args], cwd=cwd, env={**clean, "COLUMNS": "80", **env},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("verb", SHOWN)
def test_help_fits_a_screen_and_has_an_example(verb: str, tmp_path: Path) -> None:
    result = pilotq(verb, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Example: pilotq " + verb in result.stdout
    assert "--dir" in result.stdout or verb in ("help", "completion", "qcg")
    lines = result.stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80


def test_the_help_names_every_command(tmp_path: Path) -> None:
    result = pilotq("--help", cwd=tmp_path)
    assert result.returncode == 0
    words = result.stdout.split()
    assert [command for command in SHOWN if command not in words] == []
    assert not [command for command in HIDDEN if command in words]
    assert len(result.stdout.splitlines()) <= 56


def test_the_version(tmp_path: Path) -> None:
    import pilotq as package

    assert pilotq("--version", cwd=tmp_path).stdout.strip().endswith(package.__version__)


WRONG = [
    (["lsit"], "list"),
    (["enqueu", "--", "true"], "enqueue"),
    (["enqueue", "--coers", "2", "--", "true"], "--cores"),
    (["run", "--node", "2", "f"], "--nodes"),
    (["enqueue", "--cores", "many", "--", "true"], "--cores"),
    (["enqueue", "--memory", "2 buckets", "--", "true"], "--memory"),
    (["enqueue", "--memory", "500", "--", "true"], "--memory: 500 without a unit would be 500 bytes: write 500M"),
    (["enqueue", "--array", "9-1:x", "--", "true"], "--array"),
    (["enqueue", "--name", "x"], "command"),
    (["enqueue", "--script", "no-such-file"], "no-such-file"),
    (["enqueue", "--script", "tasks.txt", "--", "true"], "not both"),
    (["enqueue", "--use", "licence", "--", "true"], "NAME=N"),
    (["enqueue", "--env", "SURELY_NOT_SET_HERE", "--", "true"], "SURELY_NOT_SET_HERE"),
    (["enqueue", "--each-line", "empty.txt", "--", "true"], "empty.txt"),
    (["submit", "tasks.txt", "tasks.txt"], "tasks.txt"),
    (["cancel"], "cancel"),
    (["cancel", "--all", "1"], "not both"),
    (["stop", "--drain", "--now"], "not both"),
    (["show"], "show"),
    (["exec"], "exec"),
    (["run"], "FILE"),
    (["run", "no-such-file"], "no-such-file"),
    (["run", "tasks.txt", "--", "true"], "not both"),
    (["run", "echo", "hi"], "run -- echo hi"),
    (["run", "--cores", "2", "tasks.txt"], "--cores"),
    (["run", "--resources", "slurm", "--", "true"], "slurm"),
    (["run", "--nodes", "n1:0", "--", "true"], "nodes"),
    (["run", "empty.txt"], "empty.txt: there is no task in it"),
    (["run", "--server", "./no-such-server", "--", "true"], "./no-such-server"),
    (["run", "--server", "/bin/false", "--", "true"], "/bin/false is no Redis"),
    (["start", "--resume", "nope"], "--resume nope: there was never a pilot"),
    (["start", "--dir", "tasks.txt"], "tasks.txt cannot be the pilot's directory"),
    (["start", "--counter", "lic"], "NAME=N"),
    (["run", "--time-limit", "soon", "--", "true"], "(1:30:00, 2-00:00:00). See `pilotq run --help`"),
]


@pytest.mark.parametrize(("args", "hint"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_wrong_usage_ends_with_2_and_a_sentence(args: list[str], hint: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_text("true\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    result = pilotq(*args, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "tasks.txt"], "nothing is left behind"


@pytest.mark.parametrize("verb", ["list", "nodes", "status", "url", "stop", "wait"])
def test_without_a_pilot_the_answer_is_a_sentence(verb: str, tmp_path: Path) -> None:
    result = pilotq(verb, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("pilotq: ")
    assert len(result.stderr.splitlines()) == 1
    assert "pilotq start" in result.stderr or ".pilotq" in result.stderr


@pytest.mark.parametrize("verb", LIGHT)
def test_light_commands_import_nothing_heavy(verb: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_text("true\n")
    code = (
        "import sys\n"
        "from pilotq.cli.main import call\n"
        "code = call(sys.argv[1:])\n"
        f"print(code, *[m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *LIGHT[verb]], cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PILOTQ_")},
    )  # fmt: skip
    assert result.stdout.split() == ["2"], "no pilot here, and none of the heavy modules: " + result.stdout


def test_enqueue_loads_only_what_a_submit_needs() -> None:
    code = (
        "import sys\nimport pilotq.cli.main, pilotq.cli.commands.enqueue\n"
        "ours = ('client.queries', 'client.archive', 'store.journal', 'store.messages')\n"
        "print(sorted({'tempfile', *('pilotq.broker.' + name for name in ours)} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    def code_of(words: str) -> str:
        line = f'"$0" -m pilotq {words} {closed}; echo "code $?"'
        env = {k: v for k, v in os.environ.items() if not k.startswith("PILOTQ_")}
        result = subprocess.run(
            ["sh", "-c", line, sys.executable], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90,
            check=False,
        )  # fmt: skip
        assert "Traceback" not in result.stderr
        return result.stdout

    hidden = ">&-" in closed.split()
    assert code_of("run --nodes 1 -- echo hello") == ("" if hidden else "hello\n") + "code 0\n"
    assert code_of("list").endswith("code 0\n")


def test_a_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    for words in (["run", "--", "true"], ["list"]):
        code = "import os, sys; os.rmdir(os.getcwd()); from pilotq.cli.main import main; main()"
        gone.mkdir(exist_ok=True)
        result = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=gone, capture_output=True, text=True, timeout=60, check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith("PILOTQ_")},
        )  # fmt: skip
        assert result.returncode == 2, result.stderr
        assert result.stderr == "pilotq: the current directory does not exist any more: change to one that does\n"


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "pilotq", "help", "states"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    assert result.returncode == 3
    assert "pilotq: the disk of the pilot's directory, or of the standard output, is full" in result.stderr


def test_a_closed_reader_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "pilotq", "run", "--help"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--after-any", "1", "--", "true"],
         "`pilotq run` has no --after-any, as its pilot is new and has no tasks before: start one with `pilotq start`, "
         "and use `pilotq enqueue --after-any`. See `pilotq run --help`."),
        (["run", "--join", "--", "true"], "no --join, as it waits for what its tasks submit: start one"),
        (["run", "--learn", "--", "true"], "and use `pilotq enqueue --learn`."),
        (["submit", "--after", "1", "file"], "`pilotq submit` has no --after: `pilotq enqueue` has it."),
        (["enqueue", "--min-nodes", "2", "true"], "`pilotq enqueue` has no --min-nodes: `pilotq start` has it."),
        (["run", "--arry", "1-2", "--", "true"], "'--array'"),
        (["run", "--xyz"], "No such option"),
    ],
)  # fmt: skip
def test_an_option_of_another_command_is_said_to_be_its(words: list[str], said: str, tmp_path: Path) -> None:
    done = pilotq(*words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
