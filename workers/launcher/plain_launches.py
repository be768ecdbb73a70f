"""Leaves plain launches to the native part (`workers/launcher/native/`), and takes over what is more than that.

It is the launcher's loop as long as only plain launches are concerned: it reads their messages, starts and reaps their
processes, and reports. All else is the launcher's, in Python, and so is a launch that lives longer than a moment,
leaves a process, writes much or cannot be started: its whole chain is handed over. What waits in a chain goes back to
the native part when a launch of it has ended. docs/design/0011-native-launcher.md has the reasons.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.launcher_kind import native_module
from pilotq.workers.launcher.capture import Capture, PoolFile
from pilotq.workers.launcher.chain import Chain
from pilotq.workers.launcher.spawn import CONTEXTS_MAX, LaunchContext, Spawner, find_limits
from pilotq.workers.process_tree import ProcessTracker
from pilotq.workers.protocol import Launch, ToLauncher

CPUS_MAX = 1 << 16  # numbers of CPUs are below
MASK_BYTES = 128  # of a set of CPUs: of 1,024 at least, as the C library has it
_encode = msgspec.msgpack.Encoder().encode
_decode_launch = msgspec.msgpack.Decoder(Launch).decode
_Item = tuple[bytes, LaunchContext]  # a message, and the context of its launch
_Head = tuple[_Item, int, PoolFile | None, PoolFile | None, float, float, float]
_End = tuple[int, int, float, int, int]  # of a ChildEnd
_Taken = tuple[list[_Item], _Head | None, _End | None]


class ChildEnd(NamedTuple):
    """A child that was waited for. ``max_rss`` is in KiB, as the kernel has it, ``faults`` counts page faults."""

    pid: int
    status: int
    cpu: float
    max_rss: int
    faults: int


class TakenLaunch(NamedTuple):
    """A launch that the native part has started. ``began`` is monotonic, the others are of just after that."""

    launch: Launch
    context: LaunchContext
    pid: int
    files: tuple[PoolFile | None, PoolFile | None]
    began: float
    since: float
    started: float


class Events(NamedTuple):
    """What the launcher is to do."""

    messages: list[ToLauncher]
    ready: list[int]  # descriptors
    ends: list[ChildEnd]
    unsent: bytes  # the rest of a frame that the report pipe did not take
    closed: bool  # nobody sends any more


class PlainLaunches:
    """The launches that the native part has. ``chains`` are those of the launcher, by key.

    ``take_over(chain, running)`` is called with each chain that is handed over, and the launch of it that runs.
    """

    def __init__(
        self, pipes: tuple[int, int, int], poll: int, children: int, chains: dict[int, Chain], capture: Capture,
        spawner: Spawner, tracker: ProcessTracker, take_over: Callable[[Chain, TakenLaunch | None], None],
    ) -> None:  # fmt: skip
        native = native_module()
        down, up, wake = pipes
        hit = failpoints.hit if os.environ.get("PILOTQ_FAILPOINTS") else None
        own_cpus = _mask(spawner.all_cpus)
        self._core = native.Core(
            down, up, wake, poll, children, spawner.null, own_cpus, chains, tracker.mains, capture.take,
            capture.release, hit
        )  # fmt: skip
        self._new_context = native.Context
        self._spawner = spawner
        self._take_over = take_over
        self._decode = msgspec.msgpack.Decoder(ToLauncher).decode
        self._added: dict[bytes, LaunchContext] = {}  # the contexts that the native part has
        tracker.before_assigning = self.take_running

    def run(self, pause: float, *, may_start: bool) -> Events:
        """Serve until there is something for the launcher, at most for ``pause`` seconds (-1: for ever)."""
        until = time.monotonic() + pause if pause >= 0 else -1.0
        messages, ready, ends, taken, unsent, closed = self._core.run(until, may_start)
        ended = self._hand_over(taken)
        return Events(
            [self._decode(message) for message in messages or ()],
            ready or [],
            ended + [ChildEnd(*end) for end in ends or ()],
            unsent or b"",
            closed,
        )

    def take(self, key: int) -> None:
        """Take over the chain of a launch, if the native part has it."""
        self._hand_over(self._core.take(key))

    def take_running(self) -> None:
        """Take over all chains of which a launch runs."""
        self._hand_over(self._core.take_running())

    def adopt(self, chain: Chain, chains: dict[int, Chain]) -> bool:
        """Leave a chain to the native part, if that can start all of it."""
        if chain.interpreter or chain.handed_over:
            return False
        items = []
        for launch, context in chain:
            if not isinstance(launch, Launch) or context is None or not self._add_context(launch, context):
                return False
            items.append((_encode(launch), context))
        if not self._core.adopt(items):
            return False
        while chain:
            del chains[chain.popleft()[0].key]
        return True

    def _add_context(self, launch: Launch, context: LaunchContext) -> bool:
        """Have the native part know the context of a launch; False when its launches are not plain."""
        name = f"{launch.base}\0{launch.slot}".encode()
        if self._added.get(name) is context:
            return True
        cpus = context.cpus or self._spawner.all_cpus
        if self._spawner.context(launch) is not context or context.files or not 0 <= min(cpus) <= max(cpus) < CPUS_MAX:
            return False
        if len(self._added) >= CONTEXTS_MAX:
            self._added.clear()
            self._core.forget_contexts()
        try:
            variables = [_variable(*pair) for pair in context.env.items()]
            limits = context.limits if context.requested_limits is None else find_limits(context.requested_limits)[0]
            self._core.add_context(name, self._new_context(context, variables, _mask(cpus), context.umask, limits))
        except (ValueError, OverflowError):
            return False  # one that is wrong: each launch is refused with a sentence
        self._added[name] = context
        return True

    def forget(self) -> None:
        """No later launch names any of the contexts; the native part has seen the message itself."""
        self._added.clear()

    def _hand_over(self, taken: list[_Taken] | None) -> list[ChildEnd]:
        """Hand chains over; the ends of those of their launches that have ended, and were waited for."""
        ended = []
        for waiting, head, end in taken or ():
            running = None
            if head is not None:
                (message, context), pid, out, err, began, since, started = head
                running = TakenLaunch(_decode_launch(message), context, pid, (out, err), began, since, started)
            if end is not None:
                ended.append(ChildEnd(*end))
            chain = Chain()
            chain.extend((_decode_launch(message), context) for message, context in waiting)
            self._take_over(chain, running)
        return ended


def _mask(cpus: list[int]) -> bytes:
    """A set of CPUs as the kernel has it."""
    mask = bytearray(max(MASK_BYTES, (max(cpus) // 64 + 1) * 8))
    for cpu in cpus:
        mask[cpu // 8] |= 1 << cpu % 8
    return bytes(mask)


def _variable(name: bytes, value: bytes) -> bytes:
    """An environment variable as the system has it; raises ValueError for what cannot be one."""
    if not name or b"=" in name or b"\0" in name + value:
        raise ValueError("no environment variable")
    return name + b"=" + value
