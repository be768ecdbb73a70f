"""`pilotq run` on request files of QCG-PilotJob, each with what QCG-PilotJob makes of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pilotq.broker.records import parse_allocation
from tests.prompt import prompt

CASES = Path(__file__).parent / "qcg"


class Ran(NamedTuple):
    code: int
    report: dict[str, Any]  # of `run --json`
    rows: dict[str, dict[str, Any]]  # of `list --json` afterwards, by name, or by id
    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def statuses(self) -> dict[str, str]:
        return {name: row["status"] for name, row in self.rows.items()}


def ran(folder: Path, case: str, nodes: str, **env: str) -> Ran:
    (file,) = CASES.glob(f"{case}_*.json")
    shutil.copy(file, folder / "requests.json")
    cli = prompt(folder)
    result = cli("run", "requests.json", "--nodes", nodes, "--json", **env)
    assert result.returncode in (0, 1), result.stderr
    rows = json.loads(cli("list", "--json").stdout)
    return Ran(result.returncode, json.loads(result.stdout), {row["name"] or row["id"]: row for row in rows}, folder)


def test_one_echo(tmp_path: Path) -> None:
    found = ran(tmp_path, "01", "2")
    assert found.code == 0
    assert found.text("hello.out") == "hello world\n"
    row = found.rows["hello"]
    assert (row["status"], row["exit_code"], row["cores"]) == ("finished", 0, "n0[0]")


def test_a_working_directory_is_made_and_words_in_file_names_are_filled_in(tmp_path: Path) -> None:
    found = ran(tmp_path, "02", "2")
    assert found.code == 0
    assert found.rows["msleep2"]["cores"] == "n0[0:1]"
    names = sorted(p.name for p in (tmp_path / "sleep.sandbox").iterdir())
    assert names == ["sleep2.2.1.stderr", "sleep2.2.1.stdout"]
    assert [found.text(f"sleep.sandbox/{name}") for name in names] == ["", ""]


def test_an_iteration_counts_from_start_to_before_stop(tmp_path: Path) -> None:
    found = ran(tmp_path, "03", "2")
    assert found.code == 0
    assert {p.name: p.read_text() for p in tmp_path.glob("it.*.out")} == {
        f"it.{i}.out": f"i={i} v={i}\n" for i in range(2, 6)
    }
    assert found.report["tasks"]["finished"] == 4


def test_environment_and_variables_of_a_job(tmp_path: Path) -> None:
    found = ran(tmp_path, "06", "n1:2", OF_THE_SERVICE="yes")
    assert found.code == 0
    env = dict(line.split("=", 1) for line in found.text("env.out").splitlines() if "=" in line)
    assert (env["MY_VAR"], env["NC"], env["OF_THE_SERVICE"]) == ("my value", "2", "yes")
    wanted = {"NNODES": "1", "NODELIST": "n1", "NPROCS": "2", "NTASKS": "2", "TASKS_PER_NODE": "2"}
    assert {name: env[f"QCG_PM_{name}"] for name in wanted} == wanted
    assert re.fullmatch(r"[0-9a-f]{32}", env["QCG_PM_STEP_ID"])
    assert not [name for name in env if name.startswith("SLURM_")]


def test_dependencies_submitted_in_reverse_order(tmp_path: Path) -> None:
    found = ran(tmp_path, "10", "2")
    assert found.code == 0
    assert found.text("order") == "1\n2\n3\n"


def test_what_waits_for_a_failure_or_for_nothing_is_omitted(tmp_path: Path) -> None:
    found = ran(tmp_path, "11", "2")
    assert found.code == 1
    assert found.statuses() == {"bad": "failed", "child": "canceled", "grandchild": "canceled"}
    assert found.rows["bad"]["exit_code"] == 1
    assert {found.rows[name]["reason"] for name in ("child", "grandchild")} == {"dependency"}
    tasks = found.report["tasks"]
    assert (tasks["total"], tasks["failed"], tasks["canceled"], tasks["omitted"]) == (3, 1, 2, 1)
    assert list(found.report["omitted"]) == ["unknown"]
    assert "no_such_job" in found.report["omitted"]["unknown"]


def test_omitted_jobs_are_named_to_people_and_alone_make_exit_code_1(tmp_path: Path) -> None:
    jobs = [
        {"name": "good", "execution": {"exec": "true"}},
        {"name": "lost", "execution": {"exec": "true"}, "dependencies": {"after": ["nobody"]}},
    ]
    (tmp_path / "requests.json").write_text(json.dumps([{"request": "submit", "jobs": jobs}]))
    result = prompt(tmp_path)("run", "requests.json", "--nodes", "1")
    assert result.returncode == 1
    assert "1 task: 1 finished; 1 omitted" in result.stdout
    assert "lost omitted: it waits for 'nobody'" in result.stdout


def test_a_program_that_is_not_there_fails_its_job(tmp_path: Path) -> None:
    found = ran(tmp_path, "14", "2")
    assert found.code == 1
    row = found.rows["noexec"]
    assert (row["status"], row["reason"], row["exit_code"]) == ("failed", "not found", None)


def test_nodes_with_cores_on_each(tmp_path: Path) -> None:
    found = ran(tmp_path, "18", "n1:2,n2:2,n3:2")
    assert found.code == 0
    assert found.text("mp.out") == "2 4 n1,n2\n"
    assert found.rows["mp"]["cores"] == "n1[0:1],n2[0:1]"


def test_a_range_of_cores_takes_all_that_is_free(tmp_path: Path) -> None:
    found = ran(tmp_path, "20", "4")
    assert found.code == 0
    assert found.text("rng.out") == "4\n"


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_scheduler_shares_out_the_cores_of_the_pilot(tmp_path: Path, way: str) -> None:
    if way == "run":
        found = ran(tmp_path, "22", "10")
        assert found.code == 0
    else:
        cli = prompt(tmp_path)
        shutil.copy(next(CASES.glob("22_*.json")), tmp_path / "requests.json")
        assert cli("start", "--nodes", "10").returncode == 0
        try:
            assert len(cli("submit", "requests.json").stdout.split()) == 4
            assert cli("wait").returncode == 0
        finally:
            cli("stop")
    assert [(tmp_path / f"mi.{i}.out").read_text() for i in range(4)] == ["2\n", "2\n", "3\n", "3\n"]
    rows = json.loads(prompt(tmp_path)("list", "--json").stdout)
    held = [core for row in rows for part in parse_allocation(row["cores"]) for core in part.cores]
    assert sorted(held) == list(range(10)), "all four at once, on cores of their own"
