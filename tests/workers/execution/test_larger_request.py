"""What a task asks for when it is tried again because it had too little."""

from __future__ import annotations

import msgspec

from pilotq.broker.store.messages import Run
from pilotq.broker.tasks.spec import Grow, Spec
from pilotq.workers.execution.larger_request import UNCHANGED, larger_request

GB = 1 << 30


def run_of(spec: Spec, class_name: str) -> Run:
    return Run(
        "1", 1, 1, "n1[0]", class_name, "", 0.0, 0.0, "", "", -1, 0, 0, "s", msgspec.msgpack.encode(spec)
    )  # fmt: skip


def test_memory_grows_up_to_the_most() -> None:
    spec = Spec([b"x"], grow=Grow(memory=2.0, memory_max=5 * GB))
    names = [f"default.p3.2-4c-m{size * GB}-lic_1-t60" for size in (2, 4, 5)]
    assert larger_request(run_of(spec, names[0]), spec, "memory") == (names[1], b"")
    assert larger_request(run_of(spec, names[1]), spec, "memory") == (names[2], b"")
    assert larger_request(run_of(spec, names[2]), spec, "memory") == UNCHANGED
    assert larger_request(run_of(spec, names[0]), spec, "exit") == UNCHANGED
    assert larger_request(run_of(spec, names[0]), Spec([b"x"]), "memory") == UNCHANGED


def test_time_grows_in_the_spec_and_in_the_class() -> None:
    spec = Spec([b"x", b"{index}"], time_limit=50.0, grow=Grow(time=3.0, time_max=140.0))
    filled = msgspec.structs.replace(spec, argv=[b"x", b"7"])
    name, packed = larger_request(run_of(spec, "default.p0.1c-t60"), filled, "time limit")
    found = msgspec.msgpack.decode(packed, type=Spec)
    assert (name, found.time_limit, found.argv) == ("default.p0.1c-t300", 140.0, [b"x", b"{index}"])
    assert larger_request(run_of(found, name), found, "time limit") == UNCHANGED
