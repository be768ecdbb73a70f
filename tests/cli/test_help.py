"""`pilotq help`, `--help` of each command, completion in real shells, near misses, and colours."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pilotq.broker import env_vars
from pilotq.broker.tasks.states import REASONS, STATUSES
from pilotq.cli import exit_codes
from pilotq.cli.commands.completion import SHELLS
from pilotq.cli.main import COMMANDS, HIDDEN
from pilotq.cli.topics import TOPICS
from tests.support.command_line import Cli, command, environment, prompt
from tests.support.paths import ROOT

BIN = str(Path(sys.executable).parent)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return prompt(tmp_path)


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", TOPICS)
def test_topics(cli: Cli, topic: str) -> None:
    done = cli("help", topic, COLUMNS="80")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 5
    if topic != "schema":
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_topics_say_what_the_code_says(cli: Cli) -> None:
    states = cli("help", "states").stdout
    assert all(re.search(rf"^  {re.escape(word)} ", states, re.MULTILINE) for word in {*STATUSES, *REASONS} - {""})
    codes = cli("help", "exit-codes").stdout
    assert all(re.search(rf"^  {code} ", codes, re.MULTILINE) for code in exit_codes.MEANINGS)
    assert all(name in cli("help", "environment").stdout for name in env_vars.KNOWN - env_vars.OF_PARTS)
    assert json.loads(cli("help", "schema").stdout)["$defs"]["Entry"]["properties"]["cores"]
    assert cli("help", "list").stdout == cli("list", "--help").stdout
    assert all(topic in cli("help").stdout for topic in TOPICS)


def test_every_variable_in_the_code_is_told() -> None:
    code = [path for room in ("broker", "workers", "cli") for path in (ROOT / room).rglob("*.py")]
    named = {name for path in code for name in re.findall(r"\bPILOTQ_[A-Z][A-Z_]+[A-Z]\b", path.read_text())}
    assert named == {name for name in env_vars.KNOWN if name.startswith("PILOTQ_")}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["lst"], "Did you mean 'list'?"),
        (["xyzzy"], "there is no command 'xyzzy'"),
        (["list", "--statsu", "failed"], "--status"),
        (["enqueue", "--cors", "2", "--", "true"], "--cores"),
        (["help", "sates"], "did you mean 'states'?"),
        (["list", "--status", "faild"], "failed"),
    ],
)
def test_words_that_are_nearly_right(cli: Cli, words: list[str], hint: str) -> None:
    done = cli(*words)
    assert done.returncode == 2
    assert hint in done.stderr and len(done.stderr.splitlines()) == 1


# -- completion -------------------------------------------------------------------------------------------------------

ASK = r"""
eval "$(pilotq completion bash)"
COMP_WORDS=(%s) COMP_CWORD=%d
$(complete -p pilotq | sed 's/.*-F \([^ ]*\) .*/\1/') pilotq
printf '%%s\n' "${COMPREPLY[@]}"
"""


def completions(folder: Path, *words: str) -> set[str]:
    """What bash would offer behind these words, the last of which is being typed."""
    script = ASK % (" ".join(f"'{word}'" for word in ("pilotq", *words)), len(words))
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=folder, env=environment(PATH=f"{BIN}:{os.environ['PATH']}"),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split())


def test_bash_completes_verbs_options_and_values(tmp_path: Path) -> None:
    assert completions(tmp_path, "re") >= {"retry"}
    assert completions(tmp_path, "") >= {command for command in COMMANDS if command not in HIDDEN}
    assert completions(tmp_path, "list", "--st") == {"--status"}
    assert completions(tmp_path, "list", "--status", "fin") == {"finished"}
    assert "supervisor" not in completions(tmp_path, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_its_completion(cli: Cli, tmp_path: Path, shell: str) -> None:
    done = cli("completion", shell)
    assert done.returncode == 0 and "_PILOTQ_COMPLETE" in done.stdout
    if shutil.which(shell) is not None:
        assert subprocess.run([shell, "-n"], input=done.stdout, text=True, check=False).returncode == 0


# -- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_only_where_they_are_wanted(tmp_path: Path, variables: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    env = environment(**{"TERM": "xterm", "COLUMNS": "80", **variables})
    try:
        with subprocess.Popen(command("doctor"), cwd=tmp_path, env=env, stdin=theirs, stdout=theirs) as process:
            os.close(theirs)
            text = b""
            while True:
                try:
                    data = os.read(ours, 65536)
                except OSError:
                    break  # its other end is closed
                text += data
            process.wait()
    finally:
        os.close(ours)
    assert b"server" in text and (b"\x1b[" in text) == coloured
