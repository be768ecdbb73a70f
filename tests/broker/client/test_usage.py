"""What tasks asked for and used, by name, and what to ask for next time."""

from __future__ import annotations

from typing import Any

from pilotq.broker.client.overview_tally import pattern_of
from pilotq.broker.client.usage import Usage, learned, usage
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.tasks.model import Request, Task

MB = 1 << 20


def ran(name: str, seconds: float, **fields: Any) -> JournalEntry:
    fields = {"status": "finished", "execution": 1, "cpus": "n1[0:1]", "command": "fit x", **fields}
    return JournalEntry(id="1", name=name, started=100.0, ended=100.0 + seconds, **fields)


def only(*entries: JournalEntry) -> Usage:
    [found] = usage(entries)
    return found


def test_what_was_used_most_and_a_margin_is_asked_for_next_time() -> None:
    one = only(
        ran("fit", 10.0, cpu=11.0, max_rss=100 * MB, memory=1000 * MB, limit=600.0),
        ran("fit", 40.0, cpu=10.0, max_rss=300 * MB, memory=1000 * MB, limit=600.0),
    )
    assert (one.executions, one.finished, one.cores, one.busy) == (2, 2, 2, 1.1)
    assert (one.peak, one.memory, one.longest, one.limit) == (300 * MB, 1000 * MB, 40.0, 600.0)
    assert (one.next_cores, one.next_memory, one.next_limit) == (1, 360 * MB, 60.0)


def test_what_was_ended_for_memory_or_time_asks_for_more_than_it_had() -> None:
    short = only(ran("fit", 5.0, status="failed", reason="memory", max_rss=210 * MB, memory=200 * MB))
    assert (short.short_of_memory, short.next_memory) == (1, 420 * MB)
    grown = only(
        ran("fit", 5.0, status="failed", reason="memory", max_rss=210 * MB, memory=200 * MB),
        ran("fit", 5.0, execution=2, max_rss=250 * MB, memory=400 * MB),
    )
    assert (grown.short_of_memory, grown.finished, grown.next_memory) == (1, 1, 300 * MB)
    late = only(ran("fit", 60.1, status="failed", reason="time limit", limit=60.0))
    assert (late.short_of_time, late.next_limit) == (1, 121.0)


def test_names_and_programs_are_apart_and_short_runs_say_nothing_of_cores() -> None:
    found = usage([ran("", 0.1, cpu=0.2), ran("b", 9.0, cpu=18.0), ran("", 0.1), JournalEntry(id="2", name="b")])
    assert [(one.name, one.program, one.executions, one.next_cores) for one in found] == [
        ("b", "", 1, 2), ("", "fit", 2, 0),
    ]  # fmt: skip


def test_names_that_differ_in_their_numbers_only_count_together_on_request() -> None:
    lines = [ran(f"t-{number}", number) for number in range(1, 1001)] + [ran("", 1.0, command="fit-2 x")]
    found = usage(lines, pattern_of)
    assert [(one.name, one.program, one.executions, one.longest) for one in found] == [
        ("t-*", "", 1000, 1000.0), ("", "fit-2", 1, 1.0),
    ]  # fmt: skip
    assert len(usage(lines)) == 1001


def test_what_was_used_is_asked_for_and_never_more_than_the_task_says() -> None:
    known = usage([ran("fit", 40.0, cpu=75.0, max_rss=300 * MB)] * 3 + [ran("new", 40.0, max_rss=MB)] * 2)

    def asked(**fields: Any) -> Task:
        return learned([Task(command=["fit"], **fields)], known)[0]

    plain = asked(name="fit")
    assert plain.request == Request(cores=(2, 2), memory=360 * MB)
    assert (plain.time_request, plain.time_limit) == (60.0, None)
    assert asked(name="fit", request=Request(cores=(4, 8), memory=900 * MB)).request == plain.request
    assert asked(name="fit", request=Request(memory=100 * MB, gpus=1)).request == Request(
        cores=(2, 2), memory=100 * MB, gpus=1
    )
    assert asked(name="fit", request=Request(cores=(1, 4))).request.cores == (1, 2)
    assert asked(name="fit", request=Request(nodes=(2, 2), cores=(4, 4))).request.cores == (4, 4)
    assert asked(name="fit", time_limit=5.0).time_request is None
    for other in ("", "new", "unknown"):
        assert asked(name=other) == Task(command=["fit"], name=other)
