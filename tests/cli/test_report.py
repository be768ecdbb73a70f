"""`pilotq report` and `pilotq top`."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.report import plant as plant_many
from pilotq.broker.client.core_hours import PARTS
from pilotq.broker.client.executions import Executions
from pilotq.broker.client.statistics import Spread, statistics
from pilotq.broker.client.timeline import Timeline
from pilotq.broker.errors import InvalidInput
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.cli.report_bars import pack_bars
from pilotq.cli.report_export import write_parquet, write_trace
from pilotq.cli.report_page import write_page
from tests.support.command_line import Cli, environment, in_background, prompt
from tests.support.report_page import Bar, bars_of, data_of
from tests.support.waiting import wait_until


def line(task_id: str, started: float, ended: float, cpus: str = "n1[0]", **fields: object) -> JournalEntry:
    values = {"status": "finished", "execution": 1, "node": "n1", "queued": 0.0, "cpu": 0.5, **fields}
    return JournalEntry(id=task_id, started=started, ended=ended, cpus=cpus, **values)  # type: ignore[arg-type]


def test_statistics_of_known_lines() -> None:
    found = statistics(
        [
            line("1", 1, 5),
            line("2", 1, 3, "n1[1],n2[0]", status="failed", reason="exit", final=False),
            line("2", 4, 5, "n1[1],n2[0]", execution=2),
            line("3", 5, 11, "n2[0]", status="failed", reason="signal", node="n2"),
            JournalEntry(id="4", status="canceled", reason="dependency"),
            JournalEntry(id="5", status="failed", elements={"finished": "0-1"}),
        ],
        longest=2,
    )
    assert (found.executions, found.seconds, found.cores, found.core_seconds, found.cpu_seconds) == (4, 10, 3, 16, 2)
    assert found.use == pytest.approx(16 / 30)
    assert found.tasks == {"finished": 2, "failed": 1, "canceled": 1}
    assert found.failures == {"exit": 1, "signal": 1}
    assert found.nodes == {"n1": 3, "n2": 1}
    assert found.waits == Spread(3, 1, 5, 5)
    assert found.runs == Spread(4, 4, 6, 6)
    assert [each.id for each in found.longest] == ["3", "1"]
    assert statistics([]).use is None


def test_what_never_ran_and_what_waits_again_of_arrays() -> None:
    def element(index: int, **fields: object) -> JournalEntry:
        return line(f"6_{index}", 1, 2, array="6", index=index, **fields)

    lines = [
        element(0), element(1, status="failed", reason="exit"),
        JournalEntry(id="6_2", status="canceled", array="6", index=2, execution=1),  # handed, and never begun
        JournalEntry(id="6", status="failed", elements={"finished": "0", "failed": "1", "canceled": "2-9"}),
    ]  # fmt: skip
    found = statistics(lines)
    assert (found.tasks, found.executions) == ({"finished": 1, "failed": 1, "canceled": 8}, 2)
    lines.append(JournalEntry(id="6", status="queued", final=False))  # of `pilotq retry 6`
    assert statistics(lines).tasks == {"finished": 1, "queued": 9}
    lines.append(element(1, execution=2))
    assert statistics(lines).tasks == {"finished": 2, "queued": 8}
    lines += [*(element(index) for index in range(2, 10)), JournalEntry(id="6", elements={"finished": "0-9"})]
    assert statistics(lines).tasks == {"finished": 10}


@pytest.fixture
def pilot(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "2") as cli:
        yield cli


def test_report_while_it_runs_and_afterwards(pilot: Cli, tmp_path: Path) -> None:
    pilot("enqueue", "--array", "0-4", "--", "sh", "-c", "test {index} -lt 3")
    pilot("enqueue", "--cores", "2", "--name", "long one", "--", "sleep", "0.3")
    assert pilot("wait").returncode == 1
    wait_until(lambda: "6" in pilot("report").stdout.partition("executions")[2].split(" on ")[0], what="the journal")
    pilot("stop")
    done = pilot("report")
    assert done.returncode == 0
    assert "2 failed, 4 finished" in done.stdout and "2  exit: ended with a non-zero exit code" in done.stdout
    assert "long one" in done.stdout
    facts = json.loads(pilot("report", "stats", "--json").stdout)
    assert facts["executions"] == 6 and facts["failures"] == {"exit": 2} and 0 < facts["use"] <= 1
    spent = facts["core_hours"]
    rounded = 1e-9 * len(PARTS)
    assert spent["whole"] == pytest.approx(sum(hours for part, hours in spent.items() if part in PARTS), abs=rounded)
    assert "CORE-HOURS WENT INTO" in done.stdout and spent["advice"] in done.stdout
    for name, magic in (("run.png", b"\x89PNG"), ("run.svg", b"<?xml")):
        done = pilot("report", "gantt", name)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).read_bytes().startswith(magic)
    for words, text in (
        (["gantt"], "name the FILE"), (["stats", "x"], "takes no FILE"), (["gantt", "run.xyz"], "run.xyz: "),
        (["gant"], "gantt"),
    ):  # fmt: skip
        done = pilot("report", *words)
        assert done.returncode == 2 and text in done.stderr


def test_files_for_other_programs(pilot: Cli, tmp_path: Path) -> None:
    pilot("enqueue", "--cores", "2", "--name", "long one", "--", "sleep", "0.3")
    pilot("wait")
    pilot("stop")
    for kind, name in (("usage", "use.pdf"), ("csv", "run.csv"), ("trace", "run.json"), ("html", "run.html")):
        done = pilot("report", kind, name)
        assert done.returncode == 0 and f"1 executions are in {name}" in done.stderr
    assert (tmp_path / "use.pdf").read_bytes().startswith(b"%PDF")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["cores"], row["status"]) for row in rows] == [("long one", "2", "finished")]
    assert "long one" in (tmp_path / "run.html").read_text()
    done = pilot("report", "csv", "no/such/x.csv")
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert not list(tmp_path.glob("run.*.*"))


def test_nothing_to_draw(pilot: Cli) -> None:
    pilot("stop")
    assert "none has ended" in pilot("report").stdout
    assert "there is nothing to draw" in pilot("report", "gantt", "x.png").stderr


DRAW = """
import sys
from pilotq.broker.client.executions import Executions
from pilotq.broker.store.journal import Journal
from pilotq.cli.report_drawing import draw_gantt
draw_gantt(Executions(Journal(sys.argv[1]).entries()), sys.argv[2])
"""


def test_charts_of_many_are_of_density(tmp_path: Path) -> None:
    journal = plant(tmp_path, [line(str(i), i % 7, i % 7 + 2, f"n{i % 600}[0]") for i in range(1200)])
    subprocess.run([sys.executable, "-c", DRAW, journal.path, str(tmp_path / "many.png")], check=True)
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_a_timeline_says_how_busy_cores_were() -> None:
    runs = Executions(
        [line("1", 0, 4, "n1[0]"), line("2", 1, 2.5, "n1[1]", status="failed"), line("3", 3, 4, "n2[0:1]")]
    )
    time = Timeline(runs, 4, 2)
    assert (time.begin, time.end, time.rows, time.cores) == (0, 4, 2, [2, 2])
    assert list(time.busy) == [0.5, 1, 0.75, 0.5, 0, 0, 0, 1]
    assert list(time.failed) == [0, 0.5, 0.25, 0, 0, 0, 0, 0]


def plant(folder: Path, entries: list[JournalEntry]) -> Journal:
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    return Journal(str(path))


def test_the_page_escapes_what_tasks_are_called(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><!--"
    entries = [line("<i>", 0, 4, name=name, status="failed", reason="exit"), line("2", 1, 3, "n1[1],n2[0]")]
    assert write_page(plant(tmp_path, entries), str(tmp_path / "x.html")) == 2
    text = (tmp_path / "x.html").read_text()
    assert "<script>alert" not in text and "<i>" not in text and "<!--" not in text
    assert text.count("</script>") == 2 and "&lt;script&gt;alert" in text
    assert "http:" not in text and "https:" not in text and " src=" not in text
    data = data_of(tmp_path / "x.html")
    assert data["cores"] == 3 and bars_of(data["bars"], data["words"]) == [
        Bar("<i>", name, "failed", 0, 4_000_000, [(0, 1)]), Bar("2", "", "finished", 1_000_000, 3_000_000, [(1, 2)]),
    ]  # fmt: skip


def test_the_page_has_every_execution_of_many(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    plant_many(path, 60_000)
    write_page(Journal(str(path)), str(tmp_path / "x.html"))
    data, runs = data_of(tmp_path / "x.html"), Executions(Journal(str(path)).entries())
    begin = min(runs.started)
    row_of = {f"{node}[{core}]": row for row, (node, core) in enumerate(runs.held())}
    wanted = [
        Bar(
            runs.ids[run], runs.names.words[runs.name[run]], runs.statuses.words[runs.status[run]],
            round((runs.started[run] - begin) / 1e-6), round((runs.ended[run] - begin) / 1e-6),
            [(row_of[runs.places.words[runs.place[run]]], 1)],
        )
        for run in range(60_000)
    ]  # fmt: skip
    assert data["bars"]["unit"] == 1e-6
    assert sorted(bars_of(data["bars"], data["words"])) == sorted(wanted)


def test_what_is_lost_where_the_page_would_be_too_large() -> None:
    rng, entries = random.Random(1), []
    for task in rng.sample(range(10_000), 2000):
        start = rng.uniform(0, 9000)
        cpus = f"n1[{task % 3}:{task % 5 + 3}]"
        entries.append(line(str(task), start, rng.uniform(start, 9000), cpus, name=str(rng.randrange(10**6))))
    entries += [line("007", 0, 9000), line("x", 0.5, 8000)]
    runs = Executions(entries)
    seen: list[str] = []
    size, columns = 100_000, None
    while columns is None or columns:
        columns, lost = pack_bars(runs, runs.held(), 0, 9000, size)
        assert sum(len(text) for text in columns.values() if isinstance(text, str)) <= size
        for bar in bars_of(columns, runs.statuses.words) if "heads" in columns and lost not in seen else []:
            run = runs.ids.index(bar.id)
            times = (round(runs.started[run] / columns["unit"]), round(runs.ended[run] / columns["unit"]))
            name = runs.names.words[runs.name[run]] if "names" in columns else ""
            assert (bar.start, bar.end, bar.name) == (*times, name)
        if lost not in seen:
            seen.append(lost)
        size = size * 97 // 100
    small, coarse = "So that the page stays small, ", "times are rounded to 0.0086 s"
    assert seen == [
        "", f"{small}times are rounded to 0.001 s.", f"{small}{coarse}.", f"{small}names are left out.",
        f"{small}times are rounded to 0.001 s and names are left out.", f"{small}{coarse} and names are left out.",
        f"{small}times are rounded to 0.001 s and names and ids are left out.",
        f"{small}{coarse} and names and ids are left out.",
        "The executions are too many to be in the page one by one: it shows how busy cores were.",
    ]  # fmt: skip


def test_a_trace_has_a_slice_on_each_node(tmp_path: Path) -> None:
    entries = [line("1", 1, 3, "n1[1:2],n2[0]", name="both"), line("2", 3, 3, "n1[0]")]
    assert write_trace(entries, str(tmp_path / "x.json")) == 2
    events = json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    slices = [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [("both", 1, 2, 1e6, 2e6), ("both", 2, 1, 1e6, 2e6), ("2", 1, 1, 3e6, 1)]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["n1", "n2"]
    assert write_trace([], str(tmp_path / "x.json")) == 0
    assert json.loads((tmp_path / "x.json").read_text())["traceEvents"] == []


def test_the_page_of_nothing(tmp_path: Path) -> None:
    assert write_page(plant(tmp_path, []), str(tmp_path / "x.html")) == 0
    assert "No execution has ended" in (tmp_path / "x.html").read_text()


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInput, match="parquet"):
        write_parquet([], str(tmp_path / "x.parquet"))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_has_the_same_rows(tmp_path: Path, pilot: Cli) -> None:
    from pyarrow import parquet

    entries = [line("1", 0, 4, name="one\udcff"), line("2", 1, 3, status="failed", reason="exit", exit_code=3)]
    assert write_parquet(entries, str(tmp_path / "z.parquet")) == 2
    rows = parquet.read_table(tmp_path / "z.parquet").to_pylist()
    assert [row["name"] for row in rows] == ["one?", ""] and rows[1]["exit_code"] == 3 and rows[0]["signal"] is None
    assert pilot("enqueue", "--name", "fit", "--array", "1-3", "--", "true").returncode == 0
    assert pilot("wait").returncode == 0
    wait_until(lambda: "3 executions" in pilot("report", "csv", "x.csv").stderr, what="the journal")
    done = pilot("report", "parquet", "y.parquet")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "x.csv", newline="") as file:
        texts = list(csv.DictReader(file))
    rows = parquet.read_table(tmp_path / "y.parquet").to_pylist()
    assert [{name: "" if v is None else str(v) for name, v in row.items()} for row in rows] == texts


def test_top_once(pilot: Cli) -> None:
    task = pilot("enqueue", "--name", "sleeper", "--", "sleep", "100").stdout.strip()
    wait_until(lambda: json.loads(pilot("top", "--json").stdout)["running"] == 1)
    done = pilot("top", "--once")
    assert "0 of 1 task ended; 1 running" in done.stdout
    assert "sleeper" in done.stdout and "NAME" in done.stdout
    facts = json.loads(pilot("top", "--json").stdout)
    assert [row["id"] for row in facts["longest"]] == [task] and facts["nodes"][0]["cores"] == 2
    pilot("stop", "--now")
    assert "the pilot has ended" in pilot("top").stdout


def test_without_matplotlib_it_says_so(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    assert cli("run", "--dir", "p", "--nodes", "1", "--", "true").returncode == 0
    code = "import sys; sys.modules['matplotlib'] = None\nfrom pilotq.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "--dir", "p", "gantt", "x.png"], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "needs matplotlib" in done.stderr


def test_report_by_name_says_what_to_ask_for(pilot: Cli) -> None:
    pilot("enqueue", "--name", "fit", "--memory", "2G", "--time-limit", "1h", "--", "sleep", "1.1")
    assert pilot("wait").returncode == 0
    wait_until(lambda: "fit" in pilot("report", "--by-name").stdout, what="the journal")
    said = pilot("report", "--by-name").stdout.splitlines()
    assert said[1].split()[:2] == ["fit", "1"]
    assert " of 2 GiB" in said[1]
    assert " of 1h00m" in said[1]
    assert said[-1] == "fit: ask for --cores 1 --memory 16M --time-limit 2s"
    [one] = json.loads(pilot("report", "--by-name", "--json").stdout)
    assert (one["name"], one["memory"], one["limit"]) == ("fit", 2 << 30, 3600.0)
    assert pilot("report", "gantt", "x.png", "--by-name").returncode == 2


def test_what_was_learned_of_a_name_is_asked_for(pilot: Cli) -> None:
    """`sleep` needs less than the least memory that is ever asked for; the journal has what was asked for."""
    pilot("enqueue", "--name", "fit", "--array", "0-2", "--", "sleep", "1.1")
    assert pilot("wait").returncode == 0
    wait_until(lambda: " 3 " in pilot("report", "--by-name").stdout, what="the journal")
    assert pilot("enqueue", "--learn", "--name", "fit", "--memory", "1G", "--", "sleep", "1").returncode == 0
    assert pilot("wait").returncode == 0
    wait_until(lambda: " 4 " in pilot("report", "--by-name").stdout, what="the journal")
    [one] = json.loads(pilot("report", "--by-name", "--json").stdout)
    assert (one["executions"], one["memory"], one["limit"]) == (4, 16 << 20, 0.0)
