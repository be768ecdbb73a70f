"""Defines the state of one execution on a node, from its arrival to its end; pure data.

    PREFETCHED ──► WAITING ──► LAUNCHING ──► RUNNING ──► (NOTICED) ──► ENDING ──► KILLED
    (no slot)      (a slot)        ▲            │      (own signal) (SIGTERM sent) (SIGKILL sent)
      ◄─────────► CHAINED ─────────┘            └── ends by itself
         (behind another)

An execution is forgotten when nothing of it lives any more.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from pilotq.broker.store.messages import Run
from pilotq.broker.store.resources import parse_allocation
from pilotq.broker.tasks.spec import Spec
from pilotq.workers.memory_watch import WatchedTask
from pilotq.workers.protocol import Exited, Returned


class Phase(Enum):
    """How far an execution has come."""

    PREFETCHED = "prefetched"  # without a slot
    CHAINED = "chained"  # the launcher starts it when the one before it on its slot has ended
    WAITING = "waiting"  # has a slot, is not launched yet
    LAUNCHING = "launching"  # sent to the launcher, not confirmed yet
    RUNNING = "running"
    NOTICED = "noticed"  # a signal of the user's choice has announced its end
    ENDING = "ending"  # SIGTERM was sent, or its main process has ended
    KILLED = "killed"  # SIGKILL was sent
    SWEPT = "swept"  # nothing of it lives here; other nodes are to confirm the same


UNSTARTED = (Phase.PREFETCHED, Phase.CHAINED, Phase.WAITING)


class Action(Enum):
    """What is to be done with an execution when its deadline has come or its end is requested."""

    ANNOUNCE = "announce"  # it lives longer than a moment: report its start
    RETRACT = "retract"  # take it from its chain, unless it has been started
    NOTICE = "notice"
    TERM = "term"
    KILL = "kill"
    HANGS = "hangs"  # its launch, or its retraction, was not confirmed in time
    UNKILLABLE = "unkillable"


class HeldBack(NamedTuple):
    """A shortage that prevents a launch; times are monotonic."""

    since: float
    tried: float  # the last time
    message: str


class Execution:
    """Holds what the worker knows of one execution. ``key`` names it on this node, ``slot`` 0 means none."""

    __slots__ = (
        "began", "key", "run", "phase", "slot", "allocation", "launcher", "limit", "limit_at", "grace", "unkillable_at",
        "reason", "outcome", "message", "pid", "started", "exited", "stdout", "stderr", "suffix", "live_outputs",
        "launch_begun", "to_retract", "spec", "function", "held_back", "leased", "memory", "peak",
    )  # fmt: skip

    def __init__(self, key: int, run: Run) -> None:
        self.key = key
        self.run = run
        self.phase = Phase.WAITING if run.slot else Phase.PREFETCHED
        self.slot = run.slot
        self.allocation = run.allocation
        self.launcher = 0  # number of the launcher that it was sent to
        self.limit = 0.0  # seconds it may run, 0 = no limit
        self.limit_at = 0.0  # monotonic
        self.grace = 0.0  # seconds, when it is to be ended as soon as it has started
        self.unkillable_at = 0.0  # monotonic: when it counts as unkillable
        self.reason = ""  # why the worker ends it; of states.REASONS
        self.outcome = ""  # where the reason alone does not decide what becomes of the task
        self.message = ""
        self.pid = 0  # of its main process, once it has started
        self.started = 0.0  # unix seconds, 0 = never
        self.began = 0.0  # the same moment by the monotonic clock
        self.exited: Exited | Returned | None = None
        self.function = False  # it is a call, which an interpreter runs
        self.stdout = b""  # files named by the user
        self.stderr = b""
        self.suffix = ""  # of these files until the execution counts
        self.live_outputs = (b"", b"")  # where both outputs can be read while it runs
        self.launch_begun = False  # the launcher has begun to start it
        self.to_retract = False  # to be returned to the dispatcher as soon as its launcher has retracted it
        self.spec: Spec | None = None  # its description, once its launch was built
        self.leased = run.lease >= 0  # the server has no record of it
        self.memory: WatchedTask | None = None  # what it uses, while it runs
        self.peak = 0  # bytes that it has used on any other node at most
        self.held_back: HeldBack | None = None  # while a shortage prevents its launch

    @property
    def first_core(self) -> int:
        return parse_allocation(self.allocation)[0].cores[0]

    @property
    def launched(self) -> bool:
        """A launcher knows of it."""
        return self.phase is not Phase.PREFETCHED and self.phase is not Phase.WAITING
