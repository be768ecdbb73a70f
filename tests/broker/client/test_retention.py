"""Tasks whose records have expired: queries answer from the journal, and new tasks may depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker.errors import ServerRefused, UnknownTask
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal
from pilotq.broker.tasks.model import ArrayRange
from tests.support.engine import Engine, fixtures, task
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

engine, server, node = fixtures


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LivePilot]:
    """It keeps five records of a kind, and looks often."""
    with live_pilot(tmp_path, nodes="n1:2", keep_records=5, reconcile_s=0.1) as found:
        yield found


def forgotten(live: LivePilot, *ids: str) -> None:
    for _ in range(10):
        live.enqueue("true"), live.enqueue("false")
    live.broker.wait(timeout=60)
    names = [keys.job(task_id) for task_id in ids]
    wait_until(lambda: not live.broker.link.call("EXISTS", *names), what="records are trimmed")


def test_everything_is_answered_from_the_journal(live: LivePilot) -> None:
    good = live.enqueue("echo", "hello", name="good")
    bad = live.enqueue("false")
    array = live.enqueue("true", array=ArrayRange(0, 2))
    live.broker.wait(timeout=60)
    wait_until(lambda: live.lines(good) and live.lines(bad) and live.lines(array), what="lines in the journal")
    forgotten(live, good, bad, array)
    assert live.broker.task(good).status == "finished" and live.broker.task(bad).exit_code == 1
    assert live.broker.task(array).elements == {"finished": "0-2"}
    assert live.broker.find("good") == [good]
    assert live.output(good) == b"hello\n"
    assert good in {view.id for view in live.broker.tasks()}
    counts = live.broker.wait([good, bad, array, f"{array}_1"], timeout=30)
    assert (counts.finished, counts.failed) == (3, 1)
    for verb in ("show", "logs", "wait"):
        assert live.cli(verb, good).returncode == 0
    assert good.encode() in live.cli("list", "--limit", "1000").stdout


def test_what_is_forgotten_can_be_depended_on(live: LivePilot) -> None:
    good, bad = live.enqueue("true"), live.enqueue("false")
    array = live.enqueue("true", array=ArrayRange(0, 1))
    live.broker.wait(timeout=60)
    wait_until(lambda: live.lines(good) and live.lines(bad) and live.lines(array), what="lines in the journal")
    forgotten(live, good, bad, array)
    first = live.enqueue("true", after=[good, array, f"{array}_1"])
    second = live.enqueue("true", after=[good, bad])
    assert live.ended(first).status == "finished"
    assert (live.ended(second).status, live.broker.task(second).reason) == ("canceled", "dependency")
    with pytest.raises(UnknownTask):
        live.enqueue("true", after=["vvvv"])
    assert live.cli("enqueue", "--after", good, "--", "true").returncode == 0


def test_a_wait_reads_the_journal_once(live: LivePilot, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [live.enqueue("true") for _ in range(20)]
    live.broker.wait(timeout=60)
    wait_until(lambda: all(live.lines(task_id) for task_id in ids), what="lines in the journal")
    forgotten(live, *ids)
    monkeypatch.setattr(Journal, "find", None)  # which reads all of it for each task
    assert live.broker.wait(ids, timeout=30).finished == 20
    monkeypatch.undo()


def test_a_submit_is_refused_when_memory_is_short(engine: Engine) -> None:
    """Before anything is written, with what it needs; ends go through."""
    engine.reset(bundle_above=10_000)
    running = engine.submit(task()) and engine.claim()
    used = dict(line.split(":", 1) for line in engine.link.call("INFO", "memory").decode().splitlines() if ":" in line)
    before = engine.admin.call("CONFIG", "GET", "maxmemory")[1]
    engine.admin.call("CONFIG", "SET", "maxmemory", int(used["used_memory"]) + 300_000)
    try:
        with pytest.raises(ServerRefused, match=r"need about 1,400,000 bytes"):
            engine.submit(*[task()] * 2000)
        assert len([k for k in engine.all_keys() if k.startswith("rq:job:")]) == 1
        engine.admin.call("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(ServerRefused):
            engine.submit(task())
        assert engine.complete(running) == ["ok"]
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", before)
    assert engine.counts() == {"total": 1, "finished": 1}
