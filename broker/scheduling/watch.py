"""What the dispatcher does about nodes on which tasks keep failing at once, as aside.py judges them."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping

from pilotq.broker.scheduling.availability import Gate
from pilotq.broker.scheduling.inventory import ClassInfo, Floor
from pilotq.broker.scheduling.quarantine import Judge, Verdict
from pilotq.broker.store import keys
from pilotq.broker.store.messages import NodeInfo, Pardon
from pilotq.broker.store.store import Store

log = logging.getLogger("pilotq.dispatcher")


class Watch:
    """Which nodes are aside stands in Redis, for those who look and for the next dispatcher. How long each one waits
    for its next trial does not: the next dispatcher begins with the first pause. Time is monotonic."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.judge = Judge(store.settings)
        self.gate = Gate(store.link, self.judge)

    def turn(
        self, floor: Floor, classes: Mapping[str, ClassInfo], known: Collection[str], now: float
    ) -> list[tuple[NodeInfo, Pardon]]:
        """Put nodes aside, and use them again; returns what workers are to be told. ``known`` are all nodes that are
        registered."""
        judge, told = self.judge, []
        for name, why in self.gate.aside.items():
            if name not in judge.cases:
                judge.adopt(name, why, now)
        for name in [name for name, case in judge.cases.items() if case.aside and name not in self.gate.aside]:
            judge.forget(name)  # its user has resumed it
            log.warning("node %s is used again: its user says so", name)
            told += [(node.info, Pardon(fine=True)) for node in (floor.nodes.get(name),) if node is not None]
        # A dispatcher that was started again hears of its nodes one by one: the first is not the only one.
        if not judge.cases or any(name not in floor.nodes for name in known):
            return told
        clock = time.time()
        usable = [name for name, node in floor.nodes.items() if self.gate.usable(node.info, clock)]

        def elsewhere(class_name: str, name: str) -> bool:
            if floor.cluster.is_open(name):
                floor.cluster.set_open(name, False)
            known = classes.get(class_name)
            return known is None or floor.cluster.possible(known.request)

        for verdict in judge.turn(now, usable, floor.lanes, elsewhere):
            self._apply(verdict)
            if not verdict.aside and verdict.fine:
                told.append((floor.nodes[verdict.node].info, Pardon(fine=True)))
            elif not verdict.aside:  # it is the tasks: other nodes need not find that out by themselves
                failing = [floor.nodes[name] for name in judge.failing - judge.cases.keys() if name in floor.nodes]
                told += [(node.info, Pardon()) for node in failing]
                judge.failing.clear()
        return list({info.name: (info, word) for info, word in told}.values())

    def _apply(self, verdict: Verdict) -> None:
        node = verdict.node
        if not verdict.aside:
            if self.gate.aside.pop(node, None) is not None:
                log.warning("node %s is used again: %s", node, verdict.why)
                self._store.write("HDEL", keys.ASIDE, node)
            return
        case = self.judge.cases[node]
        at = time.strftime("%H:%M:%S", time.localtime(time.time() + case.pause))
        why = f"{verdict.why}{at}"
        log.warning("node %s is put aside: %s", node, why)
        self.gate.aside[node] = why
        self._store.write("HSET", keys.ASIDE, node, why)
