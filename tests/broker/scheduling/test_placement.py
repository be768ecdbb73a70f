"""Placement: each form of request, the order of tasks, backfill with its hold, and the sentences of `explain`."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotq.broker.scheduling.cluster import Cluster, with_counted
from pilotq.broker.scheduling.node_gpus import parts_of
from pilotq.broker.scheduling.placement import BackfillState, Waiting, plan
from pilotq.broker.store.resources import GpuFacts, NodeInfo, NodeShare, format_allocation, gpu_name, parse_allocation
from pilotq.broker.tasks.model import GPU_PARTS, Request

ALL = 1 << 30


def node(name: str, cores: int, **more: object) -> NodeInfo:
    return NodeInfo(name, 1, "host", 1, list(range(cores)), **more)  # type: ignore[arg-type]


def cluster_of(*infos: NodeInfo) -> Cluster:
    cluster = Cluster()
    for info in infos:
        cluster.add_node(info)
    return cluster


def sized(*sizes: int) -> Cluster:
    return cluster_of(*(node(f"n{i}", size) for i, size in enumerate(sizes, 1)))


def got(cluster: Cluster, request: Request) -> str | None:
    shares = cluster.reserve(request)
    return None if shares is None else format_allocation(shares)


def wait(name: str, request: Request, *orders: int, priority: int = 0, count: int = 0) -> Waiting:
    return Waiting(name, priority, request, orders, count or len(orders))


def names(placed: list[tuple[str, tuple[NodeShare, ...]]]) -> list[str]:
    return [name for name, _ in placed]


ONE, TWO, FOUR = Request(), Request(cores=(2, 2)), Request(cores=(4, 4))


# Forms of requests


@pytest.mark.parametrize(
    ("sizes", "request_", "expected"),
    [
        ((2,), ONE, "n1[0]"),
        ((2, 2, 2), Request(nodes=(2, 2), cores=(2, 2)), "n1[0:1],n2[0:1]"),
        ((4,), Request(cores=(2, 8)), "n1[0:1:2:3]"),
        ((2, 3), Request(cores=(2, 8)), "n2[0:1:2]"),
        ((9, 8), Request(cores=(2, 8)), "n2[0:1:2:3:4:5:6:7]"),
        ((1, 1), TWO, None),
        ((8, 3, 4), Request(cores=(3, 3)), "n2[0:1:2]"),
        ((2, 2, 2), Request(cores=(3, 3), spread=True), "n1[0:1],n2[0]"),
        ((2, 2), Request(cores=(3, 9), spread=True), "n1[0:1],n2[0:1]"),
        ((2, 2), Request(cores=(5, 9), spread=True), None),
        ((2, 1, 2), Request(nodes=(2, 5), cores=(2, 2)), "n1[0:1],n3[0:1]"),
        ((4, 2, 1), Request(nodes=(2, 2), cores=(2, 3)), "n1[0:1:2],n2[0:1]"),
        ((2, 1), Request(nodes=(2, 2), cores=(2, 2)), None),
        ((2, 3, 1), Request(nodes=(2, 2), whole=True), "n1[0:1],n2[0:1:2]"),
        ((2, 3, 1), Request(nodes=(1, 9), whole=True), "n1[0:1],n2[0:1:2],n3[0]"),
        ((2,), Request(nodes=(2, 2), whole=True), None),
    ],
)
def test_a_request_on_an_empty_cluster(sizes: tuple[int, ...], request_: Request, expected: str | None) -> None:
    cluster = sized(*sizes)
    assert got(cluster, request_) == expected
    if expected is None:
        assert cluster.used_cores == 0


def test_nodes_stand_in_natural_order_of_names_however_they_joined() -> None:
    cluster = cluster_of(node("n10", 2), node("n2", 2), node("n1", 2))
    assert cluster.names == ["n1", "n2", "n10"]
    assert got(cluster, Request(cores=(5, 5), spread=True)) == "n1[0:1],n2[0:1],n10[0]"


def test_the_node_with_least_to_spare_is_taken() -> None:
    cluster = sized(8, 8)
    assert [got(cluster, r) for r in (ONE, FOUR, ONE, FOUR)] == ["n1[0]", "n1[1:2:3:4]", "n1[5]", "n2[0:1:2:3]"]


def test_whole_nodes_are_completely_free_ones_and_give_all_their_gpus() -> None:
    cluster = cluster_of(node("n1", 2), node("n2", 2, gpus=["a", "b"]))
    assert got(cluster, ONE) == "n1[0]"
    assert got(cluster, Request(nodes=(1, 2), whole=True)) == "n2[0:1;a:b]"


def test_cores_are_of_as_few_numa_groups_as_can_be() -> None:
    cluster = cluster_of(node("n1", 8, numa=[[0, 2, 4, 6], [1, 3, 5, 7]]))
    assert got(cluster, TWO) == "n1[0:2]"
    assert got(cluster, Request(cores=(3, 3))) == "n1[1:3:5]"
    assert got(cluster, ONE) == "n1[7]"  # the group with least to spare
    assert got(cluster, TWO) == "n1[4:6]"
    cluster = cluster_of(node("n1", 8, numa=[[0, 1], [2, 3], [4, 5, 6, 7]]))
    assert got(cluster, Request(cores=(5, 5))) == "n1[0:4:5:6:7]"
    cluster = cluster_of(node("n1", 5, numa=[[0, 1], [2, 3]]))  # core 4 is of no group
    assert got(cluster, Request(cores=(4, 5))) == "n1[0:1:2:3:4]"


def test_cores_may_have_any_numbers() -> None:
    cluster = cluster_of(NodeInfo("n1", 1, "host", 1, [40, 3, 7]))
    assert got(cluster, TWO) == "n1[3:7]"
    assert got(cluster, ONE) == "n1[40]"


def test_gpus_memory_and_counters_are_of_the_node_and_come_back() -> None:
    cluster = cluster_of(
        node("n1", 8), node("n2", 8, gpus=["0", "1", "2"], memory=10, counters={"licence": 2}), node("n3", 8, memory=10)
    )
    two_gpus = Request(gpus=2)
    assert got(cluster, two_gpus) == "n2[0;0:1]"
    assert got(cluster, two_gpus) is None
    assert cluster.reserve(Request(memory=6)) == (NodeShare("n2", (1,), (), 6),)
    assert got(cluster, Request(memory=6, use=(("licence", 1),))) is None
    licensed = cluster.reserve(Request(memory=4, use=(("licence", 2),)))
    assert licensed == (NodeShare("n2", (2,), (), 4, (("licence", 2),)),)
    assert got(cluster, Request(use=(("licence", 1),))) is None
    cluster.release(licensed)
    cluster.release(parse_allocation("n2[0;0:1]"))
    assert got(cluster, Request(memory=4, gpus=3, use=(("licence", 2),))) == "n2[0;0:1:2]"
    assert got(cluster, Request(memory=8)) == "n1[0]"  # memory is not counted there


def test_what_ran_before_is_adopted_with_what_its_text_leaves_out() -> None:
    cluster = cluster_of(node("n1", 4, memory=10, counters={"x": 1}))
    request = Request(cores=(2, 2), memory=8, use=(("x", 1),))
    shares = with_counted(parse_allocation("n1[1:2],gone[0]"), request, cluster.pools)
    cluster.take(shares)
    assert (cluster.used("n1"), cluster.free("n1"), cluster.used_cores, cluster.total_cores) == (2, 2, 2, 4)
    assert got(cluster, Request(memory=3)) is None
    with pytest.raises(ValueError, match="n1 does not have all of cores"):
        cluster.take(parse_allocation("n1[2:3]"))
    cluster.release(shares)
    assert cluster.free_cores == 4
    assert got(cluster, Request(memory=10, use=(("x", 1),))) == "n1[0]"
    with pytest.raises(ValueError, match="not reserved"):
        cluster.release(parse_allocation("n1[0:1]"))


def test_a_closed_node_gets_nothing_and_a_node_that_went_takes_its_reservations_along() -> None:
    cluster = sized(2, 2)
    first = cluster.reserve(ONE)
    assert first is not None
    cluster.set_open("n1", False)
    assert got(cluster, ONE) == "n2[0]"
    assert got(cluster, TWO) is None
    cluster.release(first)
    cluster.set_open("n1", True)
    assert got(cluster, TWO) == "n1[0:1]"
    cluster.remove_node("n1")
    cluster.release(parse_allocation("n1[0:1]"))
    assert (cluster.total_cores, cluster.used_cores) == (2, 1)
    cluster.add_node(node("n1", 3))
    assert cluster.free("n1") == 3
    with pytest.raises(ValueError, match="n1 is there already"):
        cluster.add_node(node("n1", 3))


# Sentences


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (ONE, None),
        (Request(cores=(5, 5)), None),
        (Request(cores=(8, 9)), "needs 8 cores on one node; the largest, n2, has 5 cores"),
        (Request(cores=(8, 8), spread=True), None),
        (Request(cores=(10, 12), spread=True), "needs 10 cores; all nodes together have 9 cores"),
        (Request(nodes=(2, 2), cores=(4, 4)), None),
        (Request(nodes=(2, 3), cores=(5, 5)), "needs 5 cores on each of 2 nodes; only 1 node has that much"),
        (Request(nodes=(2, 3), whole=True), None),
        (Request(nodes=(3, 3), whole=True), "needs 3 whole nodes; there are 2"),
        (Request(gpus=2), "needs 2 GPUs on one node; the largest, n1, has 1 GPU"),
        (Request(cores=(5, 5), gpus=1), "needs 5 cores, 1 GPU on one node; no node has all of it"),
        (Request(memory=3 << 30), None),
        (Request(use=(("x", 1),)), "needs 1 of x on one node; no node has any"),
    ],
)
def test_never_fits_says_why(request_: Request, sentence: str | None) -> None:
    cluster = cluster_of(node("n1", 4, gpus=["0"], memory=1 << 30), node("n2", 5))
    cluster.set_open("n2", False)
    full = cluster.reserve(Request(cores=(4, 4)))
    assert full is not None
    assert cluster.never_fits(request_) == sentence


def test_waits_for_says_what_is_missing() -> None:
    cluster = sized(4, 2)
    assert cluster.waits_for(Request(cores=(5, 5))) == "needs 5 cores on one node; the largest, n1, has 4 cores"
    assert "as soon as" in cluster.waits_for(FOUR)
    cluster.reserve(Request(cores=(3, 3)))
    assert cluster.waits_for(FOUR) == "needs 4 cores free on one node; the most free is 2 cores, on n2"
    assert cluster.waits_for(Request(nodes=(2, 2), cores=(2, 2))) == (
        "needs 2 cores free on each of 2 nodes; only 1 node has that much free"
    )
    assert cluster.waits_for(Request(nodes=(2, 2), whole=True)) == "needs 2 unused nodes; there is 1"
    cluster.hold((NodeShare("n2", (0, 1)),), TWO)
    assert "held" in cluster.waits_for(TWO)
    assert Cluster().waits_for(ONE) == "needs 1 core on one node; there is no node"


# Order


def test_priority_is_strict_then_order_across_classes() -> None:
    waiting = [
        wait("low", ONE, 1, 2, priority=-1),
        wait("odd", ONE, 3, 5, 7),
        wait("even", TWO, 4, 6, 8),
        wait("high", ONE, 9, priority=5),
    ]
    placed = plan(sized(100), waiting, (), BackfillState(), 0.0, limit=ALL)
    assert names(placed) == ["high", "odd", "even", "odd", "even", "odd", "even", "low", "low"]


def test_tasks_beyond_the_known_orders_go_on_in_the_same_steps() -> None:
    waiting = [wait("a", ONE, 1, 3, count=4), wait("b", ONE, 2, 4, count=4), wait("array", ONE, 5, count=3)]
    placed = plan(sized(100), waiting, (), BackfillState(), 0.0, limit=ALL)
    assert "".join(names(placed)).replace("array", "x") == "ababaxxxbab"


def test_a_pass_ends_at_its_limit() -> None:
    waiting = [wait("a", ONE, *range(10)), wait("b", ONE, *range(10, 20))]
    cluster, state = sized(100), BackfillState()
    assert names(plan(cluster, waiting, (), state, 0.0, limit=12)) == ["a"] * 10 + ["b"] * 2
    assert cluster.used_cores == 12


REQUESTS = st.builds(
    Request,
    cores=st.tuples(st.integers(1, 5), st.integers(0, 3)).map(lambda p: (p[0], p[0] + p[1])),
    nodes=st.none() | st.tuples(st.integers(1, 2), st.integers(0, 1)).map(lambda p: (p[0], p[0] + p[1])),
    gpus=st.sampled_from([0, 0, 1, 2, 0.25, 0.3333]),
    numa=st.sampled_from(["", "", "spread"]),
    memory=st.sampled_from([0, 0, 3]),
    use=st.sampled_from([(), (), (("x", 1),)]),
    limit=st.sampled_from([None, 1, 5]),
).flatmap(
    lambda r: st.sampled_from(
        [r, Request(r.cores, r.nodes or (1, 1), whole=True), Request(r.cores, spread=True, gpus=r.gpus)]
        if r.nodes
        else [r, Request(r.cores, spread=True, limit=r.limit)]
    )
)
NODES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 3), st.sampled_from([0, 4]), st.booleans()), min_size=1, max_size=5
)


def build(shape: list[tuple[int, int, int, bool]]) -> Cluster:
    return cluster_of(
        *(
            node(
                f"n{i}", cores, gpus=[f"g{g}" for g in range(gpus)], memory=memory, counters={"x": 1},
                numa=[list(range(0, cores, 2)), list(range(1, cores, 2))] if numa else [],
            )
            for i, (cores, gpus, memory, numa) in enumerate(shape)
        )
    )  # fmt: skip


def meets(shares: tuple[NodeShare, ...], request: Request, shape: list[tuple[int, int, int, bool]]) -> None:
    low, high = request.cores
    counts = [len(share.cores) for share in shares]
    assert len({share.node for share in shares}) == len(shares)
    if request.whole:
        assert counts == [shape[int(share.node[1:])][0] for share in shares]
    elif request.spread:
        assert low <= sum(counts) <= high
    else:
        assert all(low <= count <= high for count in counts)
    if not request.spread:
        assert (request.nodes or (1, 1))[0] <= len(shares) <= (request.nodes or (1, 1))[1]
    for share in shares:
        parts = GPU_PARTS * request.gpus
        assert request.whole or sum(map(parts_of, share.gpus)) == parts
        assert (share.memory, share.use) == (request.memory, request.use)


@settings(max_examples=150, deadline=None, database=None)
@given(NODES, st.lists(REQUESTS | st.integers(0, 30), max_size=30))
def test_nothing_is_given_twice_and_release_restores(shape, steps) -> None:  # type: ignore[no-untyped-def]
    """Requests are reserved, numbers release one of what is reserved; an empty cluster is what it was at first."""
    cluster, fresh = build(shape), build(shape)
    live: list[tuple[NodeShare, ...]] = []
    for step in steps:
        if isinstance(step, int):
            if live:
                cluster.release(live.pop(step % len(live)))
        else:
            assert isinstance(step, Request)
            shares = cluster.reserve(step)
            if shares is None:
                assert live or cluster.never_fits(step)
            else:
                meets(shares, step, shape)
                assert cluster.never_fits(step) is None
                live.append(shares)
        taken = [(p.node, core) for shares in live for p in shares for core in p.cores]
        assert len(taken) == len(set(taken))
        parts = Counter[tuple[str, str]]()
        for p in (p for shares in live for p in shares):
            for gpu in p.gpus:
                parts[p.node, gpu_name(gpu)] += parts_of(gpu)
        assert all(part <= GPU_PARTS for part in parts.values())
        assert cluster.used_cores == sum(len(p.cores) for shares in live for p in shares)
        for i, (_, _, memory, _) in enumerate(shape):
            mine = [p for shares in live for p in shares if p.node == f"n{i}"]
            assert sum(dict(p.use).get("x", 0) for p in mine) <= 1
            assert not memory or sum(p.memory for p in mine) <= memory
    for shares in live:
        cluster.release(shares)
    for request in (r for r in steps if isinstance(r, Request)):
        assert cluster.reserve(request) == fresh.reserve(request)


CLASSES = st.lists(st.tuples(st.integers(-1, 1), REQUESTS, st.integers(1, 5)), min_size=1, max_size=6)


def classes_of(drawn: list[tuple[int, Request, int]], luck: list[int]) -> list[Waiting]:
    """The drawn classes with order numbers dealt out among them as ``luck`` says."""
    orders: list[list[int]] = [[] for _ in drawn]
    left = [count for _, _, count in drawn]
    for order in range(sum(left)):
        there = [i for i, count in enumerate(left) if count]
        which = there[luck[order % len(luck)] % len(there)]
        left[which] -= 1
        orders[which].append(order)
    return [wait(f"c{i}", r, *orders[i], priority=p) for i, (p, r, _) in enumerate(drawn)]


@settings(max_examples=100, deadline=None, database=None)
@given(NODES, CLASSES, st.lists(st.integers(0, 9), min_size=1, max_size=8), st.randoms())
def test_a_pass_equals_placing_one_after_the_other(shape, drawn, luck, random) -> None:  # type: ignore[no-untyped-def]
    """By priority, then order, each class until its head does not fit; and the order of the classes is no matter."""
    waiting = classes_of(drawn, luck)
    queue = sorted((-w.priority, order, w) for w in waiting for order in w.orders)
    simple, blocked, expected = build(shape), set(), []
    for _, _, w in queue:
        if w.class_name not in blocked:
            shares = simple.reserve(w.request)
            if shares is None:
                blocked.add(w.class_name)
            else:
                expected.append((w.class_name, shares))
    random.shuffle(waiting)
    assert plan(build(shape), waiting, (), BackfillState(), 0.0, limit=ALL) == expected


def gpu_node(name: str, cores: int, *models: str, near: dict[str, list[int]] | None = None) -> NodeInfo:
    facts = {str(n): GpuFacts(model=model, cores=(near or {}).get(str(n), [])) for n, model in enumerate(models)}
    return NodeInfo(name, 1, "host", 1, list(range(cores)), gpus=list(facts), gpu_facts=facts)


def test_shares_of_gpus_are_packed_and_add_up() -> None:
    cluster = cluster_of(gpu_node("n1", 16, "", ""))
    third, whole = Request(gpus=0.3333), Request(gpus=1)
    assert [got(cluster, third) for _ in range(4)] == [
        "n1[0;0@0.3333]", "n1[1;0@0.3333]", "n1[2;0@0.3333]", "n1[3;1@0.3333]"
    ]  # fmt: skip
    assert cluster.waits_for(whole) == "needs 1 GPU free on one node; no node has any free"
    assert got(cluster, Request(gpus=0.0001)) == "n1[4;0@0.0001]", "exactly what three thirds leave"
    assert got(cluster, Request(gpus=0.7)) is None
    lacks = "needs 0.7 of a GPU free on one node; the most free is 0.6667 of a GPU, on n1"
    assert cluster.waits_for(Request(gpus=0.7)) == lacks
    cluster.release(parse_allocation("n1[3;1@0.3333]"))
    assert got(cluster, whole) == "n1[3;1]"
    assert got(cluster, Request(gpus=0.5)) is None


def test_gpus_of_a_kind() -> None:
    cluster = cluster_of(
        gpu_node("n1", 4, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), gpu_node("n2", 4, "NVIDIA H100 80GB HBM3")
    )
    assert got(cluster, Request(gpus=1, gpu_kind="h100")) == "n2[0;0]"
    assert got(cluster, Request(gpus=1, gpu_kind="a100_80gb")) == "n1[0;1]"
    assert got(cluster, Request(gpus=1, gpu_kind="80gb")) is None
    assert got(cluster, Request(gpus=0.5, gpu_kind="40gb")) == "n1[1;0@0.5]"
    never = cluster.never_fits(Request(gpus=3, gpu_kind="a100"))
    assert never == "needs 3 GPUs of kind a100 on one node; the largest, n1, has 2 GPUs of kind a100"
    never = cluster.never_fits(Request(gpus=1, gpu_kind="mi250x"))
    assert never == "needs 1 GPU of kind mi250x on one node; no node has any"


def test_cores_and_gpus_lie_near_each_other() -> None:
    near = {"0": [0, 1, 2, 3], "1": [4, 5, 6, 7], "2": [4, 5, 6, 7]}
    cluster = cluster_of(gpu_node("n1", 8, "", "", "", near=near))
    assert got(cluster, Request(gpus=2)) == "n1[4;1:2]", "two that are near each other"
    assert got(cluster, Request(cores=(5, 5), gpus=1)) == "n1[0:1:2:3:5;0]", "all cores near it, and one more"
    cluster = cluster_of(gpu_node("n1", 8, "", "", near=near))
    cluster.take([NodeShare("n1", (0, 1, 2))])
    assert got(cluster, Request(cores=(2, 2), gpus=1)) == "n1[4:5;1]", "near enough free cores"


def test_cores_are_spread_over_numa_nodes() -> None:
    cluster = cluster_of(node("n1", 12, numa=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]))
    spread = Request(cores=(6, 6), numa="spread")
    cluster.take([NodeShare("n1", (0, 1, 2))])
    assert got(cluster, spread) == "n1[3:4:5:8:9:10]"
    assert got(cluster, Request(cores=(2, 2), numa="pack")) == "n1[6:7]"
    assert got(cluster, spread) is None


def test_pools_are_shared_by_all_nodes() -> None:
    cluster = cluster_of(node("n1", 4, pools={"lic": 5}), node("n2", 4))
    two, pair = Request(cores=(3, 3), use=(("lic", 2),)), Request(nodes=(2, 2), use=(("lic", 2),))
    assert got(cluster, two) == "n1[0:1:2]" and got(cluster, pair) == "n1[3],n2[0]", "a task takes its units once"
    assert got(cluster, Request(use=(("lic", 2),))) is None
    assert cluster.waits_for(two) == "needs 2 of lic free in the pilot; 1 of 5 are free"
    assert cluster.never_fits(Request(use=(("lic", 6),))) == "needs 6 of lic in the pilot; it has 5"
    assert cluster.never_fits(Request(use=(("other", 1),))) == "needs 1 of other on one node; no node has any"
    assert len(cluster.reserve_many(Request(use=(("lic", 1),)), 9)) == 1
    cluster.remove_node("n2")
    assert cluster.pools.free("lic") == 1, "one ended with its node; what the task over both has is the first one's"
    cluster.release(with_counted(parse_allocation("n1[3],n2[0]"), pair, cluster.pools))
    assert cluster.pools.free("lic") == 3
    cluster.add_node(node("n3", 4, pools={"lic": 5}))
    cluster.remove_node("n1")
    assert cluster.pools.free("lic") == 5


def test_a_hold_keeps_units_of_a_pool_on_all_nodes() -> None:
    cluster = cluster_of(*(node(f"n{n}", 4, pools={"lic": 2}) for n in (1, 2)))
    one, both = wait("one", Request(use=(("lic", 1),)), 2, 3), wait("both", Request(use=(("lic", 2),)), 1)
    running = cluster.reserve(one.request)
    assert running is not None
    state = BackfillState()
    assert names(plan(cluster, [both], [(running, 9.0)], state, 0.0)) == []
    assert names(plan(cluster, [both, one, wait("plain", ONE, 4)], [(running, 9.0)], state, 2.0)) == ["plain"]
    cluster.release(running)
    assert names(plan(cluster, [both, one], (), state, 9.0)) == ["both"]
