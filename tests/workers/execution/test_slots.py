"""The state that a worker keeps in memory: slots and prefetched tasks, deadlines, the escalation of an execution."""

from __future__ import annotations

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


def run_message(task_id: str, slot: int = 0, class_name: str = "c", execution: int = 1) -> Run:
    allocation = f"n1[{slot}]" if slot else ""
    return Run(task_id, execution, slot, allocation, class_name, "", 0.0, 0.0, "", "", -1, 0, 0, "", b"\x90")


# -- slots ------------------------------------------------------------------------------------------------------------


def test_a_slot_goes_to_the_oldest_of_its_class_and_is_released_when_none_is_left() -> None:
    table = SlotTable(SETTINGS)
    first = table.add(run_message("a", slot=3))
    other = table.add(run_message("x", class_name="other"))
    second, third = table.add(run_message("b")), table.add(run_message("c"))

    assert table.end(first) is second
    assert (second.phase, second.slot, second.allocation) == (Phase.WAITING, 3, "n1[3]")
    assert table.slots() == [(3, "n1[3]", "c")]
    assert table.end(second) is third
    assert table.end(third) is None
    assert table.slots() == []
    assert table.prefetched() == {"other": 1}
    assert other.phase is Phase.PREFETCHED


def test_a_slot_is_released_at_once_when_it_shall_not_go_on() -> None:
    table = SlotTable(SETTINGS)
    first = table.add(run_message("a", slot=1))
    table.add(run_message("b"))
    assert table.end(first, go_on=False) is None
    assert table.slots() == [] and table.prefetched() == {"c": 1}


def test_one_that_ends_while_it_is_prefetched_frees_no_slot_and_keeps_the_order() -> None:
    table = SlotTable(SETTINGS)
    running = table.add(run_message("a", slot=1))
    _, canceled, last = (table.add(run_message(i)) for i in "bcd")
    assert table.end(canceled) is None
    assert table.slots() == [(1, "n1[1]", "c")]
    follower = table.end(running)
    assert follower is not None and follower.run.id == "b"
    assert table.end(follower) is last


def test_a_slot_is_opened_for_the_oldest_that_is_prefetched_or_not_at_all() -> None:
    table = SlotTable(SETTINGS)
    a, b = table.add(run_message("a")), table.add(run_message("b"))
    assert table.open(7, "n1[3]", "c") is a and table.slots() == [(7, "n1[3]", "c")]
    assert (a.phase, a.slot, a.allocation) == (Phase.WAITING, 7, "n1[3]")
    assert table.end(a) is b and table.open(8, "n1[4]", "c") is None
    assert table.slots() == [(7, "n1[3]", "c")]


def test_retract_takes_the_newest_and_gives_them_in_their_order() -> None:
    table = SlotTable(SETTINGS)
    for name in "abcd":
        table.add(run_message(name))
    assert [e.run.id for e in table.retract("c", 2)] == ["c", "d"]
    assert table.find("c", 1) is None
    assert [e.run.id for e in table.retract("c", 5)] == ["a", "b"]
    assert table.retract("c", 5) == [] and table.retract("unknown", 1) == []
    assert len(table) == 0


def test_what_cannot_be_killed_keeps_its_slot_but_is_gone() -> None:
    table = SlotTable(SETTINGS)
    e = table.add(run_message("a", slot=1))
    table.add(run_message("b"))
    table.keep_reserved(e)
    assert table.find("a", 0) is None
    assert table.slots() == [(1, "n1[1]", "c")] and table.prefetched() == {"c": 1}
    follower = table.end(e)
    assert follower is not None and follower.run.id == "b" and not table.unkillable


def test_find_knows_executions() -> None:
    table = SlotTable(SETTINGS)
    old = table.add(run_message("a", slot=1))
    new = table.add(run_message("a", slot=2, execution=2))
    assert table.find("a", 0) is new and table.find("a", 2) is new and table.find("a", 1) is None
    table.end(old)
    assert table.find("a", 0) is new


def test_a_chain_comes_before_the_queue_and_also_when_slots_shall_not_go_on() -> None:
    table = SlotTable(SETTINGS)
    first = table.add(run_message("a", slot=1))
    b, c = (table.add(run_message(i)) for i in "bc")
    slot = table.slot(1)
    assert slot is not None and table.next_prefetched(slot) is b
    assert table.chain(slot) is b
    assert (b.phase, b.slot, b.allocation) == (Phase.CHAINED, 1, "n1[1]")
    assert table.prefetched() == {"c": 2}
    assert table.end(first, go_on=False) is b
    assert table.end(b) is c
    assert c.phase is Phase.WAITING


def test_what_was_chained_goes_back_in_its_order_whoever_comes_first() -> None:
    table = SlotTable(SETTINGS)
    for number in (1, 2):
        table.add(run_message(f"head{number}", slot=number))
    tasks = [table.add(run_message(i)) for i in "abcdef"]
    for number in (1, 2, 1, 2, 1):
        slot = table.slot(number)
        assert slot is not None
        table.chain(slot)
    assert [e.run.id for e in table.newest_chained("c", 3)] == ["e", "d", "c"]
    for place in (4, 0, 3, 1, 2):
        table.return_to_queue(tasks[place])
    assert {(e.phase, e.slot, e.allocation) for e in tasks} == {(Phase.PREFETCHED, 0, "")}
    assert [e.run.id for e in table.retract("c", 9)] == list("abcdef")


def test_only_short_tasks_are_chained_and_each_slot_of_their_class_has_its_share() -> None:
    table = SlotTable(SETTINGS)
    heads = [table.add(run_message(f"head{number}", slot=number)) for number in (1, 2, 3)]
    slot = table.slot(1)
    assert slot is not None
    table.add_runtime("c", 0.001)
    table.add_runtime("c", 0.001)
    assert table.chain_room(slot) == 0
    for number in range(100):
        table.add(run_message(f"t{number}"))
    assert table.chain_room(slot) == 16
    table.chain(slot)
    assert table.chain_room(slot) == 15
    table.retract("c", 95)
    assert table.chain_room(slot) == 2
    table.end(heads[1], go_on=False)
    table.end(heads[2], go_on=False)
    assert table.chain_room(slot) == 4
    table.add_runtime("c", 0.028)
    assert table.chain_room(slot) == 1
    table.add_runtime("c", 1.0)
    assert table.chain_room(slot) <= 0


MOVES = ["slot", "prefetch", "end", "cancel", "retract", "chain", "return to queue"]


class Model:
    """What a `SlotTable` must hold after the same moves."""

    def __init__(self) -> None:
        self.table = SlotTable(SETTINGS)
        self.running: dict[int, Execution] = {}
        self.chained: dict[int, list[str]] = {}
        self.prefetched: dict[str, list[str]] = {f"class{n}": [] for n in range(3)}

    def add(self, number: int, which: int, slot: int) -> None:
        e = self.table.add(run_message(str(number), slot, f"class{which}"))
        if slot:
            self.running[slot], self.chained[slot] = e, []
        else:
            self.prefetched[f"class{which}"].append(str(number))

    def end(self, slot: int) -> None:
        e = self.running.pop(slot)
        chain, queue = self.chained[slot], self.prefetched[e.run.class_name]
        follower = self.table.end(e)
        expected = chain.pop(0) if chain else queue.pop(0) if queue else None
        assert (follower.run.id if follower else None) == expected
        if follower is None:
            del self.chained[slot]
        else:
            self.running[slot] = follower

    def chain(self, number: int) -> None:
        queue = self.prefetched[self.running[number].run.class_name]
        slot = self.table.slot(number)
        assert slot is not None
        if queue:
            assert self.table.chain(slot).run.id == queue[0]
            self.chained[number].append(queue.pop(0))

    def return_to_queue(self, slot: int, which: int) -> None:
        queue, chain = self.prefetched[self.running[slot].run.class_name], self.chained[slot]
        e = self.table.find(chain.pop(which % len(chain)), 1) if chain else None
        if e is not None:
            self.table.return_to_queue(e)
            queue.append(e.run.id)
            queue.sort(key=int)

    def check(self) -> None:
        counts = {name: len(queue) for name, queue in self.prefetched.items()}
        for slot, chain in self.chained.items():
            counts[self.running[slot].run.class_name] += len(chain)
        assert self.table.prefetched() == {name: count for name, count in counts.items() if count}
        assert {number for number, _, _ in self.table.slots()} == set(self.running)
        assert len(self.table) == len(self.running) + sum(counts.values())


@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 2))))
def test_every_slot_has_one_task_and_no_task_is_lost(moves: list[tuple[str, int]]) -> None:
    model = Model()
    for number, (move, which) in enumerate(moves, 1):
        queue = model.prefetched[f"class{which}"]
        if move in ("slot", "prefetch"):
            model.add(number, which, number if move == "slot" else 0)
        elif move == "cancel" and queue:
            canceled = model.table.find(queue.pop(0), 1)
            assert canceled is not None
            model.table.end(canceled)
        elif move == "retract":
            assert [e.run.id for e in model.table.retract(f"class{which}", 2)] == queue[-2:]
            del queue[-2:]
        elif model.running and move == "end":
            model.end(min(model.running))
        elif model.running and move == "chain":
            model.chain(min(model.running))
        elif model.running and move == "return to queue":
            model.return_to_queue(min(model.running), which)
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
    e = Execution(1, run_message("a", slot=1))
    e.limit = limit
    escalation.launching(e, 0.0)
    return e


def actions(escalation: Escalation, now: float) -> list[Action]:
    return [action for _, action in escalation.due(now)]


def test_a_launch_that_is_not_confirmed_hangs(escalation: Escalation) -> None:
    launched(escalation)
    assert actions(escalation, 9.9) == []
    assert actions(escalation, 10.0) == [Action.HANGS]
    assert escalation.next() is None


def test_only_what_lives_longer_than_a_moment_is_announced(escalation: Escalation) -> None:
    e = launched(escalation)
    assert escalation.started(e, 1000.0, 1.0) is None
    assert actions(escalation, 1.05) == []
    assert actions(escalation, 1.1) == [Action.ANNOUNCE]
    assert escalation.next() is None
    escalation.ended(e)
    assert escalation.executions == {}


def test_the_time_limit_counts_from_the_start_and_starts_the_escalation(escalation: Escalation) -> None:
    e = launched(escalation, limit=7.0)
    escalation.started(e, 1000.0, 3.0)
    assert actions(escalation, 3.1) == [Action.ANNOUNCE]
    assert actions(escalation, 9.9) == []
    assert actions(escalation, 10.0) == [Action.TERM]
    assert e.reason == "time limit"
    assert actions(escalation, 14.9) == []
    assert actions(escalation, 15.0) == [Action.KILL]
    assert actions(escalation, 15.0 + KILL_AGAIN_S) == [Action.KILL]
    assert actions(escalation, 45.0 - 0.1) == [Action.KILL]
    assert actions(escalation, 45.0) == [Action.UNKILLABLE]
    assert escalation.next() is None


def test_a_limit_shorter_than_a_moment_still_holds(escalation: Escalation) -> None:
    e = launched(escalation, limit=0.05)
    escalation.started(e, 1000.0, 1.0)
    assert actions(escalation, 1.05) == [Action.TERM]


def test_the_first_reason_and_the_shortest_grace_count(escalation: Escalation) -> None:
    e = launched(escalation)
    escalation.started(e, 1000.0, 0.0)
    assert escalation.stop(e, "canceled", 8.0, 1.0) is Action.TERM
    assert escalation.stop(e, "pilot ended", 2.0, 1.0) is None
    assert escalation.stop(e, "stopped", 100.0, 1.0) is None
    assert e.reason == "canceled"
    assert actions(escalation, 2.9) == []
    assert actions(escalation, 3.0) == [Action.KILL]


def test_what_is_stopped_while_it_is_launched_is_ended_when_it_has_started(escalation: Escalation) -> None:
    e = launched(escalation)
    assert escalation.stop(e, "canceled", 4.0, 1.0) is None
    assert escalation.started(e, 1000.0, 2.0) is Action.TERM
    assert actions(escalation, 5.9) == []
    assert actions(escalation, 6.0) == [Action.KILL]


def test_what_is_stopped_while_its_launch_hangs_hangs(escalation: Escalation) -> None:
    e = launched(escalation)
    escalation.stop(e, "canceled", 60.0, 1.0)
    assert actions(escalation, 10.0) == [Action.HANGS]


def test_what_is_chained_has_no_deadline_until_it_is_retracted_or_its_turn(escalation: Escalation) -> None:
    e, other = Execution(1, run_message("a")), Execution(2, run_message("b"))
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
    e = Execution(1, run_message("a"))
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
    assert actions(escalation, 2.5) == [Action.KILL]
    assert e.reason == ""


def test_leftovers_of_what_is_being_ended_do_not_get_more_time(escalation: Escalation) -> None:
    e = launched(escalation)
    escalation.started(e, 1000.0, 0.0)
    escalation.stop(e, "canceled", 2.0, 0.0)
    assert escalation.exited(e, 1.9) is None
    assert actions(escalation, 2.0) == [Action.KILL]
