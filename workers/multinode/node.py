"""Takes part in tasks over several nodes: as the first node of some, with processes for others.

What happens on one node alone is in execution/node.py, which calls these hooks; here is where the two meet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Gone, RemoteEnded, StartRemote, StopRemote, Sweep, Swept, ToWorker
from pilotq.broker.store.resources import NodeInfo
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.hooks import NodeActions
from pilotq.workers.execution.launch_builder import LaunchBuilder
from pilotq.workers.execution.launcher_pool import LauncherPool
from pilotq.workers.memory_watch import WatchedTask
from pilotq.workers.multinode.launch_models import ParallelLaunchModel
from pilotq.workers.multinode.peer import RemoteProcesses
from pilotq.workers.multinode.primary import PrimaryNode
from pilotq.workers.protocol import FromLauncher
from pilotq.workers.session import Session


class MultinodeHooks:
    """Implements the hooks of ``node`` for tasks over several nodes.

    ``real`` maps its core numbers to CPU numbers where they differ.
    """

    def __init__(
        self, node: NodeActions, session: Session, launchers: LauncherPool, builder: LaunchBuilder, directory: str,
        info: NodeInfo, real: Mapping[int, int], settings: Settings,
    ) -> None:  # fmt: skip
        self._session = session
        self._address = info.address
        self._to_self: deque[ToWorker] = deque()
        virtual = info.name != info.host.partition(".")[0]
        self._remote_processes = RemoteProcesses(
            self._address, directory, launchers, builder, self._send, settings, node, virtual=virtual
        )  # fmt: skip
        self._primary = PrimaryNode(session, self._address, settings, self._send, node, node.memory_of)
        builder.launch_model = ParallelLaunchModel(
            session, directory, info, real, self._primary.add, node.beside
        )  # fmt: skip

    def _send(self, address: str, message: ToWorker) -> None:
        if address == self._address:
            self._to_self.append(message)
        elif address:
            self._session.send(address, message)
        elif isinstance(message, Swept):
            self._session.post_event(message)

    @property
    def busy(self) -> bool:
        return len(self._remote_processes) > 0

    def receive(self, message: ToWorker, now: float) -> None:
        if isinstance(message, StartRemote):
            self._remote_processes.start(message)
        elif isinstance(message, StopRemote):
            self._remote_processes.stop(message, now)
        elif isinstance(message, Sweep):
            self._remote_processes.sweep(message, now)
        elif isinstance(message, RemoteEnded):
            self._primary.remote_ended(message)
        elif isinstance(message, Swept):
            self._primary.swept(message)
        elif isinstance(message, Gone):
            self._primary.node_lost(message.address, clean=message.clean)

    def receive_record(self, record: FromLauncher) -> bool:
        return self._remote_processes.receive_record(record)

    def over_limit(self, task: WatchedTask, why: str, now: float) -> None:
        self._remote_processes.over_limit(task, why, now)

    def filenos(self) -> list[int]:
        return self._primary.filenos()

    def serve(self, ready: set[int]) -> None:
        self._primary.serve(ready)

    def next(self) -> float | None:
        moments = [self._remote_processes.next(), self._primary.next(), 0.0 if self._to_self else None]
        return min((m for m in moments if m is not None), default=None)

    def tick(self, now: float) -> None:
        for address, message in self._session.undelivered():
            self._primary.undelivered(address, message)
        self._remote_processes.tick(now)
        self._primary.tick(now)
        while self._to_self:
            self.receive(self._to_self.popleft(), now)

    def leave(self, grace: float, now: float) -> None:
        self._remote_processes.leave(grace, now)

    def launcher_ended(self, number: int) -> None:
        self._remote_processes.launcher_ended(number)

    def remote_executions(self) -> list[tuple[str, str]]:
        return self._remote_processes.executions()

    # -- the end of an execution of this node ----------------------------------------------------------------------

    def killing(self, e: Execution) -> None:
        self._primary.killing(e)

    def defer_end(self, e: Execution, ended: float, now: float) -> bool:
        return self._primary.defer_end(e, ended, now)

    def unconfirmed(self, e: Execution) -> str:
        return self._primary.unconfirmed(e)

    def keep_reserved(self, e: Execution, allocation: str) -> None:
        self._primary.keep_reserved(e, allocation)

    def may_go_on(self, e: Execution) -> bool:
        return self._primary.may_go_on(e)

    def forget(self, e: Execution) -> None:
        self._primary.forget(e)

    def close(self) -> None:
        self._primary.close()
        self._remote_processes.close()
