"""Measures how long it takes until the death of a part is noticed and work goes on, and what a cut network costs.

    python -m benchmarks faults

Each part is killed 10 times, with the settings that users have. *Noticed*: its parent's log says so. *Goes on*: for
worker and launcher the task that ran there has begun once more, for dispatcher and server a task that is submitted
after the kill has begun; tasks write down themselves when they begin. Then (as root) the network of a node is cut twice
in each direction, under a task that ignores SIGTERM: its process must be gone before the second execution begins.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure
from pilotq.broker import Task
from pilotq.broker.settings import Settings
from tests.support.fault_rig import PROBE, Rig, Work
from tests.support.network_namespace import CUT, FarNode, possible
from tests.support.waiting import wait_until

PARTS = {"dispatcher": "supervisor", "server": "supervisor", "n1": "supervisor", "launcher": "worker-n1"}  # who says it
WORD = {"dispatcher": "dispatcher", "server": "server", "n1": "n1", "launcher": "has died"}
NOTICED_S = 0.1
CONTACT_S = 5.0
OWN = Settings()


@contextmanager
def rig(nodes: str) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as folder:
        made = Rig(Path(folder), nodes)
        made.settings = {"restart_limit": 1000}
        try:
            yield made
        finally:
            made.stop()


def begins(r: Rig, task_id: str) -> dict[str, float]:
    """Number of each execution that has begun -> when (monotonic)."""
    return {words[1]: float(words[3]) for words in r.ledger() if words[0] == task_id and words[2] == "begin"}


def at(condition: Callable[[], object], what: str) -> float:
    wait_until(condition, seconds=120.0, what=what)
    return time.monotonic()


def started(r: Rig, task: Task) -> Work:
    work = r.submit([task])
    wait_until(lambda: begins(r, work.ids[0]), seconds=60, what="it has begun")
    return work


def cancel(r: Rig, work: Work) -> None:
    with r.broker() as broker:
        broker.cancel(work.ids)
    wait_until(lambda: r.ended(work), seconds=60, what="its end")


def kill(r: Rig, part: str) -> tuple[float, float]:
    """Seconds until it is noticed, and until work goes on."""
    running = started(r, r.probe(600.0))
    log = r.folder / "pilot" / "logs" / f"{PARTS[part]}.log"
    seen, pid = log.stat().st_size, r.process(part)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    noticed = at(lambda: WORD[part] in log.read_text()[seen:], f"{log} says it") - killed
    if part in ("n1", "launcher"):
        wait_until(lambda: "2" in begins(r, running.ids[0]), seconds=60, what="it runs again")
        goes_on = begins(r, running.ids[0])["2"] - killed
    else:
        marker = r.submit([r.probe(0.0)])
        wait_until(lambda: begins(r, marker.ids[0]), seconds=60, what="the next task")
        goes_on = begins(r, marker.ids[0])["1"] - killed
    cancel(r, running)
    return noticed, goes_on


def cut(r: Rig, far: FarNode, direction: str) -> tuple[float, float]:
    """Seconds from the cut to the end of a deaf task there, and from that to the begin of its second execution."""
    script = f"trap '' TERM; exec {sys.executable} -I -S {PROBE} {r.folder} 600"
    work = started(r, Task(script=script))  # the dispatcher takes the first node by name, which is far
    (pid,) = [int(words[4]) for words in r.ledger() if words[0] == work.ids[0]]
    began = time.monotonic()
    far.cut(direction)
    gone = at(lambda: not os.path.exists(f"/proc/{pid}"), "its end")
    wait_until(lambda: "2" in begins(r, work.ids[0]), seconds=60, what="it runs again")
    second = begins(r, work.ids[0])["2"]
    far.reconnect()
    assert far.worker is not None
    far.worker.wait(60)
    cancel(r, work)
    far.start()
    return gone - began, second - gone


def figures(what: str, seconds: list[float], reach: float = 0.0) -> Figure:
    """The largest counts."""
    text = f"min {min(seconds) * 1e3:,.0f}, median {median(seconds) * 1e3:,.0f} of {len(seconds)}"
    return Figure(what, max(seconds) * 1e3, "ms at most", reach * 1e3, False, text)


def run(number: int = 10, cuts: int = 2) -> list[Figure]:
    found = []
    with rig("n1:2") as r:
        r.start()
        for part in PARTS:
            times = [kill(r, part) for _ in range(number)]
            # For a worker: when its tasks have been ended and its loss was reported, which has no bound.
            name, word = ("worker", "tasks ended, loss reported") if part == "n1" else (part, "noticed")
            reach = NOTICED_S if part != "n1" else 0.0
            found.append(figures(f"{name} killed: {word}", [noticed for noticed, _ in times], reach))
            found.append(figures(f"{name} killed: work goes on", [goes_on for _, goes_on in times]))
    if possible():
        with rig("n1:1") as r:
            far = FarNode(r)
            try:
                r.start(bind=[far.here], contact=CONTACT_S)
                far.start()
                times = [cut(r, far, direction) for direction in CUT for _ in range(cuts)]
            finally:
                far.remove()
        bound = CONTACT_S + OWN.kill_grace_s + OWN.node_timeout_margin_s
        found.append(figures(f"cut, --contact {CONTACT_S:g}: deaf task ended", [gone for gone, _ in times], bound))
        least, text = min(gap for _, gap in times), f"of {len(times)}; below 0 two would have run at one time"
        found.append(Figure("cut: from its end to its next begin", least, "s at least", 1e-9, True, text))
    return found
