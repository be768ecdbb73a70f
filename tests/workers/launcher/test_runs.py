"""Runs of elements, which a launcher gets in one message: each is as if its launch had come by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pilotq.broker.store.journal_runs import Row
from pilotq.workers.protocol import (
    Begun,
    Element,
    Exited,
    GroupSwept,
    Launch,
    LaunchRun,
    Ran,
    Refused,
    Retract,
    Retracted,
    Started,
)
from tests.support.launcher_driver import CPUS, Driver, packed_strings, run_of

pytestmark = pytest.mark.usefixtures("each_launcher")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    yield driver
    driver.close()


def test_elements_that_end_plainly_are_told_in_rows(driver: Driver) -> None:
    began = time.time()
    run = run_of(driver, 20, "true", origin=began)
    driver.send(run)
    first = run.launch.key
    found = [driver.end_of(first + number) for number in range(20)]
    ends = [end for end in found if isinstance(end, Ran)]  # on a busy machine some live for more than a moment
    rows = [msgspec.msgpack.decode(end.row, type=Row) for end in ends]
    assert [(row[0], row[1]) for row in rows] == [(3 + 2 * (end.key - first), 1) for end in ends]
    starts = [row[2] for row in rows]
    assert starts == sorted(starts) and 0 <= starts[0] < starts[-1] < 60e6
    assert all(0 < row[3] < 60e6 and row[4] > 0 and row[5] > 0 and row[6] >= 0 for row in rows)
    assert len({row[4] for row in rows}) == len(ends) > 0
    assert all(0 <= end.seconds < 60 and end.ended >= began for end in ends)
    assert [record.key for record in driver.seen if isinstance(record, Begun)] == list(range(first, first + 20))


def test_each_element_has_its_own_index_id_number_and_cores(driver: Driver, tmp_path: Path) -> None:
    words = 'echo "$0 $PILOTQ_INDEX $PILOTQ_TASK_ID $QCG_PM_STEP_ID $(grep Cpus_allowed_list /proc/self/status)"'
    run = run_of(driver, 3, "sh", "-c", f"{words} >>$PILOTQ_DIR/out", "at-\0i-\0i", cpus=CPUS[-1:])
    driver.send(run)
    for number in range(3):
        driver.end_of(run.launch.key + number)
    lines = [line.split() for line in (tmp_path / "out").read_text().splitlines()]
    assert [line[:3] for line in lines] == [[f"at-{i}-{i}", str(i), f"7_{i}"] for i in (3, 5, 7)]
    assert len({line[3] for line in lines}) == 3 and all(len(line[3]) == 8 for line in lines)
    assert {line[-1] for line in lines} == {str(CPUS[-1])}


def test_each_element_has_its_own_arguments(driver: Driver, tmp_path: Path) -> None:
    words = 'echo "$0 $# $PILOTQ_INDEX" >out; [ "$0" = one ] || echo to a file'
    for number in range(3):
        (tmp_path / f"dir{number}").mkdir()
    paths = [
        [str(tmp_path / f"dir{number}"), "", str(tmp_path / f"out{number}") if number else "", ""]
        for number in range(3)
    ]
    arguments = [["sh", "-c", words, "one"], ["sh", "-c", words, "two", "x"], ["sh", "-c", words, ""]]
    own = [[*paths[number], *arguments[number]] for number in range(3)]
    run = run_of(driver, 3, own=own, cwd="\0A", stdin="\0B", stdout="\0C", stderr="\0D")
    driver.send(run)
    for number in range(3):
        driver.end_of(run.launch.key + number)
    assert [(tmp_path / f"dir{n}" / "out").read_text() for n in range(3)] == ["one 0 3\n", "two 1 5\n", " 0 7\n"]
    assert [(tmp_path / f"out{n}").read_text() for n in (1, 2)] == ["to a file\n"] * 2


def test_each_element_has_its_own_value_and_files(driver: Driver, tmp_path: Path) -> None:
    values = ["a b", "", "\N{SNOWMAN}" * 200, "$x"]
    run = run_of(
        driver, 4, "sh", "-c", 'printf "%s|%s" "$0" "$PILOTQ_VALUE"; echo bad >&2', "<\0A>", own=[[v] for v in values],
        env={"PILOTQ_INDEX": "\0i", "PILOTQ_VALUE": "\0A", "QCG_PM_STEP_ID": "\0n"},
        stdout=str(tmp_path / "out-\0i"), stderr=str(tmp_path / "err-\0i"),
    )  # fmt: skip
    driver.send(run)
    ends = [driver.end_of(run.launch.key + number) for number in range(4)]
    for index, value in zip((3, 5, 7, 9), values, strict=True):
        assert (tmp_path / f"out-{index}").read_text() == f"<{value}>|{value}"
        assert (tmp_path / f"err-{index}").read_text() == "bad\n"
    assert any(isinstance(end, Ran) for end in ends)  # nothing was captured


def test_what_is_more_than_a_plain_end_is_told_by_itself(driver: Driver) -> None:
    """Of five elements one writes, one fails, one lives, and two end plainly."""
    words = "case $PILOTQ_INDEX in 5) echo out;; 7) exit 3;; 9) exec sleep 1000;; esac"
    run = run_of(driver, 5, "sh", "-c", words)
    driver.send(run)
    key = run.launch.key
    driver.end_of(key)
    assert driver.get(Exited, key + 1).stdout.data == b"out\n"
    assert driver.get(Exited, key + 2).status == 3 << 8
    driver.get(Started, key + 3)
    driver.signal(key + 3, signal.SIGTERM)
    assert driver.get(Exited, key + 3).status == signal.SIGTERM
    driver.end_of(key + 4)


def test_what_an_element_leaves_is_found(driver: Driver) -> None:
    run = run_of(driver, 2, "sh", "-c", "[ $PILOTQ_INDEX = 5 ] || setsid sleep 1000 & exit 0")
    driver.send(run)
    assert driver.get(Exited, run.launch.key).remaining == 1
    driver.signal(run.launch.key, signal.SIGKILL)
    driver.get(GroupSwept, run.launch.key)
    driver.get(Begun, run.launch.key + 1)


def test_one_of_a_run_is_retracted_and_the_others_move_up(driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    words = "[ $PILOTQ_INDEX != 3 ] || read word <go; echo $PILOTQ_INDEX >>order"
    run = run_of(driver, 4, "sh", "-c", words)
    driver.send(run)
    driver.get(Begun, run.launch.key)
    driver.send(Retract(run.launch.key + 2))
    driver.get(Retracted, run.launch.key + 2)
    (tmp_path / "go").write_text("now\n")
    driver.end_of(run.launch.key + 3)
    assert (tmp_path / "order").read_text().split() == ["3", "5", "9"]
    assert driver.find(Begun, run.launch.key + 2) is None


def test_a_run_is_chained_behind_a_launch_and_what_follows_behind_it(driver: Driver, tmp_path: Path) -> None:
    first = driver.prepare("sh", "-c", "echo first >>order")
    run = run_of(driver, 3, "sh", "-c", "echo $PILOTQ_INDEX >>order", after=first.key)
    other = run_of(driver, 2, "sh", "-c", "echo other $PILOTQ_INDEX >>order", after=run.launch.key + 2)
    last = driver.prepare("sh", "-c", "echo last >>order", after=other.launch.key + 1)
    driver.send(first, run, other, last)
    driver.get(Exited, last.key)
    expected = ["first", "3", "5", "7", "other 3", "other 5", "last"]
    assert (tmp_path / "order").read_text().splitlines() == expected


def test_a_program_that_is_not_there_is_refused_for_each_element(driver: Driver) -> None:
    run = run_of(driver, 3, "/no/such/program")
    driver.send(run)
    for number in range(3):
        refused = driver.get(Refused, run.launch.key + number)
        assert refused.reason == "not found" and "/no/such/program" in refused.message


def test_the_element_of_a_message_is_that_launch() -> None:
    template = Launch(
        10, "7_\0i", 2, "b", "s", [b"p", b"x\0iy\0n"], {b"A": b"\0i"}, b"/d/\0i", after=4, element=Element(100, 2, 1.5)
    )
    run = LaunchRun(3, 5, template)
    assert run.launch_of(0) == Launch(
        10,
        "7_100",
        2,
        "b",
        "s",
        [b"p", b"x100y0000000a"],
        {b"A": b"100"},
        b"/d/100",
        after=4,
        element=Element(100, 2, 1.5),
    )
    assert run.launch_of(2) == Launch(
        12,
        "7_110",
        2,
        "b",
        "s",
        [b"p", b"x110y0000000c"],
        {b"A": b"110"},
        b"/d/110",
        after=11,
        element=Element(110, 2, 1.5),
    )


PATHS = "/d", "", "/o", ""


def test_the_element_of_a_message_has_what_is_its_own() -> None:
    template = Launch(10, "7_\0i", 2, "b", "s", [], {}, b"\0A", stdout=b"\0C", element=Element(0, 0, 1.5))
    run = LaunchRun(2, 1, template, [packed_strings(*PATHS, "p"), packed_strings(*PATHS, "q", "r")])
    assert [run.launch_of(number).argv for number in range(2)] == [[b"p"], [b"q", b"r"]]
    assert (run.launch_of(1).cwd, run.launch_of(1).stdout, run.launch_of(1).stderr) == (b"/d", b"/o", b"")
    valued = msgspec.structs.replace(template, argv=[b"p", b"\0A"], env={b"V": b"\0A\0i"})
    run = LaunchRun(2, 1, valued, [packed_strings("x"), packed_strings("y z")])
    assert [run.launch_of(number).argv for number in range(2)] == [[b"p", b"x"], [b"p", b"y z"]]
    assert run.launch_of(1).env == {b"V": b"y z1"}
