"""`Broker.overview`: what it says of a pilot, on a real one, and that it reads little of a large one."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import ArrayRange, Broker, Request, Task
from pilotq.broker.client.overview import Overview, Progress
from pilotq.broker.client.overview_reader import OverviewReader
from pilotq.broker.client.overview_tally import Tally
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal
from tests.support.engine import Engine, array, fixtures, task
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

engine, server, node = fixtures
HELD = ["sh", "-c", "until test -e go-on; do sleep 0.02; done"]


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("overview"), "n1:2,n2:1") as found:
        yield found


def until(broker: Broker, is_so: Callable[[Overview], bool]) -> Overview:
    found: list[Overview] = []

    def read() -> bool:
        found.append(broker.overview())
        return is_so(found[-1])

    wait_until(read, seconds=60.0, what="an overview like that")
    return found[-1]


def named(found: Overview, name: str) -> Progress:
    return next((one for one in found.progress if one.name == name), Progress(name=name))


def figures(one: Progress) -> tuple[int, ...]:
    return one.total, one.finished, one.failed, one.canceled, one.handed, one.waiting


def test_what_runs_waits_and_has_failed(pilot: LivePilot, tmp_path: Path) -> None:
    broker, cwd = pilot.broker, str(tmp_path)
    with Broker.connect(pilot.pilot.directory) as fresh:
        fresh.overview()
        running = broker.enqueue(Task(command=HELD, name="held", cwd=cwd, request=Request(cores=(2, 2))))
        until(fresh, lambda o: any(e.id == running and e.cores for e in o.executions))
        broker.enqueue_many([Task(command=["sh", "-c", "exit 3"], name=f"bad-{n}", cwd=cwd) for n in range(3)])
        elements = broker.enqueue(Task(command=["true"], name="many", array=ArrayRange(0, 9, 1), cwd=cwd))
        large = broker.enqueue(Task(command=["true"], name="large", request=Request(cores=(2, 2)), cwd=cwd))
        later = broker.enqueue(Task(command=["true"], name="later", after=[large], cwd=cwd))
        found = until(
            fresh,
            lambda o: named(o, "many").finished == 10 and sum(g.number for g in o.failures) == 3
            and any(q.why for q in o.queue if q.shape == "2c") and o.deferred == 1 and o.used == 2 and o.waiting == 2,
        )  # fmt: skip
        assert [(n.name, n.state, n.cores, n.used) for n in found.nodes] == [
            ("n1", "up", [0, 1], 2),
            ("n2", "up", [0], 0),
        ]
        (execution,) = (e for e in found.executions if e.id == running)
        assert (execution.node, execution.name, execution.started is not None) == ("n1", "held", True)
        assert figures(named(found, "held")) == (1, 0, 0, 0, 1, 0)
        assert figures(named(found, "bad-*")) == (3, 0, 3, 0, 0, 0)
        assert named(found, "many").array == elements
        assert (found.running, found.waiting, found.cores, found.used) == (1, 2, 3, 2)
        (waits,) = (q for q in found.queue if q.shape == "2c")
        assert (waits.first, waits.waiting, waits.priority) == (large, 1, 0)
        assert "needs 2 cores free on one node" in " ".join(waits.why)
        (group,) = found.failures
        assert (group.reason, group.exit_code, group.name, group.number) == ("exit", 3, "bad-*", 3)
        assert len(group.ids) == 3 and group.example in group.ids
        assert sum(sample.ended for sample in found.history) >= 13 and found.history[-1].used == 2
        # One that reads only now says the same.
        assert broker.overview(seconds=60.0).behind == 0
        late = until(broker, lambda o: any(q.why for q in o.queue if q.shape == "2c"))
        for one in late.progress, found.progress:
            for progress in one:
                progress.rate = progress.left_s = 0
        assert [p for p in late.progress if p.total] == [p for p in found.progress if p.total]
        (tmp_path / "go-on").touch()
        broker.wait(timeout=60)
        found = until(fresh, lambda o: not o.executions and named(o, "later").finished == 1 and not o.behind)
        assert found.counts == broker.counts() and not found.waiting and not found.queue
        assert later and found.left_s is None


def test_what_runs_again_is_no_failure_any_more(pilot: LivePilot, tmp_path: Path) -> None:
    broker = pilot.broker
    one = broker.enqueue(Task(command=["sh", "-c", "test -e go-on"], name="again", cwd=str(tmp_path)))
    several = broker.enqueue(
        Task(command=["sh", "-c", "test -e go-on"], name="all-again", array=ArrayRange(0, 3, 1), cwd=str(tmp_path))
    )
    found = until(broker, lambda o: sum(g.number for g in o.failures if g.name.endswith("again")) == 5)
    assert figures(named(found, "again")) == (1, 0, 1, 0, 0, 0)
    (tmp_path / "go-on").touch()
    assert set(broker.retry([one, several]).values()) == {"queued"}
    found = until(broker, lambda o: named(o, "again").finished == 1 and named(o, "all-again").finished == 4)
    assert figures(named(found, "again")) == (1, 1, 0, 0, 0, 0)
    assert figures(named(found, "all-again")) == (4, 4, 0, 0, 0, 0)
    assert not [g for g in found.failures if g.name.endswith("again")]


def test_nodes_that_get_nothing_and_a_pilot_that_rests(pilot: LivePilot) -> None:
    broker = pilot.broker
    broker.close_nodes(["n2"], "drained", "slow disk")
    broker.pause(True)
    found = broker.overview()
    assert [(n.state, n.why) for n in found.nodes] == [("up", ""), ("drained", "slow disk")]
    assert found.paused and "paused" in found.notes[0]
    broker.open_nodes(["n2"])
    broker.pause(False)
    found = broker.overview()
    assert [n.state for n in found.nodes] == ["up", "up"] and not found.paused and not found.notes


def test_names_are_read_once_and_only_so_many(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotq.broker.client.overview_census.OPEN_MAX", 30)
    monkeypatch.setattr("pilotq.broker.client.overview_census.READ_MAX", 20)
    engine.submit(*(task(name=f"{'abc'[number % 3]}{number}") for number in range(60)))
    engine.submit(array(100_000, name="array"))
    reader = OverviewReader(engine.link, TaskQueries(engine.link, None), "/pilot")
    found = reader.update(0.0)
    assert sum(one.waiting for one in found.progress if one.name is not None) == 20
    found = reader.update(0.0)
    before = int(engine.link.call("INFO", "commandstats").decode().partition("cmdstat_hmget:calls=")[2].split(",")[0])
    found = reader.update(0.0)
    after = int(engine.link.call("INFO", "commandstats").decode().partition("cmdstat_hmget:calls=")[2].split(",")[0])
    assert after - before < 10
    assert {one.name: one.waiting for one in found.progress} == {"a*": 14, "b*": 13, "c*": 13, None: 100_020}
    assert found.waiting == found.counts.left == 100_060
    assert [(one.shape, one.waiting) for one in found.queue] == [("1c", 61)]  # the array was not read yet


def test_tasks_of_bundles_have_their_names_a_few_blocks_at_an_update(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotq.broker.client.overview_reader.BLOCKS_MAX", 1)
    engine.reset(bundle_above=3)
    engine.submit(*(task("echo", str(number), name=f"n{number}") for number in range(2500)))
    handed = {h.id: h for h in engine.claim(2500)}
    for task_id in ("1_7", "1_8", "1_2400"):
        engine.report_started(handed[task_id])
    reader = OverviewReader(engine.link, TaskQueries(engine.link, None), "/pilot")
    names = [{one.id: one.name for one in reader.update(0.0).executions} for _ in range(3)]
    assert names[0] == {"1_7": "n7", "1_8": "n8", "1_2400": ""}
    assert names[2] == {"1_7": "n7", "1_8": "n8", "1_2400": "n2400"}


def test_an_array_counts_in_its_queue(engine: Engine) -> None:
    engine.submit(array(100_000, name="array"), task(priority=3))
    found = OverviewReader(engine.link, TaskQueries(engine.link, None), "/pilot").update(0.0)
    assert [(one.priority, one.waiting) for one in found.queue] == [(3, 1), (0, 100_000)]
    assert [(one.name, one.total, one.waiting) for one in found.progress] == [("array", 100_000, 100_000), ("", 1, 1)]


def test_many_classes_are_not_all_read(engine: Engine) -> None:
    names = [text for number in range(3000) for text in (f"default.p0.1c-m{number + 1}", "")]
    engine.link.call("HSET", keys.CLASSES, *names)
    engine.link.pipeline([("RPUSH", keys.queue(name), "1") for name in names[::2]])
    found = OverviewReader(engine.link, TaskQueries(engine.link, None), "/pilot").update(0.0)
    assert len(found.queue) == 30 and found.more_classes == 2970


def test_what_runs_again_is_found_without_looking_at_all_that_failed(tmp_path: Path) -> None:
    class Unsearched(OrderedDict[str, Any]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("all that failed is looked through")

    path = tmp_path / "journal.jsonl"
    failed = {"status": "failed", "reason": "exit", "exit_code": 1, "execution": 1, "ended": 1000.0}
    lines = [{"id": f"9_{index}", "array": "9", "index": index, **failed} for index in range(3)]
    lines += [{"id": str(number), "name": "a", **failed} for number in (8, 90)]
    lines += [{"id": task_id, "status": "queued", "final": False} for task_id in ("9", "90", "7")]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tally = Tally(Journal(str(path)))
    tally._undone = Unsearched()
    tally.update(10.0)
    assert tally.groups["9", ""].outcomes["failed"] == 0 and tally.groups["", "a"].outcomes["failed"] == 1
    assert "8" in tally._undone and len(tally._undone) == 1 and not tally._elements


def test_tasks_of_a_bundle_count_together_under_no_name_of_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    line = '{"id":"9_%d","array":"9","name":"n%d","status":"finished","execution":1,"ended":1000.0}\n'
    path.write_text("".join(line % (number, number) for number in range(4)))
    tally = Tally(Journal(str(path)))
    tally.update(10.0)
    assert [(key, group.name, group.outcomes["finished"]) for key, group in tally.groups.items()] == [
        (("9", ""), "", 4)
    ]


def test_a_journal_is_read_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    line = '{"id":"%d","name":"a","status":"finished","execution":1,"ended":1000.0}\n'
    path.write_text('{"pilotq_journal":1}\n' + "".join(line % number for number in range(1000)) + '{"id":"half')
    tally = Tally(Journal(str(path)))
    tally.update(0.0)
    assert 0 < tally.groups["", "a"].outcomes["finished"] < 1000 and tally.behind > 0
    for _ in range(10):
        tally.update(0.0)
    assert tally.groups["", "a"].outcomes["finished"] == 1000 and tally.behind == len('{"id":"half')
