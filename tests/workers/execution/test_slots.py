"""The pure books of a worker: lanes and what waits for them, deadlines, and the steps of one execution."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Handed
from pilotq.workers.execution.escalation import KILL_AGAIN_S, Deadlines, Execution, Ladder, Phase, Step
from pilotq.workers.execution.slots import Lanes

SETTINGS = Settings(
    launch_confirm_s=10.0, kill_grace_s=5.0, started_after_s=0.1, line_s=0.02, line_max=16, ahead_after_ends=2
)


def handed(task_id: str, lane: int = 0, class_name: str = "c", execution: int = 1) -> Handed:
    allocation = f"n1[{lane}]" if lane else ""
    return Handed(
        task_id, execution, lane, allocation, class_name, "", 0.0, 0.0, "", "", -1, 0, 0, "", msgspec.Raw(b"\x90")
    )


# -- lanes ------------------------------------------------------------------------------------------------------------


def test_a_lane_goes_to_the_oldest_of_its_class_and_is_released_when_none_is_left() -> None:
    lanes = Lanes(SETTINGS)
    first = lanes.hand(handed("a", lane=3))
    other = lanes.hand(handed("x", class_name="other"))
    second, third = lanes.hand(handed("b")), lanes.hand(handed("c"))

    assert lanes.end(first) is second
    assert (second.phase, second.lane, second.allocation) == (Phase.WAITING, 3, "n1[3]")
    assert lanes.lanes() == [(3, "n1[3]", "c")]
    assert lanes.end(second) is third
    assert lanes.end(third) is None
    assert lanes.lanes() == []
    assert lanes.ahead() == {"other": 1}
    assert other.phase is Phase.AHEAD


def test_a_lane_is_released_at_once_when_it_shall_not_go_on() -> None:
    lanes = Lanes(SETTINGS)
    first = lanes.hand(handed("a", lane=1))
    lanes.hand(handed("b"))
    assert lanes.end(first, go_on=False) is None
    assert lanes.lanes() == [] and lanes.ahead() == {"c": 1}


def test_one_that_ends_while_it_is_ahead_frees_no_lane_and_keeps_the_order() -> None:
    lanes = Lanes(SETTINGS)
    running = lanes.hand(handed("a", lane=1))
    _, canceled, last = (lanes.hand(handed(i)) for i in "bcd")
    assert lanes.end(canceled) is None
    assert lanes.lanes() == [(1, "n1[1]", "c")]
    follower = lanes.end(running)
    assert follower is not None and follower.handed.id == "b"
    assert lanes.end(follower) is last


def test_recall_takes_the_newest_and_gives_them_in_their_order() -> None:
    lanes = Lanes(SETTINGS)
    for name in "abcd":
        lanes.hand(handed(name))
    assert [e.handed.id for e in lanes.recall("c", 2)] == ["c", "d"]
    assert lanes.find("c", 1) is None
    assert [e.handed.id for e in lanes.recall("c", 5)] == ["a", "b"]
    assert lanes.recall("c", 5) == [] and lanes.recall("unknown", 1) == []
    assert len(lanes) == 0


def test_what_cannot_be_killed_keeps_its_lane_but_is_gone() -> None:
    lanes = Lanes(SETTINGS)
    e = lanes.hand(handed("a", lane=1))
    lanes.hand(handed("b"))
    lanes.withhold(e)
    assert lanes.find("a", 0) is None
    assert lanes.lanes() == [(1, "n1[1]", "c")] and lanes.ahead() == {"c": 1}
    follower = lanes.end(e)
    assert follower is not None and follower.handed.id == "b" and not lanes.withheld


def test_find_knows_executions() -> None:
    lanes = Lanes(SETTINGS)
    old = lanes.hand(handed("a", lane=1))
    new = lanes.hand(handed("a", lane=2, execution=2))
    assert lanes.find("a", 0) is new and lanes.find("a", 2) is new and lanes.find("a", 1) is None
    lanes.end(old)
    assert lanes.find("a", 0) is new


def test_a_line_comes_before_the_row_and_also_when_lanes_shall_not_go_on() -> None:
    lanes = Lanes(SETTINGS)
    first = lanes.hand(handed("a", lane=1))
    b, c = (lanes.hand(handed(i)) for i in "bc")
    lane = lanes.lane(1)
    assert lane is not None and lanes.next(lane) is b
    assert lanes.line_up(lane) is b
    assert (b.phase, b.lane, b.allocation) == (Phase.LINED, 1, "n1[1]")
    assert lanes.ahead() == {"c": 2}
    assert lanes.end(first, go_on=False) is b
    assert lanes.end(b) is c
    assert c.phase is Phase.WAITING


def test_what_was_lined_up_goes_back_in_its_order_whoever_comes_first() -> None:
    lanes = Lanes(SETTINGS)
    for number in (1, 2):
        lanes.hand(handed(f"head{number}", lane=number))
    tasks = [lanes.hand(handed(i)) for i in "abcdef"]
    for number in (1, 2, 1, 2, 1):
        lane = lanes.lane(number)
        assert lane is not None
        lanes.line_up(lane)
    assert [e.handed.id for e in lanes.newest_lined("c", 3)] == ["e", "d", "c"]
    for place in (4, 0, 3, 1, 2):
        lanes.put_back(tasks[place])
    assert {(e.phase, e.lane, e.allocation) for e in tasks} == {(Phase.AHEAD, 0, "")}
    assert [e.handed.id for e in lanes.recall("c", 9)] == list("abcdef")


def test_only_short_tasks_are_lined_up_and_each_lane_of_their_class_has_its_share() -> None:
    lanes = Lanes(SETTINGS)
    heads = [lanes.hand(handed(f"head{number}", lane=number)) for number in (1, 2, 3)]
    lane = lanes.lane(1)
    assert lane is not None
    lanes.took("c", 0.001)
    lanes.took("c", 0.001)
    assert lanes.room(lane) == 0
    for number in range(100):
        lanes.hand(handed(f"t{number}"))
    assert lanes.room(lane) == 16
    lanes.line_up(lane)
    assert lanes.room(lane) == 15
    lanes.recall("c", 95)
    assert lanes.room(lane) == 2
    lanes.end(heads[1], go_on=False)
    lanes.end(heads[2], go_on=False)
    assert lanes.room(lane) == 4
    lanes.took("c", 0.028)
    assert lanes.room(lane) == 1
    lanes.took("c", 1.0)
    assert lanes.room(lane) <= 0


MOVES = ["lane", "ahead", "end", "cancel", "recall", "line up", "put back"]


class Model:
    """What lanes must hold after the same moves."""

    def __init__(self) -> None:
        self.lanes = Lanes(SETTINGS)
        self.running: dict[int, Execution] = {}
        self.lined: dict[int, list[str]] = {}
        self.ahead: dict[str, list[str]] = {f"class{n}": [] for n in range(3)}

    def hand(self, number: int, which: int, lane: int) -> None:
        e = self.lanes.hand(handed(str(number), lane, f"class{which}"))
        if lane:
            self.running[lane], self.lined[lane] = e, []
        else:
            self.ahead[f"class{which}"].append(str(number))

    def end(self, lane: int) -> None:
        e = self.running.pop(lane)
        line, row = self.lined[lane], self.ahead[e.handed.class_name]
        follower = self.lanes.end(e)
        expected = line.pop(0) if line else row.pop(0) if row else None
        assert (follower.handed.id if follower else None) == expected
        if follower is None:
            del self.lined[lane]
        else:
            self.running[lane] = follower

    def line_up(self, number: int) -> None:
        row = self.ahead[self.running[number].handed.class_name]
        lane = self.lanes.lane(number)
        assert lane is not None
        if row:
            assert self.lanes.line_up(lane).handed.id == row[0]
            self.lined[number].append(row.pop(0))

    def put_back(self, lane: int, which: int) -> None:
        row, line = self.ahead[self.running[lane].handed.class_name], self.lined[lane]
        e = self.lanes.find(line.pop(which % len(line)), 1) if line else None
        if e is not None:
            self.lanes.put_back(e)
            row.append(e.handed.id)
            row.sort(key=int)

    def check(self) -> None:
        counts = {name: len(row) for name, row in self.ahead.items()}
        for lane, line in self.lined.items():
            counts[self.running[lane].handed.class_name] += len(line)
        assert self.lanes.ahead() == {name: count for name, count in counts.items() if count}
        assert {number for number, _, _ in self.lanes.lanes()} == set(self.running)
        assert len(self.lanes) == len(self.running) + sum(counts.values())


@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 2))))
def test_every_lane_has_one_task_and_no_task_is_lost(moves: list[tuple[str, int]]) -> None:
    model = Model()
    for number, (move, which) in enumerate(moves, 1):
        row = model.ahead[f"class{which}"]
        if move in ("lane", "ahead"):
            model.hand(number, which, number if move == "lane" else 0)
        elif move == "cancel" and row:
            canceled = model.lanes.find(row.pop(0), 1)
            assert canceled is not None
            model.lanes.end(canceled)
        elif move == "recall":
            assert [e.handed.id for e in model.lanes.recall(f"class{which}", 2)] == row[-2:]
            del row[-2:]
        elif model.running and move == "end":
            model.end(min(model.running))
        elif model.running and move == "line up":
            model.line_up(min(model.running))
        elif model.running and move == "put back":
            model.put_back(min(model.running), which)
        model.check()


# -- deadlines --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 20)))), st.integers(0, 20))
def test_deadlines_are_those_set_last(moves: list[tuple[int, int | None]], now: int) -> None:
    deadlines, expected = Deadlines(), {}
    for key, when in moves:
        if when is None:
            deadlines.drop(key)
            expected.pop(key, None)
        else:
            deadlines.set(key, float(when))
            expected[key] = when
    assert deadlines.next() == min(expected.values(), default=None)
    due = deadlines.due(float(now))
    assert sorted(due) == sorted(key for key, when in expected.items() if when <= now)
    assert [expected[key] for key in due] == sorted(expected[key] for key in due)
    assert deadlines.next() == min((when for when in expected.values() if when > now), default=None)


def test_deadlines_of_millions_of_short_tasks_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for key in range(100_000):
        deadlines.set(key, 3600.0 + key)
        deadlines.drop(key)
    assert len(deadlines._heap) < 2_000


# -- the ladder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ladder() -> Ladder:
    return Ladder(SETTINGS)


def launched(ladder: Ladder, limit: float = 0.0) -> Execution:
    e = Execution(1, handed("a", lane=1))
    e.limit = limit
    ladder.launching(e, 0.0)
    return e


def steps(ladder: Ladder, now: float) -> list[Step]:
    return [step for _, step in ladder.due(now)]


def test_a_launch_that_is_not_confirmed_hangs(ladder: Ladder) -> None:
    launched(ladder)
    assert steps(ladder, 9.9) == []
    assert steps(ladder, 10.0) == [Step.HANGS]
    assert ladder.next() is None


def test_only_what_lives_longer_than_a_moment_is_announced(ladder: Ladder) -> None:
    e = launched(ladder)
    assert ladder.started(e, 1000.0, 1.0) is None
    assert steps(ladder, 1.05) == []
    assert steps(ladder, 1.1) == [Step.ANNOUNCE]
    assert ladder.next() is None
    ladder.ended(e)
    assert ladder.executions == {}


def test_the_time_limit_counts_from_the_start_and_climbs_the_ladder(ladder: Ladder) -> None:
    e = launched(ladder, limit=7.0)
    ladder.started(e, 1000.0, 3.0)
    assert steps(ladder, 3.1) == [Step.ANNOUNCE]
    assert steps(ladder, 9.9) == []
    assert steps(ladder, 10.0) == [Step.TERM]
    assert e.reason == "time limit"
    assert steps(ladder, 14.9) == []
    assert steps(ladder, 15.0) == [Step.KILL]
    assert steps(ladder, 15.0 + KILL_AGAIN_S) == [Step.KILL]
    assert steps(ladder, 45.0 - 0.1) == [Step.KILL]
    assert steps(ladder, 45.0) == [Step.UNKILLABLE]
    assert ladder.next() is None


def test_a_limit_shorter_than_a_moment_still_holds(ladder: Ladder) -> None:
    e = launched(ladder, limit=0.05)
    ladder.started(e, 1000.0, 1.0)
    assert steps(ladder, 1.05) == [Step.TERM]


def test_the_first_reason_and_the_shortest_grace_count(ladder: Ladder) -> None:
    e = launched(ladder)
    ladder.started(e, 1000.0, 0.0)
    assert ladder.stop(e, "canceled", 8.0, 1.0) is Step.TERM
    assert ladder.stop(e, "pilot ended", 2.0, 1.0) is None
    assert ladder.stop(e, "stopped", 100.0, 1.0) is None
    assert e.reason == "canceled"
    assert steps(ladder, 2.9) == []
    assert steps(ladder, 3.0) == [Step.KILL]


def test_what_is_stopped_while_it_is_launched_is_ended_when_it_has_started(ladder: Ladder) -> None:
    e = launched(ladder)
    assert ladder.stop(e, "canceled", 4.0, 1.0) is None
    assert ladder.started(e, 1000.0, 2.0) is Step.TERM
    assert steps(ladder, 5.9) == []
    assert steps(ladder, 6.0) == [Step.KILL]


def test_what_is_stopped_while_its_launch_hangs_hangs(ladder: Ladder) -> None:
    e = launched(ladder)
    ladder.stop(e, "canceled", 60.0, 1.0)
    assert steps(ladder, 10.0) == [Step.HANGS]


def test_what_is_lined_up_has_no_deadline_until_it_is_withdrawn_or_its_turn(ladder: Ladder) -> None:
    e, other = Execution(1, handed("a")), Execution(2, handed("b"))
    for lined in (e, other):
        lined.phase = Phase.LINED
        ladder.lined(lined)
    assert ladder.next() is None
    assert ladder.withdraw(e, 1.0) is Step.WITHDRAW
    assert ladder.withdrawing(e) and not ladder.withdrawing(other)
    assert ladder.withdraw(e, 2.0) is None
    ladder.launching(other, 2.0)
    assert ladder.due(10.9) == []
    assert ladder.due(11.0) == [(e, Step.HANGS)]
    assert ladder.due(12.0) == [(other, Step.HANGS)]


def test_what_is_stopped_while_it_is_lined_up_is_withdrawn_or_ended_when_it_has_started(ladder: Ladder) -> None:
    e = Execution(1, handed("a"))
    e.phase = Phase.LINED
    ladder.lined(e)
    assert ladder.stop(e, "canceled", 4.0, 1.0) is Step.WITHDRAW
    assert ladder.stop(e, "pilot ended", 2.0, 1.0) is None
    ladder.launching(e, 2.0)
    assert ladder.started(e, 1000.0, 3.0) is Step.TERM
    assert (e.reason, ladder.due(5.0)) == ("canceled", [(e, Step.KILL)])


def test_leftovers_get_the_grace_and_cannot_change_the_outcome(ladder: Ladder) -> None:
    e = launched(ladder, limit=2.0)
    ladder.started(e, 1000.0, 0.0)
    assert ladder.exited(e, 1.0) is Step.TERM
    assert ladder.stop(e, "canceled", 1.0, 1.5) is None
    assert e.reason == ""
    assert steps(ladder, 2.5) == [Step.KILL]
    assert e.reason == ""


def test_leftovers_of_what_is_being_ended_do_not_get_more_time(ladder: Ladder) -> None:
    e = launched(ladder)
    ladder.started(e, 1000.0, 0.0)
    ladder.stop(e, "canceled", 2.0, 0.0)
    assert ladder.exited(e, 1.9) is None
    assert steps(ladder, 2.0) == [Step.KILL]
