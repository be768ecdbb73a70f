"""A node that takes part in executions over several nodes: as the host of some, as a guest's landlord for others.

What happens on one node alone is in node.py; here is where the two meet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import (
    Gone,
    Guest,
    GuestEnded,
    GuestStop,
    Leave,
    NodeInfo,
    NodeState,
    Pardon,
    Sweep,
    Swept,
    ToWorker,
)
from pilotq.workers.execution.escalation import Execution, Phase, Step
from pilotq.workers.execution.launcher_pool import Launcher, Launchers
from pilotq.workers.execution.node import Node
from pilotq.workers.execution.slots import Lane
from pilotq.workers.multinode.host import Joints
from pilotq.workers.multinode.launch_models import Models
from pilotq.workers.multinode.peer import FIRST_KEY, Guests
from pilotq.workers.protocol import Up
from pilotq.workers.session import NodeLink


class JointNode(Node):
    def __init__(
        self, link: NodeLink, launchers: Launchers, directory: str, info: NodeInfo, real: Mapping[int, int],
        settings: Settings,
    ) -> None:  # fmt: skip
        super().__init__(link, launchers, directory, info, real, settings)
        self._address = info.address
        self._to_ourselves: deque[ToWorker] = deque()
        virtual = info.name != info.host.partition(".")[0]
        self._guests = Guests(
            self._address, directory, launchers, self._preparer, self._tell, settings, virtual=virtual
        )  # fmt: skip
        self._joints = Joints(link, self._address, settings, self._tell, self)
        self._preparer.dresser = Models(link, directory, self._address, real, self._joints.begin)

    def _tell(self, address: str, message: ToWorker) -> None:
        if address == self._address:
            self._to_ourselves.append(message)
        elif address:
            self._link.tell(address, message)
        elif isinstance(message, Swept):
            self._link.post_mail(message)

    # -- what is asked of this node --------------------------------------------------------------------------------

    def receive(self, message: ToWorker, now: float) -> None:
        if isinstance(message, Guest):
            self._guests.start(message)
        elif isinstance(message, GuestStop):
            self._guests.stop(message, now)
        elif isinstance(message, Sweep):
            self._guests.sweep(message, now)
        elif isinstance(message, GuestEnded):
            self._joints.guest_ended(message)
        elif isinstance(message, Swept):
            self._joints.swept(message)
        elif isinstance(message, Gone):
            self._joints.gone(message.address, clean=message.clean)
        elif isinstance(message, Pardon):
            self.outbox.doubts.pardon(fine=message.fine)
        else:
            super().receive(message, now)

    def filenos(self) -> list[int]:
        """Descriptors to wait on for reading; then call `serve`."""
        return self._joints.filenos()

    def serve(self, ready: set[int]) -> None:
        self._joints.serve(ready)

    def heard(self, record: Up, now: float) -> None:
        if record.key > FIRST_KEY:
            self._guests.heard(record)
        else:
            super().heard(record, now)

    @property
    def busy(self) -> bool:
        return super().busy or len(self._guests) > 0

    def leave(self, word: Leave, now: float) -> None:
        super().leave(word, now)
        self._guests.leave(word.grace, now)

    def _abandon(self, launcher: Launcher, now: float, *, dead: bool) -> None:
        super()._abandon(launcher, now, dead=dead)
        self._guests.launcher_ended(launcher.number)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        moments = [super().next(), self._guests.next(), self._joints.next(), 0.0 if self._to_ourselves else None]
        return min((m for m in moments if m is not None), default=None)

    def tick(self, now: float) -> None:
        super().tick(now)
        for address, message in self._link.undelivered():
            self._joints.undelivered(address, message)
        self._guests.tick(now)
        self._joints.tick(now)
        while self._to_ourselves:
            self.receive(self._to_ourselves.popleft(), now)

    def _state(self, term: int) -> NodeState:
        state = super()._state(term)
        state.guests = self._guests.held()
        return state

    # -- what this node is the host of -----------------------------------------------------------------------------

    def stop_joint(self, e: Execution, reason: str) -> None:
        self._stop(e, reason, self._settings.kill_grace_s, time.monotonic())

    def finish_joint(self, e: Execution, ended: float) -> None:
        self._end(e, ended, time.monotonic())

    def free_lane(self, number: int) -> None:
        self._lanes.free(number)

    def _do(self, e: Execution, step: Step | None, now: float) -> None:
        if step is Step.KILL:
            self._joints.kill(e)
        super()._do(e, step, now)

    def _end(self, e: Execution, ended: float, now: float) -> None:
        if self._joints.ending(e, ended, now):
            if e.key in self._ladder.executions:
                self._ladder.ended(e)
                if (launcher := self._launchers.living.get(e.launcher)) is not None:
                    self._launchers.dismiss(launcher)
            e.phase = Phase.SWEPT
            return
        rest = self._joints.withheld(e)
        if rest:
            e.message = f"{e.message} {rest} stays taken: its end was not confirmed there.".strip()
            self._lanes.shrink(e, rest)
            self._report(e, ended, None, now)
            self._joints.withhold(e, rest)
        else:
            super()._end(e, ended, now)
        self._joints.forget(e)

    def _goes_on(self, e: Execution) -> bool:
        return super()._goes_on(e) and self._joints.goes_on(e)

    def _line_up(self, lane: Lane, now: float) -> None:
        # Between two executions over several nodes all of these must have been swept.
        if "]," not in lane.allocation:
            super()._line_up(lane, now)

    def _give_back(self, tasks: list[Execution], asked: str = "") -> None:
        super()._give_back(tasks, asked)
        for e in tasks:
            self._joints.forget(e)

    def close(self) -> None:
        self._joints.close()
        self._guests.close()
