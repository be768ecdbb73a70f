"""What became of many tasks without records: the journal is read once for all of them, and then what is added."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from pilotq.broker import ArrayRange
from pilotq.broker.client import queries
from pilotq.broker.client.archive import Archive
from pilotq.broker.client.past import PastTasks
from pilotq.broker.client.submit import submit
from pilotq.broker.client.views import Counts
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal, JournalEntry
from tests.support.engine import SHARED, Engine, array, fixtures, task
from tests.support.live_pilot import live_pilot

engine, server, node = fixtures


def write(path: Path, *entries: JournalEntry) -> Journal:
    """Append to a journal, with a last line that its writer has not finished."""
    with open(path, "ab+") as file:
        if not file.tell():
            file.write(b'{"pilotq_journal": 1}\n')
        for entry in entries:
            file.write(msgspec.json.encode(entry) + b"\n")
    return Journal(str(path))


def end(task_id: str, status: str, **fields: object) -> JournalEntry:
    return msgspec.structs.replace(JournalEntry(task_id, status=status, execution=1, array=array_of(task_id)), **fields)


def retry(task_id: str) -> JournalEntry:
    return end(task_id, "queued", final=False, execution=0)


def array_of(task_id: str) -> str:
    return task_id.rpartition("_")[0]


def test_the_last_end_of_each_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    odd = 'a",b\\'
    ids = ["1", "2", "3", "4", "4_0", "4_2", "5_0", odd, "never"]
    past = PastTasks(None, Journal(str(path)), ids)
    assert past.statuses(ids) == {}
    write(path, end("1", "failed", final=False), end("1", "finished"), end("2", "failed"), end("9", "failed"))
    assert past.statuses(ids) == {"1": "finished", "2": "failed"}
    write(path, retry("2"), end("4", "failed", elements={"failed": "2-8:2", "canceled": "0"}), end(odd, "canceled"))
    assert past.statuses(ids) == {"1": "finished", "4": "failed", "4_0": "canceled", "4_2": "failed", odd: "canceled"}
    with open(path, "ab") as file:
        file.write(msgspec.json.encode(end("3", "finished")))  # its writer is at it
    assert "3" not in past.statuses(ids)
    with open(path, "ab") as file:
        file.write(b"\n")
    write(path, retry("4"))
    assert set(past.statuses(ids)) == {"1", "3", odd}


def test_elements_are_asked_of_their_array_first(engine: Engine) -> None:
    (a,) = engine.submit(array(5))
    good, bad, *_ = engine.claim(3)
    engine.complete([good])
    engine.complete([bad], "failed", "exit")
    past = PastTasks(engine.link, None, [])
    assert past.statuses([f"{a}_{n}" for n in range(6)] + ["7"]) == {
        f"{a}_0": "finished", f"{a}_1": "failed", f"{a}_2": "started", f"{a}_3": "queued", f"{a}_4": "queued",
    }  # fmt: skip


def test_what_the_array_knows_counts_more_than_a_retry_in_the_journal(engine: Engine, tmp_path: Path) -> None:
    (a,) = engine.submit(array(3))
    engine.cancel(a)
    journal = write(tmp_path / "journal.jsonl", end(f"{a}_1", "failed"), retry(f"{a}_1"), retry("zz_1"))
    found = [queries.TaskQueries(engine.link, journal).task(i) for i in (f"{a}_1", "zz_1")]
    assert [view and view.status for view in found] == ["canceled", "queued"]


def test_elements_without_records_are_counted_by_array(engine: Engine) -> None:
    (a,) = engine.submit(array(400))
    runs = engine.claim(4)
    engine.complete_runs(runs[:2])
    engine.complete(runs[2:3], "failed", "exit")
    asked = queries.TaskQueries(engine.link, None)
    ids = [f"{a}_{n}" for n in range(400)]
    before = commands(engine)
    assert asked.counts([*ids, "zz_0", "zz"]) == Counts(total=402, finished=4, failed=1)
    assert commands(engine) - before < 402 + 10
    engine.link.call("SET", keys.job("y"), "a string")
    assert asked.counts(["y_1"]) == Counts(total=1, finished=1)
    engine.cancel(a)
    engine.release_dependents()
    assert asked.counts(ids) == Counts(total=400, finished=2, failed=1, canceled=396)


def commands(engine: Engine) -> int:
    """How many the server has processed."""
    text = engine.admin.call("INFO", "stats").decode()
    return int(text.split("total_commands_processed:")[1].split()[0])


@pytest.mark.parametrize("seed", range(20))
def test_counts_of_an_ended_pilot_whatever_was_retried(tmp_path: Path, seed: int) -> None:
    luck = random.Random(seed)
    entries = []
    for _ in range(200):
        task_id = luck.choice(["1", "2", "a", "b", *(f"{a}_{n}" for a in "ab" for n in range(4))])
        if luck.random() < 0.3:
            entries.append(retry(task_id))
        else:
            entries.append(end(task_id, luck.choice(["finished", "failed", "canceled"]), final=luck.random() < 0.7))
    last: dict[str, JournalEntry] = {}
    for entry in entries:
        last[entry.id] = entry
        if not entry.final and not entry.execution:
            last = {i: e for i, e in last.items() if e.array != entry.id or e.status == "finished"}
    pilot = Pilot(str(tmp_path))
    write(Path(pilot.journal), *entries)
    ended = [entry.status for entry in last.values() if entry.final]
    assert Archive(pilot).counts() == Counts(
        total=len(last), **{status: ended.count(status) for status in ("finished", "failed", "canceled")}
    )


def test_forgotten_parents_are_looked_up_together(engine: Engine) -> None:
    asked = []

    def statuses(ids: object) -> dict[str, str]:
        asked.append(ids)
        return dict.fromkeys(parents, "finished")

    parents = [f"v{n}" for n in range(500)]
    submit(engine.link, engine.store, [task(after=[p]) for p in parents], SHARED, None, statuses)
    assert asked == [parents] and len(engine.list()) == 500


@pytest.mark.parametrize(
    ("task_id", "array"),
    [
        ("7f_3", "7f"), ("7f_0", "7f"), ("a_b_9007199254740991", "a_b"), ("7f", None), ("_3", None), ("7f_", None),
        ("7f_03", None), ("7f_\u0663", None), ("7f_-3", None), ("7f_" + "9" * 5000, None),
    ],
    ids=ascii,
)  # fmt: skip
def test_an_element_has_one_id(task_id: str, array: str | None) -> None:
    assert queries.array_of(task_id) == array


def test_statuses_of_many_are_read_from_records_elements_and_the_journal(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as pilot:
        broker = pilot.broker
        done, bad, several = (
            pilot.enqueue("true"), pilot.enqueue("false"), pilot.enqueue("true", array=ArrayRange(0, 2))
        )  # fmt: skip
        waits = pilot.enqueue("true", after=[pilot.enqueue("sleep", "100", name="long")])
        broker.wait([done, bad, several], timeout=60)
        pilot.ended(done)
        broker.link.call("DEL", keys.job(done))
        asked = [done, bad, several, f"{several}_1", f"{several}_7", waits, "zz", done]
        assert broker.statuses(asked) == {
            done: "finished", bad: "failed", several: "finished", f"{several}_1": "finished", f"{several}_7": "unknown",
            waits: "deferred", "zz": "unknown",
        }  # fmt: skip
        broker.cancel(broker.open_ids())
