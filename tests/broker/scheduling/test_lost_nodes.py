"""Which nodes are lost where none is ever out of touch: those whose worker is no process of this machine."""

from __future__ import annotations

import os

from pilotq.broker.process_identity import machine_id, start_time
from pilotq.broker.scheduling.reconciler import LOST_S, POLL_S, Reconciler
from pilotq.broker.store import keys
from pilotq.broker.store.resources import NodeInfo
from tests.support.engine import Engine, fixtures

engine, server, _ = fixtures


def test_a_silent_worker_is_lost_unless_its_process_is_here(engine: Engine) -> None:
    """A pilot that is resumed elsewhere, with fewer nodes, inherits records; in a container numbers are used again."""
    pid, start = os.getpid(), start_time(os.getpid()) or 0
    places = {"here": (machine_id(), start), "number used again": (machine_id(), start - 1), "elsewhere": ("x", start)}
    nodes = {
        f"{name}:1": NodeInfo(name, 1, "host", pid, [0], machine=machine, start=begun)
        for name, (machine, begun) in places.items()
    }
    engine.link.call("HSET", keys.CONTROL, "contact", 0)
    reconciler = Reconciler(engine.store)
    assert reconciler.turn(100.0, nodes, [], walked=True, idle=False) == []
    clock, lost = 100.0, []
    while not lost and clock < 100.0 + 2 * LOST_S:
        clock += POLL_S
        lost = reconciler.turn(clock, nodes, [], walked=True, idle=False)
    assert {info.name for info in lost} == {"number used again", "elsewhere"}
    assert clock - 100.0 >= LOST_S
