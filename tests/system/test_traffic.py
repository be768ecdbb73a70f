"""What a task costs that does not depend on the machine: the pilot's traffic for one of many, held below ceilings."""

from __future__ import annotations

import pytest

from benchmarks.costs import Submit, submit_array, submit_many, submit_single, submit_some
from benchmarks.traffic import Traffic, submit_rq, traffic

# For each task, from the submit to its line in the journal. Where a change makes one smaller, its ceiling follows.
# What counts calls and entries has room for a slow machine: there batches are smaller, and the periodic work is more.
CEILINGS = {
    "element of an array": Traffic(
        requests=0.12, commands=0.8, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=200, journal_bytes=370,
    ),
    "task of a bundle": Traffic(
        requests=0.12, commands=0.8, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=90, journal_bytes=370,
    ),
    "single task": Traffic(
        requests=0.4, commands=6.3, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=875, journal_bytes=350,
    ),
    # The dispatcher, which may hand out nothing yet, wakes up for each.
    "task of an enqueue of its own": Traffic(
        requests=10, commands=47, inbox_entries=0.05, messages=1.05, events=0.05, journal_entries=0.05,
        log_bytes=2_020, journal_bytes=350,
    ),
    # RQ's own enqueue_many is three of the requests, and a third of the bytes.
    "job of an RQ producer": Traffic(
        requests=4.4, commands=23.5, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=2_550, journal_bytes=310,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "submit", "number"),
    [
        ("element of an array", submit_array, 5_000),
        ("task of a bundle", submit_many, 5_000),
        ("single task", submit_some, 5_000),
        ("task of an enqueue of its own", submit_single, 1_000),
        ("job of an RQ producer", submit_rq, 5_000),
    ],
    ids=["element", "bundle", "single", "alone", "rq"],
)
def test_the_traffic_of_a_task_stays_below_its_ceiling(shape: str, submit: Submit, number: int) -> None:
    found, ceiling = traffic(submit, number)._asdict(), CEILINGS[shape]._asdict()
    above = {what: f"{found[what]:.4g} > {most:g}" for what, most in ceiling.items() if found[what] > most}
    assert not above, f"{shape}: it costs more than it did: {above}; all figures: {found}"
