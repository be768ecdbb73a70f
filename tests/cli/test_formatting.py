"""Tables and JSON; control sequences from users' programs do not reach the terminal."""

from __future__ import annotations

import io
import json

import pytest

from pilotq.broker.client.views import Counts, NodeView, TaskView
from pilotq.broker.store.journal import JournalEntry
from pilotq.cli import formatting, summary

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]52;c;ZXZpbA==\x1b\\text", "text"),
    ("\x9b2Jtext", "text"),
    ("\x1bPq#0\x1b\\text", "text"),
    ("\x1b7save", "save"),
    ("a\rb\nc\x00d\x08e", "a b c d e"),
    ("\u202eabc\u2066d", " abc d"),
    ("\x1b]0;never ends", ""),
    ("tail\x1b", "tail"),
    ("naïve 日本 text", "naïve 日本 text"),
]


@pytest.mark.parametrize(("text", "seen"), HOSTILE)
def test_control_characters_and_escapes_do_not_pass(text: str, seen: str) -> None:
    assert formatting.clean(text) == seen
    assert all(c.isprintable() for c in formatting.clean(text))


def test_a_table_is_clean_and_aligned_though_names_are_wide() -> None:
    tasks = [
        TaskView(id="1", name="日本", status="finished", exit_code=0),
        TaskView(id="1000", name="a\x1b[2Jb\nc", status="failed", reason="exit", exit_code=12),
    ]
    text = formatting.tasks_table(tasks)
    head, first, second = text.split("\n")
    assert head.split() == [*formatting.TASK_COLUMNS]
    assert "\x1b" not in text
    column = formatting.width(head[: head.index("STATUS")])
    assert formatting.width(first[: first.index("finished")]) == column
    assert formatting.width(second[: second.index("failed")]) == column
    assert "ab c" in second
    assert first.startswith("   1") and second.startswith("1000"), "numbers stand to the right"


def test_an_empty_table_has_its_head() -> None:
    assert formatting.tasks_table([]).split() == [*formatting.TASK_COLUMNS]


def test_no_status_is_coloured_where_stdout_is_no_terminal() -> None:
    assert "\x1b" not in formatting.tasks_table([TaskView(id="1", status="failed")])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout", Terminal())
    task = TaskView(id="1", status="failed", command="x" * 500)
    assert "\x1b[31mfailed\x1b[0m" in formatting.tasks_table([task])
    monkeypatch.setenv("NO_COLOR", "1")
    text = formatting.tasks_table([task])
    assert "\x1b" not in text
    assert max(map(len, text.split("\n"))) <= 60, "the last column is cut to the terminal"


def test_the_record_of_a_listing_has_the_promised_keys() -> None:
    task = TaskView(id="1", name="a", status="queued", times={"queued": 1.5})
    text = formatting.to_json([formatting.task_json(task)])
    assert json.loads(text) == [
        {"id": "1", "name": "a", "status": "queued", "reason": "", "exit_code": None, "execution": 0, "node": "",
         "cores": "", "times": {"queued": 1.5}}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0.00s"), (9.99, "9.99s"), (9.999, "10s"), (59.7, "1m00s"), (187, "3m07s"), (7500, "2h05m"),
     (100 * 3600, "4d04h")],
)  # fmt: skip
def test_durations(value: float | None, text: str) -> None:
    assert formatting.seconds(value) == text


def test_counts_say_what_is_left() -> None:
    assert formatting.counts_text(Counts(total=1, finished=1)) == "1 task: 1 finished"
    some = Counts(total=2000, finished=6, failed=1)
    assert formatting.counts_text(some) == "7 of 2,000 tasks ended: 6 finished, 1 failed"
    assert formatting.counts_text(Counts()) == "0 tasks"


def test_nodes_with_shared_cores_are_marked() -> None:
    node = NodeView(name="n1", state="up", host="h", pid=1, cores=4, used=2, shared_cores=True, running=2)
    assert "4*" in formatting.nodes_table([node])


def line(number: int, **facts: object) -> JournalEntry:
    base: dict[str, object] = {"status": "finished", "execution": 1, "cpus": "n1[0:1]", "started": 10.0, "ended": 12.0}
    return JournalEntry(id=str(number), **{**base, **facts})  # type: ignore[arg-type]


def test_the_summary_counts_core_seconds_of_all_executions_of_this_run() -> None:
    lines = [
        line(1),
        line(2, final=False, status="failed"),  # tried again: it held its cores all the same
        line(2, started=12.0, ended=14.0),
        line(3, started=1.0, ended=2.0),  # before this run began
        line(4, started=None, cpus="", status="canceled"),
    ]
    found = summary.summarise(lines, counts=Counts(total=3), cores=2, begin=10.0, end=20.0, directory="d")
    assert found.core_seconds == 12.0
    assert found.efficiency == 0.6
    assert found.failed == []
    assert "\n60 % of the core-hours went into the tail: " in summary.as_text(found, {})
    spent = summary.as_json(found, 0)["core_hours"]
    assert (spent["whole"] * 3600, spent["finished"] * 3600) == pytest.approx((20, 6), rel=1e-4)


def test_the_summary_names_the_first_failed_tasks_and_counts_the_rest() -> None:
    lines = [line(i, status="failed", reason="exit", exit_code=3, name=f"n\x1b[2J{i}") for i in range(30)]
    found = summary.summarise(lines, counts=Counts(total=30, failed=30), cores=1, begin=0, end=20, directory="d")
    text = summary.as_text(found, {"0": "one\n\x1b[2Jtwo\n"})
    assert "0 (n0) failed: ended with a non-zero exit code (3)" in text
    assert "    one\n    two\n" in text
    assert "19 (n19) failed" in text and "20 (n20)" not in text
    assert "and 10 more failed" in text
    assert "\x1b" not in text
    record = summary.as_json(found, 1)
    assert record["tasks"]["failed"] == 30 and len(record["failed"]) == 20
