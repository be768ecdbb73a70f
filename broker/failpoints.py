"""Failpoints: named points in every transition at which a test may kill, stop or delay the process that reaches them.

In production `hit` does nothing. Where PILOTQ_FAILPOINTS names a folder, a file ``<role>.<point>`` in it arms that
point: the first process that reaches it removes the file and suffers the fault it describes (`Fault`), after it has
written its own number, or that of the process the fault is done to, to ``<role>.<point>.fired``. An empty file
``<role>.<point>.seen`` records that a point was reached.

Around each script that is called and waited for are the points ``<script>:before`` and ``<script>:after``; around
scripts that a worker posts ``:before``, ``:sent`` and ``:after``, the last of them before their answer is read.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Final

import msgspec

from pilotq.broker.errors import ServerUnavailable

ROLES: Final = ("supervisor", "dispatcher", "worker", "launcher", "client")
_CALLED: Final = (":before", ":after")
_POSTED: Final = (":before", ":sent", ":after")


def _around(scripts: tuple[str, ...], moments: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(script + moment for script in scripts for moment in moments)


# Every failpoint of each role: the tests go through this table, one fault after the other; a point that the code does
# not have fails a test.
POINTS: Final[dict[str, tuple[str, ...]]] = {
    "client": ("submit checked", "submit staging", "submit staged", *_around(("commit", "cancel", "requeue"), _CALLED)),
    "supervisor": (
        "part started", "server ready", "connection written", "journal read", "journal written", "journal synced",
        "journal trimmed", "part ended", "worker swept", "loss announced",
    ),
    "dispatcher": (
        "term taken", "nodes asked", "events taken", *_around(("heads", "claim", "release_dependents", "count_vanished",
        "drop_idle_classes", "trim", "guarded_write", "complete", "deregister", "cancel", "read_rq", "route_rq",
        "part_rq", "enqueue_due", "free_rate_slots", "cancel_orphans"), _CALLED),
    ),
    "worker": (
        "inbox read", "launch sent", "end received", *_around(("register", "deregister"), _CALLED),
        *_around(("complete", "report_started", "return_unstarted", "heartbeat", "guarded_write", "send",
        "inbox trim"), _POSTED),
    ),
    "launcher": ("launch received", "begun sent", "spawned", "tracked", "reaped", "collected", "reported"),
}  # fmt: skip


class Fault(msgspec.Struct, omit_defaults=True):
    """What a process suffers at a point: ``{"kind": "delay", "seconds": 0.5}``.

    ``kind``: kill, stop, delay (``seconds``), lose (the reply just awaited never comes). ``pid`` is the process that a
    kill or stop is done to; 0 is the one that has reached the point. ``nth``: the fault strikes when one process
    reaches the point for the nth time. ``token`` distinguishes one arming of a point from the next.
    """

    kind: str
    pid: int = 0
    nth: int = 1
    seconds: float = 0.0
    token: str = ""


def hit(point: str) -> None:
    """A process has reached this point of its role."""


class _Armed:
    """What `hit` is where PILOTQ_FAILPOINTS is set."""

    def __init__(self, folder: str) -> None:
        command = " ".join(sys.orig_argv)
        role = next((r for r in ROLES if f"pilotq {r}" in command or f"pilotq.workers.{r}.{r}" in command), "client")
        self._prefix = os.path.join(folder, role)
        self._seen: set[str] = set()
        self._counts: dict[tuple[str, str], int] = {}  # (point, token) -> how often it was reached

    def __call__(self, point: str) -> None:
        path = f"{self._prefix}.{point}"
        if point not in self._seen:
            self._seen.add(point)
            os.close(os.open(f"{path}.seen", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        try:
            with open(path, "rb") as file:
                fault = msgspec.json.decode(file.read(), type=Fault)
            count = self._counts[point, fault.token] = self._counts.get((point, fault.token), 0) + 1
            if count < fault.nth:
                return
            os.rename(path, f"{path}.struck")
        except FileNotFoundError:
            return  # not armed, or another process was first
        _suffer(fault, f"{path}.fired")


def _suffer(fault: Fault, record: str) -> None:
    with open(f"{record}.new", "w") as file:
        file.write(str(fault.pid or os.getpid()))
    os.rename(f"{record}.new", record)
    if fault.kind == "lose":
        raise ServerUnavailable("the reply was lost")
    if fault.kind == "delay":
        time.sleep(fault.seconds)
    else:
        os.kill(fault.pid or os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


if os.environ.get("PILOTQ_FAILPOINTS"):
    hit = _Armed(os.environ["PILOTQ_FAILPOINTS"])
