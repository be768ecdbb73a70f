"""What a task costs that does not depend on the machine: the pilot's traffic for one of many, held below ceilings."""

from __future__ import annotations

import pytest

from benchmarks.costs import Submit, submit_array, submit_many, submit_some
from benchmarks.traffic import Traffic, traffic

NUMBER = 5_000
# For each task, from the submit to its line in the journal. Where a change makes one smaller, its ceiling follows.
# What counts calls and entries has room for a slow machine: there batches are smaller, and the periodic work is more.
CEILINGS = {
    "element of an array": Traffic(
        requests=0.12, commands=0.8, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=200, journal_bytes=370,
    ),
    "task of a bundle": Traffic(
        requests=0.12, commands=0.8, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=130, journal_bytes=370,
    ),
    "single task": Traffic(
        requests=0.4, commands=8.2, inbox_entries=0.02, messages=1.05, events=0.04, journal_entries=0.04,
        log_bytes=1_160, journal_bytes=350,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "submit"),
    [("element of an array", submit_array), ("task of a bundle", submit_many), ("single task", submit_some)],
    ids=["element", "bundle", "single"],
)
def test_the_traffic_of_a_task_stays_below_its_ceiling(shape: str, submit: Submit) -> None:
    found, ceiling = traffic(submit, NUMBER)._asdict(), CEILINGS[shape]._asdict()
    above = {what: f"{found[what]:.4g} > {most:g}" for what, most in ceiling.items() if found[what] > most}
    assert not above, f"an {shape} costs more than it did: {above}; all figures: {found}"
