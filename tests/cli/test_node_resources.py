"""What nodes have besides cores (GPUs, named counters), and whose environment their tasks get."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from pilotq.broker import Broker
from pilotq.broker.store import keys
from pilotq.broker.store.resources import NodeInfo
from tests.support.command_line import in_background, prompt

ONE_AT_WORK = "mkdir at-work-{index}; ls -d at-work-* | wc -l >>seen; rmdir at-work-{index}"


def counted(folder: Path) -> dict[str, tuple[list[str], dict[str, int]]]:
    """GPUs and counters of each node, as the dispatcher knows them."""
    with Broker.connect(str(folder / ".pilotq" / "current")) as broker:
        infos = [msgspec.json.decode(r, type=NodeInfo) for r in broker.link.call("HVALS", keys.NODES)]
    return {info.name: (info.gpus, info.counters) for info in infos}


def test_a_counter_bounds_how_many_run_at_once(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "4", "--counter", "lic=2", "--counter", "seats=1") as cli:
        cli("enqueue", "--array", "0-39", "--use", "lic=1", "--", "sh", "-c", ONE_AT_WORK)
        assert cli("wait").returncode == 0
        seen = [int(line) for line in (tmp_path / "seen").read_text().split()]
        assert len(seen) == 40 and max(seen) <= 2
        refused = cli("enqueue", "--use", "lic=3", "--", "true")
        assert refused.returncode == 2 and "3 of lic" in refused.stderr
        refused = cli("enqueue", "--use", "other=1", "--", "true")
        assert refused.returncode == 2 and "other" in refused.stderr
        assert counted(tmp_path) == {"n0": ([], {"lic": 2, "seats": 1})}


def test_every_node_has_the_counter_and_the_first_one_the_gpus(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "a:1,b:1", "--counter", "lic=2", CUDA_VISIBLE_DEVICES="3,5") as cli:
        assert counted(tmp_path) == {"a": (["3", "5"], {"lic": 2}), "b": ([], {"lic": 2})}
        task = cli("enqueue", "--gpus", "2", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").stdout.strip()
        assert cli("wait").returncode == 0
        assert cli("logs", task).stdout == "3,5\n"
        assert json.loads(cli("show", task, "--json").stdout)[0]["node"] == "a"
        refused = cli("enqueue", "--gpus", "3", "--", "true")
        assert refused.returncode == 2 and "3 GPUs" in refused.stderr


@pytest.mark.parametrize("devices", ["", "-1", "NoDevFiles"])
def test_gpus_are_refused_where_there_are_none(tmp_path: Path, devices: str) -> None:
    with in_background(tmp_path, "--nodes", "1", CUDA_VISIBLE_DEVICES=devices) as cli:
        refused = cli("enqueue", "--gpus", "1", "--", "true")
        assert refused.returncode == 2
        assert "1 GPU" in refused.stderr and refused.stdout == ""
        assert json.loads(cli("list", "--json").stdout) == []


def test_run_refuses_them_before_there_is_a_pilot(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    for option, hint in (("--gpus=1", "1 GPU"), ("--use=lic=3", "3 of lic")):
        result = cli("run", "--counter", "lic=2", option, "--", "true", CUDA_VISIBLE_DEVICES="")
        assert result.returncode == 2 and hint in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = cli("run", "--counter", "lic=2", "--use=lic=2", "--gpus=1", "--", "printenv", "CUDA_VISIBLE_DEVICES",
                 CUDA_VISIBLE_DEVICES="7")  # fmt: skip
    assert result.stdout == "7\n"


@pytest.mark.parametrize("word", ["lic", "lic=", "lic=x", "=2", "li-c=2", "lic=-1"])
def test_a_wrong_counter_is_a_sentence(tmp_path: Path, word: str) -> None:
    result = prompt(tmp_path)("start", "--counter", word)
    assert result.returncode == 2
    assert "--counter" in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_whose_environment_a_task_has(tmp_path: Path) -> None:
    script = 'echo "$COLOUR $OMP_NUM_THREADS ${PILOTQ_COUNTERS-none} ${HOME:+home}"'
    with in_background(
        tmp_path, "--nodes", "2", "--counter", "a=1", COLOUR="of-the-worker", OMP_NUM_THREADS="7"
    ) as cli:
        said = {}
        for policy in ("submit", "worker", "clean"):
            task = cli(
                "enqueue",
                "--env-policy",
                policy,
                "--",
                "sh",
                "-c",
                script,
                COLOUR="of-the-submitter",
                OMP_NUM_THREADS="",
            ).stdout.strip()
            assert cli("wait", task).returncode == 0
            said[policy] = cli("logs", task).stdout.rstrip("\n")
    assert said == {
        "submit": "of-the-submitter  none home", "worker": "of-the-worker 7 none home", "clean": " 1 none home"
    }  # fmt: skip


def test_nodes_and_use_of_cores_are_shown(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "n1:2,n2:1") as cli:
        rows = json.loads(cli("nodes", "--json").stdout)
        assert [(r["name"], r["cores"]) for r in rows] == [("n1", 2), ("n2", 1)], "start returns when all have joined"
        assert cli("nodes").stdout.split()[:5] == ["NAME", "STATE", "HOST", "CORES", "USED"]


def test_a_pool_is_shared_by_all_nodes(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "2,2", "--pool", "lic=1", "--counter", "seat=1") as cli:
        cli("enqueue", "--array", "0-19", "--use", "lic=1", "--", "sh", "-c", ONE_AT_WORK)
        assert cli("wait", "--timeout", "60s").returncode == 0
        assert (tmp_path / "seen").read_text().split() == ["1"] * 20
        for wanted, why in (("lic=2", "needs 2 of lic in the pilot; it has 1"), ("seat=2", "2 of seat on one node")):
            refused = cli("enqueue", "--use", wanted, "--", "true")
            assert refused.returncode == 2 and why in refused.stderr
    twice = prompt(tmp_path)("start", "--pool", "a=1", "--counter", "a=1")
    assert twice.returncode == 2 and "--pool a: each node has a counter of that name" in twice.stderr
