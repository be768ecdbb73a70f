"""Backfill: who may overtake a blocked task, for how long, and the hold that ends it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.scheduling.giving_way import plan_nice
from pilotq.broker.scheduling.placement import BackfillState, Waiting, drain, plan
from pilotq.broker.store.resources import NodeInfo, NodeShare, format_allocation, parse_allocation
from pilotq.broker.tasks.model import Request

ONE, TWO, FOUR = Request(), Request(cores=(2, 2)), Request(cores=(4, 4))
Running = list[tuple[tuple[NodeShare, ...], float]]


def sized(*sizes: int, gpus: int = 0, memory: int = 0, pools: dict[str, int] | None = None) -> Cluster:
    cluster = Cluster()
    for number, size in enumerate(sizes, 1):
        names = [f"g{gpu}" for gpu in range(gpus)]
        cluster.add_node(
            NodeInfo(f"n{number}", 1, "host", 1, list(range(size)), gpus=names, memory=memory, pools=pools or {})
        )
    return cluster


def wait(name: str, request: Request, order: int = 1, priority: int = 0, count: int = 1) -> Waiting:
    return Waiting(name, priority, request, [order], count)


def occupy(cluster: Cluster, **until: float) -> Running:
    """Take these cores (``n1_0_1=5.0`` is cores 0 and 1 of n1 until 5); returns them as running."""
    running = []
    for text, end in until.items():
        name, *cores = text.split("_")
        shares = (NodeShare(name, tuple(map(int, cores))),)
        cluster.take(shares)
        running.append((shares, end))
    return running


class Passes:
    """Passes over one cluster; each call gives the names that were placed."""

    def __init__(self, cluster: Cluster, running: Running, wait_s: float = 1.0) -> None:
        self.cluster = cluster
        self.running = running
        self.wait_s = wait_s
        self.state = BackfillState()

    def __call__(self, now: float, *waiting: Waiting) -> list[str]:
        placed = plan(self.cluster, waiting, self.running, self.state, now, self.wait_s)
        self.running += [(shares, math.inf) for _, shares in placed]
        return [name for name, _ in placed]

    def release(self, text: str) -> None:
        shares = parse_allocation(text)
        self.running.remove(next(item for item in self.running if item[0] == shares))
        self.cluster.release(shares)

    @property
    def held(self) -> str | None:
        return format_allocation(self.state.hold.shares) if self.state.hold else None


BIG, SMALL = wait("big", FOUR, 1), wait("small", ONE, 2)
LATER = wait("later", FOUR, 3)  # never fits beside anything; without somebody behind it nobody needs a hold


def test_without_anybody_behind_it_a_task_needs_no_hold() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf), wait_s=0.0)
    assert passes(0.0, BIG) == []
    assert passes.held is None
    assert passes(5.0, BIG, SMALL) == []
    assert passes.held == "n1[0:1:2:3]"


def test_later_tasks_overtake_until_the_wait_is_over_then_the_cores_are_held() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf))
    assert passes(10.0, BIG, SMALL) == ["small"]
    assert passes(10.9, BIG, SMALL) == ["small"]
    assert passes(11.0, BIG, SMALL) == []  # not even in the pass in which the wait ends
    assert passes.held == "n1[0:1:2:3]"
    for core in (0, 1):
        passes.release(f"n1[{core}]")
        assert passes(12.0, BIG, SMALL) == []
    passes.release("n1[2]")
    assert passes(13.0, BIG) == ["big"]
    assert passes.held is None
    passes.release("n1[0:1:2:3]")
    assert passes(13.0, SMALL) == ["small"]


def test_the_wait_counts_from_when_the_task_was_first_seen_blocked_though_another_was_first_then() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf, n1_1=math.inf))
    first, second = wait("first", Request(cores=(3, 3)), 1), wait("second", FOUR, 2)
    assert passes(0.0, first, second) == []
    passes.release("n1[0]")
    assert passes(0.9, first, second) == ["first"]
    assert passes(1.0, second, LATER) == []
    assert passes.held == "n1[0:1:2:3]"


def test_the_next_task_of_a_class_waits_anew() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf))
    two = wait("big", FOUR, 1, count=2)
    passes(0.0, two, LATER)
    passes(1.0, two, LATER)
    passes.release("n1[0]")
    assert passes(1.5, two, LATER) == ["big"]
    assert passes(2.4, BIG, LATER) == []
    assert passes.held is None
    assert passes(2.5, BIG, LATER) == []
    assert passes.held is not None


def test_what_lies_outside_the_hold_goes_on() -> None:
    cluster = sized(8, 4)
    running = occupy(cluster, n1_0_1_2_3_4_5=math.inf, n2_0_1_2=math.inf)
    passes = Passes(cluster, running, wait_s=0.0)
    assert passes(0.0, BIG, LATER) == []
    assert passes.held == "n1[0:1:6:7]"  # the node with most free cores
    assert passes(0.0, BIG, SMALL) == ["small"]
    assert passes.running[-1][0] == (NodeShare("n2", (3,)),)
    passes.release("n1[0:1:2:3:4:5]")
    assert passes(0.0, BIG, wait("small", ONE, 2, count=9)) == ["big"] + ["small"] * 4


@pytest.mark.parametrize(("limit", "fits"), [(5, True), (10, False), (None, False)])
def test_only_tasks_that_end_in_time_use_held_cores(limit: int | None, fits: bool) -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=8.0, n1_1=3.0), wait_s=0.0)
    assert passes(2.0, BIG, wait("small", Request(limit=limit), 2)) == ["small"] * fits
    assert passes.state.hold is not None
    assert passes.state.hold.frees_at == 8.0


def test_nobody_uses_held_cores_when_their_end_is_unknown() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=8.0, n1_1=math.inf), wait_s=0.0)
    assert passes(2.0, BIG, wait("small", Request(limit=1), 2)) == []


def test_a_higher_priority_uses_held_cores_and_takes_the_hold_over_when_it_is_blocked() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf), wait_s=0.5)
    passes(0.0, BIG, LATER)
    passes(0.5, BIG, LATER)
    assert passes.held is not None
    assert passes(0.5, BIG, wait("urgent", ONE, 9, priority=1)) == ["urgent"]
    assert passes.held is not None
    urgent = wait("urgent", Request(cores=(3, 3)), 9, priority=1)
    assert passes(0.6, BIG, urgent, SMALL) == ["small"]
    assert passes.held is None
    assert passes(1.1, BIG, urgent, SMALL) == []
    assert passes.state.hold is not None
    assert passes.state.hold.class_name == "urgent"


def test_an_earlier_task_of_the_same_priority_respects_the_hold_until_its_own_wait_is_over() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf))
    big, late = wait("big", FOUR, 5), wait("late", TWO, 1)
    for now in (0.0, 1.0):
        passes(now, big, wait("later", FOUR, 6))
    assert passes(1.1, big, late) == []
    assert passes.state.hold is not None
    assert passes.state.hold.class_name == "big"
    passes.running.append(((NodeShare("n1", (1, 2)),), math.inf))
    cluster.take((NodeShare("n1", (1, 2)),))
    assert passes(2.1, big, late) == []
    assert passes.state.hold.class_name == "late"


@pytest.mark.parametrize("change", ["emptied", "closed", "gone"])
def test_the_hold_ends_with_its_class_or_its_node(change: str) -> None:
    cluster = sized(4, 4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf, n2_0_1=math.inf), wait_s=0.0)
    passes(0.0, BIG, LATER)
    assert passes.held == "n1[0:1:2:3]"
    if change == "emptied":
        assert passes(0.1, wait("small", ONE, 2, count=5)) == ["small"] * 5
        assert passes.held is None
    elif change == "closed":
        cluster.set_open("n1", False)
        assert passes(0.1, BIG, SMALL) == []
        assert passes.held == "n2[0:1:2:3]"
    else:
        cluster.remove_node("n1")
        assert passes(0.1, BIG, SMALL) == []
        assert passes.held == "n2[0:1:2:3]"


def test_a_hold_outlives_a_node_that_joins_before_it_in_order() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf), wait_s=0.0)
    passes(0.0, BIG, LATER)
    cluster.add_node(NodeInfo("a1", 1, "host", 1, [0]))
    assert passes(0.0, BIG, wait("small", ONE, 2, count=9)) == ["small"]
    assert passes.running[-1][0] == (NodeShare("a1", (0,)),)


def test_a_hold_stays_on_its_node_when_another_joins_before_it() -> None:
    one, both = wait("one", Request(gpus=1), 2), wait("both", Request(gpus=2), 1)
    cluster = sized(4, gpus=2)
    passes = Passes(cluster, [], wait_s=0.0)
    assert passes(0.0, wait("one", Request(gpus=1), 0)) == ["one"]
    assert passes(0.0, both, one) == []
    cluster.add_node(NodeInfo("a1", 1, "host", 1, [0], gpus=["x"]))
    assert passes(0.0, both, one) == ["one"]
    assert passes.running[-1][0] == (NodeShare("a1", (0,), ("x",)),)


def test_a_class_that_only_closed_nodes_could_hold_does_not_block() -> None:
    cluster = sized(4, 2)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf, n2_0=math.inf), wait_s=0.0)
    assert passes(0.0, BIG, LATER) == []
    cluster.set_open("n1", False)
    assert passes(1.0, BIG, LATER, SMALL) == ["small"]
    assert passes.held is None
    assert passes.state.since == {}


def test_what_a_pass_did_not_come_to_keeps_its_wait() -> None:
    cluster, state = sized(4), BackfillState()
    occupy(cluster, n1_0=math.inf)
    plan(cluster, [BIG, LATER], (), state, 0.0)
    plan(cluster, [wait("first", ONE, 0), BIG, LATER], (), state, 0.5, limit=1)
    assert state.since == {"big": 0.0, "later": 0.0}


def test_a_class_that_never_fits_neither_blocks_nor_holds() -> None:
    cluster = sized(4)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf), wait_s=0.0)
    giant, gpu = wait("giant", Request(cores=(5, 5)), 0, 9), wait("gpu", Request(gpus=1), 0, 9)
    assert passes(0.0, giant, gpu, SMALL) == ["small"]
    assert passes.held is None
    assert passes(1.0, giant, gpu, BIG, SMALL) == []
    assert passes.held == "n1[0:1:2:3]"


def test_a_full_cluster_still_counts_the_wait_of_all() -> None:
    cluster = sized(1)
    passes = Passes(cluster, occupy(cluster, n1_0=math.inf))
    passes(0.0, *(wait(f"c{n}", ONE, n) for n in range(5)))
    assert passes.state.since == {f"c{n}": 0.0 for n in range(5)}


def test_a_hold_keeps_gpus_and_memory_from_those_who_want_them_too() -> None:
    cluster = sized(8, gpus=2)
    both, one = Request(gpus=2), Request(gpus=1)
    passes = Passes(cluster, [], wait_s=0.0)
    assert passes(0.0, wait("one", one, 0)) == ["one"]
    assert passes(0.0, wait("both", both, 1), wait("one", one, 2), SMALL) == ["small"]
    passes.release("n1[0;g0]")
    assert passes(0.0, wait("both", both, 1), wait("one", one, 2)) == ["both"]


@pytest.mark.parametrize(
    ("request_", "expected", "frees_at"),
    [
        (FOUR, "n2[0:1:2:3]", 6.0),
        (Request(cores=(3, 3)), "n2[0:2:3]", 4.0),
        (Request(nodes=(2, 2), cores=(3, 3)), "n1[0:2:3],n2[0:2:3]", 9.0),
        (Request(nodes=(2, 2), whole=True), "n1[0:1:2:3],n2[0:1:2:3]", 9.0),
        (Request(nodes=(3, 3), cores=(1, 1)), "n1[2],n2[2],n3[0]", math.inf),
        (Request(cores=(5, 5), spread=True), "n1[2:3],n2[0:2:3]", 4.0),
        (Request(cores=(11, 11), spread=True), "n1[0:1:2:3],n2[0:1:2:3],n3[0:1:2]", math.inf),
        (Request(cores=(5, 5)), None, 0.0),
    ],
)
def test_the_cores_that_free_soonest_are_held(request_: Request, expected: str | None, frees_at: float) -> None:
    cluster = sized(4, 4, 4)
    running = occupy(cluster, n1_0_1=9.0, n2_0=4.0, n2_1=6.0, n3_0_1_2_3=math.inf)
    found = drain(cluster, request_, iter(running))
    if expected is None:
        assert found is None
    else:
        assert found == (parse_allocation(expected), frees_at)


def test_looking_for_a_hold_changes_nothing() -> None:
    cluster = Cluster()
    cluster.add_node(NodeInfo("n1", 1, "host", 1, [0, 1, 2, 3], counters={"x": 2}))
    request = Request(use=(("x", 2),))
    shares = cluster.reserve(Request(use=(("x", 1),)))
    assert shares is not None
    assert drain(cluster, request, [(shares, 7.0)]) == ((NodeShare("n1", (1,)),), 7.0)
    assert cluster.reserve(request) is None


def test_running_tasks_are_looked_at_only_when_a_hold_begins() -> None:
    def never() -> Iterable[tuple[tuple[NodeShare, ...], float]]:
        raise AssertionError("looked at")
        yield

    plan(sized(4), [BIG, wait("more", FOUR, 2), SMALL], never(), BackfillState(), 0.0)


# The promise, with a simulated clock

Placed = list[tuple[str, tuple[NodeShare, ...]]]
LARGE = {
    "cores": FOUR,
    "range": Request(cores=(3, 8)),
    "nodes": Request(nodes=(2, 2), cores=(3, 3)),
    "whole": Request(nodes=(1, 2), whole=True),
    "spread": Request(cores=(7, 7), spread=True),
    "gpus": Request(gpus=2),
    "share of a GPU": Request(gpus=0.9),
    "memory": Request(cores=(2, 2), memory=9),
    "pool": Request(use=(("lic", 3),)),
    "pool over nodes": Request(nodes=(2, 2), cores=(1, 1), use=(("lic", 2),)),
}


def simulate(
    kind: str, limits: bool, luck: list[int], arrives: float, wait_s: float, place: Callable[..., Placed] = plan
) -> tuple[float, float, list[str]]:
    """An endless stream of small tasks and one large: when it was seen, when it started, all that was placed.

    There is a pass after each end, and none between, so the time of one pass is nothing. The lengths of small tasks
    are dealt out by ``luck``; with ``limits`` every other class states them.
    """
    cluster = sized(4, 4, 5, gpus=2, memory=10, pools={"lic": 3})
    state = BackfillState()
    stated = [limits and n % 2 == 1 for n in range(len(luck))]
    small = [
        Request(
            (c, c),
            gpus=(n % 3) / 2,
            memory=3 * int(n % 4 == 3),
            use=(("lic", 1),) if n % 2 else (),
            limit=luck[n] if stated[n] else None,
        )
        for n, c in enumerate([1, 2, 1, 2, 1, 2][: len(luck)])
    ]
    step = len(small)
    ends: list[tuple[float, int, tuple[NodeShare, ...], float]] = []
    now, order, seen, log = 0.0, 1000, math.inf, []
    while now < arrives + 1000:
        starts = range(order, order + step)
        waiting = [
            Waiting(f"s{n}", 0, request, range(start, start + 32 * step, step), 10_000)
            for n, (request, start) in enumerate(zip(small, starts, strict=True))
        ]
        if now >= arrives:
            seen = min(seen, now)
            waiting.append(Waiting("large", 0, LARGE[kind], [1], 1))
        running = ((shares, by) for _, _, shares, by in ends)
        for name, shares in place(cluster, waiting, running, state, now, wait_s, 500):
            log.append(f"{now} {name} {format_allocation(shares)}")
            if name == "large":
                return seen, now, log
            n = int(name[1:])
            order += 1
            by = now + luck[n] if stated[n] else math.inf
            heapq.heappush(ends, (now + luck[n], order, shares, by))
        now = ends[0][0]
        while ends and ends[0][0] <= now:
            cluster.release(heapq.heappop(ends)[2])
    raise AssertionError("the large task starved")


@settings(max_examples=120, deadline=None, database=None)
@given(
    st.sampled_from(sorted(LARGE)),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.floats(0, 20),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_a_large_task_starts_within_the_wait_and_the_longest_running_task(
    kind: str, limits: bool, luck: list[int], arrives: float, wait_s: float
) -> None:
    seen, started, log = simulate(kind, limits, luck, arrives, wait_s)
    assert started <= seen + wait_s + max(luck)
    assert simulate(kind, limits, luck, arrives, wait_s) == (seen, started, log)


@settings(max_examples=120, deadline=None, database=None)
@given(
    st.sampled_from(sorted(LARGE)),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.floats(0, 20),
)
def test_so_does_a_large_nice_task_among_nice_ones(kind: str, limits: bool, luck: list[int], arrives: float) -> None:
    seen, started, _ = simulate(kind, limits, luck, arrives, 1.0, plan_nice)
    assert started <= seen + 1.0 + max(luck)
