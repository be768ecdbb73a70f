"""Which nodes get nothing new, and why: allocations that end, nodes that were drained, retired or put aside.

What stands in Redis (`keys.ENDS`, `keys.CLOSED`, `keys.ASIDE`) is applied to the dispatcher's floor; a word to leave
goes to nodes whose time has come, and to retired ones when nothing of theirs runs.
"""

from __future__ import annotations

import math
import time

from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.scheduling.inventory import Floor
from pilotq.broker.scheduling.quarantine import Judge
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Link
from pilotq.broker.store.messages import Leave, Leaving, NodeInfo
from pilotq.broker.store.node_states import RETIRED, texts


class End:
    """When the nodes of a Slurm job get nothing new (unix seconds), and how they are to leave then."""

    def __init__(self, text: bytes) -> None:
        at, grace, notice = text.split()
        self.at = float(at)
        self.word = Leave(float(grace), "walltime", int(notice))


class Gate:
    """``judge`` knows of nodes that were put aside when they are to be tried; without one they are closed."""

    def __init__(self, link: Link, judge: Judge | None = None) -> None:
        self._link = link
        self._judge = judge
        self.aside: dict[str, str] = {}  # node -> why
        self.least = 0  # without so many nodes nothing begins
        self._ends: dict[str, End] = {}
        self._closed: dict[str, str] = {}  # node -> state
        self._leaving: set[tuple[str, int]] = set()  # incarnations that have said that they leave
        self._left: set[tuple[str, int]] = set()  # incarnations that were told to leave

    def read(self) -> None:
        """Read again what stands in Redis."""
        hashes = [("HGETALL", key) for key in (keys.ENDS, keys.CLOSED, keys.ASIDE)]
        ends, closed, aside, least = self._link.pipeline([*hashes, ("HGET", keys.WISH, "least")])
        self.least = int(least or 0)
        self._ends = {job.decode(): End(text) for job, text in zip(ends[::2], ends[1::2], strict=True)}
        self._closed = {name: text.partition(" ")[0] for name, text in texts(closed).items()}
        self.aside = texts(aside)

    def leaving(self, word: Leaving) -> None:
        self._leaving.add((word.node, word.incarnation))

    def apply(self, floor: Floor, now: float) -> list[tuple[NodeInfo, Leave]]:
        """Open and close nodes; returns those that are to leave, each incarnation once. ``now`` is monotonic."""
        clock = time.time()
        leaving = []
        for node in floor.nodes.values():
            info = node.info
            incarnation = (info.name, info.incarnation)
            word = self.show(floor.cluster, info, now, clock)
            if self._closed.get(info.name) == RETIRED and floor.idle(info.name):
                word = word or Leave(0.0)
            if word is not None and incarnation not in self._left:
                self._left.add(incarnation)
                leaving.append((info, word))
        return leaving

    def show(self, cluster: Cluster, info: NodeInfo, now: float, clock: float) -> Leave | None:
        """Open or close one node of a cluster, whose clock shows ``now`` at ``clock`` unix seconds; the word to leave
        when its allocation is over."""
        end = self._ends.get(info.job)
        aside = info.name in self.aside if self._judge is None else self._judge.shut(info.name, now)
        shut = aside or not self.usable(info, clock)
        cluster.set_end(info.name, now + end.at - clock if end is not None else math.inf)
        if cluster.is_open(info.name) is shut:
            cluster.set_open(info.name, not shut)
        return end.word if end is not None and clock >= end.at else None

    def usable(self, info: NodeInfo, clock: float) -> bool:
        """Whether nothing but `Judge` keeps new tasks from it."""
        end = self._ends.get(info.job)
        over = end is not None and clock >= end.at
        return not (over or info.name in self._closed or (info.name, info.incarnation) in self._leaving)
