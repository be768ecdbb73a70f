"""`--stop-on-failures` of `run`, `wait` and arrays: no more is started when too much has failed."""

from __future__ import annotations

import json
from pathlib import Path

from pilotq.broker.client.broker import Broker
from pilotq.broker.store import keys
from pilotq.cli.failure_stop import FailureStop
from tests.support.command_line import in_background, prompt
from tests.support.engine import QUEUE_ID, Engine, array, fixtures
from tests.support.waiting import wait_until

engine, server, node = fixtures


def test_run_stops_and_says_why(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    (tmp_path / "tasks.txt").write_text("false\n" * 5 + "sleep 0.3\n" * 200)
    done = cli("run", "--nodes", "1", "--stop-on-failures", "1%", "--json", "tasks.txt")
    assert done.returncode == 1
    assert " of 205 tasks have failed, more than 1%: what waited is canceled\n" in done.stderr
    counts = json.loads(done.stdout)["tasks"]
    assert 3 <= counts["failed"] <= 5 and counts["canceled"] > 150 and counts["finished"] < 50


def test_wait_and_arrays(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1") as cli:
        code = "[ {index} -gt 2 ] || exit 1; sleep 0.2"
        (array,) = cli("enqueue", "--stop-on-failures", "2", "--array", "0-999", "--", "sh", "-c", code).stdout.split()
        assert cli("wait", array).returncode == 1
        (view,) = json.loads(cli("show", "--json", array).stdout)
        assert view["elements"]["failed"] == "0-2" and view["elements"]["canceled"].endswith("-999")
        assert (view["status"], view["reason"]) == ("failed", "failures")

        for limit, text in (("200%", "a percentage is from 0 to 100"), ("2", "or `pilotq wait --stop-on-failures 2`")):
            refused = cli("enqueue", "--stop-on-failures", limit, "--", "true")
            assert refused.returncode == 2 and text in refused.stderr
        assert f"{array}: nothing of it waits" in cli("cancel", "--waiting", array).stdout
        assert view["times"]["started"] is None, "not that of its last element"
        never = f"{array}_999"
        assert "more tasks failed than may" in cli("explain", never).stdout
        (later,) = cli("enqueue", "--array", "0-999", "--", "sleep", "0.2").stdout.split()
        assert cli("cancel", "--waiting", later).stdout == f"{later}: canceled\n"
        assert cli("wait", later).returncode == 1
        assert "canceled: was canceled by its user" in cli("show", f"{later}_999").stdout
        assert "it was canceled by its user" in cli("explain", f"{later}_999").stdout

        bad, other, mine, held, _ = cli("submit", tasks(tmp_path)).stdout.split()
        done = cli("wait", bad, other, "--stop-on-failures", "0")
        assert done.returncode == 1
        assert "pilotq: 1 of 1,001 tasks have failed, more than 0: what waited is canceled\n" in done.stderr
        assert "reason        failures: more tasks failed than may" in cli("show", f"{other}_999").stdout
        rows = {row["id"]: row["reason"] for row in json.loads(cli("list", "--limit", "2000", "--json").stdout)}
        assert rows[other] == "failures"
        assert cli("wait", mine).returncode == 0, "others are let alone"
        wait_until(lambda: cli("show", held).stdout.count("started") > 1)
        said = cli("cancel", "--waiting", held, "never").stdout
        assert f"{held}: goes on, if its node has begun it\n" in said and ": canceled" in said
        (tmp_path / "go").touch()
        assert cli("wait", held).returncode == 0


def test_a_share_is_one_of_all_there_were(engine: Engine) -> None:
    done, more = engine.submit(array(100), array(40))
    broker = Broker(engine.running.address, QUEUE_ID, None)
    stop, both = FailureStop("10%"), [done, more]
    assert stop.enforce(broker, broker.counts(ids=both), both) == ""
    engine.complete(engine.claim(100))
    engine.link.call("DEL", keys.job(done))  # its time is over
    runs = engine.claim(16)
    engine.complete(runs[:14], "failed", "exit")
    assert stop.enforce(broker, broker.counts(ids=both), both) == "", "14 of 140"
    engine.complete(runs[14:15], "failed", "exit")
    assert stop.enforce(broker, broker.counts(ids=both), both) == (
        "15 of 140 tasks have failed, more than 10%: what waited is canceled"
    )
    broker.close()


def tasks(folder: Path) -> str:
    hold = {"script": "while [ ! -e go ]; do sleep 0.05; done"}
    found = [
        {"command": "false"}, {"command": "sleep 0.2", "array": "0-999"}, {"command": "true"}, {**hold, "name": "held"},
        {"command": "true", "after": "held", "name": "never"},
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps({"tasks": found}))
    return "jobs.json"
