"""The pure books of a worker: lanes and what waits for them, deadlines, and the steps of one execution."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Run
from pilotq.workers.execution.escalation import KILL_AGAIN_S, Deadlines, Escalation
from pilotq.workers.execution.execution import Action, Execution, Phase
from pilotq.workers.execution.slots import SlotTable

SETTINGS = Settings(
    launch_confirm_s=10.0, kill_grace_s=5.0, started_after_s=0.1, chain_s=0.02, chain_max=16, prefetch_after=2
)


def handed(task_id: str, lane: int = 0, class_name: str = "c", execution: int = 1) -> Run:
    allocation = f"n1[{lane}]" if lane else ""
    return Run(
        task_id, execution, lane, allocation, class_name, "", 0.0, 0.0, "", "", -1, 0, 0, "", msgspec.Raw(b"\x90")
    )


# -- lanes ------------------------------------------------------------------------------------------------------------


def test_a_lane_goes_to_the_oldest_of_its_class_and_is_released_when_none_is_left() -> None:
    lanes = SlotTable(SETTINGS)
    first = lanes.add(handed("a", lane=3))
    other = lanes.add(handed("x", class_name="other"))
    second, third = lanes.add(handed("b")), lanes.add(handed("c"))

    assert lanes.end(first) is second
    assert (second.phase, second.slot, second.allocation) == (Phase.WAITING, 3, "n1[3]")
    assert lanes.slots() == [(3, "n1[3]", "c")]
    assert lanes.end(second) is third
    assert lanes.end(third) is None
    assert lanes.slots() == []
    assert lanes.prefetched() == {"other": 1}
    assert other.phase is Phase.PREFETCHED


def test_a_lane_is_released_at_once_when_it_shall_not_go_on() -> None:
    lanes = SlotTable(SETTINGS)
    first = lanes.add(handed("a", lane=1))
    lanes.add(handed("b"))
    assert lanes.end(first, go_on=False) is None
    assert lanes.slots() == [] and lanes.prefetched() == {"c": 1}


def test_one_that_ends_while_it_is_ahead_frees_no_lane_and_keeps_the_order() -> None:
    lanes = SlotTable(SETTINGS)
    running = lanes.add(handed("a", lane=1))
    _, canceled, last = (lanes.add(handed(i)) for i in "bcd")
    assert lanes.end(canceled) is None
    assert lanes.slots() == [(1, "n1[1]", "c")]
    follower = lanes.end(running)
    assert follower is not None and follower.run.id == "b"
    assert lanes.end(follower) is last


def test_recall_takes_the_newest_and_gives_them_in_their_order() -> None:
    lanes = SlotTable(SETTINGS)
    for name in "abcd":
        lanes.add(handed(name))
    assert [e.run.id for e in lanes.retract("c", 2)] == ["c", "d"]
    assert lanes.find("c", 1) is None
    assert [e.run.id for e in lanes.retract("c", 5)] == ["a", "b"]
    assert lanes.retract("c", 5) == [] and lanes.retract("unknown", 1) == []
    assert len(lanes) == 0


def test_what_cannot_be_killed_keeps_its_lane_but_is_gone() -> None:
    lanes = SlotTable(SETTINGS)
    e = lanes.add(handed("a", lane=1))
    lanes.add(handed("b"))
    lanes.keep_reserved(e)
    assert lanes.find("a", 0) is None
    assert lanes.slots() == [(1, "n1[1]", "c")] and lanes.prefetched() == {"c": 1}
    follower = lanes.end(e)
    assert follower is not None and follower.run.id == "b" and not lanes.unkillable


def test_find_knows_executions() -> None:
    lanes = SlotTable(SETTINGS)
    old = lanes.add(handed("a", lane=1))
    new = lanes.add(handed("a", lane=2, execution=2))
    assert lanes.find("a", 0) is new and lanes.find("a", 2) is new and lanes.find("a", 1) is None
    lanes.end(old)
    assert lanes.find("a", 0) is new


def test_a_line_comes_before_the_row_and_also_when_lanes_shall_not_go_on() -> None:
    lanes = SlotTable(SETTINGS)
    first = lanes.add(handed("a", lane=1))
    b, c = (lanes.add(handed(i)) for i in "bc")
    lane = lanes.slot(1)
    assert lane is not None and lanes.next_prefetched(lane) is b
    assert lanes.chain(lane) is b
    assert (b.phase, b.slot, b.allocation) == (Phase.CHAINED, 1, "n1[1]")
    assert lanes.prefetched() == {"c": 2}
    assert lanes.end(first, go_on=False) is b
    assert lanes.end(b) is c
    assert c.phase is Phase.WAITING


def test_what_was_lined_up_goes_back_in_its_order_whoever_comes_first() -> None:
    lanes = SlotTable(SETTINGS)
    for number in (1, 2):
        lanes.add(handed(f"head{number}", lane=number))
    tasks = [lanes.add(handed(i)) for i in "abcdef"]
    for number in (1, 2, 1, 2, 1):
        lane = lanes.slot(number)
        assert lane is not None
        lanes.chain(lane)
    assert [e.run.id for e in lanes.newest_chained("c", 3)] == ["e", "d", "c"]
    for place in (4, 0, 3, 1, 2):
        lanes.return_to_queue(tasks[place])
    assert {(e.phase, e.slot, e.allocation) for e in tasks} == {(Phase.PREFETCHED, 0, "")}
    assert [e.run.id for e in lanes.retract("c", 9)] == list("abcdef")


def test_only_short_tasks_are_lined_up_and_each_lane_of_their_class_has_its_share() -> None:
    lanes = SlotTable(SETTINGS)
    heads = [lanes.add(handed(f"head{number}", lane=number)) for number in (1, 2, 3)]
    lane = lanes.slot(1)
    assert lane is not None
    lanes.add_runtime("c", 0.001)
    lanes.add_runtime("c", 0.001)
    assert lanes.chain_room(lane) == 0
    for number in range(100):
        lanes.add(handed(f"t{number}"))
    assert lanes.chain_room(lane) == 16
    lanes.chain(lane)
    assert lanes.chain_room(lane) == 15
    lanes.retract("c", 95)
    assert lanes.chain_room(lane) == 2
    lanes.end(heads[1], go_on=False)
    lanes.end(heads[2], go_on=False)
    assert lanes.chain_room(lane) == 4
    lanes.add_runtime("c", 0.028)
    assert lanes.chain_room(lane) == 1
    lanes.add_runtime("c", 1.0)
    assert lanes.chain_room(lane) <= 0


MOVES = ["lane", "ahead", "end", "cancel", "recall", "line up", "put back"]


class Model:
    """What lanes must hold after the same moves."""

    def __init__(self) -> None:
        self.lanes = SlotTable(SETTINGS)
        self.running: dict[int, Execution] = {}
        self.chained: dict[int, list[str]] = {}
        self.ahead: dict[str, list[str]] = {f"class{n}": [] for n in range(3)}

    def hand(self, number: int, which: int, lane: int) -> None:
        e = self.lanes.add(handed(str(number), lane, f"class{which}"))
        if lane:
            self.running[lane], self.chained[lane] = e, []
        else:
            self.ahead[f"class{which}"].append(str(number))

    def end(self, lane: int) -> None:
        e = self.running.pop(lane)
        line, row = self.chained[lane], self.ahead[e.run.class_name]
        follower = self.lanes.end(e)
        expected = line.pop(0) if line else row.pop(0) if row else None
        assert (follower.run.id if follower else None) == expected
        if follower is None:
            del self.chained[lane]
        else:
            self.running[lane] = follower

    def line_up(self, number: int) -> None:
        row = self.ahead[self.running[number].run.class_name]
        lane = self.lanes.slot(number)
        assert lane is not None
        if row:
            assert self.lanes.chain(lane).run.id == row[0]
            self.chained[number].append(row.pop(0))

    def put_back(self, lane: int, which: int) -> None:
        row, line = self.ahead[self.running[lane].run.class_name], self.chained[lane]
        e = self.lanes.find(line.pop(which % len(line)), 1) if line else None
        if e is not None:
            self.lanes.return_to_queue(e)
            row.append(e.run.id)
            row.sort(key=int)

    def check(self) -> None:
        counts = {name: len(row) for name, row in self.ahead.items()}
        for lane, line in self.chained.items():
            counts[self.running[lane].run.class_name] += len(line)
        assert self.lanes.prefetched() == {name: count for name, count in counts.items() if count}
        assert {number for number, _, _ in self.lanes.slots()} == set(self.running)
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
            assert [e.run.id for e in model.lanes.retract(f"class{which}", 2)] == row[-2:]
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


# -- the escalation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def escalation() -> Escalation:
    return Escalation(SETTINGS)


def launched(escalation: Escalation, limit: float = 0.0) -> Execution:
    e = Execution(1, handed("a", lane=1))
    e.limit = limit
    escalation.launching(e, 0.0)
    return e


def steps(escalation: Escalation, now: float) -> list[Action]:
    return [step for _, step in escalation.due(now)]


def test_a_launch_that_is_not_confirmed_hangs(escalation: Escalation) -> None:
    launched(escalation)
    assert steps(escalation, 9.9) == []
    assert steps(escalation, 10.0) == [Action.HANGS]
    assert escalation.next() is None


def test_only_what_lives_longer_than_a_moment_is_announced(escalation: Escalation) -> None:
    e = launched(escalation)
    assert escalation.started(e, 1000.0, 1.0) is None
    assert steps(escalation, 1.05) == []
    assert steps(escalation, 1.1) == [Action.ANNOUNCE]
    assert escalation.next() is None
    escalation.ended(e)
    assert escalation.executions == {}


def test_the_time_limit_counts_from_the_start_and_climbs_the_ladder(escalation: Escalation) -> None:
    e = launched(escalation, limit=7.0)
    escalation.started(e, 1000.0, 3.0)
    assert steps(escalation, 3.1) == [Action.ANNOUNCE]
    assert steps(escalation, 9.9) == []
    assert steps(escalation, 10.0) == [Action.TERM]
    assert e.reason == "time limit"
    assert steps(escalation, 14.9) == []
    assert steps(escalation, 15.0) == [Action.KILL]
    assert steps(escalation, 15.0 + KILL_AGAIN_S) == [Action.KILL]
    assert steps(escalation, 45.0 - 0.1) == [Action.KILL]
    assert steps(escalation, 45.0) == [Action.UNKILLABLE]
    assert escalation.next() is None


def test_a_limit_shorter_than_a_moment_still_holds(escalation: Escalation) -> None:
    e = launched(escalation, limit=0.05)
    escalation.started(e, 1000.0, 1.0)
    assert steps(escalation, 1.05) == [Action.TERM]


def test_the_first_reason_and_the_shortest_grace_count(escalation: Escalation) -> None:
    e = launched(escalation)
    escalation.started(e, 1000.0, 0.0)
    assert escalation.stop(e, "canceled", 8.0, 1.0) is Action.TERM
    assert escalation.stop(e, "pilot ended", 2.0, 1.0) is None
    assert escalation.stop(e, "stopped", 100.0, 1.0) is None
    assert e.reason == "canceled"
    assert steps(escalation, 2.9) == []
    assert steps(escalation, 3.0) == [Action.KILL]


def test_what_is_stopped_while_it_is_launched_is_ended_when_it_has_started(escalation: Escalation) -> None:
    e = launched(escalation)
    assert escalation.stop(e, "canceled", 4.0, 1.0) is None
    assert escalation.started(e, 1000.0, 2.0) is Action.TERM
    assert steps(escalation, 5.9) == []
    assert steps(escalation, 6.0) == [Action.KILL]


def test_what_is_stopped_while_its_launch_hangs_hangs(escalation: Escalation) -> None:
    e = launched(escalation)
    escalation.stop(e, "canceled", 60.0, 1.0)
    assert steps(escalation, 10.0) == [Action.HANGS]


def test_what_is_chained_has_no_deadline_until_it_is_retracted_or_its_turn(escalation: Escalation) -> None:
    e, other = Execution(1, handed("a")), Execution(2, handed("b"))
    for chained in (e, other):
        chained.phase = Phase.CHAINED
        escalation.chained(chained)
    assert escalation.next() is None
    assert escalation.retract(e, 1.0) is Action.RETRACT
    assert escalation.retracting(e) and not escalation.retracting(other)
    assert escalation.retract(e, 2.0) is None
    escalation.launching(other, 2.0)
    assert escalation.due(10.9) == []
    assert escalation.due(11.0) == [(e, Action.HANGS)]
    assert escalation.due(12.0) == [(other, Action.HANGS)]


def test_what_is_stopped_while_it_is_chained_is_retracted_or_ended_when_it_has_started(escalation: Escalation) -> None:
    e = Execution(1, handed("a"))
    e.phase = Phase.CHAINED
    escalation.chained(e)
    assert escalation.stop(e, "canceled", 4.0, 1.0) is Action.RETRACT
    assert escalation.stop(e, "pilot ended", 2.0, 1.0) is None
    escalation.launching(e, 2.0)
    assert escalation.started(e, 1000.0, 3.0) is Action.TERM
    assert (e.reason, escalation.due(5.0)) == ("canceled", [(e, Action.KILL)])


def test_leftovers_get_the_grace_and_cannot_change_the_outcome(escalation: Escalation) -> None:
    e = launched(escalation, limit=2.0)
    escalation.started(e, 1000.0, 0.0)
    assert escalation.exited(e, 1.0) is Action.TERM
    assert escalation.stop(e, "canceled", 1.0, 1.5) is None
    assert e.reason == ""
    assert steps(escalation, 2.5) == [Action.KILL]
    assert e.reason == ""


def test_leftovers_of_what_is_being_ended_do_not_get_more_time(escalation: Escalation) -> None:
    e = launched(escalation)
    escalation.started(e, 1000.0, 0.0)
    escalation.stop(e, "canceled", 2.0, 0.0)
    assert escalation.exited(e, 1.9) is None
    assert steps(escalation, 2.0) == [Action.KILL]
