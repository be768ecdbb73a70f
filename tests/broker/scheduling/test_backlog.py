"""The backlog: which classes a pass of placement looks at, also when there are very many that the nodes cannot hold."""

from __future__ import annotations

from pilotq.broker.scheduling.backlog import EXAMINED_MAX, Backlog
from pilotq.broker.store.store import Head
from pilotq.broker.tasks.model import Request
from tests.support.engine import Engine, fixtures

engine, server, node = fixtures
KINDS = 3 * EXAMINED_MAX
FITS = "default.p0.1c-m1"


class Nodes:
    """Can hold requests up to ``memory``."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.asked = 0

    def is_possible(self, request: Request) -> bool:
        self.asked += 1
        return request.memory <= self.memory


def passes(backlog: Backlog, nodes: Nodes, widenings: int) -> tuple[list[str], int]:
    """What passes find until nothing is left to be examined, and how much one of them examined at most."""
    most = 0
    while True:
        nodes.asked = 0
        found = backlog.first(nodes.is_possible, widenings, lambda *_: 1)
        most = max(most, nodes.asked)
        if not backlog.more:
            return list(found), most


def test_very_many_kinds_that_cannot_run(engine: Engine) -> None:
    backlog, nodes = Backlog(engine.store), Nodes(memory=1)
    for n in range(KINDS):
        backlog.set(f"default.p5.1c-m{n + 2}", Head(1, [f"{n + 1}"], 0))
    backlog.set(FITS, Head(1, ["v"], 0))
    assert backlog.first(nodes.is_possible, 1, lambda *_: 1) == {} and backlog.more
    assert passes(backlog, nodes, 1) == ([FITS], EXAMINED_MAX)
    assert passes(backlog, nodes, 1) == ([FITS], 1)
    # Read again, gone, and new.
    backlog.set("default.p5.1c-m2", Head(2, ["1"], 0))
    backlog.set("default.p5.1c-m3", Head(0, [], 0))
    backlog.set("default.p5.1c", Head(1, ["v"], 0))
    assert passes(backlog, nodes, 1) == (["default.p5.1c", FITS], 2)
    nodes.memory = 4
    assert passes(backlog, nodes, 2)[0] == ["default.p5.1c-m2", "default.p5.1c-m4", "default.p5.1c", FITS]
    assert len(backlog.heads) == KINDS + 1
