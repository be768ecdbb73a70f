"""`pilotq nodes drain`, `retire` and `resume` have effect: on what is placed, on prefetched tasks, on workers."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.command_line import Cli, in_background
from tests.support.waiting import wait_until

HOLD = "touch up.$PILOTQ_INDEX; until [ -e go ]; do sleep 0.05; done"


def nodes(cli: Cli) -> dict[str, str]:
    return {node["name"]: node["state"] for node in json.loads(cli("nodes", "--json").stdout)}


def where(cli: Cli, count: int) -> set[str]:
    """The nodes that so many tasks ran on; all ran."""
    cli("enqueue", "--array", f"0-{count - 1}", "--name", "probe", "--", "true")
    assert cli("wait").returncode == 0
    shown = json.loads(cli("list", "--limit", "1000", "--json").stdout)
    return {task["node"] for task in shown if task["node"] and task["name"] == "probe"}


def test_a_drained_node_gets_nothing_new_and_what_runs_there_goes_on(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "n1:1,n2:1") as cli:
        held = cli("enqueue", "--nodes", "2", "--cores", "1", "--", "sh", "-c", HOLD)
        wait_until((tmp_path / "up.").exists)
        assert cli("nodes", "drain", "n1", "--reason", "a slow disk").returncode == 0
        assert nodes(cli) == {"n1": "drained", "n2": "up"}
        assert "n1 is drained: a slow disk" in cli("nodes").stdout
        (tmp_path / "go").touch()
        assert cli("wait").returncode == 0, held.stdout
        assert where(cli, 40) == {"n2"}
        assert cli("nodes", "drain", "n2").returncode == 0
        waits = cli("enqueue", "--", "true").stdout.strip()
        assert "all nodes are closed" in cli("explain", waits).stdout
        assert cli("nodes", "resume", "n2").returncode == 0
        # What only both could hold waits, and holds up nobody.
        pair = cli("enqueue", "--nodes", "2", "--cores", "1", "--", "true").stdout.strip()
        single = cli("enqueue", "--", "true").stdout.strip()
        assert cli("wait", single).returncode == 0
        assert cli("nodes", "resume", "n1").returncode == 0
        assert cli("wait", pair).returncode == 0
        assert where(cli, 40) == {"n1", "n2"}


def test_a_retired_worker_leaves_after_its_tasks_and_comes_back(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "n1:1,n2:1") as cli:
        cli("enqueue", "--array", "0-1", "--", "sh", "-c", HOLD)
        wait_until((tmp_path / "up.0").exists)
        wait_until((tmp_path / "up.1").exists)
        assert cli("nodes", "retire", "n1").returncode == 0
        assert nodes(cli) == {"n1": "retired", "n2": "up"}
        (tmp_path / "go").touch()
        assert cli("wait").returncode == 0
        wait_until(lambda: nodes(cli) == {"n2": "up"}, what="n1 has left")
        assert where(cli, 20) == {"n2"}
        assert cli("nodes", "resume", "n1").returncode == 0
        wait_until(lambda: nodes(cli) == {"n1": "up", "n2": "up"}, what="n1 is back")


def test_nodes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "n1:1") as cli:
        for words in (("drain", "n9"), ("retire", "n9"), ("resume", "n1")):
            refused = cli("nodes", *words)
            assert refused.returncode == 2
            assert words[1] in refused.stderr
        assert nodes(cli) == {"n1": "up"}
