"""Named points of every transition, at which a test may strike the process that has come to them.

In production ``at`` does nothing. Where PILOTQ_POINTS names a folder, a file ``<role>.<point>`` in it arms that point:
the first process to come there takes the file away and suffers what it says (`Fault`), after it has written to
``<role>.<point>.fired`` whose number that is. Points come to are noted in empty files ``<role>.<point>.seen``.

Around each script that is called and waited for stand ``<script>:before`` and ``<script>:after``; of scripts that a
worker posts ``:before``, ``:sent`` and ``:after``, which is before their answer is read.
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


# What the sweep of tests strikes at, one fault after the other; a point that is named nowhere else fails a test.
POINTS: Final[dict[str, tuple[str, ...]]] = {
    "client": ("submit checked", "submit staging", "submit staged", *_around(("commit", "cancel", "retry"), _CALLED)),
    "supervisor": (
        "part started", "server ready", "connection written", "journal read", "journal written", "journal synced",
        "journal trimmed", "part ended", "worker swept", "loss announced",
    ),
    "dispatcher": (
        "term taken", "nodes asked", "mail taken", *_around(("heads", "claim", "release", "settle", "tidy", "trim",
        "write", "end", "leave", "cancel", "inbound", "route", "due", "limits", "orphans"), _CALLED),
    ),
    "worker": (
        "inbox read", "launch told", "end heard", *_around(("register", "leave"), _CALLED),
        *_around(("end", "launched", "give_back", "beat", "write", "tell", "inbox trim"), _POSTED),
    ),
    "launcher": ("launch received", "begun said", "spawned", "born", "reaped", "collected", "reported"),
}  # fmt: skip


class Fault(msgspec.Struct, omit_defaults=True):
    """``kind``: kill, stop, delay (``seconds``), lose (the reply just awaited never comes). ``pid`` is who suffers a
    kill or stop; 0 is the process itself. ``nth``: at the nth time that one process comes to the step."""

    kind: str
    pid: int = 0
    nth: int = 1
    seconds: float = 0.0
    token: str = ""  # tells one arming of a step from the next


def at(step: str) -> None:
    """A process has come to this step of its role."""


class _Armed:
    """What ``at`` is where PILOTQ_POINTS is set."""

    def __init__(self, folder: str) -> None:
        words = " ".join(sys.orig_argv)
        role = next((r for r in ROLES if f"pilotq {r}" in words or f"pilotq.workers.{r}.{r}" in words), "client")
        self._prefix = os.path.join(folder, role)
        self._seen: set[str] = set()
        self._times: dict[tuple[str, str], int] = {}

    def __call__(self, step: str) -> None:
        path = f"{self._prefix}.{step}"
        if step not in self._seen:
            self._seen.add(step)
            os.close(os.open(f"{path}.seen", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        try:
            with open(path, "rb") as file:
                fault = msgspec.json.decode(file.read(), type=Fault)
            times = self._times[step, fault.token] = self._times.get((step, fault.token), 0) + 1
            if times < fault.nth:
                return
            os.rename(path, f"{path}.struck")
        except FileNotFoundError:
            return  # not armed, or another process was first
        _suffer(fault, f"{path}.fired")


def _suffer(fault: Fault, note: str) -> None:
    with open(f"{note}.new", "w") as file:
        file.write(str(fault.pid or os.getpid()))
    os.rename(f"{note}.new", note)
    if fault.kind == "lose":
        raise ServerUnavailable("the reply was lost")
    if fault.kind == "delay":
        time.sleep(fault.seconds)
    else:
        os.kill(fault.pid or os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


if os.environ.get("PILOTQ_POINTS"):
    at = _Armed(os.environ["PILOTQ_POINTS"])
