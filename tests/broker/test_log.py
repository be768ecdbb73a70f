"""The logs of a pilot's processes: as text, and as JSON where PILOTQ_LOG asks for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.log import LINE, as_text, log_form
from pilotq.broker.store import keys
from tests.support.command_line import environment, prompt
from tests.support.live_pilot import LivePilot, live_pilot, worker_of
from tests.support.waiting import wait_until


def lines_of(pilot: LivePilot, name: str) -> list[dict[str, Any]]:
    """The messages of a log; every line must be one."""
    text = Path(pilot.pilot.log(name)).read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert all(set(line) <= set(LINE) and {"time", "level", "part", "message"} <= set(line) for line in found)
    return found


def test_every_message_of_a_pilot_is_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTQ_LOG", "json")
    with live_pilot(tmp_path, "n1:1,n2:1") as pilot:
        os.kill(worker_of(pilot, "n2"), signal.SIGKILL)
        wait_until(lambda: any("is lost" in line["message"] for line in lines_of(pilot, "dispatcher")), what="its loss")
        task = pilot.enqueue("sleep", "1000")
        wait_until(lambda: pilot.broker.task(task).times["started"], what="the start")
        pilot.broker.redis.delete(keys.job(task))
        wait_until(lambda: any("task" in line for line in lines_of(pilot, "dispatcher")), what="the loss of the record")
        dispatcher, supervisor = lines_of(pilot, "dispatcher"), lines_of(pilot, "supervisor")
        password = pilot.pilot.connection().address.password
    assert [line["task"] for line in dispatcher if "task" in line] == [task]
    assert {line["node"] for line in dispatcher if " slots in use" in line["message"]} == {"n1", "n2"}
    assert [line["node"] for line in dispatcher if "is lost" in line["message"]] == ["n2"]
    assert {line["part"] for line in dispatcher + supervisor} == {"dispatcher", "supervisor"}
    (restarted,) = (line for line in supervisor if "it is started again" in line["message"])
    assert restarted["level"] == "warning" and "worker-n2 was killed by signal 9" in restarted["message"]
    (first, *_) = lines_of(pilot, "worker-n1")
    assert (first["part"], first["node"], first["level"]) == ("worker", "n1", "info")
    logs = [path.read_text() for path in Path(pilot.pilot.path("logs")).iterdir()]
    assert len(password) > 10 and not any(password in text for text in logs)


def test_an_uncaught_exception_is_one_line(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "pilotq.workers.launcher.launcher", "--node", "n1"]
    done = subprocess.run(
        launcher, cwd=tmp_path, env=environment(PILOTQ_LOG="json"), capture_output=True, text=True, timeout=60
    )
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["part"], line["node"], line["level"]) == ("launcher", "n1", "error")
    assert line["message"].startswith("Traceback") and "KeyError: '--down'" in line["message"]


def test_the_command_shows_the_failure_of_a_pilot_as_text(tmp_path: Path) -> None:
    """The supervisor's log is JSON, and what `start` quotes from it is a sentence."""
    failed = prompt(tmp_path)("start", "--nodes", "n1:1", "--bind", "203.0.113.1", "--dir", "p", PILOTQ_LOG="json")
    plain = prompt(tmp_path)("start", "--nodes", "n1:1", "--bind", "203.0.113.1", "--dir", "q")
    assert failed.returncode == plain.returncode == 2, failed.stderr
    *_, line = map(json.loads, (tmp_path / "p/logs/supervisor.log").read_text().splitlines())
    assert line["level"] == "error" and line["message"].startswith("the pilot failed: ")
    assert failed.stderr.replace("/p", "/q") == plain.stderr and "{" not in failed.stderr


def test_lines_are_shown_as_text() -> None:
    made = '{"time":"2031-05-04T10:00:00.123Z","level":"info","part":"worker","message":"two\\nlines"}'
    assert as_text(f"{made}\nplain\n{made[:40]}") == f"2031-05-04 10:00:00 two\nlines\nplain\n{made[:40]}"


def test_an_unknown_form_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="it can be text or json, or unset"):
        log_form({"PILOTQ_LOG": "xml"})
    cli = prompt(tmp_path)
    for command in (("run", "--", "true"), ("start",), ("server", "--dir", "p")):
        done = cli(*command, PILOTQ_LOG="xml")
        assert done.returncode == 2 and "PILOTQ_LOG is 'xml'" in done.stderr, done
    assert not list(tmp_path.iterdir())
