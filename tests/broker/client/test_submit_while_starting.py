"""A submit while some nodes of the pilot are still starting, or restarting."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotq.broker import Request, Task
from pilotq.broker.errors import NeverFits
from pilotq.broker.store import keys
from tests.support.live_pilot import live_pilot

TWO_NODES = Task(command=["true"], request=Request(nodes=(2, 2)))


def test_what_never_fits_is_judged_when_all_nodes_are_there(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as pilot:
        with pytest.raises(NeverFits, match="2 nodes"):
            pilot.broker.enqueue(TWO_NODES)
        pilot.broker.link.call("RPUSH", keys.EXPECTED_NODES, "n2")
        task_id = pilot.broker.enqueue(TWO_NODES)
        assert pilot.broker.task(task_id).status == "queued"


def test_the_supervisor_tells_its_nodes(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1,n2:1") as pilot:
        assert pilot.broker.link.call("LRANGE", keys.EXPECTED_NODES, 0, -1) == [b"n1", b"n2"]
        assert pilot.ended(pilot.broker.enqueue(TWO_NODES)).status == "finished"
