"""`list`, `show`, `status` and `logs` of a running pilot."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import ArrayRange, Broker, Task
from pilotq.broker.errors import PilotFailed, UnknownTask
from pilotq.broker.store import keys
from tests.support.command_line import TIMEOUT, Cli, in_background
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

KEYS = {"id", "name", "status", "reason", "exit_code", "execution", "node", "cores", "times"}
HOLD = 'touch started-"$0"; while [ ! -e go ]; do sleep 0.05; done'


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "2") as cli:
        yield cli


def rows(cli: Cli, *args: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli("list", "--json", *args).stdout)
    return found


def test_running_then_waiting_then_ended_newest_first(pilot: Cli, tmp_path: Path) -> None:
    first = [pilot("enqueue", "--", word).stdout.strip() for word in ("true", "false", "true")]
    assert pilot("wait").returncode == 1
    running = [pilot("enqueue", "--", "sh", "-c", HOLD, str(i)).stdout.strip() for i in range(2)]
    wait_until(lambda: all((tmp_path / f"started-{i}").exists() for i in range(2)))
    waiting = [pilot("enqueue", "--priority", p, "--", "true").stdout.strip() for p in ("0", "7")]
    waiting.append(pilot("enqueue", "--after", waiting[0], "--", "true").stdout.strip())
    everything = [row["id"] for row in rows(pilot)]
    assert everything[:5] == [*reversed(running), *reversed(waiting)]
    assert sorted(everything[5:]) == sorted(first)
    for limit in (1, 2, 3, 6, 8, 100):
        assert [row["id"] for row in rows(pilot, "--limit", str(limit))] == everything[:limit]
    by_status = {
        s: [row["id"] for row in rows(pilot, "--status", s)] for s in ("started", "queued", "deferred", "failed")
    }
    assert by_status == {
        "started": everything[:2], "queued": [waiting[1], waiting[0]], "deferred": [waiting[2]], "failed": [first[1]]
    }  # fmt: skip
    assert "there are more than 3" in pilot("list", "--limit", "3").stderr
    assert "there are more" not in pilot("list", "--limit", "8").stderr
    assert "; 2 running" in pilot("status").stdout
    assert json.loads(pilot("status", "--json").stdout)["running"] == 2


def test_waiting_elements_are_shown_as_their_array(pilot: Cli, tmp_path: Path) -> None:
    array = pilot("enqueue", "--array", "0-99:2", "--name", "many", "--", "sh", "-c", HOLD, "{index}").stdout.strip()
    wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2)
    assert [row["id"] for row in rows(pilot, "--status", "queued")] == [array]
    assert [row["id"] for row in rows(pilot)] == [f"{array}_2", f"{array}_0", array]
    assert "[50]" in pilot("list").stdout
    (shown,) = json.loads(pilot("show", "many", "--json").stdout)
    assert shown["elements"] == {"started": "0-2:2", "waiting": "4-98:2"}
    assert shown["array_size"] == 50
    assert set(shown) >= KEYS
    text = pilot("show", "many").stdout
    assert "waiting     4-98:2" in text
    (element,) = json.loads(pilot("show", f"{array}_98", "--json").stdout)
    assert (element["status"], element["array"], element["index"]) == ("queued", array, 98)
    assert pilot("show", f"{array}_97").returncode == 2
    (tmp_path / "go").touch()
    assert pilot("wait", timeout=str(TIMEOUT)).returncode == 0
    (shown,) = json.loads(pilot("show", "many", "--json").stdout)
    assert shown["elements"] == {"finished": "0-98:2"}


def test_the_keys_of_listings(pilot: Cli) -> None:
    pilot("enqueue", "--name", "x", "--", "sh", "-c", "kill -9 $$")
    assert pilot("wait").returncode == 1
    (row,) = rows(pilot)
    assert set(row) == KEYS
    wait_until(lambda: json.loads(pilot("show", "x", "--json").stdout)[0]["signal"] == 9, what="the journal's part")
    (shown,) = json.loads(pilot("show", "x", "--json").stdout)
    assert set(shown) > KEYS
    assert shown["command"] == "sh -c kill -9 $$" and shown["max_rss"] > 0


def test_following_through_retries_loses_and_doubles_nothing(pilot: Cli, tmp_path: Path) -> None:
    script = 'echo "attempt $PILOTQ_EXECUTION"; sleep 0.3; echo done; test $PILOTQ_EXECUTION = 3'
    task = pilot("enqueue", "--retries", "2", "--", "sh", "-c", script).stdout.strip()
    with Broker.connect(str(tmp_path / ".pilotq" / "current")) as broker:
        wait_until(lambda: broker.task(task).status == "started")
        written = {0: ""}
        for execution, piece in broker.follow_executions(task):
            written[execution] = written.get(execution, "") + piece.decode()
    whole = "".join(f"attempt {number}\ndone\n" for number in (1, 2, 3))
    text = "".join(written.values())
    assert written[0] == "" and all(f"attempt {number}\n" in written[number] for number in (2, 3))
    assert text and whole.endswith(text) and text.startswith("attempt")
    assert pilot("logs", task).stdout == "attempt 3\ndone\n", "the last one only"


# with a connection in our hands


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LivePilot]:
    with live_pilot(tmp_path, "n1:2") as pilot:
        yield pilot


def test_output_is_waited_for_when_redis_says_ended_before_the_journal_does(live: LivePilot) -> None:
    supervisor = live.pilot.process.pid
    os.kill(supervisor, signal.SIGSTOP)
    try:
        task = live.enqueue("echo", "hello")
        live.broker.wait([task], timeout=TIMEOUT)
        assert live.lines(task) == []
        pieces = live.broker.follow(task)
        os.kill(supervisor, signal.SIGCONT)
        assert b"".join(pieces) == b"hello\n"
        assert live.output(task) == b"hello\n"
        os.kill(supervisor, signal.SIGSTOP)
        array = live.broker.enqueue(Task(command=["echo", "{index}"], array=ArrayRange(0, 3)))
        live.broker.wait([array], timeout=TIMEOUT)
        pieces = live.broker.output(f"{array}_2")
        os.kill(supervisor, signal.SIGCONT)
        assert b"".join(pieces) == b"2\n"
    finally:
        os.kill(supervisor, signal.SIGCONT)


def test_output_that_never_comes_is_an_error_and_not_nothing(live: LivePilot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotq.broker.client.output.JOURNAL_WAIT_S", 0.2)
    os.kill(live.pilot.process.pid, signal.SIGSTOP)
    try:
        task = live.enqueue("echo", "hello")
        live.broker.wait([task], timeout=TIMEOUT)
        with pytest.raises(PilotFailed, match="has not reached the journal"):
            live.output(task)
    finally:
        os.kill(live.pilot.process.pid, signal.SIGCONT)
    assert live.ended(task).stdout_tail == "hello\n"


def test_what_never_ran_has_no_output(live: LivePilot) -> None:
    live.pause()
    task = live.enqueue("echo", "hello")
    assert next(live.broker.follow(task)) == b""
    live.broker.cancel([task])
    live.broker.wait([task], timeout=TIMEOUT)
    assert live.output(task) == b""
    assert b"".join(live.broker.follow(task)) == b""


def test_following_a_task_that_somebody_deletes_ends_with_a_sentence(live: LivePilot) -> None:
    live.pause()
    task = live.enqueue("echo", "hello")
    pieces = live.broker.follow(task)
    assert next(pieces) == b""
    live.broker.link.call("DEL", keys.job(task))
    with pytest.raises(UnknownTask):
        next(pieces)
    live.broker.pause(False)


def test_executions_under_way_are_counted_and_arrays_are_not(live: LivePilot, tmp_path: Path) -> None:
    assert live.broker.running() == 0
    script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    array = live.broker.enqueue(Task(script=script, array=ArrayRange(0, 1)))
    wait_until(lambda: live.broker.task(array).status == "started", what="the array handed out whole")
    wait_until(lambda: live.broker.running() == 2, what="both run")
    (tmp_path / "go").touch()
    live.broker.wait([array], timeout=TIMEOUT)
    assert live.broker.running() == 0


def test_what_is_only_prefetched_does_not_run(live: LivePilot) -> None:
    # The dispatcher learns from the first ones that tasks of this class are short, and prefetches.
    live.broker.wait(live.broker.enqueue_many([Task(command=["true"]) for _ in range(200)]), timeout=TIMEOUT)
    ids = live.broker.enqueue_many([Task(command=["sleep", "1000"]) for _ in range(40)])
    handed = f"{keys.registry('wip', 'default')}"
    wait_until(lambda: live.broker.link.call("ZCARD", handed) > 2, what="some are prefetched")
    assert live.broker.running() <= 2
    wait_until(lambda: live.broker.running() == 2)
    assert "; 2 running" in live.cli("status").stdout.decode() and "; 2 running" in live.cli("top").stdout.decode()
    live.broker.cancel(ids)
    live.broker.wait(ids, timeout=TIMEOUT)
    wait_until(lambda: live.broker.running() == 0)


def test_a_long_queue_is_listed_by_its_newest(live: LivePilot) -> None:
    live.pause()
    ids = live.broker.enqueue_many([Task(command=["true"], priority=i % 5) for i in range(5000)])
    begin = live.broker.link.call("INFO", "commandstats").decode()
    assert [t.id for t in live.broker.tasks(limit=50)] == ids[:-51:-1]
    after = live.broker.link.call("INFO", "commandstats").decode()
    assert _calls(after, "hmget") - _calls(begin, "hmget") <= 60, "what a listing costs does not grow with the queue"
    assert [t.id for t in live.broker.tasks(limit=10_000)] == ids[::-1]
    live.broker.cancel(ids)
    live.broker.pause(False)


def _calls(stats: str, name: str) -> int:
    return sum(
        int(line.split("calls=")[1].split(",")[0]) for line in stats.splitlines() if line.startswith(f"cmdstat_{name}:")
    )
