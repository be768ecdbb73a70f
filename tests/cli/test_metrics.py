"""`pilotq metrics`: what it exports of a real pilot, to whom, and what docs/grafana.json shows of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.journal import JournalEntry
from pilotq.cli.metrics import FAMILIES, NAMES_MAX, OTHER, JournalTotals, PilotMetrics
from tests.support.dashboard import Served, needs_dashboard, served
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

Sample = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("metrics"), "n1:2,n2:1") as found:
        yield found


@pytest.fixture
def page(pilot: LivePilot, tmp_path: Path) -> Iterator[Served]:
    """`pilotq metrics`, ended with Ctrl-C."""
    with served(tmp_path, Path(pilot.pilot.directory), verb="metrics") as found:
        yield found


def samples(text: str) -> dict[Sample, float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: dict[Sample, float], series: str, **labels: str) -> float:
    return found.get((series, frozenset(labels.items())), 0.0)


def test_metrics_of_a_pilot(pilot: LivePilot, page: Served) -> None:
    broker = pilot.broker
    held = pilot.enqueue("sleep", "1000", name="held", request=Request(cores=(2, 2)))
    wide = pilot.enqueue("true", name="wide", request=Request(cores=(2, 2)))
    later = pilot.enqueue("true", name="later", after=[wide])
    bad = [pilot.enqueue("sh", "-c", "exit 3", name=f"bad-{number}") for number in range(3)]
    again = pilot.enqueue("false", name="again", retries=1)
    many = broker.enqueue(Task(command=["true"], name="many", array=ArrayRange(0, 9)))
    broker.wait([*bad, again, many], timeout=60)

    def read() -> dict[Sample, float]:
        status, text = page.ask()
        assert status == 200, text
        return samples(text)

    def complete() -> dict[Sample, float] | None:
        found = read()
        seen = value(found, "pilotq_tasks_ended_total", status="failed", reason="exit")
        done = value(found, "pilotq_tasks_ended_total", status="finished", reason="")
        used = value(found, "pilotq_cores_used")
        return found if seen == 4 and done == 10 and used == 2 else None

    found = wait_until(complete, what="all ends in the metrics")
    states = ("deferred", "queued", "running", "finished", "failed", "canceled")
    assert [value(found, "pilotq_tasks", state=state) for state in states] == [1, 1, 1, 10, 4, 0]
    assert value(found, "pilotq_tasks_submitted_total") == broker.counts().total == 17
    assert value(found, "pilotq_executions_total", name="bad-*", status="failed", reason="exit") == 3
    assert value(found, "pilotq_executions_total", name="again", status="failed", reason="exit") == 2
    assert value(found, "pilotq_retries_total", name="again") == 1
    assert value(found, "pilotq_queue_wait_seconds_count", name="many") == 10
    assert value(found, "pilotq_run_seconds_bucket", name="many", le="+Inf") == 10
    assert value(found, "pilotq_start_latency_seconds_count") == 15
    assert value(found, "pilotq_waiting_tasks", queue="default", priority="0", shape="2c") == 1
    assert [value(found, f"pilotq_{what}") for what in ("cores", "cores_used")] == [3, 2]
    assert value(found, "pilotq_node_cores_used", node="n1") == 2 and value(found, "pilotq_nodes", state="up") == 2
    assert value(found, "pilotq_journal_bytes") == Path(pilot.pilot.journal).stat().st_size
    assert value(found, "pilotq_server_memory_bytes") > 1e6
    names = {re.sub("_(bucket|count|sum)$", "", name) for name, _ in found}
    assert names == set(FAMILIES), "what is exported is what the table says"
    once = samples(pilot.cli("metrics", "--once").stdout.decode())
    assert value(once, "pilotq_tasks_ended_total", status="failed", reason="exit") == 4
    assert value(once, "pilotq_journal_unread_bytes") == 0
    broker.cancel([held, wide, later])


def test_only_who_knows_the_password_sees_them(pilot: LivePilot, page: Served) -> None:
    assert [page.ask(password=word)[0] for word in ("", "wrong", page.password)] == [401, 401, 200]
    assert page.ask("/other")[0] == 404 and page.ask("/other", password="")[0] == 401
    assert Pilot(pilot.pilot.directory).connection().address.password not in page.ask()[1] + page.stderr


def test_they_end_with_the_pilot(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as own, served(tmp_path, Path(own.pilot.directory), verb="metrics") as page:
        own.pilot.process.terminate()
        page.process.wait(60)
    assert "the pilot has ended, and so do its metrics" in (tmp_path / "dashboard.err").read_text()


def entry(name: str = "a", **fields: object) -> JournalEntry:
    known = {"status": "finished", "execution": 1, "node": "n1", "cpus": "n1[0:1]", "queued": 10.0, "handed": 11.0}
    return JournalEntry(id="1", name=name, **{**known, "started": 11.5, "ended": 13.5, **fields})  # type: ignore[arg-type]


def test_names_are_bounded() -> None:
    totals = JournalTotals()
    for number in range(NAMES_MAX + 10):
        letters = f"{chr(97 + number // 26)}{chr(97 + number % 26)}"
        totals.add(entry(f"{letters}-{number}"))
        totals.add(entry(f"{letters}-{number + 1}"))
    executions = totals.values()["pilotq_executions_total"]
    assert len(executions) == NAMES_MAX + 1
    assert executions["aa-*", "finished", ""] == 2 and executions[OTHER, "finished", ""] == 20


def test_times_are_sums_and_buckets() -> None:
    totals = JournalTotals()
    totals.add(entry(final=False, status="failed", reason="exit"))
    totals.add(entry(execution=2, ended=None))
    found = totals.values()
    assert found["pilotq_core_seconds_total"] == {("a",): 4.0} and found["pilotq_retries_total"] == {("a",): 1}
    buckets, total = found["pilotq_queue_wait_seconds"][("a",)]
    assert total == 1.5 and dict(buckets)["1.0"] == 0 and dict(buckets)["10.0"] == 1, "of the first execution only"
    assert found["pilotq_start_latency_seconds"][()][1] == 1.0
    assert found["pilotq_tasks_ended_total"] == {("finished", ""): 1}


def test_elements_that_never_ran_count_once() -> None:
    totals = JournalTotals()
    for _ in range(2):  # retried, and ended as before
        totals.add(JournalEntry(id="9_3", array="9", index=3, status="canceled", reason="canceled", execution=1))
        totals.add(
            JournalEntry(id="9", status="canceled", reason="canceled", elements={"canceled": "3-9", "finished": "0-2"})
        )
    assert totals.values()["pilotq_tasks_ended_total"] == {("canceled", "canceled"): 8}


def test_the_dashboard_of_grafana_shows_what_is_exported() -> None:
    board = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = set(re.findall(r"pilotq_\w+", " ".join(expressions)))
    histograms = {name for name, family in FAMILIES.items() if family.kind == "histogram"}
    series = {f"{name}_bucket" if name in histograms else name for name in FAMILIES}
    assert named == series, "each is shown somewhere, and nothing else"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    labels = {label for text in expressions for label in re.findall(r"by \(([\w, ]+)\)", text)}
    known = {label for family in FAMILIES.values() for label in family.labels} | {"le"}
    assert {label for text in labels for label in text.split(", ")} <= known


@needs_dashboard
def test_the_dashboard_has_the_same(pilot: LivePilot, tmp_path: Path) -> None:
    with served(tmp_path, Path(pilot.pilot.directory)) as dashboard:
        status, text = dashboard.ask("metrics")
        assert status == 200 and value(samples(text), "pilotq_cores") == 3
        assert dashboard.ask("metrics", password="")[0] == 401


def test_a_journal_that_cannot_be_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pilotq.cli.metrics.TROUBLE_S", 0.01)
    monkeypatch.setattr("pilotq.cli.metrics.POLL_S", 0.01)
    own = Pilot(str(tmp_path))
    Path(own.journal).mkdir()
    metrics = PilotMetrics(own)
    metrics.start()
    try:
        wait_until(lambda: "cannot be read" in capfd.readouterr().err, what="a line about it")
        Path(own.journal).rmdir()
        Path(own.journal).write_text('{"id":"1","name":"a","status":"finished","execution":1,"ended":1000.0}\n')
        wait_until(lambda: metrics._totals.values()["pilotq_tasks_ended_total"], what="the entry")
    finally:
        metrics.close()
