"""What the core-hours went into, by journals whose answer is known."""

from __future__ import annotations

import random

import pytest

from pilotq.broker.client.core_hours import MICRO, PARTS, core_hours
from pilotq.broker.client.executions import Executions
from pilotq.broker.store.journal import JournalEntry


def ran(task_id: str, queued: float, started: float, ended: float, cpus: str, **facts: object) -> JournalEntry:
    values = {"status": "finished", "execution": 1, "node": "n1", **facts}
    return JournalEntry(id=task_id, queued=queued, started=started, ended=ended, cpus=cpus, **values)  # type: ignore[arg-type]


def parts(entries: list[JournalEntry], **facts: object) -> dict[str, float]:
    found = core_hours(Executions(entries), **facts)  # type: ignore[arg-type]
    assert sum(getattr(found, part) for part in PARTS) == found.whole
    return {part: getattr(found, part) / MICRO for part in PARTS if getattr(found, part)}


def test_start_up_and_tail() -> None:
    entries = [ran("1", 10, 12, 20, "n1[0]"), ran("2", 10, 12, 15, "n1[1]")]
    assert parts(entries) == {"start_up": 4, "finished": 11, "tail": 5}
    # With what is known of the pilot: it has a third core, was there before, and ended later.
    assert parts(entries, cores=3, begin=9, end=21) == {"start_up": 9, "finished": 11, "tail": 16}


def test_idle_cores_without_work_and_between_tasks() -> None:
    assert parts([ran("1", 0, 0, 2, "n1[0]"), ran("2", 5, 6, 7, "n1[0]")]) == {
        "finished": 3, "no_work": 3, "overhead": 1
    }  # fmt: skip
    # Two cores are free, but only one task waits for one.
    entries = [ran("1", 0, 0, 2, "n1[0:1]"), ran("2", 2, 3, 4, "n1[0]")]
    assert parts(entries) == {"finished": 5, "overhead": 1, "no_work": 1, "tail": 1}


def test_cores_held_back_for_a_large_task() -> None:
    entries = [ran("1", 0, 0, 10, "n1[0]"), ran("2", 0, 0, 4, "n1[1]"), ran("3", 1, 10, 12, "n1[0:1]")]
    assert parts(entries) == {"finished": 18, "large": 6}


def test_a_retry_waits_from_the_end_of_the_execution_before() -> None:
    entries = [
        ran("1", 0, 0, 3, "n1[0]", status="failed", final=False),
        ran("1", 0, 4, 6, "n1[0]", execution=2),
        ran("2", 0, 6, 7, "n1[0]", status="stopped"),
    ]
    assert parts(entries) == {"finished": 2, "lost": 4, "overhead": 1}
    assert parts(entries[:2]) == {"finished": 2, "lost": 3, "overhead": 1}


def test_what_came_after_others_was_not_in_the_queue_before_these_had_ended() -> None:
    first = ran("1", 0, 0, 4, "n1[0]")
    assert parts([first, ran("2", 0, 7, 8, "n1[0]")]) == {"finished": 5, "overhead": 3}
    assert parts([first, ran("2", 0, 7, 8, "n1[0]", released=6)]) == {"finished": 5, "no_work": 2, "overhead": 1}
    again = ran("2", 9, 9, 10, "n1[0]", execution=2, released=6)  # requeued: that is later
    assert list(Executions([again]).queued) == [9]
    # Of an array its own line says it, behind those of its elements.
    elements = [ran(f"3_{n}", 0, 7 + n, 8 + n, "n1[0]", array="3", index=n) for n in range(2)]
    array = JournalEntry(id="3", status="finished", elements={"finished": "0-1"}, released=6)
    assert list(Executions([first, *elements]).queued) == [0, 0, 0]
    assert list(Executions([first, *elements, array]).queued) == [0, 6, 6]
    assert parts([first, *elements, array]) == {"finished": 6, "no_work": 2, "overhead": 1}


def test_shared_cores_count_once() -> None:
    entries = [ran("1", 0, 0, 4, "n1[0]"), ran("2", 0, 0, 4, "n1[0]", status="failed")]
    assert parts(entries) == {"finished": 2, "lost": 2}


def test_nothing_ran() -> None:
    assert parts([]) == {}
    assert parts([], cores=2, begin=1.0, end=3.0) == {"start_up": 4}
    assert core_hours(Executions()).advice == ""
    never = [JournalEntry(id="1", status="canceled"), JournalEntry(id="2", elements={"finished": "0-1"})]
    assert len(Executions(never)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_are_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    entries = []
    for number in range(200):
        queued = rng.choice([0.0, rng.random() * 10])
        started = queued + rng.choice([0.0, rng.random()])
        ended = started + rng.choice([0.0, 1e-7, rng.random() * 3])
        cpus = rng.choice(["n1[0]", "n1[0:3]", "n1[1],n2[0]", ""])
        entries.append(ran(str(number), queued, started, ended, cpus, status=rng.choice(["finished", "failed"])))
    found = core_hours(Executions(entries), cores=rng.choice([None, 1, 40]))
    assert sum(getattr(found, part) for part in PARTS) == found.whole > 0
    assert all(getattr(found, part) >= 0 for part in PARTS)
    parts(entries, cores=3, begin=2.0, end=5.0)


def test_advice_names_the_largest_loss() -> None:
    entries = [ran("1", 10, 10, 20, "n1[0]"), ran("2", 10, 10, 15, "n1[1]")]
    assert core_hours(Executions(entries)).advice.startswith("25 % of the core-hours went into the tail: ")
    assert core_hours(Executions(entries[:1])).advice == "100 % of the core-hours went into tasks that finished"
