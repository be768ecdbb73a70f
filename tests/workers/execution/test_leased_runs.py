"""Runs of elements in the table of slots: packed while they are alike, in the same order and number as one by one."""

from __future__ import annotations

from typing import cast

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pilotq.broker.settings import Settings
from pilotq.broker.store.journal_runs import INDEX_PLACE, RunLines, pack_run
from pilotq.broker.store.messages import EndReport, Lease
from pilotq.broker.tasks.runtime_estimate import RuntimeEstimate
from pilotq.broker.tasks.spec import Spec
from pilotq.workers.execution.execution import Execution, Phase
from pilotq.workers.execution.leased_ends import plain_runs, read_row
from pilotq.workers.execution.leased_runs import VALUES_MAX, HeldLease, LeasedRun, PlainEnds
from pilotq.workers.execution.reporting import Outbox
from pilotq.workers.execution.slots import SlotTable
from pilotq.workers.protocol import NO_OUTPUT, Returned
from pilotq.workers.session import Session

TRUE = Spec([b"true"])
SETTINGS = Settings(chain_s=0.02, chain_max=16, prefetch_after=1)
FIRST = 100


def table_with(number: int) -> tuple[SlotTable, Execution]:
    """A slot whose task is the first of so many elements; the others are a run."""
    lease = Lease("arr", 1, "c", "", 1.0, 2.0, "", 10, number, FIRST, 1, 0, "", b"", [(1, "n1[0]")])
    table = SlotTable(SETTINGS)
    e = table.add(lease.run(0))
    if number > 1:
        table.add_run(HeldLease(lease, TRUE, TRUE, "true", varies=False), 1, number - 1)
    return table, e


def chained(table: SlotTable, most: int) -> LeasedRun:
    slot = table.slot(1)
    assert slot is not None
    return table.chain_run(slot, most)


def test_results_are_told_in_pieces() -> None:
    outbox = Outbox(cast(Session, None), SETTINGS, "n1", lambda e, ended: cast(EndReport, None))
    table, _ = table_with(3 * VALUES_MAX)
    run = chained(table, 3 * VALUES_MAX)
    found = []
    while run.count:
        outbox.open_ends(run, 1.0)
        assert run.ends is not None
        while run.count and not run.ends.is_full:
            run.pass_plain(
                Returned(run.key, 1, "finished", "", "", "", 3.0, 3.0, 0.0, 0.0, 0, 0, NO_OUTPUT, NO_OUTPUT, b"v")
            )
        found.append((run.ends.number, len(run.ends.rows)))
    assert found == [(1, VALUES_MAX), (1 + VALUES_MAX, VALUES_MAX), (1 + 2 * VALUES_MAX, VALUES_MAX - 1)]
    ends = list(outbox._plain)
    pieces = [(end.first, end.number) for end, _ in plain_runs(ends, "n1", lambda e, ended: cast(EndReport, None))]
    assert pieces == [(10 + number, count) for number, count in found]


def test_a_part_of_a_run_is_chained_and_the_rest_stays_in_its_place() -> None:
    table, e = table_with(10)
    run = chained(table, 4)
    assert (run.count, run.number, run.slot, run.allocation) == (4, 1, 1, "n1[0]")
    assert table.prefetched() == {"c": 9} and len(table) == 10
    table.add_runtime("c", 0.001)
    slot = table.slot(1)
    assert slot is not None and table.chain_room(slot) == 5
    assert table.end(e) is run
    assert table.prefetched() == {"c": 8} and table.first_runs() == [run]


def test_those_with_a_slot_of_their_own_and_those_that_are_retracted_leave_a_run_at_its_ends() -> None:
    table, e = table_with(6)
    assert [one.run.id for one in table.retract("c", 2)] == ["arr_104", "arr_105"]
    follower = table.end(e)
    assert isinstance(follower, Execution) and follower.run.id == "arr_101" and follower.phase is Phase.WAITING
    assert [one.run.id for one in table.retract_all()] == ["arr_102", "arr_103"]
    assert table.prefetched() == {} and len(table) == 1 and not table.runs()


def test_a_run_is_unpacked_where_it_stands() -> None:
    table, e = table_with(12)
    first, second = chained(table, 3), chained(table, 3)
    (queued,) = (run for run in table.runs() if not run.slot)
    assert [one.run.position for one in table.unpack(second)] == [14, 15, 16]
    assert [one.run.position for one in table.unpack(queued)] == [17, 18, 19, 20, 21]
    assert table.end(e) is first
    (head,) = table.unpack(first, 1)
    slot = table.slot(1)
    assert slot is not None and slot.task is head and slot.chain[0] is first and first.count == 2
    assert [one.run.id for one in table.chained_behind(head)] == ["arr_104", "arr_105", "arr_106"]
    assert [one.run.id for one in table.newest_chained("c", 2)] == ["arr_106", "arr_105"]
    assert table.prefetched() == {"c": 10} and len(table) == 11
    assert table.end(head) is first


def test_a_run_holds_its_elements_and_their_array() -> None:
    lease = Lease("arr", 2, "c", "", 1.0, 2.0, "", 10, 8, 100, 5, 0, "", b"", [])
    run = LeasedRun(HeldLease(lease, TRUE, TRUE, "true", varies=False), 7, 2, 3)
    held = [f"arr_{index}" for index in range(90, 160) if run.holds(f"arr_{index}", 0)]
    assert held == ["arr_110", "arr_115", "arr_120"]
    assert run.holds("arr", 2) and not run.holds("arr", 1) and not run.holds("ar", 0) and not run.holds("arr_x", 0)


MOVES = ["chain", "pass", "unpack", "unpack first", "end", "retract"]


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from(MOVES), st.integers(1, 6))))
def test_whatever_is_unpacked_each_element_has_its_turn_once_and_in_order(
    number: int, moves: list[tuple[str, int]]
) -> None:
    table, _ = table_with(number)
    ended: list[int] = []
    returned: list[int] = []
    for move, most in [*moves, *[("end", 1)] * number]:
        slot = table.slot(1)
        if slot is None:
            break
        task = slot.task
        if move == "chain" and isinstance(table.next_prefetched(slot), LeasedRun):
            table.chain_run(slot, most)
        elif move == "unpack" and table.runs():
            table.unpack(table.runs()[most % len(table.runs())])
        elif move == "unpack first" and isinstance(task, LeasedRun):
            table.unpack(task, 1)
        elif move == "retract":
            returned[:0] = [e.run.position for e in table.retract("c", most)]
        elif move in ("end", "pass") and isinstance(task, LeasedRun):
            ended.append(10 + task.number)
            pass_plainly(table, task)
        elif move == "end" and isinstance(task, Execution):
            ended.append(task.run.position)
            table.end(task)
        assert len(table) == number - len(ended) - len(returned)
    assert ended + returned == list(range(10, 10 + number))


def pass_plainly(table: SlotTable, run: LeasedRun) -> None:
    """As the node does when the first element of a run has ended."""
    del table.runs_by_key[run.key]
    run.pass_first()
    if run.count:
        table.runs_by_key[run.key] = run
    else:
        table.end_run(run)


def test_ends_say_of_the_slot_what_each_of_them_would_say() -> None:
    table, _ = table_with(5)
    ends = PlainEnds(chained(table, 4))
    ends.rows, ends.seconds = [b""] * 4, 2.0
    assert [(end.number, end.seconds, end.kept) for end in ends.slot_ends()] == [(4, 0.5, True)]
    ends.kept = False
    assert [(end.number, end.kept) for end in ends.slot_ends()] == [(3, True), (1, False)]
    ends.rows = [b""]
    assert [(end.number, end.kept) for end in ends.slot_ends()] == [(1, False)]


def test_packed_rows_are_read_as_those_that_were_packed_with_the_rest() -> None:
    rows = [(7, 0, 500, 2000, 4711, 1 << 20, 1500), (12, 0, -3, 70_000, 4712, 1 << 33, 0)]
    lines = RunLines("1f", "", "s", "n1", 1, 100.0, 101.0, f"p {INDEX_PLACE}.txt", 0, 0.0, ["n1[0]"], 102.0, [])
    packed = [msgspec.msgpack.encode(row) for row in rows]
    assert [read_row(row) for row in packed] == rows
    decoded = msgspec.msgpack.decode(pack_run(lines, packed), type=RunLines)
    assert decoded == msgspec.structs.replace(lines, rows=rows)
    assert [(entry.id, entry.command) for entry in decoded.entries()] == [("1f_7", "p 7.txt"), ("1f_12", "p 12.txt")]


def test_many_run_times_at_once_count_as_one_by_one() -> None:
    for before in (0, 3, 20):
        together, apart = RuntimeEstimate(), RuntimeEstimate()
        for estimate in (together, apart) if before else ():
            estimate.add(5.0, before)
        together.add(1.0, 40)
        for _ in range(40):
            apart.add(1.0)
        assert together.ends == apart.ends and abs(together.mean_s - apart.mean_s) < 0.1
