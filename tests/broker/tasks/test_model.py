"""The name of a class says all of its request, and no other class has it."""

from __future__ import annotations

from itertools import product

import pytest

from pilotq.broker.store.resources import class_info
from pilotq.broker.tasks.model import Request, class_name, shape_of

REQUESTS = [
    Request(cores=cores, nodes=nodes, spread=spread, gpus=gpus, memory=memory, use=use, limit=limit)
    for cores, nodes, spread, gpus, memory, use, limit in product(
        [(1, 1), (2, 40)], [None, (2, 2), (1, 3)], [False, True], [0, 4], [0, 1, 3 << 40],
        [(), (("t60", 5), ("m1_2", 30), *((f"c{n}", n + 1) for n in range(20)))], [None, 1, 604_800],
    )
]  # fmt: skip
REQUESTS += [
    Request(gpus=gpus, gpu_kind=kind, memory=memory, use=use, numa=numa)
    for gpus, kind, memory, use, numa in product(
        [2, 0.0001, 0.25, 0.3333, 0.9999], ["", "a100", "1g_5gb"], [0, 3], [(), (("npack", 1),)], ["pack", "spread"]
    )
]
WHOLE = [Request(whole=True), Request(nodes=(2, 4), whole=True, gpus=2, memory=7, limit=60)]


def test_a_class_is_read_from_its_name() -> None:
    names = {class_name(queue, -5, r): (queue, r) for r in REQUESTS + WHOLE for queue in ("default", "a.p3.2c")}
    assert len(names) == 2 * len(REQUESTS + WHOLE)
    for name, (queue, request) in names.items():
        info = class_info(name)
        assert info is not None and (info.queue, info.priority, info.request) == (queue, -5, request)


@pytest.mark.parametrize(
    "text", ["default", "default.p1", "default.px.1c", "default.p1.1x", "default.p1.1c-", "a.p1.c"]
)
def test_what_is_no_class(text: str) -> None:
    assert class_info(text) is None


def test_what_is_no_label() -> None:
    assert shape_of("1c-m") is None and shape_of("2c1n") is None
