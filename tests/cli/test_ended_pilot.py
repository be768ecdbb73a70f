"""What the inspecting commands answer from the journal of a pilot that has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pilotq.broker.client.archive import Archive
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.store.journal_writer import JournalWriter
from tests.support.command_line import TIMEOUT, Cli, command, environment, in_background, prompt
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pilot that has ended: tasks that ended, one that was cut off, and one that never ran."""
    folder = tmp_path_factory.mktemp("ended")
    with in_background(folder, "--nodes", "2") as cli:
        cli("enqueue", "--name", "good", "--", "sh", "-c", "echo out; echo err >&2")
        cli("enqueue", "--name", "bad", "--", "sh", "-c", "exit 3")
        cli("enqueue", "--name", "child", "--after", "bad", "--", "true")
        cli("enqueue", "--name", "many", "--array", "0-9", "--", "sh", "-c", "echo $PILOTQ_INDEX; test {index} != 4")
        (folder / "call.toml").write_text("[[tasks]]\nname = 'call'\nfunction = 'os:getpid'\n")
        assert cli("submit", "call.toml").returncode == 0
        assert cli("wait").returncode == 1
        cli("enqueue", "--name", "cut-off", "--", "sh", "-c", "touch started; sleep 600")
        cli("enqueue", "--name", "never", "--cores", "2", "--", "true")
        wait_until((folder / "started").exists)
        assert cli("stop").returncode == 0
    return folder


@pytest.fixture
def cli(folder: Path) -> Cli:
    return prompt(folder)


def test_list(cli: Cli) -> None:
    result = cli("list", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout) if "_" not in row["id"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "finished", "bad": "failed", "child": "canceled", "many": "failed", "cut-off": "queued",
        "call": "finished",
    }  # fmt: skip
    assert rows["bad"]["exit_code"] == 3
    assert (rows["cut-off"]["reason"], rows["cut-off"]["exit_code"]) == ("pilot ended", None)
    assert set(rows["good"]) == {
        "id", "name", "status", "reason", "exit_code", "execution", "node", "cores", "times"
    }  # fmt: skip
    table = cli("list")
    assert "has ended" in table.stderr and "cut-off" in table.stdout
    commands = {line.split()[1]: line for line in table.stdout.splitlines() if "_" not in line.split()[0]}
    assert "echo $PILOTQ_INDEX; test 7 != 4" in table.stdout, "of an element with its index"
    ends = {
        "good": "sh -c echo out; echo err >&2", "bad": "sh -c exit 3", "child": "true",
        "many": "sh -c echo $PILOTQ_INDEX; test {index} != 4", "cut-off": "sh -c touch started; sleep 600",
        "call": "os:getpid(...)",
    }  # fmt: skip
    assert {name: text for name, text in ends.items() if not commands[name].endswith(text)} == {}
    assert [row["name"] for row in json.loads(cli("list", "--status", "finished", "--json").stdout)].count("good") == 1
    assert len(json.loads(cli("list", "--limit", "3", "--json").stdout)) == 3
    assert "--limit" in cli("list", "--limit", "3").stderr


def test_show(cli: Cli) -> None:
    (row,) = json.loads(cli("show", "many", "--json").stdout)
    assert row["elements"] == {"finished": "0-3,5-9", "failed": "4"}
    assert row["array_size"] == 10
    assert "0-3,5-9" in cli("show", "many").stdout
    (element,) = json.loads(cli("show", f"{row['id']}_4", "--json").stdout)
    assert (element["status"], element["exit_code"], element["index"]) == ("failed", 1, 4)


def test_logs(cli: Cli) -> None:
    assert cli("logs", "good").stdout == "out\n"
    assert cli("logs", "-f", "good", "--stderr").stdout == "err\n"
    (row,) = json.loads(cli("show", "many", "--json").stdout)
    assert cli("logs", f"{row['id']}_7").stdout == "7\n"
    array = cli("logs", "many")
    assert (
        array.returncode == 2
        and f"array of 10 tasks, and each has its own output: name one, `pilotq logs {row['id']}_" in array.stderr
    )


def test_status(cli: Cli) -> None:
    result = cli("status")
    assert "14 of 16 tasks ended: 11 finished, 2 failed, 1 canceled" in result.stdout
    assert "has ended" in result.stdout
    facts = json.loads(cli("status", "--json").stdout)
    assert facts["ended"] and facts["tasks"]["left"] == 2 and facts["running"] == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["good"], 0, ""),
        (["good", "bad"], 1, ""),
        (["child"], 1, ""),
        (["cut-off"], 1, "1 of 1 tasks had not"),
        (["good", "vvv"], 1, "1 of 2 tasks had not"),  # it may have been one that never ran
        (["good", "no such name"], 2, "'no such name'"),
        ([], 1, "2 of 16 tasks had not"),
    ],
)
def test_wait_returns_at_once_by_the_outcome(cli: Cli, words: list[str], code: int, sentence: str) -> None:
    result = cli("wait", *words)
    assert result.returncode == code
    assert sentence in result.stderr
    assert ("start --resume" in result.stderr) == (code == 1 and bool(sentence))


def test_an_unknown_task_is_a_sentence(cli: Cli) -> None:
    for verb in ("show", "logs"):
        result = cli(verb, "nobody")
        assert result.returncode == 2
        assert "'nobody'" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "args", [["enqueue", "--", "true"], ["cancel", "1"], ["nodes"], ["url"], ["exec", "--", "true"], ["stop"]]
)
def test_what_needs_a_running_pilot_says_so(cli: Cli, args: list[str]) -> None:
    result = cli(*args)
    assert result.returncode == 2
    assert "no pilot runs in" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_pilot_where_all_finished_is_waited_for_with_0_also_after_it_was_resumed(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    assert cli("run", "--dir", "p", "--nodes", "1", "--", "true").returncode == 0
    assert cli("wait", "--dir", "p").returncode == 0
    with in_background(tmp_path, "--resume", "p", "--nodes", "1"):
        assert cli("enqueue", "--dir", "p", "--", "true").returncode == 0
        assert cli("wait", "--dir", "p").returncode == 0
        assert cli("stop", "--dir", "p").returncode == 0
    assert cli("wait", "--dir", "p").returncode == 0
    assert "2 tasks: 2 finished" in cli("status", "--dir", "p").stdout


def test_a_wait_that_is_under_way_when_the_pilot_ends_tells_what_the_journal_does(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1") as cli:
        cli("enqueue", "--name", "long", "--", "sh", "-c", "touch started; sleep 600")
        waiting = subprocess.Popen(
            command("wait", "long"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
        )
        wait_until((tmp_path / "started").exists)
        assert cli("stop", "--now").returncode == 0
        _, said = waiting.communicate(timeout=TIMEOUT)
    assert waiting.returncode == 1, said
    assert "1 of 1 tasks had not" in said


def test_after_a_kill_the_journal_answers_and_wait_does_not_promise_too_much(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1") as cli:
        cli("enqueue", "--name", "good", "--", "true")
        assert cli("wait", "good").returncode == 0
        pilot = find(str(tmp_path / ".pilotq" / "current"))
        wait_until(lambda: Archive(pilot).counts().finished == 1, what="the end in the journal")
        connection = pilot.connection()
        os.kill(connection.pid, signal.SIGKILL)
        server = int((Path(pilot.directory) / "server" / "server.pid").read_text())
        wait_until(lambda: not pilot.alive(), what="the lock of a dead process")
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: json.loads(cli("status", "--json").stdout or "{}").get("ended"), what="the archive")
        assert cli("wait", "good").returncode == 0
        result = cli("wait")
        assert result.returncode == 1
        assert "does not know what never ran" in result.stderr
        assert "does not know what never ran" in cli("list").stderr
        assert "nodes  none: the pilot was killed, and its journal does not know" in cli("status").stdout
        for verb in (("enqueue", "--", "true"), ("stop",)):
            refused = cli(*verb)
            assert refused.returncode == 3
            assert "it was killed; `pilotq start --resume /" in refused.stderr
        left = cli("status", "--left")
        assert left.returncode == 3 and not left.stdout and "does not know what never ran" in left.stderr
        # Its successor cleans up.
        assert cli("start", "--resume", pilot.directory, "--nodes", "1").returncode == 0


@pytest.fixture
def empty(tmp_path: Path) -> Archive:
    (tmp_path / "server").mkdir()
    writer = JournalWriter(str(tmp_path / "journal.jsonl"), fsync_s=1.0)
    writer.commands(0.0)
    writer.close()
    return Archive(Pilot(str(tmp_path)))


def test_an_empty_journal_has_no_tasks(empty: Archive) -> None:
    assert list(empty.tasks()) == []
    assert empty.counts().total == 0 and not empty.complete
    assert empty.find("x") == []


def test_a_damaged_journal_is_told_without_the_damage_and_repaired(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    for name in ("server", "logs", "output"):
        (tmp_path / "p" / name).mkdir(parents=True, mode=0o700)
    (tmp_path / "p").chmod(0o700)
    journal = tmp_path / "p" / "journal.jsonl"
    journal.write_bytes(
        b'{"pilotq_journal":1,"pilot":"p"}\n{"id":"1","name":"one","status":"finished","execution":1,"exit_code":0}\n'
        b'{"id":"2","name":"two","node":"\xff"}\n{"id":"3","name":"three","status":"finished","execution":1}\n'
    )
    journal.chmod(0o600)
    (tmp_path / "p" / "submitted").touch(0o600)  # empty, as after a power loss
    said = (
        f"pilotq: {journal}: line 3 cannot be read (it is not UTF-8): what it says is left out; `pilotq doctor` tells"
    )
    for words, shown in (
        ("list", "three"), ("status", "2 finished"), ("wait", ""), ("report", "2 finished"), ("show one", "finished"),
        ("show two", ""), ("wait 2", ""),
    ):  # fmt: skip
        done = cli(*words.split(), "--dir", "p")
        whole = words in ("show one",)  # which does not come to that line
        assert (said in done.stderr) is not whole, (words, done.stderr)
        assert shown in done.stdout and done.stderr.count("line 3") == 1 - whole
    doctor = cli("doctor", "--dir", "p")
    assert doctor.returncode == 3 and "line 3 (it is not UTF-8) cannot be read" in doctor.stdout
    repaired = cli("doctor", "--repair", "--dir", "p")
    assert repaired.returncode == 0 and f"1 line of {journal} that cannot be read: moved to" in repaired.stdout
    assert "line 3" not in cli("list", "--dir", "p").stderr
    assert cli("doctor", "--dir", "p").returncode == 0


def test_output_that_is_shorter_than_the_journal_says_is_said(tmp_path: Path) -> None:
    """A pack that a power loss has emptied, one that is gone, output that the disk could not keep."""
    cli = prompt(tmp_path)
    for name in ("server", "logs", "output"):
        (tmp_path / "p" / name).mkdir(parents=True)
    pack = tmp_path / "p" / "output" / "n0.7.pack"
    pack.write_bytes(b"a" * 5000 + b"b" * 1000)
    (tmp_path / "p" / "journal.jsonl").write_text(
        '{"pilotq_journal":1,"pilot":"p"}\n'
        '{"id":"1","status":"finished","execution":1,"stdout_at":["output/n0.7.pack",0,5000]}\n'
        '{"id":"2","status":"finished","execution":1,"stdout_at":["output/n0.7.pack",5000,5000]}\n'
        '{"id":"3","status":"finished","execution":1,"stdout_at":["output/gone",0,7]}\n'
        '{"id":"4","status":"finished","execution":1,"stdout":"begin","stdout_at":["",0,9000]}\n'
        '{"id":"5","status":"finished","execution":1,"stdout_at":["/no/such/file"]}\n'
    )
    for task, code, output, said in (
        ("1", 0, "a" * 5000, ""),
        (
            "2",
            3,
            "b" * 1000,
            f"4,000 of the 5,000 bytes that task 2 has written to stdout are lost: {pack} is too short",
        ),
        ("3", 3, "", "7 of the 7 bytes that task 3 has written to stdout are lost: "),
        (
            "4",
            3,
            "begin",
            "8,995 of the 9,000 bytes that task 4 has written to stdout are lost: the disk could not keep it",
        ),
        ("5", 0, "", ""),
    ):
        done = cli("logs", task, "--dir", "p")
        assert (done.returncode, done.stdout) == (code, output), task
        assert done.stderr.startswith(f"pilotq: {said}" if said else "") and bool(said) == bool(done.stderr), (
            done.stderr
        )


def test_a_pilot_that_is_resumed_says_what_can_never_run_on_its_nodes(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1", "--counter", "lic=1") as cli:
        for _ in range(3):
            cli("enqueue", "--use", "lic=1", "--", "sleep", "100")
        cli("stop", "--now")
        again = cli("start", "--resume", ".pilotq/current", "--nodes", "1")
        assert again.returncode == 0
        assert "pilotq: task 1 and 2 like it can never run here: needs 1 of lic on one node" in again.stderr
        assert "a pilot that is resumed has the nodes of this command alone" in again.stderr
